//! What a killed git process leaves in a repository: lock files that would refuse every later write, quarantines and
//! half-written packs that would only cost space.
//!
//! Git takes these away itself when it may; this is for when it was killed outright. Nothing is removed while another
//! process writes in the repository, because what belongs to whom cannot be told.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

/// Margin between the clock and file time stamps, which lag it by up to one kernel tick.
const TIMESTAMP_LAG: Duration = Duration::from_millis(20);

/// How many processes write in each repository.
#[derive(Default)]
pub(crate) struct Writers(Mutex<HashMap<PathBuf, Usage>>);

#[derive(Default)]
struct Usage {
    writers: usize,
    killed: bool,
}

/// One process that writes.
pub(crate) struct WriterGuard {
    writers: Arc<Writers>,
    path: PathBuf,
}

impl Writers {
    /// Counts one more writer of the repository at `path`.
    pub(crate) fn enter(self: &Arc<Self>, path: &Path) -> WriterGuard {
        let mut usages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        usages.entry(path.to_owned()).or_default().writers += 1;
        WriterGuard { writers: Arc::clone(self), path: path.to_owned() }
    }

    /// One writer less; true when it was the last and one of them was killed.
    fn leave(&self, path: &Path) -> bool {
        let mut usages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(usage) = usages.get_mut(path) else { return false };
        usage.writers = usage.writers.saturating_sub(1);
        usage.writers == 0 && usages.remove(path).is_some_and(|usage| usage.killed)
    }
}

impl WriterGuard {
    /// The process did not end by itself. If it was the last writer, what it left is removed before this returns.
    pub(crate) async fn killed(self) {
        if let Some(usage) = self.writers.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&self.path)
        {
            usage.killed = true;
        }
        let swept = tokio::task::spawn_blocking(move || drop(self)).await;
        if let Err(error) = swept {
            tracing::warn!(%error, "sweeping after a killed git process");
        }
    }
}

impl Drop for WriterGuard {
    fn drop(&mut self) {
        if self.writers.leave(&self.path) {
            let before = SystemTime::now() - TIMESTAMP_LAG;
            if let Err(error) = sweep(&self.path, before) {
                tracing::warn!(%error, path = %self.path.display(), "sweeping after a killed git process");
            }
        }
    }
}

/// Removes what no running process can own: lock files, quarantines and temporary packs last changed before `before`.
pub(crate) fn sweep(repository: &Path, before: SystemTime) -> io::Result<usize> {
    let mut removed = 0;
    for name in ["HEAD.lock", "packed-refs.lock", "packed-refs.new", "config.lock", "shallow.lock"] {
        removed += usize::from(remove_if_older(&repository.join(name), before)?);
    }
    removed += sweep_locks(&repository.join("refs"), before)?;
    let objects = repository.join("objects");
    for entry in entries(&objects)? {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("tmp_objdir-") || name.starts_with("incoming-") {
            removed += usize::from(remove_if_older(&entry.path(), before)?);
        }
    }
    for directory in ["pack", "info", "info/commit-graphs"] {
        for entry in entries(&objects.join(directory))? {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if (directory == "pack" && name.starts_with("tmp_")) || name.ends_with(".lock") {
                removed += usize::from(remove_if_older(&entry.path(), before)?);
            }
        }
    }
    Ok(removed)
}

fn sweep_locks(directory: &Path, before: SystemTime) -> io::Result<usize> {
    let mut removed = 0;
    for entry in entries(directory)? {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            removed += sweep_locks(&path, before)?;
        } else if path.extension().is_some_and(|extension| extension == "lock") {
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
            tracing::info!(path = %path.display(), "removed what a killed git process left");
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
        for path in ["refs/heads/a", "objects/tmp_objdir-incoming-x", "objects/pack"] {
            fs::create_dir_all(directory.path().join(path)).unwrap();
        }
        for file in ["HEAD", "HEAD.lock", "refs/heads/a/b.lock", "refs/heads/a/b", "objects/pack/tmp_pack_1"]
        {
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
        assert_eq!(sweep(directory.path(), future).unwrap(), 4);
        assert!(directory.path().join("HEAD").exists() && directory.path().join("refs/heads/a/b").exists());
    }

    #[tokio::test]
    async fn nothing_goes_while_somebody_writes() {
        let directory = repository();
        let lock = directory.path().join("HEAD.lock");
        let writers = Arc::new(Writers::default());
        let first = writers.enter(directory.path());
        let second = writers.enter(directory.path());
        tokio::time::sleep(TIMESTAMP_LAG * 3).await;
        first.killed().await;
        assert!(lock.exists());
        drop(second);
        assert!(!lock.exists());
        assert!(writers.0.lock().unwrap().is_empty());
    }
}
