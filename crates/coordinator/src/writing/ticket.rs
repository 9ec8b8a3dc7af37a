//! Waiting for a repository's write ticket.

use std::{sync::Arc, time::Duration};

use tabularium_common::{
    faults::{CrashPoint, crash_point},
    ids::RepositoryId,
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    app::Shared,
    db::tickets::{self, DutyTicket},
    error::WriteError,
    repository::RepositoryKey,
};

/// How long it takes at least until there is hope for one that came too early.
const NOT_YET: Duration = Duration::from_millis(100);

/// What became of one try for the ticket.
pub(super) enum Try<T> {
    /// It is ours, or nobody will have it.
    Over(T),
    /// Somebody has it.
    Held,
    /// It could be had, and would be of no use yet; at last this is why.
    NotYet(WriteError),
}

/// Tries for the ticket of `key` in the order of arrival, until a try is over or `wait` is, or the
/// caller has hung up.
pub(super) async fn take<T, F, Fut>(
    shared: &Shared,
    key: &RepositoryKey,
    wait: Duration,
    hung_up: &CancellationToken,
    mut attempt: F,
) -> Result<T, WriteError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Try<T>, WriteError>>,
{
    let deadline = Instant::now() + wait.min(shared.config.timing.ticket_wait.0);
    let next_turn = || async {
        tokio::select! {
            turn = shared.queues.turn(key, deadline) => turn.map_err(WriteError::from),
            () = hung_up.cancelled() => Err(WriteError::Busy),
        }
    };
    let mut turn = next_turn().await?;
    loop {
        // Looked at between attempts, not in the middle of one: what was begun must be known.
        if hung_up.is_cancelled() {
            return Err(WriteError::Busy);
        }
        match attempt().await? {
            Try::Over(outcome) => {
                crash_point(CrashPoint::CoordinatorAfterBegin);
                return Ok(outcome);
            }
            Try::Held => turn.try_again(deadline).await?,
            Try::NotYet(error) => {
                if Instant::now() + NOT_YET >= deadline {
                    return Err(error);
                }
                // What it waits for may be behind it in the queue: a copy whose last round needs the ticket.
                drop(turn);
                sleep(NOT_YET).await;
                turn = match next_turn().await {
                    Ok(turn) => turn,
                    Err(_) if Instant::now() >= deadline => return Err(error),
                    Err(busy) => return Err(busy),
                };
            }
        }
    }
}

/// Takes the ticket for a duty, in the same queue as writes. False: the repository is gone. `WriteError::Busy`: it did not
/// become free in time. Renewed by [`tickets::ticket_renew`] and given back by [`tickets::ticket_release_in_txn`], after
/// whose commit the caller rings `shared.queues.freed(key)`. When it runs out, the target's replica becomes unknown.
pub(crate) async fn take_for_duty(
    shared: &Arc<Shared>,
    key: &RepositoryKey,
    repository: RepositoryId,
    ticket: &DutyTicket,
    wait: Duration,
) -> Result<bool, WriteError> {
    let db = &shared.db;
    take(shared, key, wait, &shared.tasks.stopping(), || async move {
        let taken = db.retrying(|| tickets::ticket_take(db.pool(), repository, ticket)).await?;
        Ok(match taken {
            Some(true) => Try::Over(true),
            Some(false) => Try::Held,
            None => Try::Over(false),
        })
    })
    .await
}
