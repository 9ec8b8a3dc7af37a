//! The life of a copy, from the worker's first question to the moment when the replica is up to date.
//!
//! A copy goes in rounds. The worker copies, and when nothing was written meanwhile the replica is up to date. Otherwise it
//! copies again, which takes less time because less is missing; once a round was short, the next one runs while the copy
//! holds the repository's write ticket, so that nothing can be missing after it. What follows a round is decided by
//! [`duties::after_round`](crate::duties::after_round).
//!
//! A worker that has been given a duty [`start`]s with the first [`mod@round`]; its report ends in [`mod@success`] or in
//! [`mod@failure`].
//!
//! Why no older copy can undo what an up-to-date replica holds: every round has a number, above those of all rounds for that
//! replica before it, and a node runs a copy only when it has seen no higher number, and only when no other copy to the
//! replica runs. That a round's worker reports success means that the node ran it, so whatever older copy is still on its
//! way is refused there. A replica that becomes up to date otherwise, by an operator's word, gets a number of its own
//! ([`mod@fence`]).

mod failure;
mod fence;
mod round;
mod success;

use std::{sync::Arc, time::Duration};

use sqlx::{Postgres, Transaction};
use tabularium_proto::coordinator::{self as wire, finish_duty_response::Disposition};
use uuid::Uuid;

pub(crate) use failure::{failed, retry_or_park};
pub(crate) use fence::fence;
pub(crate) use round::{renew, start};
pub(crate) use success::copied;

use crate::{
    app::Shared,
    db::{
        attempts,
        outbox::{self, Duty, DutyState},
        repositories,
        tickets::{self, DutyTicket},
    },
    records::{self, Vouched},
    repository::{Repository, RepositoryKey, RevokedRoute},
};

/// Of a repository that was removed while it was copied.
const GONE: &str = "the repository is gone";

/// Who reports about which attempt.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub(crate) duty: Uuid,
    pub(crate) worker: String,
    /// 0: the worker does not say.
    pub(crate) attempt: i64,
}

/// What became of a report, as far as the database is concerned.
enum Recorded {
    /// It counts nothing.
    Void,
    /// The worker is to do this; whom else it concerns.
    Answer(Box<Disposition>, Aftermath),
    /// The worker waits while the ticket is asked for.
    WantsTicket(RepositoryKey, Box<Repository>, Box<DutyTicket>),
}

/// What is to be done once a report is recorded.
#[derive(Default)]
struct Aftermath {
    /// Routes that show one up-to-date replica too few, or too many; with what is owed for the latter.
    routes: Vec<RevokedRoute>,
    owed: Vec<i64>,
    /// The ticket was given back.
    freed: Option<RepositoryKey>,
    /// A replica is up to date now.
    promoted: Option<Box<Vouched>>,
}

impl Recorded {
    fn done() -> Self {
        Self::Answer(Box::new(done()), Aftermath::default())
    }
}

pub(crate) fn done() -> Disposition {
    Disposition::Done(wire::DutyDone {})
}

/// Tells others what a recorded report means for them.
fn finish(shared: &Arc<Shared>, recorded: Recorded) -> Disposition {
    match recorded {
        Recorded::Answer(disposition, aftermath) => {
            if let Some(key) = aftermath.freed {
                shared.queues.freed(&key);
            }
            if let Some(promoted) = aftermath.promoted {
                records::note_vouched(shared, *promoted);
            }
            if !aftermath.routes.is_empty() {
                shared.revoke_later(aftermath.routes, aftermath.owed);
            }
            *disposition
        }
        Recorded::Void | Recorded::WantsTicket(..) => done(),
    }
}

/// A report, under the locks of repository and duty.
enum Received {
    /// All that follows from it is done: it counts nothing, the repository is gone, or nobody works on what it is about.
    Over(Recorded),
    /// It is about the round that is under way.
    Counts(Transaction<'static, Postgres>, Box<Repository>, Box<Duty>),
}

async fn receive(shared: &Shared, report: &Report) -> Result<Received, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let nothing = Ok(Received::Over(Recorded::Void));
    let Some(seen) = outbox::duty_find(&mut *transaction, report.duty).await? else { return nothing };
    // Repository before duty, as commits do.
    let repository = repositories::repository_lock_id(&mut transaction, seen.repository_id).await?;
    let Some(duty) = outbox::duty_lock(&mut transaction, report.duty).await? else { return nothing };
    if duty.state != DutyState::Started || duty.worker_id.as_deref() != Some(report.worker.as_str()) {
        // Overtaken: what this worker did may be older than what was recorded since.
        return nothing;
    }
    let Some(repository) = repository else {
        attempts::duty_end_in_txn(&mut transaction, duty.id, GONE).await?;
        outbox::duty_owe_cleanup_after(&mut *transaction, &duty).await?;
        transaction.commit().await?;
        return Ok(Received::Over(Recorded::done()));
    };
    if report.attempt == 0 || duty.copy_attempt == Some(report.attempt) {
        return Ok(Received::Counts(transaction, Box::new(repository), Box::new(duty)));
    }
    // The answer that began the present round was lost.
    let (answer, freed) =
        round::go_on(shared, &mut transaction, &duty, &repository, round::Round::Plain).await?;
    transaction.commit().await?;
    let aftermath = Aftermath { freed, ..Aftermath::default() };
    Ok(Received::Over(Recorded::Answer(Box::new(answer), aftermath)))
}

/// Gives the ticket back if the duty has it; the key of who may be waiting for it.
async fn release(
    transaction: &mut sqlx::PgConnection,
    duty: &Duty,
    repository: &Repository,
) -> Result<Option<RepositoryKey>, sqlx::Error> {
    let worker = duty.worker_id.as_deref().unwrap_or_default();
    let released = tickets::ticket_release_in_txn(transaction, duty.id, worker).await?;
    Ok(released.then(|| repository.key.clone()))
}

pub(crate) fn proto_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}
