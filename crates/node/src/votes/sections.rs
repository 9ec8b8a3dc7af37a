//! Critical sections: from before a replica votes for a change until the change is made or given up.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

/// The sections of all replicas, by their directories. Any number of changes may be in theirs at once; whoever wants
/// the replica still waits for all of them and holds off new ones.
#[derive(Default)]
pub(crate) struct Sections(Mutex<HashMap<PathBuf, Weak<RwLock<()>>>>);

/// A change is being decided or made until this is dropped.
pub(crate) struct Section {
    _within: OwnedRwLockReadGuard<()>,
}

/// No change is made until this is dropped.
pub(crate) struct Stillness {
    _alone: OwnedRwLockWriteGuard<()>,
}

impl Sections {
    fn of(&self, replica: &Path) -> Arc<RwLock<()>> {
        let mut sections = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sections.retain(|_, section| section.strong_count() > 0);
        let existing = sections.get(replica).and_then(Weak::upgrade);
        existing.unwrap_or_else(|| {
            let section = Arc::new(RwLock::new(()));
            sections.insert(replica.to_owned(), Arc::downgrade(&section));
            section
        })
    }

    /// Enters a section; waits while the replica is kept still, whose holder bounds that.
    pub(crate) async fn enter(&self, replica: &Path) -> Section {
        Section { _within: self.of(replica).read_owned().await }
    }

    /// Waits until no change is decided or made; the caller's own deadline bounds the wait.
    pub(crate) async fn still(&self, replica: &Path) -> Stillness {
        Stillness { _alone: self.of(replica).write_owned().await }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn stillness_waits_for_sections_and_holds_off_new_ones() {
        let sections = Sections::default();
        let (a, second) = (Path::new("a"), Duration::from_secs(1));
        let one = sections.enter(a).await;
        let other = timeout(second, sections.enter(a)).await.expect("sections do not exclude each other");
        drop(timeout(second, sections.still(Path::new("b"))).await.expect("another replica's"));
        assert!(timeout(second, sections.still(a)).await.is_err());
        drop(one);
        assert!(timeout(second, sections.still(a)).await.is_err());
        drop(other);
        let still = sections.still(a).await;
        assert!(timeout(second, sections.enter(a)).await.is_err());
        drop(still);
        drop(sections.enter(a).await);
        drop(sections.enter(Path::new("c")).await);
        assert!(!sections.0.lock().unwrap().contains_key(a), "forgotten afterwards");
    }
}
