//! What is checked and put in order before a node serves.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
};

use rustix::fs::{FlockOperation, flock};
use tabularium_common::lifecycle::Tasks;
use tokio::process::Command;

use crate::{
    backup::Backups,
    config::{BackupConfig, StorageConfig},
    hooks::{Hooks, Judges},
    server::ServerError,
    storage::{OWN_DIRECTORY, Storage},
    storage_health::{IDENTITY_FILE, Identity, read_identity},
    votes::Sections,
};

/// The oldest git whose options and protocol the node relies on.
const OLDEST_GIT: (u32, u32) = (2, 39);
/// What a new disk may hold already.
const NEW_DISK: [&str; 2] = [OWN_DIRECTORY, "lost+found"];
const CLAIM_FILE: &str = "node.lock";

/// Held open and locked as long as the node uses the storage.
pub(super) struct Claim {
    _file: File,
}

pub(super) struct Prepared {
    pub(super) storage: Storage,
    pub(super) claim: Claim,
}

/// Opens the place of backups, if there is one.
pub(super) fn backups(config: Option<&BackupConfig>) -> Result<Option<Backups>, ServerError> {
    let Some(config) = config else { return Ok(None) };
    // The configuration has been checked for that.
    let none = || ServerError::Backups(io::Error::other("not a directory"));
    let directory = config.directory().ok_or_else(none)?;
    Backups::open(directory).map(Some).map_err(ServerError::Backups)
}

/// Claims the storage for this process, gives it its id, and clears what earlier processes left half-done.
pub(super) fn storage(config: &StorageConfig, tasks: &Tasks) -> io::Result<Prepared> {
    let root = config.path.canonicalize()?;
    let own = root.join(OWN_DIRECTORY);
    fs::create_dir_all(own.join("tmp"))?;
    let claim = claim(&own)?;
    let storage = Storage { name: config.name.to_string(), filesystem_id: filesystem_id(&root)?, root };
    // The claim says that whoever made these is dead.
    let stale: Vec<_> = fs::read_dir(storage.temporary())?.collect::<Result<_, _>>()?;
    if !stale.is_empty() {
        tasks.spawn("temporary files", async move {
            let removed = tokio::task::spawn_blocking(move || {
                for entry in stale {
                    if let Err(error) = remove(&entry.path()) {
                        tracing::warn!(%error, path = %entry.path().display(), "stale temporary file stays");
                    }
                }
            });
            if let Err(error) = removed.await {
                tracing::warn!(%error, "removing stale temporary files");
            }
        });
    }
    Ok(Prepared { storage, claim })
}

/// Serves git's hooks from the first storage, which no other process uses.
pub(super) fn hooks(
    program: &Path,
    storages: &[Storage],
    judges: &Arc<Judges>,
    sections: &Arc<Sections>,
    tasks: &Tasks,
) -> Result<Hooks, ServerError> {
    let failed = |source| ServerError::Hooks { path: program.to_owned(), source };
    let place = storages.first().map(|storage| storage.root.join(OWN_DIRECTORY).join("run"));
    let place = place.ok_or_else(|| failed(io::Error::other("there is no storage to serve hooks from")))?;
    // Git looks for it from within repositories.
    let program = program.canonicalize().map_err(failed)?;
    let mode = program.metadata().map_err(failed)?.permissions().mode();
    if mode & 0o111 == 0 {
        return Err(failed(io::ErrorKind::PermissionDenied.into()));
    }
    Hooks::start(&place, &program, Arc::clone(judges), Arc::clone(sections), tasks).map_err(failed)
}

fn remove(path: &Path) -> io::Result<()> {
    if path.symlink_metadata()?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

fn claim(own: &Path) -> io::Result<Claim> {
    let file = File::create(own.join(CLAIM_FILE))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
        if error == rustix::io::Errno::WOULDBLOCK {
            io::Error::new(io::ErrorKind::AddrInUse, "another node serves this directory")
        } else {
            error.into()
        }
    })?;
    Ok(Claim { _file: file })
}

/// The id by which clients tell whether two storages are the same file system (wire reference, section b.9), and
/// coordinators whether a storage is still the one they know. Made on an empty disk only: data whose identity is lost may
/// be anybody's, and a new one would hide that.
fn filesystem_id(root: &Path) -> io::Result<String> {
    match read_identity(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        read => return read,
    }
    for entry in fs::read_dir(root)? {
        let name = entry?.file_name();
        if !NEW_DISK.iter().any(|known| name == *known) {
            return Err(io::Error::other(format!(
                "it holds data ({}) and no identity file {IDENTITY_FILE}: restore that file, or empty the directory",
                name.to_string_lossy()
            )));
        }
    }
    let identity = Identity { gitaly_filesystem_id: uuid::Uuid::new_v4().to_string() };
    let mut file = tempfile::NamedTempFile::new_in(root.join(OWN_DIRECTORY).join("tmp"))?;
    file.write_all(&serde_json::to_vec(&identity).map_err(io::Error::other)?)?;
    file.as_file().sync_all()?;
    file.persist(root.join(IDENTITY_FILE))?;
    File::open(root)?.sync_all()?;
    Ok(identity.gitaly_filesystem_id)
}

/// Where the program is. By its whole path it is started without a copy of the node's address space being made first,
/// which is what the standard library does for a program that it has to look for in a changed `PATH`.
pub(super) fn find_git(git: &Path, search_path: &OsStr) -> PathBuf {
    if git.components().count() > 1 {
        return git.to_owned();
    }
    let runnable = |path: &PathBuf| {
        path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    // What is not found is refused, with its reason, by whoever tries to start it.
    let found = std::env::split_paths(search_path).map(|directory| directory.join(git)).find(runnable);
    found.unwrap_or_else(|| git.to_owned())
}

/// The version of the git program, which must be new enough.
pub(super) async fn git_version(git: &Path, search_path: &OsStr) -> Result<String, ServerError> {
    let failed = |problem: String| ServerError::Git { path: git.to_owned(), problem };
    let output = Command::new(git)
        .arg("--version")
        .env_clear()
        .env("PATH", search_path)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| failed(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.trim().strip_prefix("git version ").unwrap_or_default();
    match parse_version(version) {
        Some(found) if found >= OLDEST_GIT => Ok(version.to_owned()),
        Some(_) => {
            Err(failed(format!("is version {version}; at least {}.{} is needed", OLDEST_GIT.0, OLDEST_GIT.1)))
        }
        None => Err(failed(format!("`--version` says {:?}", text.trim()))),
    }
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_distributions_are_read() {
        assert_eq!(parse_version("2.39.5"), Some((2, 39)));
        assert_eq!(parse_version("2.47.3 (Apple Git-1)"), Some((2, 47)));
        assert_eq!(parse_version("3.0.rc1"), Some((3, 0)));
        assert_eq!(parse_version("nonsense"), None);
    }

    #[tokio::test]
    async fn a_storage_keeps_its_id_and_serves_one_node() {
        let directory = tempfile::tempdir().unwrap();
        let config = StorageConfig { name: "a".parse().unwrap(), path: directory.path().to_owned() };
        let tasks = Tasks::new();
        let first = storage(&config, &tasks).unwrap();
        assert!(storage(&config, &tasks).is_err(), "a second node is refused");
        let id = first.storage.filesystem_id.clone();
        let stale = first.storage.temporary().join("half-done");
        fs::create_dir(&stale).unwrap();
        drop(first);
        assert_eq!(storage(&config, &tasks).unwrap().storage.filesystem_id, id);
        tasks.drain(std::time::Duration::from_secs(5)).await.unwrap();
        assert!(!stale.exists());
    }

    #[tokio::test]
    async fn data_without_its_identity_is_not_given_a_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let config = StorageConfig { name: "a".parse().unwrap(), path: directory.path().to_owned() };
        let tasks = Tasks::new();
        fs::create_dir(directory.path().join("lost+found")).unwrap();
        let first = storage(&config, &tasks).unwrap();
        drop(first);
        fs::create_dir(directory.path().join("@cluster")).unwrap();
        fs::remove_file(directory.path().join(IDENTITY_FILE)).unwrap();
        let refused = storage(&config, &tasks).err().unwrap().to_string();
        assert!(refused.contains("@cluster") && refused.contains(IDENTITY_FILE), "{refused}");
    }
}
