//! Storages, and how a `gitaly.Repository` becomes a path that is safe to use.
//!
//! Every RPC goes through [`Storages::open`] (the repository must be there) or [`Storages::locate`] (it need not). Both
//! answer paths below the storage's real directory only: `..`, absolute paths, symbolic links that lead out, and the
//! node's own directory are refused. The errors are those of the wire reference, section h.2.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Component, Path, PathBuf},
};

use sha1::{Digest as _, Sha1};
use tabularium_common::ids::{ParseIdError, RelativePath};
use tabularium_proto::gitaly;

use crate::error::RepositoryError;

/// The node's own directory in a storage (wire reference, section k.5).
pub(crate) const OWN_DIRECTORY: &str = "+gitaly";

/// Deepest nesting below a storage that is looked into.
pub(crate) const MAX_DEPTH: usize = 32;

/// A storage: a name and a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Storage {
    /// Physical storage name.
    pub(crate) name: String,
    /// Its directory, without symbolic links.
    pub(crate) root: PathBuf,
    /// Stable id of its file system (`.gitaly-metadata`).
    pub(crate) filesystem_id: String,
}

impl Storage {
    /// Where everything is built before it is moved into place; on the same file system.
    pub(crate) fn temporary(&self) -> PathBuf {
        self.root.join(OWN_DIRECTORY).join("tmp")
    }

    /// What is known of who borrows whose objects.
    pub(crate) fn pool_members(&self) -> PathBuf {
        self.root.join(OWN_DIRECTORY).join("pool-members")
    }
}

/// All storages of the node.
#[derive(Debug, Clone, Default)]
pub(crate) struct Storages(BTreeMap<String, Storage>);

/// Object directories of a push that has not been accepted yet, in which an RPC is to look (fields 4 and 5 of
/// `gitaly.Repository`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Quarantine {
    /// Absolute.
    pub(crate) object_directory: Option<PathBuf>,
    /// Absolute.
    pub(crate) alternates: Vec<PathBuf>,
}

/// A repository's checked place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RepositoryPath {
    /// Its storage.
    pub(crate) storage: Storage,
    /// Below the storage, normalised.
    pub(crate) relative_path: String,
    /// Absolute.
    pub(crate) path: PathBuf,
    /// Where else to look for objects.
    pub(crate) quarantine: Option<Quarantine>,
}

impl RepositoryPath {
    /// The same place with another directory in its stead: a repository that is still being built.
    pub(crate) fn elsewhere(&self, path: PathBuf) -> Self {
        Self { path, quarantine: None, ..self.clone() }
    }

    /// The file that whoever creates or removes the repository holds.
    pub(crate) fn lock_file(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".lock");
        name.into()
    }
}

impl Storages {
    /// From storages that have been checked at start-up.
    pub(crate) fn new(storages: impl IntoIterator<Item = Storage>) -> Self {
        Self(storages.into_iter().map(|storage| (storage.name.clone(), storage)).collect())
    }

    /// In the order of their names.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Storage> {
        self.0.values()
    }

    /// By name.
    pub(crate) fn get(&self, name: &str) -> Option<&Storage> {
        self.0.get(name)
    }

    /// Where the repository is or would be. Nothing needs to be there.
    pub(crate) fn locate(
        &self,
        repository: Option<&gitaly::Repository>,
    ) -> Result<RepositoryPath, RepositoryError> {
        let repository = repository.ok_or(RepositoryError::NotSet)?;
        match (repository.storage_name.as_str(), repository.relative_path.as_str()) {
            ("", "") => return Err(RepositoryError::NotSet),
            (_, "") => return Err(RepositoryError::PathNotSet),
            ("", _) => return Err(RepositoryError::StorageNotSet),
            _ => {}
        }
        let storage = self.get(&repository.storage_name).ok_or(RepositoryError::UnknownStorage)?;
        let relative: RelativePath = repository.relative_path.parse().map_err(|error| match error {
            ParseIdError::Escapes => RepositoryError::Escapes,
            ParseIdError::Empty => RepositoryError::PathNotSet,
            error @ (ParseIdError::TooLong { .. }
            | ParseIdError::Character { .. }
            | ParseIdError::Control) => RepositoryError::BadPath(error.to_string()),
        })?;
        let relative = relative.as_str();
        if relative == OWN_DIRECTORY || relative.starts_with("+gitaly/") {
            return Err(RepositoryError::Escapes);
        }
        let path = storage.root.join(relative);
        check_inside(&storage.root, &path)?;
        let mut located = RepositoryPath {
            storage: storage.clone(),
            relative_path: relative.to_owned(),
            path,
            quarantine: None,
        };
        located.quarantine = quarantine(&located, repository)?;
        Ok(located)
    }

    /// The repository, which is there and has what makes a directory a repository.
    pub(crate) fn open(
        &self,
        repository: Option<&gitaly::Repository>,
    ) -> Result<RepositoryPath, RepositoryError> {
        let located = self.locate(repository)?;
        if !located.storage.root.is_dir() {
            return Err(RepositoryError::StorageMissing);
        }
        check_repository(&located.path)?;
        Ok(located)
    }
}

/// Whether the directory is a git repository: `objects`, `refs` and `HEAD` (wire reference, section k.5).
pub(crate) fn check_repository(path: &Path) -> Result<(), RepositoryError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(RepositoryError::NotFound),
        Err(error) if absent(&error) => return Err(RepositoryError::NotFound),
        Err(error) => return Err(RepositoryError::Io(error.to_string())),
    }
    for entry in ["objects", "refs", "HEAD"] {
        if !path.join(entry).exists() {
            return Err(RepositoryError::Invalid(entry));
        }
    }
    Ok(())
}

fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Refuses a path whose existing part leads out of `root` through symbolic links.
fn check_inside(root: &Path, path: &Path) -> Result<(), RepositoryError> {
    let mut existing = path;
    loop {
        match existing.canonicalize() {
            Ok(real) if real.starts_with(root) => return Ok(()),
            Ok(_) => return Err(RepositoryError::Escapes),
            // A link that leads nowhere yet could lead out later.
            Err(_) if existing.is_symlink() => return Err(RepositoryError::Escapes),
            Err(error) if absent(&error) => match existing.parent() {
                Some(parent) if parent != root && parent.starts_with(root) => existing = parent,
                _ => return Ok(()),
            },
            Err(error) => return Err(RepositoryError::Io(error.to_string())),
        }
    }
}

/// The first part of the name of a repository's quarantine directories (wire reference, section a).
pub(crate) fn quarantine_prefix(relative_path: &str) -> String {
    let digest = Sha1::digest(relative_path.as_bytes());
    format!("quarantine-{}-", hex::encode(&digest[..8]))
}

fn quarantine(
    located: &RepositoryPath,
    repository: &gitaly::Repository,
) -> Result<Option<Quarantine>, RepositoryError> {
    if repository.git_object_directory.is_empty() && repository.git_alternate_object_directories.is_empty() {
        return Ok(None);
    }
    let object_directory = match repository.git_object_directory.as_str() {
        "" => None,
        directory => Some(object_directory(located, directory)?),
    };
    let alternates = repository
        .git_alternate_object_directories
        .iter()
        .map(|directory| self::object_directory(located, directory))
        .collect::<Result<_, _>>()?;
    Ok(Some(Quarantine { object_directory, alternates }))
}

/// An object directory given relative to the repository: among its objects, or in one of its quarantines.
fn object_directory(located: &RepositoryPath, given: &str) -> Result<PathBuf, RepositoryError> {
    // The list of alternates is joined with colons, so one in a name would smuggle in another directory.
    if given.contains([':', '\0', '\n', '"']) {
        return Err(RepositoryError::ForeignObjects);
    }
    let mut path = PathBuf::new();
    for component in located.path.join(given).components() {
        match component {
            Component::ParentDir => {
                path.pop();
            }
            Component::CurDir => {}
            other => path.push(other),
        }
    }
    let temporary = located.storage.temporary();
    let own_quarantine = path.strip_prefix(&temporary).is_ok_and(|rest| {
        rest.components().next().is_some_and(|first| {
            first.as_os_str().to_string_lossy().starts_with(&quarantine_prefix(&located.relative_path))
        })
    });
    // Where git keeps a push that has not been accepted, and what it builds on.
    if !path.starts_with(located.path.join("objects")) && !own_quarantine {
        return Err(RepositoryError::ForeignObjects);
    }
    check_inside(&located.storage.root, &path).map_err(|_| RepositoryError::ForeignObjects)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storages() -> (tempfile::TempDir, Storages) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        let storage = Storage { name: "default".into(), root, filesystem_id: "id".into() };
        (directory, Storages::new([storage]))
    }

    fn repository(storage: &str, path: &str) -> gitaly::Repository {
        gitaly::Repository {
            storage_name: storage.into(),
            relative_path: path.into(),
            ..gitaly::Repository::default()
        }
    }

    #[test]
    fn refusals_are_gitalys() {
        let (directory, storages) = storages();
        std::os::unix::fs::symlink("/", directory.path().join("out")).unwrap();
        std::os::unix::fs::symlink("/nowhere-at-all", directory.path().join("dangling")).unwrap();
        fs::create_dir_all(directory.path().join("half.git/objects")).unwrap();
        for (storage, path, expected) in [
            ("", "", RepositoryError::NotSet),
            ("default", "", RepositoryError::PathNotSet),
            ("", "a.git", RepositoryError::StorageNotSet),
            ("other", "a.git", RepositoryError::UnknownStorage),
            ("default", "../a.git", RepositoryError::Escapes),
            ("default", "a/../../b.git", RepositoryError::Escapes),
            ("default", "/etc", RepositoryError::Escapes),
            ("default", "out/etc", RepositoryError::Escapes),
            ("default", "dangling/a.git", RepositoryError::Escapes),
            ("default", "+gitaly/tmp/x", RepositoryError::Escapes),
            ("default", "none/a.git", RepositoryError::NotFound),
            ("default", "half.git", RepositoryError::Invalid("refs")),
        ] {
            let error = storages.open(Some(&repository(storage, path))).unwrap_err();
            assert_eq!(error, expected, "{storage} {path}");
        }
        assert_eq!(storages.open(None).unwrap_err(), RepositoryError::NotSet);
        assert_eq!(
            RepositoryError::Invalid("refs").to_string(),
            "repository not valid: \"refs\" does not exist"
        );
    }

    #[test]
    fn object_directories_stay_in_the_repository_or_its_quarantine() {
        let (_directory, storages) = storages();
        let own = format!("../+gitaly/tmp/{}1/objects", quarantine_prefix("a.git"));
        let foreign = format!("../+gitaly/tmp/{}1/objects", quarantine_prefix("b.git"));
        for (given, allowed) in [
            ("objects", true),
            ("objects/tmp_objdir-incoming-x", true),
            (own.as_str(), true),
            (foreign.as_str(), false),
            ("../b.git/objects", false),
            ("refs", false),
            (".", false),
            ("/etc", false),
            ("objects:/etc", false),
        ] {
            let mut repository = repository("default", "a.git");
            repository.git_object_directory = given.into();
            assert_eq!(storages.locate(Some(&repository)).is_ok(), allowed, "{given}");
            repository.git_object_directory.clear();
            repository.git_alternate_object_directories = vec![given.into()];
            assert_eq!(storages.locate(Some(&repository)).is_ok(), allowed, "{given}");
        }
    }
}
