//! Other storages, as the caller's `gitaly-servers` metadata says how to reach them (wire reference, section f), and the
//! fetch from one of them.

use std::{collections::HashMap, path::Path, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost::Message as _;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tabularium_common::{
    auth::SendToken,
    grpc::{self, Address},
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tabularium_proto::gitaly;
use tonic::{
    Extensions, Request, Status,
    metadata::MetadataMap,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use crate::{
    error::GitError,
    fetch_proxy,
    git::{Git, GitCommand, Output},
    node::Node,
    storage::RepositoryPath,
};

/// Metadata key of the list of storages.
const SERVERS: &str = "gitaly-servers";
/// How long one small question to another node may take.
pub(crate) const QUESTION_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
struct Server {
    address: String,
    #[serde(default)]
    token: String,
}

/// What a call says of the storages that it may have to reach; they are looked for when they are needed.
pub(crate) struct Peers {
    metadata: MetadataMap,
    extensions: Extensions,
}

impl Peers {
    /// Of a call's metadata and extensions.
    pub(crate) fn of(metadata: MetadataMap, extensions: Extensions) -> Self {
        Self { metadata, extensions }
    }

    /// Where a storage is.
    pub(crate) fn find(&self, storage: &str) -> Result<Peer, Status> {
        Peer::find(&self.metadata, &self.extensions, storage)
    }
}

/// A storage on another node, or behind a router.
pub(crate) struct Peer {
    address: Address,
    token: Option<SecretString>,
    correlation_id: CorrelationId,
}

/// Signs calls and passes the correlation id on.
#[derive(Clone)]
pub(crate) struct Outgoing {
    token: SendToken,
    correlation_id: CorrelationId,
}

impl Interceptor for Outgoing {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let mut request = self.token.call(request)?;
        if let Ok(id) = self.correlation_id.as_str().parse() {
            request.metadata_mut().insert(CORRELATION_ID, id);
        }
        Ok(request)
    }
}

impl Peer {
    /// Finds `storage` in the metadata of a call.
    pub(crate) fn find(
        metadata: &MetadataMap,
        extensions: &Extensions,
        storage: &str,
    ) -> Result<Self, Status> {
        let bad = |why: &str| Status::invalid_argument(format!("{SERVERS} metadata: {why}"));
        let encoded = metadata.get(SERVERS).ok_or_else(|| Status::internal("empty metadata"))?;
        let json = STANDARD.decode(encoded.as_bytes()).map_err(|_| bad("not base64"))?;
        let mut servers: HashMap<String, Server> =
            serde_json::from_slice(&json).map_err(|_| bad("not a JSON object of address and token"))?;
        let server = servers.remove(storage).ok_or_else(|| Status::internal("storage name not found"))?;
        let address = server.address.parse().map_err(|error| bad(&format!("address: {error}")))?;
        let token = (!server.token.is_empty()).then(|| SecretString::from(server.token));
        let correlation_id = extensions.get::<CorrelationId>().cloned().unwrap_or_default();
        Ok(Self { address, token, correlation_id })
    }

    /// What clients of its services are made from.
    pub(crate) fn channel(&self) -> InterceptedService<Channel, Outgoing> {
        let outgoing =
            Outgoing { token: SendToken(self.token.clone()), correlation_id: self.correlation_id.clone() };
        InterceptedService::new(grpc::channel(&self.address), outgoing)
    }

    /// `git fetch` from `source` on this storage into `target`: objects and `refspecs`, nothing else.
    pub(crate) async fn fetch(
        &self,
        node: &Node,
        git: &Git,
        target: &RepositoryPath,
        source: &gitaly::Repository,
        refspecs: &[&str],
        hidden_refs: bool,
    ) -> Result<(), GitError> {
        let command = || {
            let mut command = git
                .command(target, "fetch")
                .config("fetch.negotiationAlgorithm=skipping")
                .config("fetch.fsckObjects=false")
                .config("fetch.recurseSubmodules=false")
                .env("GIT_ALLOW_PROTOCOL", "ssh")
                .env("GIT_SSH_VARIANT", "simple")
                .env("GIT_SSH_COMMAND", proxy_command(node))
                .env(fetch_proxy::ADDRESS, self.address.to_string())
                .env(fetch_proxy::REPOSITORY, STANDARD.encode(source.encode_to_vec()))
                .env(fetch_proxy::REFS, if hidden_refs { "all" } else { "visible" })
                .env(fetch_proxy::CORRELATION, self.correlation_id.as_str())
                .args(["--quiet", "--prune", "--force", "--no-tags", "--no-write-fetch-head"]);
            if let Some(token) = &self.token {
                command = command.env(fetch_proxy::TOKEN, token.expose_secret());
            }
            node.tls
                .environment()
                .into_iter()
                .fold(command, |command, (name, value)| command.env(name, value))
        };
        fetch_atomically(command, "ssh://gitaly/internal.git", refspecs)
            .await
            .and_then(|output| output.checked().map(drop))
    }
}

fn proxy_command(node: &Node) -> String {
    format!("{} fetch-proxy", quoted(&node.fetch_proxy))
}

/// A program for the shell through which git starts it.
pub(crate) fn quoted(program: &Path) -> String {
    format!("'{}'", program.as_os_str().to_string_lossy().replace('\'', r"'\''"))
}

/// Fetches in one ref transaction. One transaction cannot remove `a` and create `a/b`; when that is what it takes, the
/// pruning goes first and the rest ref by ref.
pub(crate) async fn fetch_atomically(
    command: impl Fn() -> GitCommand,
    remote: &str,
    refspecs: &[&str],
) -> Result<Output, GitError> {
    let atomic = command().arg("--atomic").arg(remote).args(refspecs).output().await?;
    if !is_directory_conflict(&atomic) {
        return Ok(atomic);
    }
    tracing::info!("a ref became a directory or the other way round; fetching ref by ref");
    command().arg(remote).args(refspecs).output().await
}

fn is_directory_conflict(output: &Output) -> bool {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let one = stderr.contains("cannot lock ref") && stderr.contains("; cannot create");
    let both = stderr.contains("cannot process") && stderr.contains("at the same time");
    !output.exit.success() && (one || both)
}

/// A request with the time a small question may take.
pub(crate) fn question<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(QUESTION_TIMEOUT);
    request
}
