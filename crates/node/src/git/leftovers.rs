//! What a killed git process leaves in a repository: lock files that would refuse every later write, quarantines and
//! half-written packs and objects that would only cost space.
//!
//! Git takes most of these away itself when it may; this is for when it was killed outright, and for the objects that it
//! leaves half-written on a full disk. Nothing is removed while another process writes in the repository, because what
//! belongs to whom cannot be told.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

/// Margin between the clock and file time stamps, which lag it by up to one kernel tick.
pub(super) const TIMESTAMP_LAG: Duration = Duration::from_millis(20);

/// A file of an earlier process of the node is only taken for abandoned at this age: git processes that outlived it
/// for a moment still finish what they hold.
const ABANDONED_AFTER: Duration = Duration::from_secs(10);
/// Letters in the name of a directory of loose objects.
const LOOSE_DIRECTORY: usize = 2;

/// How many processes write in each repository, and which repositories have been cleared of what earlier processes of
/// the node left.
pub(crate) struct Writers {
    usages: Mutex<HashMap<PathBuf, Usage>>,
    started: SystemTime,
    cleared: Mutex<HashSet<PathBuf>>,
    /// Written while it was too early to clear them.
    waiting: Mutex<HashSet<PathBuf>>,
}

impl Default for Writers {
    fn default() -> Self {
        Self {
            usages: Mutex::default(),
            started: SystemTime::now(),
            cleared: Mutex::default(),
            waiting: Mutex::default(),
        }
    }
}

/// How a process came to its end, the worst last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ended {
    /// Nothing of it is left.
    #[default]
    Well,
    /// By itself: its locks and quarantines are gone, and what lock is there is somebody else's, maybe the reason.
    Died,
    /// It had no say.
    Killed,
}

#[derive(Default)]
struct Usage {
    writers: usize,
    worst: Ended,
}

/// One process that writes.
pub(crate) struct WriterGuard {
    writers: Arc<Writers>,
    path: PathBuf,
}

impl Writers {
    /// Counts one more writer of the repository at `path`.
    pub(crate) fn enter(self: &Arc<Self>, path: &Path) -> WriterGuard {
        let mut usages = self.usages.lock().unwrap_or_else(PoisonError::into_inner);
        usages.entry(path.to_owned()).or_default().writers += 1;
        WriterGuard { writers: Arc::clone(self), path: path.to_owned() }
    }

    /// Before the first write since the node started: removes what a node that was killed left here. Without this a
    /// ref whose lock was held when the power went could never be written again.
    pub(crate) async fn clear_stale(&self, path: &Path) {
        if self.cleared.lock().unwrap_or_else(PoisonError::into_inner).contains(path) {
            return;
        }
        let now = SystemTime::now();
        let before = self.started.min(now - ABANDONED_AFTER);
        let directory = path.to_owned();
        match tokio::task::spawn_blocking(move || sweep(&directory, before)).await {
            Ok(Ok(_)) if before == self.started => {
                self.cleared.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned());
            }
            Ok(Ok(_)) => {
                self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned());
            }
            Ok(Err(error)) => tracing::warn!(%error, path = %path.display(), "clearing abandoned locks"),
            Err(error) => tracing::warn!(%error, "clearing abandoned locks"),
        }
    }

    /// Once nothing of an earlier process of the node can be in use any more: clears what was written before that, and
    /// so was looked at too early.
    pub(crate) async fn clear_waiting(&self) {
        let old_enough = self.started + ABANDONED_AFTER + TIMESTAMP_LAG;
        tokio::time::sleep(old_enough.duration_since(SystemTime::now()).unwrap_or_default()).await;
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        for path in waiting {
            self.clear_stale(&path).await;
        }
    }

    /// One writer less; if it was the last, how the worst of them ended.
    fn leave(&self, path: &Path) -> Ended {
        let mut usages = self.usages.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(usage) = usages.get_mut(path) else { return Ended::Well };
        usage.writers = usage.writers.saturating_sub(1);
        let last = usage.writers == 0;
        last.then(|| usages.remove(path)).flatten().map_or(Ended::Well, |usage| usage.worst)
    }
}

impl WriterGuard {
    /// How the process ended. If it was the last writer, what was left is removed before this returns.
    pub(crate) async fn ended(self, ended: Ended) {
        if let Some(usage) =
            self.writers.usages.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&self.path)
        {
            usage.worst = usage.worst.max(ended);
        }
        let swept = tokio::task::spawn_blocking(move || drop(self)).await;
        if let Err(error) = swept {
            tracing::warn!(%error, "sweeping after a killed git process");
        }
    }
}

impl Drop for WriterGuard {
    fn drop(&mut self) {
        // Before leaving: what a writer makes that comes the moment after is younger.
        let before = SystemTime::now() - TIMESTAMP_LAG;
        let swept = match self.writers.leave(&self.path) {
            Ended::Well => return,
            Ended::Died => sweep_half_written(&self.path.join("objects"), before),
            Ended::Killed => sweep(&self.path, before),
        };
        if let Err(error) = swept {
            tracing::warn!(%error, path = %self.path.display(), "sweeping after a killed git process");
        }
    }
}

/// Removes what no running process can own: lock files, quarantines, temporary packs and objects last changed before
/// `before`.
pub(crate) fn sweep(repository: &Path, before: SystemTime) -> io::Result<usize> {
    let mut removed = 0;
    for name in ["HEAD.lock", "packed-refs.lock", "packed-refs.new", "config.lock", "shallow.lock"] {
        removed += usize::from(remove_if_older(&repository.join(name), before)?);
    }
    removed += sweep_locks(&repository.join("refs"), before)?;
    let objects = repository.join("objects");
    removed += sweep_named(&objects, before, |name| {
        name.starts_with("tmp_objdir-") || name.starts_with("incoming-")
    })?;
    for directory in ["pack", "info", "info/commit-graphs"] {
        removed += sweep_named(&objects.join(directory), before, |name| is_lock(Path::new(name)))?;
    }
    Ok(removed + sweep_half_written(&objects, before)?)
}

/// Objects and packs that git had begun to write beside the others.
fn sweep_half_written(objects: &Path, before: SystemTime) -> io::Result<usize> {
    let pack = |name: &str| name.starts_with("tmp_") || name.starts_with(".tmp-");
    let mut removed = sweep_named(&objects.join("pack"), before, pack)?;
    for entry in entries(objects)? {
        if entry.file_name().len() == LOOSE_DIRECTORY && entry.file_type()?.is_dir() {
            removed += sweep_named(&entry.path(), before, |name| name.starts_with("tmp_obj_"))?;
        }
    }
    Ok(removed)
}

fn sweep_named(directory: &Path, before: SystemTime, named: impl Fn(&str) -> bool) -> io::Result<usize> {
    let mut removed = 0;
    for entry in entries(directory)? {
        if named(&entry.file_name().to_string_lossy()) {
            removed += usize::from(remove_if_older(&entry.path(), before)?);
        }
    }
    Ok(removed)
}

fn is_lock(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "lock")
}

fn sweep_locks(directory: &Path, before: SystemTime) -> io::Result<usize> {
    let mut removed = 0;
    for entry in entries(directory)? {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            removed += sweep_locks(&path, before)?;
        } else if is_lock(&path) {
            removed += usize::from(remove_if_older(&path, before)?);
        }
    }
    Ok(removed)
}

fn entries(directory: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn remove_if_older(path: &Path, before: SystemTime) -> io::Result<bool> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if metadata.modified()? > before {
        return Ok(false);
    }
    let removed = if metadata.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Ok(()) => {
            tracing::info!(path = %path.display(), "removed what a git process left that did not end well");
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for path in ["refs/heads/a", "objects/tmp_objdir-incoming-x", "objects/pack", "objects/01"] {
            fs::create_dir_all(directory.path().join(path)).unwrap();
        }
        let files = ["HEAD", "HEAD.lock", "refs/heads/a/b.lock", "refs/heads/a/b", "objects/pack/tmp_pack_1"];
        for file in files.into_iter().chain(["objects/01/tmp_obj_x", "objects/01/23"]) {
            fs::write(directory.path().join(file), "").unwrap();
        }
        directory
    }

    #[test]
    fn only_what_is_old_and_temporary_goes() {
        let directory = repository();
        let past = SystemTime::now() - Duration::from_secs(60);
        assert_eq!(sweep(directory.path(), past).unwrap(), 0);
        let future = SystemTime::now() + Duration::from_secs(60);
        assert_eq!(sweep(directory.path(), future).unwrap(), 5);
        for file in ["HEAD", "refs/heads/a/b", "objects/01/23"] {
            assert!(directory.path().join(file).exists(), "{file}");
        }
    }

    #[tokio::test]
    async fn what_a_killed_node_left_goes_before_the_first_write() {
        let directory = repository();
        let lock = directory.path().join("refs/heads/a/b.lock");
        Writers::default().clear_stale(directory.path()).await;
        assert!(lock.exists(), "too young: somebody may hold it");
        let writers =
            Writers { started: SystemTime::now() + Duration::from_secs(3600), ..Writers::default() };
        fs::File::open(&lock).unwrap().set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        writers.clear_stale(directory.path()).await;
        assert!(!lock.exists());
    }

    #[tokio::test]
    async fn what_was_looked_at_too_early_is_looked_at_again() {
        let directory = repository();
        let quarantine = directory.path().join("objects/tmp_objdir-incoming-x");
        // Started so long ago that the wait is short, and not so long that the first look is late enough.
        let started = SystemTime::now() - ABANDONED_AFTER + Duration::from_millis(500);
        fs::File::open(&quarantine).unwrap().set_modified(started - Duration::from_millis(100)).unwrap();
        let writers = Writers { started, ..Writers::default() };
        let young = directory.path().join("HEAD.lock");
        writers.clear_stale(directory.path()).await;
        assert!(quarantine.exists(), "somebody may still use it");
        writers.clear_waiting().await;
        assert!(!quarantine.exists());
        assert!(young.exists(), "it was made since the node started");
    }

    #[tokio::test]
    async fn nothing_goes_while_somebody_writes() {
        let directory = repository();
        let lock = directory.path().join("HEAD.lock");
        let writers = Arc::new(Writers::default());
        let first = writers.enter(directory.path());
        let second = writers.enter(directory.path());
        tokio::time::sleep(TIMESTAMP_LAG * 3).await;
        first.ended(Ended::Killed).await;
        assert!(lock.exists());
        drop(second);
        assert!(!lock.exists());
        assert!(writers.usages.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn the_lock_that_a_process_died_of_stays() {
        let directory = repository();
        let writers = Arc::new(Writers::default());
        let [first, second] = [(); 2].map(|()| writers.enter(directory.path()));
        tokio::time::sleep(TIMESTAMP_LAG * 3).await;
        first.ended(Ended::Died).await;
        drop(second);
        let left = |path: &str| directory.path().join(path).exists();
        assert!(!left("objects/01/tmp_obj_x") && !left("objects/pack/tmp_pack_1"));
        assert!(left("HEAD.lock") && left("refs/heads/a/b.lock") && left("objects/tmp_objdir-incoming-x"));
    }
}
