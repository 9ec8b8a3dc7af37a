//! Where a service listens, told to whoever started it.
//!
//! A service bound to port 0 gets its port from the kernel. `--announce FILE` makes it write the addresses there once
//! every listener is bound; a supervisor waits for the file instead of guessing a free port.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::grpc::Address;

/// The addresses of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// Process id.
    pub pid: u32,
    /// gRPC, as clients dial it: `tcp://host:port`, `tls://host:port` or `unix:/path`; the first of the addresses listened at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc: Option<String>,
    /// HTTP: `host:port`, `https://host:port` or `unix:/path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// Metrics, liveness and readiness, `host:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin: Option<String>,
}

impl Announcement {
    /// This process, no addresses yet.
    pub fn of_this_process() -> Self {
        Self { pid: std::process::id(), grpc: None, http: None, admin: None }
    }

    /// What [`Self::http`] says of an address.
    pub fn http_at(address: &Address) -> String {
        match address {
            Address::Tcp(host_port) => host_port.clone(),
            Address::Tls(host_port) => format!("https://{host_port}"),
            other => other.to_string(),
        }
    }

    /// Writes the file in one step: a reader sees all of it or nothing.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let temporary = path.with_extension(format!("{}.tmp", self.pid));
        fs::write(&temporary, serde_json::to_vec(self).map_err(io::Error::other)?)?;
        fs::rename(&temporary, path)
    }

    /// Reads the file; `None` while it is not there.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.json");
        assert_eq!(Announcement::read(&path).unwrap(), None);
        let mut announcement = Announcement::of_this_process();
        announcement.grpc = Some("tcp://127.0.0.1:1".into());
        announcement.write(&path).unwrap();
        assert_eq!(Announcement::read(&path).unwrap(), Some(announcement));
    }
}
