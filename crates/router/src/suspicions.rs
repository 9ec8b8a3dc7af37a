//! Replicas that failed a read which another one answered: a coordinator is told, once in a while, and looks for itself.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use http::HeaderValue;
use tabularium_proto::coordinator::ReportReplicaRequest;
use tokio::sync::Semaphore;

use crate::{
    limits::{MAX_SUSPICIONS, REPORT_TIMEOUT, REPORTS_AT_ONCE, SUSPICION_REST},
    relay::Shared,
};

/// What is held against a replica.
#[derive(Debug, Clone)]
pub(crate) struct Suspicion {
    /// Of which repository.
    pub(crate) repository_id: i64,
    /// Where.
    pub(crate) storage: String,
    /// Of the route by which it was read.
    pub(crate) generation: i64,
    /// What it said.
    pub(crate) what: String,
}

/// What was told lately.
pub(crate) struct Suspicions {
    told: Mutex<HashMap<(i64, String), Instant>>,
    under_way: Arc<Semaphore>,
}

impl Default for Suspicions {
    fn default() -> Self {
        Self { told: Mutex::default(), under_way: Arc::new(Semaphore::new(REPORTS_AT_ONCE)) }
    }
}

impl Suspicions {
    /// Whether it is time to tell of this replica, at `now`.
    fn is_due(&self, suspicion: &Suspicion, now: Instant) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = |at: &Instant| now.saturating_duration_since(*at) < SUSPICION_REST;
        let key = (suspicion.repository_id, suspicion.storage.clone());
        if told.get(&key).is_some_and(recent) {
            return false;
        }
        if told.len() >= MAX_SUSPICIONS {
            told.retain(|_, at| recent(at));
        }
        // With as many as that the fault is one that a coordinator knows of already.
        let room = told.len() < MAX_SUSPICIONS;
        if room {
            told.insert(key, now);
        }
        room
    }

    /// Tells a coordinator in the background, unless that was done a short while ago.
    pub(crate) fn tell(&self, shared: &Arc<Shared>, suspicion: Suspicion, correlation: &HeaderValue) {
        shared.metrics.suspicions.inc();
        let Ok(place) = Arc::clone(&self.under_way).try_acquire_owned() else { return };
        if !self.is_due(&suspicion, Instant::now()) {
            return;
        }
        let Suspicion { repository_id, storage, generation, what } = suspicion;
        tracing::warn!(repository_id, storage, what, "a replica failed a read that another one answered");
        let request = ReportReplicaRequest { repository_id, storage, generation, what };
        let (coordinators, correlation) = (shared.coordinators.clone(), correlation.clone());
        shared.tasks.spawn("report replica", async move {
            let _place = place;
            let told = coordinators.call(
                Some(&correlation),
                REPORT_TIMEOUT,
                request,
                |mut client, request| async move { client.report_replica(request).await },
            );
            if let Err(error) = told.await {
                tracing::info!(repository_id, error = error.message(), "no coordinator took a suspicion");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_told_of_once_in_a_while_and_many_are_not() {
        let suspicions = Suspicions::default();
        let of = |repository_id, storage: &str| Suspicion {
            repository_id,
            storage: storage.to_owned(),
            generation: 1,
            what: String::new(),
        };
        let now = Instant::now();
        assert!(suspicions.is_due(&of(1, "a"), now));
        assert!(!suspicions.is_due(&of(1, "a"), now));
        assert!(suspicions.is_due(&of(1, "b"), now));
        assert!(suspicions.is_due(&of(1, "a"), now + SUSPICION_REST));
        let due = (2..).take(2 * MAX_SUSPICIONS).filter(|id| suspicions.is_due(&of(*id, "a"), now)).count();
        assert_eq!(due, MAX_SUSPICIONS - 2);
        assert!(suspicions.is_due(&of(9999, "b"), now + 2 * SUSPICION_REST));
    }
}
