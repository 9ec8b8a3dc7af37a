//! A worker could not copy: the copy is tried again, from elsewhere if need be, or set aside.

use std::sync::Arc;

use tabularium_common::ids::StorageName;
use tabularium_proto::coordinator::{self as wire, finish_duty_response::Disposition};

use super::{
    Aftermath, Received, Recorded, Report, done, finish, proto_duration, receive, release,
    round::{Round, go_on},
};
use crate::{
    app::Shared,
    db::{
        DbError, attempts, copies,
        history::{self, End},
        outbox::{self, Duty},
        replicas, revocations,
    },
    duties::{self, AfterFailure},
    repository::{Repository, RevokedRoute},
};

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
    let (mut transaction, repository, duty) = match receive(shared, report).await? {
        Received::Over(recorded) => return Ok(recorded),
        Received::Counts(transaction, repository, duty) => (transaction, repository, duty),
    };
    let mut aftermath = Aftermath::default();
    history::history_add_in_txn(&mut transaction, &duty, End::Failed, error).await?;
    if let Some(source) = &duty.source
        && (failed.bad_source || !failed.unreachable)
    {
        copies::copy_avoid_source_in_txn(&mut transaction, duty.id, source).await?;
    }
    if failed.bad_source {
        doubt_source(shared, &mut transaction, &duty, &repository, &mut aftermath).await?;
    }
    let (disposition, freed) = if duty.under_ticket && failed.unreachable {
        // Most likely it took too long; others write again, and the rest is copied while they do.
        go_on(shared, &mut transaction, &duty, &repository, Round::PlainWithoutTicket).await?
    } else {
        let freed = release(&mut transaction, &duty, &repository).await?;
        (retry_or_park(shared, &mut transaction, &duty, failed.unreachable, error).await?, freed)
    };
    aftermath.freed = freed;
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
        && attempts::duty_has_parked_twin_in_txn(transaction, duty).await?
    {
        // It was set aside before, and is no better now.
        next = AfterFailure::Park { failures };
    }
    Ok(match next {
        AfterFailure::Retry { delay, failures } => {
            if attempts::duty_retry_later_in_txn(transaction, duty.id, delay, failures, error).await? {
                Disposition::Retry(wire::DutyRetry { delay: Some(proto_duration(delay)) })
            } else {
                attempts::duty_end_in_txn(transaction, duty.id, "failed; another waits for the same").await?;
                done()
            }
        }
        AfterFailure::Park { failures } => {
            attempts::duty_unpark_twin_in_txn(transaction, duty).await?;
            attempts::duty_park_in_txn(transaction, duty.id, failures, error).await?;
            Disposition::Parked(wire::DutyParked { attempts: duty.attempts })
        }
    })
}
