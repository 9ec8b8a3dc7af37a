//! What git leaves to the file system: it syncs the files it writes (`core.fsync`), but not the directories it renames
//! them into. Until those are on disk a power cut can undo an update that was acknowledged.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use super::leftovers::TIMESTAMP_LAG;

/// Files or directories that are synced at once. A disk that is asked several times at once answers all with one flush.
const AT_ONCE: usize = 8;

/// When something began. The time of day may be put back while it runs, and what it makes then looks older than itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    time: SystemTime,
    began: Instant,
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self { time: SystemTime::now(), began: Instant::now() }
    }

    /// No file that was made since then has an earlier time stamp.
    fn earliest(self) -> SystemTime {
        self.earliest_by(SystemTime::now(), self.began.elapsed())
    }

    /// The same, that long afterwards, when the clock says `now`.
    fn earliest_by(self, now: SystemTime, elapsed: Duration) -> SystemTime {
        let by_now = now.checked_sub(elapsed).unwrap_or(SystemTime::UNIX_EPOCH);
        self.time.min(by_now)
    }
}

/// Makes every name that was given or taken in the repository since then durable.
pub(crate) fn sync_changed(repository: &Path, since: Moment) -> io::Result<()> {
    let since = since.earliest();
    let mut directories = changed_objects(repository, since)?;
    directories.extend(changed_references(repository, since)?);
    sync_directories(&directories)
}

/// The same for objects only.
pub(crate) fn sync_objects(repository: &Path, since: Moment) -> io::Result<()> {
    sync_directories(&changed_objects(repository, since.earliest())?)
}

/// The same for all but objects.
pub(crate) fn sync_references(repository: &Path, since: Moment) -> io::Result<()> {
    sync_directories(&changed_references(repository, since.earliest())?)
}

/// Makes the names in these directories durable; one that is gone has none.
pub(crate) fn sync_directories(directories: &[PathBuf]) -> io::Result<()> {
    let sync = |directory: &PathBuf| match unless_gone(File::open(directory))? {
        Some(directory) => directory.sync_all(),
        None => Ok(()),
    };
    at_once(directories, sync)?;
    #[cfg(test)]
    for directory in directories {
        synced::directory(directory);
    }
    Ok(())
}

/// Makes what these files hold durable.
pub(crate) fn sync_files(files: &[File]) -> io::Result<()> {
    at_once(files, File::sync_all)?;
    #[cfg(test)]
    for file in files {
        synced::file(file);
    }
    Ok(())
}

fn at_once<T: Sync>(all: &[T], sync: impl Fn(&T) -> io::Result<()> + Sync) -> io::Result<()> {
    if let [only] = all {
        return sync(only);
    }
    let each = all.len().div_ceil(AT_ONCE).max(1);
    std::thread::scope(|scope| {
        let in_turn = |some: &[T]| some.iter().try_for_each(&sync);
        let syncing: Vec<_> = all.chunks(each).map(|some| scope.spawn(move || in_turn(some))).collect();
        let panicked = |_| Err(io::Error::other("not everything could be synced"));
        syncing.into_iter().try_for_each(|syncing| syncing.join().unwrap_or_else(panicked))
    })
}

fn changed_objects(repository: &Path, since: SystemTime) -> io::Result<Vec<PathBuf>> {
    let since = since - TIMESTAMP_LAG;
    let mut found = Vec::new();
    let objects = repository.join("objects");
    for directory in directories(&objects)? {
        // Of a push that is not accepted yet; what comes of it is renamed into the others.
        if !is_incoming(&directory) {
            look(&directory, since, &mut found)?;
        }
    }
    look(&objects.join("info/commit-graphs"), since, &mut found)?;
    look(&objects, since, &mut found)?;
    Ok(found)
}

fn changed_references(repository: &Path, since: SystemTime) -> io::Result<Vec<PathBuf>> {
    let since = since - TIMESTAMP_LAG;
    let mut found = Vec::new();
    walk(&repository.join("refs"), since, &mut found)?;
    look(repository, since, &mut found)?;
    Ok(found)
}

fn is_incoming(directory: &Path) -> bool {
    directory.file_name().is_some_and(|name| name.to_string_lossy().starts_with("tmp_objdir-"))
}

fn walk(directory: &Path, since: SystemTime, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for inner in directories(directory)? {
        walk(&inner, since, found)?;
    }
    look(directory, since, found)
}

fn look(directory: &Path, since: SystemTime, found: &mut Vec<PathBuf>) -> io::Result<()> {
    if let Some(metadata) = unless_gone(fs::metadata(directory))?
        && metadata.modified()? >= since
    {
        found.push(directory.to_owned());
    }
    Ok(())
}

fn directories(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let Some(entries) = unless_gone(fs::read_dir(directory))? else { return Ok(found) };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Git removes directories that became empty.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What was synced, for tests that cut the power.
#[cfg(test)]
pub(crate) mod synced {
    use std::{ffi::OsString, os::fd::AsRawFd as _, os::unix::fs::MetadataExt as _, sync::Mutex};

    use super::{File, Path, PathBuf, fs};

    #[derive(Debug, Clone)]
    pub(crate) enum Synced {
        File { inode: u64, content: Vec<u8> },
        Directory { path: PathBuf, names: Vec<(OsString, u64)> },
    }

    /// By all tests, in order.
    static LOG: Mutex<Vec<Synced>> = Mutex::new(Vec::new());

    pub(crate) fn log() -> Vec<Synced> {
        LOG.lock().unwrap().clone()
    }

    pub(super) fn file(file: &File) {
        let inode = file.metadata().unwrap().ino();
        let content = fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        LOG.lock().unwrap().push(Synced::File { inode, content });
    }

    pub(super) fn directory(path: &Path) {
        // One that is gone has no names.
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| Some((entry.file_name(), entry.metadata().ok()?.ino())));
        let (path, names) = (path.to_owned(), names.collect());
        LOG.lock().unwrap().push(Synced::Directory { path, names });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_after_the_clock_was_put_back_is_not_too_old() {
        let second = Duration::from_secs(1);
        let began = Moment::now();
        let by = |now| began.earliest_by(now, 5 * second);
        assert_eq!(by(began.time + 5 * second), began.time);
        assert_eq!(by(began.time + 3600 * second), began.time, "what came before the jump is there too");
        assert_eq!(by(began.time - 3600 * second), began.time - 3605 * second);
    }

    #[test]
    fn directories_that_changed_are_found_and_no_others() {
        let repository = tempfile::tempdir().unwrap();
        let root = repository.path();
        for path in ["refs/heads/a", "refs/tags", "objects/ab", "objects/pack", "objects/tmp_objdir-x/pack"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        let age = |path: &Path| {
            let past = SystemTime::now() - Duration::from_secs(60);
            File::open(path).unwrap().set_modified(past).unwrap();
        };
        let all =
            ["refs/heads/a", "refs/heads", "refs/tags", "refs", "objects/ab", "objects/pack", "objects"];
        for path in all {
            age(&root.join(path));
        }
        age(root);
        let (began, since) = (Moment::now(), SystemTime::now());
        let changed = |root: &Path, since| {
            let mut found = changed_objects(root, since)?;
            found.extend(changed_references(root, since)?);
            Ok::<_, io::Error>(found)
        };
        assert_eq!(changed(root, since).unwrap(), Vec::<PathBuf>::new());
        fs::write(root.join("refs/heads/a/b"), "").unwrap();
        fs::write(root.join("objects/pack/p.idx"), "").unwrap();
        fs::write(root.join("packed-refs"), "").unwrap();
        let mut found = changed(root, since).unwrap();
        found.sort();
        assert_eq!(found, [root.to_owned(), root.join("objects/pack"), root.join("refs/heads/a")]);
        sync_changed(root, began).unwrap();
        fs::remove_dir_all(root.join("refs")).unwrap();
        sync_changed(root, began).unwrap();
    }
}
