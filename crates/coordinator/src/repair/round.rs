//! The rounds of a copy: how one begins, and how it is kept with its worker.

use std::time::Duration;

use tabularium_common::ids::StorageName;
use tabularium_proto::coordinator::{self as wire, finish_duty_response::Disposition};
use uuid::Uuid;

use super::{GONE, done, release};
use crate::{
    app::Shared,
    db::{
        DbError, attempts,
        copies::{self, RoundStart},
        outbox::{self, Duty},
        repositories, tickets,
    },
    duties,
    repository::{Repository, RepositoryKey},
    service::storage_address,
};

/// Of a replica that needs no copy.
const NOTHING_NEWER: &str = "there is nothing newer to copy";

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
pub(super) enum Round {
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
    let copy_attempt = copies::copy_number(&mut *transaction, repository.id, &target).await?;
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

/// Another round begins, or the duty ends because nothing is to be copied any more. The ticket that the copy may hold is
/// kept for a round under it only; the key is that of who may be waiting for it.
pub(super) async fn go_on(
    shared: &Shared,
    transaction: &mut sqlx::PgConnection,
    duty: &Duty,
    repository: &Repository,
    round: Round,
) -> Result<(Disposition, Option<RepositoryKey>), sqlx::Error> {
    let work = begin_round(shared, transaction, duty, repository, round).await?;
    if round == Round::UnderTicket
        && let Some(work) = work
    {
        return Ok((Disposition::AnotherRound(work), None));
    }
    // Left to run out it would take the replica from whoever has copied meanwhile.
    let freed = release(transaction, duty, repository).await?;
    if let Some(work) = work {
        return Ok((Disposition::AnotherRound(work), freed));
    }
    attempts::duty_end_in_txn(transaction, duty.id, NOTHING_NEWER).await?;
    Ok((done(), freed))
}

fn proto_milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// How long nobody may write after the worker of a round under the ticket fell silent.
pub(super) fn ticket_lease(shared: &Shared) -> Duration {
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
