//! Settles writes whose intent ran out, looks again at those that were settled, and carries out revocations that a
//! coordinator left undone.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use tokio::time::Instant;

use super::pause;
use crate::{
    app::Shared,
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
        let lease = writes.config.timing.write_lease.0;
        // While we were not running, routers may have had nobody to renew their writes with; they get the time to do it now.
        let mut settle_from = Instant::now() + lease;
        let mut awake = Instant::now();
        while pause(&writes, writes.config.timing.sweep_interval.0).await {
            if awake.elapsed() > lease / 2 {
                settle_from = Instant::now() + lease;
            }
            awake = Instant::now();
            if let Err(error) = settle_expired(&writes, settle_from).await {
                tracing::debug!(%error, "expired writes are not settled");
                // Neither could they while the database was away.
                settle_from = Instant::now() + lease;
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

async fn settle_expired(shared: &Arc<Shared>, from: Instant) -> Result<(), DbError> {
    let db = &shared.db;
    let expired = db.retrying(|| writes::write_list_expired(db.pool(), BATCH, writing::PAUSE)).await?;
    if Instant::now() < from {
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
