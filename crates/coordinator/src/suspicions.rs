//! Replicas that routers suspect: which reports are a reason to look, and how often.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tabularium_common::ids::RepositoryId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long after a look at a repository reports of it are no reason for another one.
const REST: Duration = Duration::from_secs(5);
/// Repositories remembered; reports of more are dropped. Readers report again.
const MOST: usize = 256;
/// Repositories looked at at once.
const AT_ONCE: usize = 4;

/// What was looked at lately.
pub(crate) struct Suspicions {
    looked: Mutex<HashMap<RepositoryId, Instant>>,
    places: Arc<Semaphore>,
}

impl Default for Suspicions {
    fn default() -> Self {
        Self { looked: Mutex::default(), places: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl Suspicions {
    /// The right to look at a repository at `now`, if it is time for it.
    pub(crate) fn admit(&self, id: RepositoryId, now: Instant) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        looked.retain(|_, at| now.saturating_duration_since(*at) < REST);
        if looked.contains_key(&id) || looked.len() >= MOST {
            return None;
        }
        looked.insert(id, now);
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_look_at_a_time_and_a_few_over_all() {
        let suspicions = Suspicions::default();
        let now = Instant::now();
        let first = suspicions.admit(RepositoryId(1), now);
        assert!(first.is_some());
        assert!(suspicions.admit(RepositoryId(1), now).is_none());
        assert!(suspicions.admit(RepositoryId(1), now + REST).is_some());
        let others: Vec<_> = (2..9).filter_map(|id| suspicions.admit(RepositoryId(id), now)).collect();
        assert_eq!(others.len(), AT_ONCE - 1);
        drop((first, others));
        let many = (10..).take(2 * MOST).filter(|id| suspicions.admit(RepositoryId(*id), now).is_some());
        assert!(many.count() < MOST);
    }
}
