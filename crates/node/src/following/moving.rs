//! Moves one reference as git does: its lock file is made and holds the new value, on disk, before anybody is asked; then
//! it takes the reference's place. Other processes of git keep to the same lock.
//!
//! What is not plain (the reference is locked, has another value, stands for another one, or its name is in the way of
//! another's) is left to git before anything has happened, so that it is git's rules that refuse, in git's words.
//!
//! Git also locks `HEAD` when it moves the branch that `HEAD` stands for, but only for the log of references, which a
//! repository that is looked at here has not.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use super::{
    LeftToGit, connectivity,
    opening::Command,
    references::{Loose, Packed, loose},
};
use crate::git::{durable, leftovers::WriterGuard};

/// A reference that is locked and can be moved. Dropped, it is as it was.
pub(super) struct Locked {
    /// Until it has taken the reference's place.
    lock: Option<PathBuf>,
    /// Whose names have to be made durable.
    directories: Vec<PathBuf>,
    /// Only while no process that writes here was killed is the lock safe from being cleared away.
    _writer: WriterGuard,
}

/// Locks the reference, if it is what the command says.
pub(super) fn lock(repository: &Path, command: &Command, writer: WriterGuard) -> Result<Locked, LeftToGit> {
    let id = |hex: &str| connectivity::id(hex.as_bytes()).ok_or(LeftToGit("ids of another kind"));
    let (name, new) = (command.reference.as_slice(), id(&command.new)?);
    let old = Some(id(&command.old)?).filter(|old| !old.is_null());
    let path = repository.join(OsStr::from_bytes(name));
    let directories = directories(repository, &path);
    let mut lock = path.clone().into_os_string();
    lock.push(".lock");
    let lock = PathBuf::from(lock);
    let mut file = create(&lock).map_err(|_| LeftToGit("a reference that cannot be locked at once"))?;
    let locked = Locked { lock: Some(lock), directories, _writer: writer };
    let value = match loose(repository, name) {
        Loose::Value(value) => Some(value),
        Loose::Other => return Err(LeftToGit("a reference that is not plain")),
        Loose::Absent => {
            let packed = Packed::read(repository)?;
            if packed.conflicts(name) {
                return Err(LeftToGit("a reference whose name is in the way"));
            }
            packed.value(name)?
        }
    };
    if value != old {
        return Err(LeftToGit("a reference with another value"));
    }
    let written = file.write_all(format!("{new}\n").as_bytes());
    let written = written.and_then(|()| durable::sync_files(std::slice::from_ref(&file)));
    written.map_err(|_| LeftToGit("a lock that cannot be written"))?;
    Ok(locked)
}

/// Those that the reference's file lies in, the innermost first, up to one that is there since the repository is.
fn directories(repository: &Path, reference: &Path) -> Vec<PathBuf> {
    let old = ["refs/heads", "refs/tags", "refs"].map(|name| repository.join(name));
    let outermost = old.iter().find(|old| reference.starts_with(old));
    let within = |directory: &&Path| outermost.is_some_and(|outermost| directory.starts_with(outermost));
    reference.ancestors().skip(1).take_while(within).map(Path::to_owned).collect()
}

/// A file that is not there, in directories that may not be there.
fn create(path: &Path) -> io::Result<File> {
    let create = || OpenOptions::new().write(true).create_new(true).open(path);
    match (create(), path.parent()) {
        (Err(error), Some(directory)) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(directory)?;
            create()
        }
        (created, _) => created,
    }
}

impl Locked {
    /// Moves the reference; that is on disk when this returns.
    pub(super) fn apply(mut self) -> io::Result<()> {
        if let Some(lock) = &self.lock {
            fs::rename(lock, lock.with_extension(""))?;
            self.lock = None;
        }
        // Others may have made them a moment ago and not have come to this yet.
        durable::sync_directories(&self.directories)
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take()
            && let Err(error) = fs::remove_file(&lock)
        {
            tracing::error!(%error, path = %lock.display(), "a reference's lock stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use gix_hash::ObjectId;

    use super::*;
    use crate::git::leftovers::Writers;

    const MAIN: &[u8] = b"refs/heads/main";

    struct Repository {
        directory: tempfile::TempDir,
        writers: Arc<Writers>,
    }

    impl Repository {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir_all(directory.path().join("refs/heads")).unwrap();
            Self { directory, writers: Arc::default() }
        }

        fn lock(&self, name: &[u8], old: Option<ObjectId>, new: ObjectId) -> Result<Locked, LeftToGit> {
            let command = Command::of(name, old.unwrap_or(ObjectId::null(gix_hash::Kind::Sha1)), new);
            lock(self.directory.path(), &command, self.writers.enter(self.directory.path()))
        }

        fn move_it(&self, name: &[u8], old: Option<ObjectId>, new: ObjectId) -> bool {
            self.lock(name, old, new).map(|locked| locked.apply().unwrap()).is_ok()
        }

        fn pack(&self, line: &str) {
            fs::write(self.directory.path().join("packed-refs"), line).unwrap();
        }

        /// All files below `refs`.
        fn files(&self) -> Vec<String> {
            let mut found = Vec::new();
            let mut waiting = vec![self.directory.path().join("refs")];
            while let Some(directory) = waiting.pop() {
                for entry in fs::read_dir(directory).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_dir() {
                        waiting.push(path);
                    } else {
                        let name = path.strip_prefix(self.directory.path()).unwrap();
                        found.push(name.to_str().unwrap().to_owned());
                    }
                }
            }
            found.sort();
            found
        }
    }

    fn id(digit: char) -> ObjectId {
        ObjectId::from_hex(digit.to_string().repeat(40).as_bytes()).unwrap()
    }

    #[test]
    fn a_reference_moves_from_what_it_is_and_from_nothing_else() {
        let repository = Repository::new();
        assert!(!repository.move_it(MAIN, Some(id('1')), id('2')), "is not there");
        assert!(repository.move_it(MAIN, None, id('1')));
        assert!(!repository.move_it(MAIN, None, id('2')), "is there");
        assert!(!repository.move_it(MAIN, Some(id('3')), id('2')));
        assert!(repository.move_it(MAIN, Some(id('1')), id('2')));
        let content = fs::read_to_string(repository.directory.path().join("refs/heads/main")).unwrap();
        assert_eq!(content, format!("{}\n", id('2')));
        assert_eq!(repository.files(), ["refs/heads/main"]);
    }

    #[test]
    fn packed_references_count_where_there_is_no_file() {
        let repository = Repository::new();
        repository.pack(&format!("{} refs/heads/main\n{} refs/heads/a/b\n", id('1'), id('2')));
        assert!(!repository.move_it(MAIN, None, id('3')));
        assert!(repository.move_it(MAIN, Some(id('1')), id('3')));
        assert!(repository.move_it(MAIN, Some(id('3')), id('4')), "the line is older");
        assert!(!repository.move_it(b"refs/heads/a", None, id('1')), "a directory");
        assert!(!repository.move_it(b"refs/heads/a/b/c", None, id('1')));
        assert!(repository.move_it(b"refs/heads/a/c", None, id('1')));
        assert_eq!(repository.files(), ["refs/heads/a/c", "refs/heads/main"]);
    }

    #[test]
    fn names_with_dots_and_directories_are_names_like_others() {
        let repository = Repository::new();
        for name in ["refs/heads/v1.2", "refs/heads/a.b/c.d/e", "refs/x"] {
            assert!(repository.move_it(name.as_bytes(), None, id('1')), "{name}");
        }
        assert_eq!(repository.files(), ["refs/heads/a.b/c.d/e", "refs/heads/v1.2", "refs/x"]);
        assert!(!repository.move_it(b"refs/heads/a.b", None, id('1')), "has others in it");
        assert!(!repository.move_it(b"refs/heads/v1.2/x", None, id('1')), "is no directory");
    }

    #[test]
    fn every_directory_that_may_be_new_is_synced() {
        let names = |reference: &str| {
            let found = directories(Path::new("r"), &Path::new("r").join(reference));
            found.iter().map(|path| path.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names("refs/heads/a"), ["r/refs/heads"]);
        assert_eq!(names("refs/tags/a/b"), ["r/refs/tags/a", "r/refs/tags"]);
        assert_eq!(names("refs/keep/a"), ["r/refs/keep", "r/refs"]);
        assert_eq!(names("refs/a"), ["r/refs"]);
    }

    #[test]
    fn whoever_holds_the_lock_holds_it_alone_until_all_is_as_it_was() {
        let repository = Repository::new();
        assert!(repository.move_it(MAIN, None, id('1')));
        let held = repository.lock(MAIN, Some(id('1')), id('2')).unwrap();
        assert!(repository.lock(MAIN, Some(id('1')), id('3')).is_err());
        let main = repository.directory.path().join("refs/heads/main");
        assert_eq!(fs::read_to_string(main.with_extension("lock")).unwrap(), format!("{}\n", id('2')));
        drop(held);
        assert_eq!(fs::read_to_string(main).unwrap(), format!("{}\n", id('1')));
        assert_eq!(repository.files(), ["refs/heads/main"]);
        assert!(repository.move_it(MAIN, Some(id('1')), id('3')));
    }
}
