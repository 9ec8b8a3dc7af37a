//! A place for new objects until hooks have accepted them.
//!
//! Git writes into a directory beside the storage's repositories and reads the repository through it. When the change is
//! accepted the objects are moved into the repository and are on disk before any reference names them; when it is not,
//! the directory goes and the repository never saw them.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use tonic::Status;

use super::durable;
use crate::{
    node::Node,
    place::Temporary,
    storage::{Quarantine as ObjectDirectories, RepositoryPath, quarantine_prefix},
};

/// Within a quarantine, and left behind when its objects are moved.
const DRAFTS: &str = "drafts";

/// A repository with the objects of a quarantine and with drafts.
pub(crate) struct Drafts {
    /// What is written is a draft.
    pub(crate) writing: RepositoryPath,
    /// Drafts can be read; what is written goes into the quarantine.
    pub(crate) reading: RepositoryPath,
}

/// New objects of one repository.
pub(crate) struct Quarantine {
    directory: Temporary,
    objects: PathBuf,
    repository: RepositoryPath,
}

impl Quarantine {
    /// An empty quarantine. When it is dropped it goes, also while a git that was killed still writes into it.
    pub(crate) fn create(node: &Node, repository: &RepositoryPath) -> Result<Self, Status> {
        let mut repository = repository.clone();
        let prefix = quarantine_prefix(&repository.relative_path);
        let directory = Temporary::new(node, &repository.storage, &prefix)?;
        let objects = repository.path.join("objects");
        repository.quarantine = Some(ObjectDirectories {
            object_directory: Some(directory.path().to_owned()),
            alternates: vec![objects.clone()],
        });
        Ok(Self { directory, objects, repository })
    }

    /// The repository as seen with the new objects in it.
    pub(crate) fn repository(&self) -> &RepositoryPath {
        &self.repository
    }

    /// Where new objects are written.
    pub(crate) fn directory(&self) -> PathBuf {
        self.directory.path().to_owned()
    }

    /// A file of this name in the quarantine that is no object.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A place for objects that never become part of the repository.
    pub(crate) fn drafts(&self) -> io::Result<Drafts> {
        let drafts = self.directory.path().join(DRAFTS);
        make_directory(&drafts)?;
        let seen = |writes: &Path, reads: [&Path; 2]| RepositoryPath {
            quarantine: Some(ObjectDirectories {
                object_directory: Some(writes.to_owned()),
                alternates: reads.map(Path::to_owned).to_vec(),
            }),
            ..self.repository.clone()
        };
        let own = self.directory.path();
        Ok(Drafts {
            writing: seen(&drafts, [own, &self.objects]),
            reading: seen(own, [&self.objects, &drafts]),
        })
    }

    /// Moves every object into the repository; they are on disk when this returns.
    pub(crate) async fn migrate(self) -> io::Result<()> {
        blocking(move || migrate(self.directory.path(), &self.objects)).await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// How often a directory that was removed before a file got into it is made again.
const MOVE_ATTEMPTS: usize = 100;

/// Only fan-out directories and packs hold objects.
fn holds_objects(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name == b"pack" || (name.len() == 2 && name.iter().all(u8::is_ascii_hexdigit))
}

/// Moves every object into the other directory; they are on disk when this returns.
pub(crate) fn migrate(from: &Path, to: &Path) -> io::Result<()> {
    let mut touched = Vec::new();
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() || !holds_objects(&entry.file_name()) {
            continue;
        }
        let target = to.join(entry.file_name());
        make_directory(&target)?;
        let mut files: Vec<PathBuf> =
            fs::read_dir(entry.path())?.map(|file| file.map(|file| file.path())).collect::<Result<_, _>>()?;
        // A pack counts from the moment its index is there.
        files.sort_by_key(|file| file.extension() == Some(OsStr::new("idx")));
        for file in files {
            let Some(name) = file.file_name() else { continue };
            if name.as_encoded_bytes().starts_with(b"tmp_") {
                continue;
            }
            let target = target.join(name);
            if target.exists() && keep(&target)? {
                continue;
            }
            // Git has synced what it wrote (`core.fsync`).
            move_in(&file, &target)?;
        }
        touched.push(target);
    }
    if !touched.is_empty() {
        touched.push(to.to_owned());
    }
    // One that is gone: a repack has taken all of it into a pack, which git has synced.
    durable::sync_directories(&touched)
}

/// Sees that an object that is here already does not look as if nobody wanted it. False: it is gone.
fn keep(object: &Path) -> io::Result<bool> {
    match fs::File::open(object).and_then(|file| file.set_modified(SystemTime::now())) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        kept => kept.map(|()| true),
    }
}

fn make_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Renames a file into a fan-out directory, which a concurrent repack removes whenever it finds it empty.
fn move_in(file: &Path, target: &Path) -> io::Result<()> {
    for _ in 0..MOVE_ATTEMPTS {
        match fs::rename(file, target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            moved => return moved,
        }
        if let Some(directory) = target.parent() {
            make_directory(directory)?;
        }
    }
    fs::rename(file, target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_move_and_scratch_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        for path in ["ab", "pack", "other"] {
            fs::create_dir_all(from.join(path)).unwrap();
        }
        fs::create_dir_all(to.join("ab")).unwrap();
        for file in ["ab/1", "ab/2", "ab/tmp_obj_x", "pack/p.idx", "pack/p.pack", "other/x", "content"] {
            fs::write(from.join(file), file).unwrap();
        }
        fs::write(to.join("ab/2"), "here already").unwrap();
        let old = SystemTime::UNIX_EPOCH;
        fs::File::open(to.join("ab/2")).unwrap().set_modified(old).unwrap();
        migrate(&from, &to).unwrap();
        assert!(fs::metadata(to.join("ab/2")).unwrap().modified().unwrap() > old, "it is wanted again");
        assert_eq!(fs::read(to.join("ab/1")).unwrap(), b"ab/1");
        assert_eq!(fs::read(to.join("ab/2")).unwrap(), b"here already");
        assert!(to.join("pack/p.idx").exists() && to.join("pack/p.pack").exists());
        assert!(
            !to.join("other").exists() && !to.join("content").exists() && !to.join("ab/tmp_obj_x").exists()
        );
    }
    #[test]
    fn a_directory_that_went_away_before_an_object_came_is_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("object");
        fs::write(&file, "1").unwrap();
        let target = directory.path().join("ab/1");
        move_in(&file, &target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"1");
        assert!(!file.exists());
        // A file that is not there is still an error, after a bounded number of tries.
        assert_eq!(move_in(&file, &target).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
