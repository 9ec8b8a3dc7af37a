//! The secrets of a local cluster: made once per state directory, kept in files that only their owner reads.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use super::{LocalError, io_error, process::private_directory};

/// Bytes of randomness in a secret.
const SECRET_BYTES: usize = 32;

/// The files that hold the secrets of one site.
#[derive(Debug, Clone)]
pub(crate) struct SiteTokens {
    /// Whoever calls a node.
    pub(crate) node: PathBuf,
    /// Whoever calls a router.
    pub(crate) router: PathBuf,
    /// Whoever calls a coordinator.
    pub(crate) coordinator: PathBuf,
    /// What the other site's replicator sends to this site's geo-receiver.
    pub(crate) hook: PathBuf,
}

impl SiteTokens {
    /// Finds the files below `directory`, and makes those that are missing.
    pub(crate) fn prepare(directory: &Path, site: &str) -> Result<Self, LocalError> {
        let make = || -> io::Result<Self> {
            private_directory(directory)?;
            let file = |name: &str| secret_file(directory, &format!("{site}-{name}"));
            Ok(Self {
                node: file("node")?,
                router: file("router")?,
                coordinator: file("coordinator")?,
                hook: file("hook")?,
            })
        };
        make().map_err(io_error(format!("cannot keep secrets in {}", directory.display())))
    }
}

fn secret_file(directory: &Path, name: &str) -> io::Result<PathBuf> {
    let path = directory.join(name);
    if fs::metadata(&path).is_ok_and(|metadata| metadata.len() > 0) {
        return Ok(path);
    }
    let secret: [u8; SECRET_BYTES] = rand::random();
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
    writeln!(file, "{}", hex::encode(secret))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn secrets_are_private_differ_and_stay() {
        let directory = tempfile::tempdir().unwrap();
        let tokens = SiteTokens::prepare(directory.path(), "home").unwrap();
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        let node = read(&tokens.node);
        assert_eq!(node.trim().len(), 64);
        assert_ne!(node, read(&tokens.router));
        assert_eq!(fs::metadata(&tokens.node).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(&SiteTokens::prepare(directory.path(), "home").unwrap().node), node);
    }
}
