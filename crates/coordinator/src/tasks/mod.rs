//! What a coordinator does unasked. Each task acts on stored state only, does a bounded piece at a time, and may be run
//! by several coordinators at once.

mod carrier;
pub(crate) mod check;
pub(crate) mod heartbeat;
mod movement;
pub(crate) mod probe;
mod reconcile;
mod relay;
mod sweep;
pub(crate) mod verify;

use std::{sync::Arc, time::Duration};

use tabularium_common::bus::Bus;
use tokio::sync::mpsc;

use crate::{app::Shared, db::revocations};

/// Starts all of them but the heartbeat.
pub(crate) fn start(shared: &Arc<Shared>, bus: &Bus, done_rows: mpsc::Receiver<Vec<i64>>) {
    probe::start(shared);
    relay::start(shared, bus);
    reconcile::start(shared);
    sweep::start(shared);
    movement::start(shared);
    verify::start(shared);
    check::start(shared);
    forget_revocations(shared, done_rows);
}

/// Waits `interval`, less up to a fifth so that coordinators do not march in step. False: the service stops.
async fn pause(shared: &Shared, interval: Duration) -> bool {
    let length = interval.mul_f64(rand::random_range(0.8..=1.0));
    let stopping = shared.tasks.stopping();
    tokio::select! {
        () = tokio::time::sleep(length) => true,
        () = stopping.cancelled() => false,
    }
}

/// Removes the rows of revocations that were carried out, many at a time. What it fails to remove is revoked again.
fn forget_revocations(shared: &Arc<Shared>, mut rows: mpsc::Receiver<Vec<i64>>) {
    /// Finished revocations taken together.
    const BATCH: usize = 256;
    let shared = Arc::clone(shared);
    let stopping = shared.tasks.stopping();
    shared.tasks.clone().spawn("forget-revocations", async move {
        let mut batch = Vec::new();
        loop {
            batch.clear();
            let received = tokio::select! {
                received = rows.recv_many(&mut batch, BATCH) => received,
                () = stopping.cancelled() => return,
            };
            if received == 0 {
                return;
            }
            let ids = batch.concat();
            if ids.is_empty() {
                continue;
            }
            let db = &shared.db;
            if let Err(error) = db.retrying(|| revocations::revocation_done(db.pool(), &ids)).await {
                tracing::debug!(%error, "finished revocations are not recorded");
            }
        }
    });
}
