//! One at a time per key, for long work on a repository.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Locks that exist as long as somebody holds or awaits them.
#[derive(Default)]
pub(crate) struct KeyedLocks(Mutex<HashMap<PathBuf, Weak<Semaphore>>>);

/// Held until dropped.
pub(crate) struct KeyedLock {
    _permit: Option<OwnedSemaphorePermit>,
}

impl KeyedLocks {
    /// Waits for the lock of `key`; the caller's own deadline bounds the wait.
    pub(crate) async fn lock(&self, key: &Path) -> KeyedLock {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let existing = locks.get(key).and_then(Weak::upgrade);
            existing.unwrap_or_else(|| {
                let lock = Arc::new(Semaphore::new(1));
                locks.insert(key.to_owned(), Arc::downgrade(&lock));
                lock
            })
        };
        // Never closed, so a permit always comes.
        KeyedLock { _permit: lock.acquire_owned().await.ok() }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_is_held_once_and_forgotten_afterwards() {
        let locks = KeyedLocks::default();
        let held = locks.lock(Path::new("a")).await;
        let _other = locks.lock(Path::new("b")).await;
        let second = tokio::time::timeout(Duration::from_secs(1), locks.lock(Path::new("a"))).await;
        assert!(second.is_err());
        drop(held);
        drop(locks.lock(Path::new("a")).await);
        let _third = locks.lock(Path::new("c")).await;
        assert!(!locks.0.lock().unwrap().contains_key(Path::new("a")));
    }
}
