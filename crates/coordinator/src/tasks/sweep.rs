//! Settles writes whose intent ran out, looks again at those that were settled, and carries out revocations that a
//! coordinator left undone.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use tokio::time::Instant;

use super::pause;
use crate::{
    app::Shared,
    config::MAX_WRITE_LEASE,
    database_clock::{DatabaseClock, Reading},
    db::{DbError, ended_writes, revocations, writes},
    leases::with_drift,
    writing::{self, Doubt},
};

/// Intents settled, and revocations carried out, in one run.
const BATCH: u32 = 256;
/// Of those at once.
const AT_ONCE: usize = 8;

pub(super) fn start(shared: &Arc<Shared>) {
    let writes = Arc::clone(shared);
    shared.tasks.spawn("sweep-writes", async move {
        let mut judge = Judge::new(writes.config.timing.write_lease.0);
        while pause(&writes, writes.config.timing.sweep_interval.0).await {
            if let Err(error) = settle_expired(&writes, &mut judge).await {
                tracing::debug!(%error, "expired writes are not settled");
                judge.defer();
            }
            if let Err(error) = reconsider_settled(&writes).await {
                tracing::debug!(%error, "settled writes are not looked at again");
            }
        }
    });
    let routes = Arc::clone(shared);
    shared.tasks.spawn("sweep-revocations", async move {
        while pause(&routes, routes.config.timing.router_lease.0).await {
            if let Err(error) = carry_out_owed(&routes).await {
                tracing::debug!(%error, "owed revocations are not carried out");
            }
        }
    });
}

/// When to believe the database that a write's lease is over.
struct Judge {
    lease: Duration,
    /// Until then nothing is settled.
    from: Instant,
    awake: Instant,
    clock: DatabaseClock,
    origin: Instant,
    /// No lease that began by the clock as it was may stand for longer.
    shorten: bool,
}

impl Judge {
    fn new(lease: Duration) -> Self {
        let now = Instant::now();
        let clock = DatabaseClock::new(lease);
        Self { lease, from: now + lease, awake: now, clock, origin: now, shorten: true }
    }

    /// Routers may have had nobody to renew their writes with: we were not running, or the database was away. They get the
    /// time to do it now.
    fn defer(&mut self) {
        self.from = Instant::now() + self.lease;
    }

    /// Also when leases ended before their time, or last longer, because the database's clock was stepped.
    fn looked(&mut self, asked: Instant, shown: i64) {
        if self.awake.elapsed() > self.lease / 2 {
            self.defer();
        }
        self.awake = Instant::now();
        let reading = Reading { asked: asked - self.origin, answered: self.awake - self.origin, shown };
        if self.clock.stepped(reading) {
            tracing::warn!("the database's clock was stepped; no write is settled for the time of a lease");
            self.defer();
            self.shorten = true;
        }
    }
}

async fn settle_expired(shared: &Arc<Shared>, judge: &mut Judge) -> Result<(), DbError> {
    let db = &shared.db;
    let asked = Instant::now();
    let (clock, expired) =
        db.retrying(|| writes::write_list_expired(db.pool(), BATCH, writing::PAUSE)).await?;
    judge.looked(asked, clock);
    if judge.shorten {
        db.retrying(|| writes::write_shorten(db.pool(), MAX_WRITE_LEASE)).await?;
        judge.shorten = false;
    }
    if Instant::now() < judge.from {
        return Ok(());
    }
    futures::stream::iter(expired)
        .for_each_concurrent(AT_ONCE, |id| async move {
            if let Err(error) = writing::settle(shared, id, &Doubt::Expired).await {
                tracing::warn!(write_id = %id, %error, "expired write is not settled");
            }
        })
        .await;
    Ok(())
}

/// A node that was cut off from its router may have gone on for a while with a write that was settled.
async fn reconsider_settled(shared: &Arc<Shared>) -> Result<(), DbError> {
    let (db, age) = (&shared.db, shared.config.timing.settle_again_after.0);
    let doubtful = db.retrying(|| ended_writes::ended_write_list_doubtful(db.pool(), age, BATCH)).await?;
    futures::stream::iter(doubtful)
        .for_each_concurrent(AT_ONCE, |id| async move {
            if let Err(error) = writing::look_again(shared, id).await {
                tracing::warn!(write_id = %id, %error, "settled write is not looked at again");
            }
        })
        .await;
    Ok(())
}

/// Those owed for longer than the one who owes them takes when all goes badly.
async fn carry_out_owed(shared: &Arc<Shared>) -> Result<(), DbError> {
    let timing = &shared.config.timing;
    let age: Duration = with_drift(timing.coordinator_lease.0 + timing.router_lease.0);
    let db = &shared.db;
    let owed = db.retrying(|| revocations::revocation_list_stale(db.pool(), age, BATCH)).await?;
    if owed.is_empty() {
        return Ok(());
    }
    let (routes, rows): (Vec<_>, Vec<_>) = owed.into_iter().unzip();
    shared.revoker.revoke(&routes, rows).await
}
