//! A worker has copied: whether the replica is up to date now, and what follows if it is not.

use std::sync::Arc;

use tabularium_common::ids::Generation;
use tabularium_proto::coordinator::finish_duty_response::Disposition;
use tonic::Status;

use super::{
    Aftermath, Received, Recorded, Report, done, finish, receive, release,
    round::{Round, go_on, ticket_lease},
};
use crate::{
    app::Shared,
    db::{
        attempts, copies,
        history::{self, End},
        outbox, replicas,
        tickets::{self, DutyTicket},
    },
    duties::{self, AfterRound, RoundEnd, Ticket},
    error::WriteError,
    records::Vouched,
    repository::{RepositoryKey, RevokedRoute},
    writing,
};

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
                Ok(true) => Asked::Taken(&key),
                Ok(false) | Err(WriteError::Busy) => Asked::Refused,
                Err(error) => return Err(error),
            };
            shared.db.retrying(|| record_round(shared, report, asked)).await?
        }
        recorded => recorded,
    };
    Ok(finish(shared, recorded))
}

/// Whether the ticket was asked for after the round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked<'k> {
    No,
    Taken(&'k RepositoryKey),
    Refused,
}

/// Records a round and decides what follows.
async fn record_round(shared: &Shared, report: &Report, asked: Asked<'_>) -> Result<Recorded, sqlx::Error> {
    let (mut transaction, repository, duty) = match receive(shared, report).await? {
        Received::Over(recorded) => {
            if let Asked::Taken(key) = asked {
                // Nothing was copied under it. Left to run out it would take the replica from whoever has copied meanwhile.
                let mut transaction = shared.db.begin().await?;
                tickets::ticket_release_in_txn(&mut transaction, report.duty, &report.worker).await?;
                transaction.commit().await?;
                shared.queues.freed(key);
            }
            return Ok(recorded);
        }
        Received::Counts(transaction, repository, duty) => (transaction, repository, duty),
    };
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
            attempts::duty_end_in_txn(&mut transaction, duty.id, "").await?;
            attempts::duty_unpark_twin_in_txn(&mut transaction, &duty).await?;
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
            attempts::duty_end_in_txn(&mut transaction, duty.id, "written too fast; owed anew").await?;
            outbox::duty_owe_copy(&mut *transaction, &repository, &target, &duty.correlation_id).await?;
            Recorded::Answer(Box::new(done()), aftermath)
        }
        AfterRound::UnderTicket | AfterRound::Again => {
            let round = match (after, asked) {
                (AfterRound::UnderTicket, _) => Round::UnderTicket,
                (_, Asked::Refused) => Round::PlainWithoutTicket,
                _ => Round::Plain,
            };
            let (answer, freed) = go_on(shared, &mut transaction, &duty, &repository, round).await?;
            aftermath.freed = freed;
            Recorded::Answer(Box::new(answer), aftermath)
        }
    };
    transaction.commit().await?;
    Ok(recorded)
}
