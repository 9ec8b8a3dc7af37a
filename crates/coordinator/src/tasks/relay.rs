//! Tells the bus what the outbox owes. Takes duties that are pending, those published long ago without a result, and
//! mirrors that wait to be fetched; a message says only which row to look at. Without the bus everything stays in the
//! outbox and nothing is lost.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tabularium_common::{
    bus::{Bus, Link},
    duties::{self as subjects, BODY_VERSION, Class, DutyMessage, SyncEvent, SyncMessage},
    ids::SiteName,
};
use tokio::time::Instant;
use uuid::Uuid;

use super::carrier::{Carrier, CarrierError, Envelope};
use crate::{
    app::Shared,
    db::{
        DbError, geo_registry,
        outbox::{self, Duty, DutyKind},
        publications,
    },
    duties::back_off,
    service::subject,
};

/// Duties published at once.
const BATCH: u32 = 256;
/// Pauses after failures to publish: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often lost messages are looked for.
const STALE_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Database(#[from] DbError),
    #[error("message bus: {0}")]
    Bus(#[from] CarrierError),
}

struct Relay {
    shared: Arc<Shared>,
    carrier: Carrier,
    /// What carries messages is known to be ready; looked at again after every failure, and now and then.
    ready: bool,
    /// What the bus may have forgotten, and is to be told again.
    lost: HashSet<Class>,
    stale_at: Instant,
}

pub(super) fn start(shared: &Arc<Shared>, bus: &Bus) {
    let stale_at = Instant::now() + STALE_INTERVAL;
    let mut relay = Relay {
        shared: Arc::clone(shared),
        carrier: Carrier::new(bus),
        ready: false,
        lost: HashSet::new(),
        stale_at,
    };
    shared.tasks.spawn("relay", async move { relay.run().await });
}

impl Relay {
    async fn run(&mut self) {
        let shared = Arc::clone(&self.shared);
        let stopping = shared.tasks.stopping();
        let mut link = shared.link.clone();
        let mut failures = 0;
        let (mut changed, mut was_up) = (false, false);
        loop {
            changed |= link.has_changed().unwrap_or(false);
            let up = *link.borrow_and_update() == Link::Up;
            if up && std::mem::take(&mut changed) && std::mem::replace(&mut was_up, true) {
                // The server may be another one, or the same with an empty disk.
                self.ready = false;
                self.lost.extend(Class::ALL);
            }
            shared.metrics.bus_connected.set(i64::from(up));
            let outcome = if up { self.turn().await } else { Ok(false) };
            let wait = match outcome {
                Ok(true) => continue,
                Ok(false) => {
                    failures = 0;
                    shared.config.timing.relay_interval.0
                }
                Err(error) => {
                    failures += 1;
                    self.ready = false;
                    tracing::warn!(%error, failures, "duties are not published");
                    let wait = back_off(failures, FIRST_PAUSE, LONGEST_PAUSE, &mut rand::rng());
                    // A bell does not shorten a pause after a failure.
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = stopping.cancelled() => return,
                    }
                    continue;
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = shared.bell.notified() => {}
                _ = link.changed() => changed = true,
                () = stopping.cancelled() => return,
            }
        }
    }

    /// Makes ready what carries messages, and notes what it lost.
    async fn prepare(&mut self) -> Result<(), RelayError> {
        self.carrier.prepare(&mut self.lost).await?;
        self.ready = true;
        Ok(())
    }

    /// Publishes once more what the bus was told and may have forgotten.
    async fn publish_lost(&mut self) -> Result<(), RelayError> {
        let found = Instant::now();
        let db = &self.shared.db;
        for class in self.lost.clone() {
            let kind = match class {
                Class::Replication => DutyKind::Replicate,
                Class::Cleanup => DutyKind::Cleanup,
                Class::GeoNotify => DutyKind::Notify,
                Class::GeoSync => {
                    // What is published here changes, so that it is older than `found` once only.
                    while self.publish_mirrors(found.elapsed()).await? {}
                    self.lost.remove(&class);
                    continue;
                }
            };
            loop {
                let age = found.elapsed();
                let lost =
                    db.retrying(|| publications::duty_republish_lost(db.pool(), kind, age, BATCH)).await?;
                let full = lost.len() == BATCH as usize;
                if !lost.is_empty() {
                    tracing::info!(
                        ?class,
                        duties = lost.len(),
                        "the bus may have forgotten duties; told again"
                    );
                }
                self.publish(lost).await?;
                if !full {
                    break;
                }
            }
            self.lost.remove(&class);
        }
        Ok(())
    }

    /// One round. True: there may be more to do at once.
    async fn turn(&mut self) -> Result<bool, RelayError> {
        if !self.ready {
            self.prepare().await?;
        }
        if !self.lost.is_empty() {
            self.publish_lost().await?;
        }
        let db = &self.shared.db;
        let sites: Vec<SiteName> =
            self.shared.config.subscribers.iter().map(|site| site.name.clone()).collect();
        if !sites.is_empty() {
            db.retrying(|| outbox::duty_owe_notifications(db.pool(), &sites)).await?;
        }
        let pause = self.shared.config.repair.parked_pause.0;
        let due = db.retrying(|| publications::duty_claim_pending(db.pool(), BATCH, pause)).await?;
        let full = due.len() == BATCH as usize;
        self.publish(due).await?;
        if Instant::now() >= self.stale_at {
            self.stale_at = Instant::now() + STALE_INTERVAL;
            self.prepare().await?;
            self.publish_again().await?;
        }
        Ok(full)
    }

    async fn publish_again(&self) -> Result<(), RelayError> {
        let db = &self.shared.db;
        let timing = &self.shared.config.timing;
        let (published, started) = (timing.republish_after.0, timing.restart_after.0);
        let lapsed = self.shared.config.repair.lease.0;
        let stale = db
            .retrying(|| publications::duty_republish_stale(db.pool(), published, started, lapsed, BATCH))
            .await?;
        self.publish(stale).await?;
        self.publish_mirrors(published).await.map(drop)
    }

    /// Asks again for mirrors that have waited longer than `age`. True: there may be more of them.
    async fn publish_mirrors(&self, age: Duration) -> Result<bool, RelayError> {
        let db = &self.shared.db;
        let forgotten = db.retrying(|| geo_registry::mirror_list_forgotten(db.pool(), age, BATCH)).await?;
        let full = forgotten.len() == BATCH as usize;
        for mirror in forgotten {
            let event_id = Uuid::now_v7();
            let message = SyncMessage {
                version: BODY_VERSION,
                event_id,
                home_site: mirror.home_site,
                virtual_storage: mirror.key.virtual_storage,
                relative_path: mirror.key.relative_path,
                event: SyncEvent::Updated,
            };
            let envelope = Envelope {
                class: Class::GeoSync,
                subject: subjects::sync_subject(&message.home_site, &message.relative_path),
                message_id: event_id.to_string(),
                correlation_id: "",
            };
            self.carrier.send(envelope, &message).await?;
        }
        Ok(full)
    }

    /// Publishes duties that are marked published already; those that fail go back.
    async fn publish(&self, duties: Vec<Duty>) -> Result<(), RelayError> {
        let sent = futures::future::join_all(duties.iter().map(|duty| self.publish_one(duty))).await;
        let mut failed = Vec::new();
        let mut problem = None;
        for (duty, outcome) in duties.iter().zip(sent) {
            if let Err(error) = outcome {
                failed.push(duty.id);
                problem = Some(error);
            }
        }
        self.shared.metrics.duties_published(duties.len() - failed.len());
        let Some(problem) = problem else { return Ok(()) };
        let db = &self.shared.db;
        db.retrying(|| publications::duty_unpublish(db.pool(), &failed, FIRST_PAUSE)).await?;
        Err(problem)
    }

    async fn publish_one(&self, duty: &Duty) -> Result<(), RelayError> {
        let class = match duty.kind {
            DutyKind::Replicate => Class::Replication,
            DutyKind::Cleanup => Class::Cleanup,
            DutyKind::Notify => Class::GeoNotify,
        };
        let envelope = Envelope {
            class,
            subject: subject(duty).map_err(DbError::from)?,
            message_id: format!("{}:{}", duty.id, duty.publications),
            correlation_id: &duty.correlation_id,
        };
        Ok(self.carrier.send(envelope, &DutyMessage { version: BODY_VERSION, duty_id: duty.id }).await?)
    }
}
