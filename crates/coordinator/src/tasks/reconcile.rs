//! Finds what is owed and was forgotten: replicas that are behind without a duty, sites that were not told. Clears what
//! is finished, and refreshes the gauges.

use std::{sync::Arc, time::Duration};

use super::pause;
use crate::{
    app::Shared,
    db::{
        DbError, copies,
        ended_writes::{self, Word},
        geo_log, history,
        outbox::{self, DutyState},
        repositories, routers, storages, writes,
    },
};

/// Duties owed, or removed, in one run.
const BATCH: u32 = 1000;
/// Runs between two counts of everything.
const RUNS_PER_COUNT: u32 = 3;
/// Events removed in one statement, and statements in one run.
const EVENTS: u32 = 10_000;
const PRUNINGS: u32 = 10;
/// How long the end of a write is remembered: recorded by its router's word, far longer than a router asks again; settled,
/// as long as a router that was stopped may be expected back.
const KEEP_ENDED_WRITES: [(Word, Duration); 2] =
    [(Word::Router, Duration::from_secs(600)), (Word::Nobody, Duration::from_secs(24 * 3600))];

pub(super) fn start(shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    shared.tasks.clone().spawn("reconcile", async move {
        let mut run = 0;
        loop {
            if let Err(error) = reconcile(&shared, run % RUNS_PER_COUNT == 0).await {
                tracing::debug!(%error, "not reconciled");
            }
            run += 1;
            if !pause(&shared, shared.config.timing.reconcile_interval.0).await {
                return;
            }
        }
    });
}

async fn reconcile(shared: &Shared, count: bool) -> Result<(), DbError> {
    let db = &shared.db;
    let owed = db.retrying(|| outbox::duty_owe_behind(db.pool(), BATCH)).await?;
    if owed > 0 {
        tracing::info!(owed, "replicas were behind with nothing owed to them");
        shared.bell.notify_one();
    }
    let keep = shared.config.timing.keep_done_duties.0;
    db.retrying(|| outbox::duty_purge(db.pool(), keep, BATCH)).await?;
    let keep = shared.config.repair.keep_history.0;
    db.retrying(|| history::history_purge(db.pool(), keep, BATCH)).await?;
    db.retrying(|| copies::copy_purge_numbers(db.pool(), BATCH)).await?;
    for (word, age) in KEEP_ENDED_WRITES {
        db.retrying(|| ended_writes::ended_write_purge(db.pool(), word, age, EVENTS)).await?;
    }
    prune_geo_log(shared).await?;
    let (me, sessions) = (shared.identity.get(), shared.sessions.routers());
    db.retrying(|| routers::router_set(db.pool(), &me, &sessions)).await?;
    if count {
        gauges(shared).await?;
    }
    Ok(())
}

async fn prune_geo_log(shared: &Shared) -> Result<(), DbError> {
    let db = &shared.db;
    for site in &shared.config.subscribers {
        db.retrying(|| geo_log::subscriber_add(db.pool(), &site.name)).await?;
    }
    // Only what has a position can be told, and pruned.
    db.retrying(|| geo_log::geo_log_place(db)).await?;
    let keep = shared.config.timing.keep_geo_log.0;
    for _ in 0..PRUNINGS {
        if db.retrying(|| geo_log::geo_log_prune(db.pool(), keep, EVENTS)).await? < u64::from(EVENTS) {
            break;
        }
    }
    Ok(())
}

async fn gauges(shared: &Shared) -> Result<(), DbError> {
    let (pool, metrics) = (shared.db.pool(), &shared.metrics);
    for held in repositories::repository_count(pool).await? {
        metrics.repositories(&held.virtual_storage, held.repositories);
    }
    for held in storages::storage_count_replicas(pool).await? {
        metrics.replicas_behind(&held.virtual_storage, &held.storage, held.behind);
    }
    let counts = outbox::duty_count(pool).await?;
    for state in DutyState::ALL.into_iter().filter(|state| *state != DutyState::Done) {
        let count = counts.iter().find(|(counted, _)| *counted == state).map_or(0, |(_, count)| *count);
        metrics.duties(state, count);
    }
    metrics.writes_open.set(writes::write_count(pool).await?);
    metrics.sessions.set(i64::try_from(shared.sessions.routers().len()).unwrap_or(i64::MAX));
    Ok(())
}
