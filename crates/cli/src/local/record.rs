//! `cluster.json`: where everything of a running local cluster is, for the other commands and for people.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    service::Kind,
    transport::{TlsFiles, base_url},
};

/// The file's name in the state directory.
pub const FILE_NAME: &str = "cluster.json";

/// A running local cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Process id of whoever runs it.
    pub supervisor_pid: u32,
    /// The home site first.
    pub sites: Vec<SiteRecord>,
    /// What its clients need, when it speaks TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
}

/// One site of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteRecord {
    /// `home` or `mirror`.
    pub name: String,
    /// `postgres://…`, without a password.
    pub database_url: String,
    /// `nats://…`.
    pub nats_url: String,
    /// File with the secret for calls to nodes.
    pub node_token_file: PathBuf,
    /// File with the secret for calls to routers.
    pub router_token_file: PathBuf,
    /// File with the secret for calls to coordinators.
    pub coordinator_token_file: PathBuf,
    /// Every process.
    pub processes: Vec<ProcessRecord>,
}

/// One process of a site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// `home/node-1`.
    pub name: String,
    /// Which service.
    pub kind: Kind,
    /// Process id.
    pub pid: u32,
    /// `tcp://host:port`, `tls://host:port` or `unix:/path`.
    pub grpc: Option<String>,
    /// `host:port` or `https://host:port`.
    pub http: Option<String>,
    /// Where `/metrics`, `/live` and `/ready` are: `host:port` or, at a coordinator, as `http`.
    pub admin: Option<String>,
    /// The program file.
    pub program: PathBuf,
    /// Its configuration file.
    pub config: PathBuf,
    /// Its log.
    pub log: PathBuf,
    /// A node's storage directory.
    pub storage: Option<PathBuf>,
}

impl ClusterRecord {
    /// Reads the record of the cluster in `state`; `None` when none is running there.
    pub fn read(state: &Path) -> io::Result<Option<Self>> {
        match fs::read(state.join(FILE_NAME)) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes it in one step.
    pub fn write(&self, state: &Path) -> io::Result<()> {
        let temporary = state.join(format!("{FILE_NAME}.tmp"));
        fs::write(&temporary, serde_json::to_vec_pretty(self).map_err(io::Error::other)?)?;
        fs::rename(temporary, state.join(FILE_NAME))
    }

    /// The site of that name.
    pub fn site(&self, name: &str) -> Option<&SiteRecord> {
        self.sites.iter().find(|site| site.name == name)
    }
}

impl SiteRecord {
    /// Its processes of one kind, in order.
    pub fn of(&self, kind: Kind) -> impl Iterator<Item = &ProcessRecord> {
        self.processes.iter().filter(move |process| process.kind == kind)
    }

    /// gRPC addresses of one kind, in order.
    pub fn grpc(&self, kind: Kind) -> Vec<String> {
        self.of(kind).filter_map(|process| process.grpc.clone()).collect()
    }

    /// `http://host:port` or `https://host:port` of one kind, in order.
    pub fn urls(&self, kind: Kind) -> Vec<String> {
        self.of(kind).filter_map(|process| process.http.as_deref().map(base_url)).collect()
    }
}
