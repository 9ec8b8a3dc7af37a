//! The life of a copy, from the worker's first question to the moment when the replica is up to date.
//!
//! A copy goes in rounds. The worker copies, and when nothing was written meanwhile the replica is up to date. Otherwise it
//! copies again, which takes less time because less is missing; once a round was short, the next one runs while the copy
//! holds the repository's write ticket, so that nothing can be missing after it. What follows a round is decided by
//! [`duties::after_round`].
//!
//! Why no older copy can undo what an up-to-date replica holds: every round has a number, above those of all rounds for that
//! replica before it, and a node runs a copy only when it has seen no higher number, and only when no other copy to the
//! replica runs. That a round's worker reports success means that the node ran it, so whatever older copy is still on its
//! way is refused there.

use std::{sync::Arc, time::Duration};

use tabularium_common::ids::{Generation, StorageName};
use tabularium_proto::coordinator::{self as wire, finish_duty_response::Disposition};
use tonic::Status;
use uuid::Uuid;

use crate::{
    app::Shared,
    db::{
        DbError, copies,
        copies::RoundStart,
        history::{self, End},
        outbox::{self, Duty, DutyState},
        replicas, repositories, revocations,
        tickets::{self, DutyTicket},
    },
    duties::{self, AfterFailure, AfterRound, RoundEnd, Ticket},
    error::WriteError,
    records::{self, Vouched},
    repository::{Repository, RepositoryKey, RevokedRoute},
    service::storage_address,
    writing,
};

/// Of a repository that was removed while it was copied.
const GONE: &str = "the repository is gone";
/// Of a replica that needs no copy.
const NOTHING_NEWER: &str = "there is nothing newer to copy";

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

/// Hands a copy to a worker that has been given the duty. An error is why there is nothing to do.
pub(crate) async fn start(
    shared: &Shared,
    transaction: &mut sqlx::PgConnection,
    duty: &Duty,
) -> Result<Result<wire::ReplicateWork, &'static str>, sqlx::Error> {
    let found = repositories::repository_find(&mut *transaction, duty.repository_id).await?;
    let Some(repository) = found else {
        if duty.attempts > 0 {
            outbox::duty_owe_cleanup_after(transaction, duty).await?;
        }
        return Ok(Err(GONE));
    };
    let round = begin_round(shared, transaction, duty, &repository, Round::Plain).await?;
    Ok(round.ok_or(NOTHING_NEWER))
}

/// What kind of round begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    Plain,
    /// The ticket was not to be had, or not for long enough.
    PlainWithoutTicket,
    UnderTicket,
}

/// Begins a round: generation and epoch are read before anything is copied. `None`: there is nothing to copy.
async fn begin_round(
    shared: &Shared,
    transaction: &mut sqlx::PgConnection,
    duty: &Duty,
    repository: &Repository,
    round: Round,
) -> Result<Option<wire::ReplicateWork>, sqlx::Error> {
    let target = outbox::target_storage(duty)?;
    let virtual_storage = &repository.key.virtual_storage;
    let healthy = |storage: &StorageName| shared.health.is_healthy(virtual_storage, storage);
    let source = duties::source(repository, &target, &duty.bad_sources, healthy, &mut rand::rng());
    let Some(source) = source else { return Ok(None) };
    let under_ticket = round == Round::UnderTicket;
    let lease = if under_ticket { ticket_lease(shared) } else { shared.config.repair.lease.0 };
    let copy_attempt = copies::copy_number_in_txn(transaction, repository.id, &target).await?;
    let start = RoundStart {
        generation: source.generation,
        epoch: repository.epoch,
        source: &source.storage,
        copy_attempt,
        under_ticket,
        lease,
        lost_ticket: round == Round::PlainWithoutTicket,
    };
    copies::copy_begin_round_in_txn(transaction, duty.id, &start).await?;
    let address = |storage: &StorageName| storage_address(shared, virtual_storage, storage);
    Ok(Some(wire::ReplicateWork {
        repository_id: repository.id.0,
        virtual_storage: virtual_storage.to_string(),
        relative_path: repository.key.relative_path.to_string(),
        replica_path: repository.replica_path.to_string(),
        source: Some(address(&source.storage)),
        target: Some(address(&target)),
        generation: source.generation.0,
        attempt: copy_attempt,
        lease_milliseconds: proto_milliseconds(lease),
        under_ticket,
        deadline_milliseconds: if under_ticket {
            proto_milliseconds(shared.config.repair.ticket_round.0)
        } else {
            0
        },
        witness: duties::witness(repository, &source.storage, healthy).map(address),
    }))
}

fn proto_milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// How long nobody may write after the worker of a round under the ticket fell silent.
fn ticket_lease(shared: &Shared) -> Duration {
    shared.config.repair.lease.0.min(shared.config.timing.write_lease.0)
}

/// Keeps a copy, and the ticket that it may hold, with its worker. False: it is the worker's no more.
pub(crate) async fn renew(shared: &Shared, id: Uuid, worker: &str) -> Result<bool, DbError> {
    let (db, lease) = (&shared.db, shared.config.repair.lease.0);
    let Some(round) = db.retrying(|| copies::copy_renew(db.pool(), id, worker, lease)).await? else {
        return Ok(false);
    };
    if !round.under_ticket || round.running > shared.config.repair.ticket_round.0 {
        // A round that is over its time is not helped to keep others from writing.
        return Ok(true);
    }
    db.retrying(|| tickets::ticket_renew(db.pool(), id, worker, ticket_lease(shared))).await
}

/// A worker has copied. Runs to its end also when the worker hangs up: it may hold the ticket.
pub(crate) async fn copied(shared: &Arc<Shared>, report: Report) -> Result<Disposition, Status> {
    let task = {
        let shared = Arc::clone(shared);
        async move { copied_to_its_end(&shared, &report).await }
    };
    let ended = shared.tasks.spawn("copy-round", task).await;
    Ok(ended.map_err(|error| Status::internal(error.to_string()))??)
}

async fn copied_to_its_end(shared: &Arc<Shared>, report: &Report) -> Result<Disposition, WriteError> {
    let recorded = shared.db.retrying(|| record_round(shared, report, Asked::No)).await?;
    let recorded = match recorded {
        Recorded::WantsTicket(key, repository, ticket) => {
            let wait = shared.config.repair.ticket_wait.0;
            let taken = writing::take_for_duty(shared, &key, repository.id, &ticket, wait).await;
            let asked = match taken {
                Ok(true) => Asked::Taken,
                Ok(false) | Err(WriteError::Busy) => Asked::Refused,
                Err(error) => return Err(error),
            };
            shared.db.retrying(|| record_round(shared, report, asked)).await?
        }
        recorded => recorded,
    };
    Ok(finish(shared, recorded))
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

/// Whether the ticket was asked for after the round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    No,
    Taken,
    Refused,
}

/// A duty that its worker may report about, under the locks of repository and duty.
enum Mine {
    No,
    /// The repository is gone.
    Gone(Duty),
    Yes(Box<Repository>, Duty),
}

async fn lock_mine(transaction: &mut sqlx::PgConnection, report: &Report) -> Result<Mine, sqlx::Error> {
    let Some(seen) = outbox::duty_find(&mut *transaction, report.duty).await? else { return Ok(Mine::No) };
    // Repository before duty, as commits do.
    let repository = repositories::repository_lock_id(transaction, seen.repository_id).await?;
    let Some(duty) = outbox::duty_lock(transaction, report.duty).await? else { return Ok(Mine::No) };
    if duty.state != DutyState::Started || duty.worker_id.as_deref() != Some(report.worker.as_str()) {
        // Overtaken: what this worker did may be older than what was recorded since.
        return Ok(Mine::No);
    }
    Ok(match repository {
        Some(repository) => Mine::Yes(Box::new(repository), duty),
        None => Mine::Gone(duty),
    })
}

/// Another round begins, or the duty ends because nothing is to be copied any more.
async fn go_on(
    shared: &Shared,
    transaction: &mut sqlx::PgConnection,
    duty: &Duty,
    repository: &Repository,
    round: Round,
) -> Result<Disposition, sqlx::Error> {
    if let Some(work) = begin_round(shared, transaction, duty, repository, round).await? {
        return Ok(Disposition::AnotherRound(work));
    }
    outbox::duty_end_in_txn(transaction, duty.id, NOTHING_NEWER).await?;
    Ok(done())
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

/// Records a round and decides what follows.
async fn record_round(shared: &Shared, report: &Report, asked: Asked) -> Result<Recorded, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let (repository, duty) = match lock_mine(&mut transaction, report).await? {
        Mine::No => return Ok(Recorded::Void),
        Mine::Gone(duty) => {
            outbox::duty_end_in_txn(&mut transaction, duty.id, GONE).await?;
            outbox::duty_owe_cleanup_after(&mut *transaction, &duty).await?;
            transaction.commit().await?;
            return Ok(Recorded::done());
        }
        Mine::Yes(repository, duty) => (repository, duty),
    };
    if report.attempt != 0 && duty.copy_attempt != Some(report.attempt) {
        // The answer that began the present round was lost: nobody works on it.
        let freed = release(&mut transaction, &duty, &repository).await?;
        let answer = go_on(shared, &mut transaction, &duty, &repository, Round::Plain).await?;
        transaction.commit().await?;
        return Ok(Recorded::Answer(Box::new(answer), Aftermath { freed, ..Aftermath::default() }));
    }
    let target = outbox::target_storage(&duty)?;
    let copied = duty.generation.unwrap_or(Generation::UNKNOWN);
    let ticket = match copies::copy_find_ticket_in_txn(&mut transaction, repository.id).await? {
        None => Ticket::Free,
        Some(holder) if holder == duty.id => Ticket::Ours,
        Some(_) => Ticket::Others,
    };
    let source = duty.source.as_ref().and_then(|source| repository.replica(source));
    let end = RoundEnd {
        copied: (copied, duty.epoch.unwrap_or(repository.epoch)),
        present: (repository.generation, repository.epoch),
        ticket,
        source_stands: source.is_some_and(|source| source.generation >= copied),
        took: duty.round_took,
        rounds: duty.rounds,
        tickets_lost: duty.tickets_lost,
        asked: asked != Asked::No,
    };
    let after = duties::after_round(&end, &shared.config.repair);
    if asked == Asked::No {
        let outcome = if after == AfterRound::Promote { End::Done } else { End::Round };
        history::history_add_in_txn(&mut transaction, &duty, outcome, "").await?;
        if end.copied.1 == end.present.1 && end.source_stands && copied < repository.generation {
            // Not up to date, but less far behind; should all others be lost, this is known to be there.
            replicas::replica_repaired_in_txn(&mut transaction, repository.id, &target, copied).await?;
        }
    }
    let mut aftermath = Aftermath::default();
    let recorded = match after {
        AfterRound::AskTicket => {
            let ticket = DutyTicket {
                duty: duty.id,
                worker_id: report.worker.clone(),
                target,
                correlation_id: duty.correlation_id.clone(),
                lease: ticket_lease(shared),
            };
            Recorded::WantsTicket(repository.key.clone(), repository, Box::new(ticket))
        }
        AfterRound::Promote => {
            aftermath.freed = release(&mut transaction, &duty, &repository).await?;
            outbox::duty_end_in_txn(&mut transaction, duty.id, "").await?;
            outbox::duty_unpark_twin_in_txn(&mut transaction, &duty).await?;
            let behind =
                replicas::replica_repaired_in_txn(&mut transaction, repository.id, &target, copied).await?;
            if behind == Some(false) {
                aftermath.promoted = Some(Box::new(Vouched {
                    repository: (*repository).clone(),
                    target: target.clone(),
                    generation: copied,
                    attempt: duty.copy_attempt.unwrap_or(0),
                }));
                // Routers that cached the route would go on to leave this replica out of writes, and it would fall behind.
                let generation = repository.generation.next();
                aftermath.routes.push(RevokedRoute { key: repository.key, id: repository.id, generation });
            }
            Recorded::Answer(Box::new(done()), aftermath)
        }
        AfterRound::Rest => {
            aftermath.freed = release(&mut transaction, &duty, &repository).await?;
            outbox::duty_end_in_txn(&mut transaction, duty.id, "written too fast; owed anew").await?;
            outbox::duty_owe_copy(&mut *transaction, &repository, &target, &duty.correlation_id).await?;
            Recorded::Answer(Box::new(done()), aftermath)
        }
        AfterRound::UnderTicket => {
            let answer = go_on(shared, &mut transaction, &duty, &repository, Round::UnderTicket).await?;
            Recorded::Answer(Box::new(answer), aftermath)
        }
        AfterRound::Again => {
            aftermath.freed = release(&mut transaction, &duty, &repository).await?;
            let round = if asked == Asked::Refused { Round::PlainWithoutTicket } else { Round::Plain };
            let answer = go_on(shared, &mut transaction, &duty, &repository, round).await?;
            Recorded::Answer(Box::new(answer), aftermath)
        }
    };
    transaction.commit().await?;
    Ok(recorded)
}

/// A worker could not copy.
pub(crate) async fn failed(
    shared: &Arc<Shared>,
    report: &Report,
    failed: &wire::DutyFailed,
    error: &str,
) -> Result<Disposition, DbError> {
    let recorded = shared.db.retrying(|| record_failure(shared, report, failed, error)).await?;
    Ok(finish(shared, recorded))
}

async fn record_failure(
    shared: &Shared,
    report: &Report,
    failed: &wire::DutyFailed,
    error: &str,
) -> Result<Recorded, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let (repository, duty) = match lock_mine(&mut transaction, report).await? {
        Mine::No => return Ok(Recorded::Void),
        Mine::Gone(duty) => {
            outbox::duty_end_in_txn(&mut transaction, duty.id, GONE).await?;
            outbox::duty_owe_cleanup_after(&mut *transaction, &duty).await?;
            transaction.commit().await?;
            return Ok(Recorded::done());
        }
        Mine::Yes(repository, duty) => (repository, duty),
    };
    let freed = release(&mut transaction, &duty, &repository).await?;
    let mut aftermath = Aftermath { freed, ..Aftermath::default() };
    if report.attempt != 0 && duty.copy_attempt != Some(report.attempt) {
        let answer = go_on(shared, &mut transaction, &duty, &repository, Round::Plain).await?;
        transaction.commit().await?;
        return Ok(Recorded::Answer(Box::new(answer), aftermath));
    }
    history::history_add_in_txn(&mut transaction, &duty, End::Failed, error).await?;
    if let Some(source) = &duty.source
        && (failed.bad_source || !failed.unreachable)
    {
        copies::copy_avoid_source_in_txn(&mut transaction, duty.id, source).await?;
    }
    if failed.bad_source {
        doubt_source(shared, &mut transaction, &duty, &repository, &mut aftermath).await?;
    }
    let disposition = if duty.under_ticket && failed.unreachable {
        // Most likely it took too long; others write again, and the rest is copied while they do.
        go_on(shared, &mut transaction, &duty, &repository, Round::PlainWithoutTicket).await?
    } else {
        retry_or_park(shared, &mut transaction, &duty, failed.unreachable, error).await?
    };
    transaction.commit().await?;
    tracing::warn!(
        duty_id = %duty.id,
        repository_id = %duty.repository_id,
        storage = duty.target,
        source = duty.source.as_ref().map(ToString::to_string),
        error,
        "copy failed"
    );
    Ok(Recorded::Answer(Box::new(disposition), aftermath))
}

/// Takes a replica that does not hold what it is to hold out of service, if the others can go on without it.
async fn doubt_source(
    shared: &Shared,
    transaction: &mut sqlx::PgConnection,
    duty: &Duty,
    repository: &Repository,
    aftermath: &mut Aftermath,
) -> Result<(), sqlx::Error> {
    let Some(source) = &duty.source else { return Ok(()) };
    let healthy = |storage: &StorageName| shared.health.is_healthy(&repository.key.virtual_storage, storage);
    let up_to_date = repository.up_to_date().any(|storage| storage == source);
    if !up_to_date || !duties::may_be_doubted(repository, source, healthy) {
        return Ok(());
    }
    replicas::replica_forget_in_txn(transaction, repository.id, source).await?;
    outbox::duty_owe_copy(&mut *transaction, repository, source, &duty.correlation_id).await?;
    let route = RevokedRoute {
        key: repository.key.clone(),
        id: repository.id,
        generation: repository.generation.next(),
    };
    aftermath.owed.push(revocations::revocation_owe_in_txn(transaction, &route).await?);
    aftermath.routes.push(route);
    tracing::warn!(repository_id = %repository.id, storage = %source, "a replica is not what it should be; it is made again");
    Ok(())
}

/// Records a failed attempt of any kind of duty; the caller holds its lock.
pub(crate) async fn retry_or_park(
    shared: &Shared,
    transaction: &mut sqlx::PgConnection,
    duty: &Duty,
    unreachable: bool,
    error: &str,
) -> Result<Disposition, sqlx::Error> {
    let timing = &shared.config.timing;
    let mut next = duties::after_failure(duty.attempts, duty.failures, unreachable, timing, &mut rand::rng());
    if let AfterFailure::Retry { failures, .. } = next
        && failures > duty.failures
        && outbox::duty_has_parked_twin_in_txn(transaction, duty).await?
    {
        // It was set aside before, and is no better now.
        next = AfterFailure::Park { failures };
    }
    Ok(match next {
        AfterFailure::Retry { delay, failures } => {
            if outbox::duty_retry_later_in_txn(transaction, duty.id, delay, failures, error).await? {
                Disposition::Retry(wire::DutyRetry { delay: Some(proto_duration(delay)) })
            } else {
                outbox::duty_end_in_txn(transaction, duty.id, "failed; another waits for the same").await?;
                done()
            }
        }
        AfterFailure::Park { failures } => {
            outbox::duty_unpark_twin_in_txn(transaction, duty).await?;
            outbox::duty_park_in_txn(transaction, duty.id, failures, error).await?;
            Disposition::Parked(wire::DutyParked { attempts: duty.attempts })
        }
    })
}

pub(crate) fn proto_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}
