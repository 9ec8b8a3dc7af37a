//! Where backups lie: a directory. What is in it appears whole, on disk and under its final name, or not at all.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use sha1::{Digest as _, Sha1};
use tempfile::NamedTempFile;

use crate::place::sync_parent;

/// What is being written lies here, beside everything that has a key.
pub(super) const OWN_DIRECTORY: &str = "+tabularium";
/// What nobody has written to for so long was left by a process that died.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 3600);
/// What unfinished files are called.
const DRAFT: &str = "draft-";
/// Longest key.
const MAX_KEY_BYTES: usize = 4096;

/// The name of a file in the sink: a relative path that leads nowhere else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key(String);

impl Key {
    /// From what may come from anywhere.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let sound = |part: &str| {
            !matches!(part, "" | "." | "..") && !part.contains(|character: char| character.is_control())
        };
        let own = text.split('/').next() == Some(OWN_DIRECTORY);
        (text.len() <= MAX_KEY_BYTES && !own && text.split('/').all(sound)).then(|| Self(text.to_owned()))
    }

    /// As manifests name it.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The directory.
#[derive(Debug, Clone)]
pub(super) struct Sink {
    root: PathBuf,
}

impl Sink {
    /// A directory that is there.
    pub(super) fn open(root: PathBuf) -> io::Result<Self> {
        let sink = Self { root };
        sink.create_directories(&sink.drafts())?;
        Ok(sink)
    }

    fn drafts(&self) -> PathBuf {
        self.root.join(OWN_DIRECTORY)
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.root.join(key.as_str())
    }

    /// Begins a file that is to have this key.
    pub(super) fn draft(&self, key: Key) -> io::Result<Draft> {
        let file = tempfile::Builder::new().prefix(DRAFT).tempfile_in(self.drafts())?;
        Ok(Draft { file, key })
    }

    /// Keeps all others, on whichever node, from placing files of one repository's backups until the answer is dropped.
    /// `None`: somebody else does.
    pub(super) fn try_alone(&self, place: &str) -> io::Result<Option<File>> {
        let name = format!("lock-{:02x}", Sha1::digest(place.as_bytes())[0]);
        let mut options = File::options();
        let lock = options.create(true).append(true).mode(0o600).open(self.drafts().join(name))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Ok(None),
            locked => Ok(locked.map(|()| Some(lock))?),
        }
    }

    /// The file with this key; `None`: there is none.
    pub(super) fn read(&self, key: &Key) -> io::Result<Option<File>> {
        let path = self.path(key);
        match File::open(&path) {
            Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
            Ok(_) => Err(io::Error::other(format!("{} is no file", key.as_str()))),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What is in a file that has to be small.
    pub(super) fn read_small(&self, key: &Key, limit: u64) -> io::Result<Option<String>> {
        let Some(file) = self.read(key)? else { return Ok(None) };
        if file.metadata()?.len() > limit {
            return Err(io::Error::other(format!("{} has more than {limit} bytes", key.as_str())));
        }
        io::read_to_string(file).map(Some)
    }

    /// Removes the file, if there is one.
    pub(super) fn remove(&self, key: &Key) -> io::Result<()> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Err(error) if is_absent(&error) => Ok(()),
            removed => removed.and_then(|()| sync_parent(&path)),
        }
    }

    /// Has a file that is sealed appear, in the place of one with the same key.
    pub(super) fn place(&self, draft: Draft) -> io::Result<()> {
        let path = self.path(&draft.key);
        if let Some(directory) = path.parent() {
            self.create_directories(directory)?;
        }
        draft.file.persist(&path)?;
        sync_parent(&path)
    }

    /// A small file at once.
    pub(super) fn write(&self, key: Key, content: &[u8]) -> io::Result<()> {
        let mut draft = self.draft(key)?;
        draft.file.write_all(content)?;
        draft.seal()?;
        self.place(draft)
    }

    /// Removes what processes that died have left. What cannot be removed stays: it is in nobody's way.
    pub(super) fn clear_abandoned(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.drafts())? {
            let entry = entry?;
            if !entry.file_name().as_encoded_bytes().starts_with(DRAFT.as_bytes()) {
                continue;
            }
            let Ok(written) = entry.metadata().and_then(|metadata| metadata.modified()) else { continue };
            let age = SystemTime::now().duration_since(written).unwrap_or_default();
            if age > ABANDONED_AFTER
                && let Err(error) = fs::remove_file(entry.path())
            {
                tracing::warn!(%error, path = %entry.path().display(), "an abandoned part of a backup stays");
            }
        }
        Ok(())
    }

    /// Directories for nobody else, each of them durable.
    fn create_directories(&self, directory: &Path) -> io::Result<()> {
        let missing: Vec<&Path> = directory
            .ancestors()
            .take_while(|ancestor| *ancestor != self.root && !ancestor.is_dir())
            .collect();
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        missing.into_iter().try_for_each(sync_parent)
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// A file that nobody sees yet. It goes when it is dropped.
pub(super) struct Draft {
    file: NamedTempFile,
    key: Key,
}

impl Draft {
    /// The file, to be written.
    pub(super) fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// The same file for writing without blocking.
    pub(super) fn writer(&self) -> io::Result<tokio::fs::File> {
        self.file.as_file().try_clone().map(tokio::fs::File::from_std)
    }

    /// A reader of what has been written, from the beginning.
    pub(super) fn reopen(&self) -> io::Result<File> {
        self.file.reopen()
    }

    /// Makes what has been written durable.
    pub(super) fn seal(&self) -> io::Result<()> {
        self.file.as_file().sync_all()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn key(text: &str) -> Key {
        Key::parse(text).unwrap()
    }

    #[test]
    fn keys_lead_nowhere_else() {
        let long = "x/".repeat(MAX_KEY_BYTES);
        let foreign =
            ["", "/etc/passwd", "a//b", "a/../b", "..", "./a", "a/", "a\nb", "+tabularium/x", long.as_str()];
        for text in foreign {
            assert_eq!(Key::parse(text), None, "{text}");
        }
        assert_eq!(key("@hashed/ab/+latest.toml").as_str(), "@hashed/ab/+latest.toml");
    }

    #[test]
    fn a_file_appears_whole_and_for_its_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let sink = Sink::open(directory.path().to_owned()).unwrap();
        let mut draft = sink.draft(key("a/b/c")).unwrap();
        draft.file().write_all(b"one").unwrap();
        assert!(sink.read(&key("a/b/c")).unwrap().is_none());
        draft.seal().unwrap();
        sink.place(draft).unwrap();
        assert_eq!(sink.read_small(&key("a/b/c"), 3).unwrap().as_deref(), Some("one"));
        assert!(sink.read_small(&key("a/b/c"), 2).is_err());
        let mode = |path: &str| fs::metadata(directory.path().join(path)).unwrap().permissions().mode();
        assert_eq!((mode("a") & 0o777, mode("a/b/c") & 0o777), (0o700, 0o600));
        sink.write(key("a/b/c"), b"two").unwrap();
        assert_eq!(sink.read_small(&key("a/b/c"), 3).unwrap().as_deref(), Some("two"));
        for _ in 0..2 {
            sink.remove(&key("a/b/c")).unwrap();
        }
        assert!(sink.read(&key("a/b/c")).unwrap().is_none());
        assert!(sink.read(&key("a/b")).is_err(), "a directory");
    }

    #[test]
    fn what_nobody_writes_any_more_is_cleared() {
        let directory = tempfile::tempdir().unwrap();
        let sink = Sink::open(directory.path().to_owned()).unwrap();
        let [old, new, lock] = ["draft-old", "draft-new", "lock-00"].map(|name| sink.drafts().join(name));
        for path in [&old, &new, &lock] {
            fs::write(path, "x").unwrap();
        }
        let long_ago = SystemTime::now() - 2 * ABANDONED_AFTER;
        for path in [&old, &lock] {
            File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
        }
        sink.clear_abandoned().unwrap();
        assert!(!old.exists() && new.exists() && lock.exists());
    }

    #[test]
    fn one_at_a_time_places_files() {
        let directory = tempfile::tempdir().unwrap();
        let sink = Sink::open(directory.path().to_owned()).unwrap();
        let held = sink.try_alone("a").unwrap();
        assert!(held.is_some() && sink.try_alone("a").unwrap().is_none());
        assert!(sink.try_alone("another").unwrap().is_some());
        drop(held);
        assert!(sink.try_alone("a").unwrap().is_some());
    }
}
