//! What replicators ask.

use std::{sync::Arc, time::Duration};

use tabularium_common::ids::SiteName;
use tabularium_proto::coordinator::{
    self as wire, begin_sync_response::Decision, duty_service_server::DutyService, finish_duty_request,
    finish_duty_response::Disposition, finish_sync_request, finish_sync_response::Next,
    start_duty_response::Work,
};
use time::OffsetDateTime;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{argument, relative_path, storage_address};
use crate::{
    app::Shared,
    db::{
        DbError, attempts, geo_log,
        geo_registry::{self, Claimed, SyncEnd},
        history::{self, End},
        outbox::{self, Duty, DutyKind, DutyState},
        parsed, repositories,
    },
    duties::{self, Handover},
    error::NameError,
    repair::{self, Report, proto_duration},
    repository::RepositoryKey,
};

/// Longest error text kept of a failure, in bytes.
const MAX_ERROR_BYTES: usize = 2000;
/// Events handed out with one notification.
const EVENTS_PER_NOTIFICATION: u32 = 256;

pub(crate) struct Duties(pub(crate) Arc<Shared>);

/// What a duty means now, or why there is nothing to do.
type Planned = Result<Work, &'static str>;

enum Start {
    Work(Box<Work>),
    Busy,
}

fn nothing(reason: impl Into<String>) -> Start {
    Start::Work(Box::new(Work::Nothing(wire::NothingToDo { reason: reason.into() })))
}

fn shortened(mut text: String) -> String {
    let mut end = MAX_ERROR_BYTES.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

fn worker(text: &str) -> Result<&str, Status> {
    if text.is_empty() || text.len() > 256 {
        return Err(Status::invalid_argument("worker_id must have 1 to 256 bytes"));
    }
    Ok(text)
}

fn age(duty: &Duty) -> Duration {
    let started = duty.started_at.unwrap_or(OffsetDateTime::UNIX_EPOCH);
    Duration::try_from(OffsetDateTime::now_utc() - started).unwrap_or(Duration::ZERO)
}

impl Duties {
    /// Decides what the duty means now and hands it out. Locks duties only: a commit that owes the same waits for us.
    async fn start(&self, id: Uuid, worker: &str) -> Result<Start, sqlx::Error> {
        let mut transaction = self.0.db.begin().await?;
        let Some(duty) = outbox::duty_lock(&mut transaction, id).await? else {
            return Ok(nothing("no such duty"));
        };
        match duty.state {
            DutyState::Done | DutyState::Parked => {
                return Ok(nothing(format!("the duty is {}", duty.state.as_str())));
            }
            DutyState::Started => {
                if duties::hand_over(age(&duty), duty.lease_over) == Handover::Wait {
                    return Ok(Start::Busy);
                }
                history::history_add_in_txn(&mut transaction, &duty, End::Lost, "").await?;
            }
            DutyState::Pending | DutyState::Published => {}
        }
        if let Some(twin) = attempts::duty_started_twin(&mut transaction, &duty).await? {
            // Its own message goes to another worker when its worker is silent. We are another message, which knows
            // nothing of that: a copy may take long, and one that is overtaken counts nothing.
            let restart_after = self.0.config.timing.restart_after.0;
            if !twin.lease_over.unwrap_or(age(&twin) >= restart_after) {
                // When that one ends, what is still missing is owed anew.
                attempts::duty_end_in_txn(&mut transaction, id, "the same is under way").await?;
                transaction.commit().await?;
                return Ok(nothing("the same is under way"));
            }
            attempts::duty_end_in_txn(&mut transaction, twin.id, "its worker was silent; overtaken").await?;
            history::history_add_in_txn(&mut transaction, &twin, End::Lost, "").await?;
        }
        attempts::duty_start_in_txn(&mut transaction, id, worker).await?;
        let work = match duty.kind {
            DutyKind::Replicate => {
                repair::start(&self.0, &mut transaction, &duty).await?.map(Work::Replicate)
            }
            DutyKind::Cleanup => Ok(self.cleanup(&duty)?),
            DutyKind::Notify => notify(&mut transaction, &duty).await?,
        };
        let start = match work {
            Ok(work) => Start::Work(Box::new(work)),
            Err(reason) => {
                attempts::duty_end_in_txn(&mut transaction, id, reason).await?;
                nothing(reason)
            }
        };
        transaction.commit().await?;
        Ok(start)
    }

    fn cleanup(&self, duty: &Duty) -> Result<Work, sqlx::Error> {
        let target = outbox::target_storage(duty)?;
        Ok(Work::Cleanup(wire::CleanupWork {
            repository_id: duty.repository_id.0,
            replica_path: outbox::target_path(duty)?.to_string(),
            target: Some(storage_address(&self.0, &parsed(&duty.virtual_storage)?, &target)),
        }))
    }

    /// Records the success of a duty that is no copy.
    async fn succeed(&self, id: Uuid, worker: &str, reached: i64) -> Result<(), sqlx::Error> {
        let mut transaction = self.0.db.begin().await?;
        let Some(duty) = started_by(&mut transaction, id, worker).await? else { return Ok(()) };
        attempts::duty_end_in_txn(&mut transaction, id, "").await?;
        attempts::duty_unpark_twin_in_txn(&mut transaction, &duty).await?;
        history::history_add_in_txn(&mut transaction, &duty, End::Done, "").await?;
        if duty.kind == DutyKind::Notify {
            let site: SiteName = parsed(&duty.target)?;
            geo_log::subscriber_advance(&mut *transaction, &site, reached).await?;
        }
        transaction.commit().await
    }

    /// Records the failure of a duty that is no copy.
    async fn fail(
        &self,
        id: Uuid,
        worker: &str,
        unreachable: bool,
        error: &str,
    ) -> Result<Disposition, sqlx::Error> {
        let mut transaction = self.0.db.begin().await?;
        let Some(duty) = started_by(&mut transaction, id, worker).await? else { return Ok(repair::done()) };
        history::history_add_in_txn(&mut transaction, &duty, End::Failed, error).await?;
        let disposition = repair::retry_or_park(&self.0, &mut transaction, &duty, unreachable, error).await?;
        transaction.commit().await?;
        tracing::warn!(duty_id = %id, repository_id = %duty.repository_id, target = duty.target, error, "duty failed");
        Ok(disposition)
    }

    async fn finish_sync(
        &self,
        claim_id: Uuid,
        outcome: &finish_sync_request::Outcome,
    ) -> Result<Option<Next>, sqlx::Error> {
        let mut transaction = self.0.db.begin().await?;
        let Some(mirror) = geo_registry::mirror_lock_claim(&mut transaction, claim_id).await? else {
            return Ok(None);
        };
        let again = |delay| Next::Again(wire::SyncAgain { delay: Some(proto_duration(delay)) });
        let settled = || Next::Settled(wire::SyncSettled {});
        let (end, next) = match outcome {
            finish_sync_request::Outcome::Succeeded(_) if mirror.look_again => {
                (SyncEnd::Synced, again(Duration::ZERO))
            }
            finish_sync_request::Outcome::Succeeded(_) => (SyncEnd::Synced, settled()),
            finish_sync_request::Outcome::Gone(_) if mirror.look_again => {
                (SyncEnd::Pending, again(Duration::ZERO))
            }
            finish_sync_request::Outcome::Gone(_) => (SyncEnd::Gone, settled()),
            finish_sync_request::Outcome::Failed(failed) => {
                let timing = &self.0.config.timing;
                let (first, cap) = (timing.retry_delay.0, timing.max_retry_delay.0);
                let tries = mirror.failures.unsigned_abs() + 1;
                let delay = duties::back_off(tries, first, cap, &mut rand::rng());
                (SyncEnd::Failed(shortened(failed.message.clone())), again(delay))
            }
        };
        geo_registry::mirror_end_in_txn(&mut transaction, claim_id, &end).await?;
        transaction.commit().await?;
        if let SyncEnd::Failed(error) = &end {
            let (virtual_storage, relative_path) = (mirror.virtual_storage, mirror.relative_path);
            tracing::warn!(virtual_storage, relative_path, error, "sync failed");
        }
        Ok(Some(next))
    }
}

/// A duty that is with this worker, locked.
async fn started_by(
    transaction: &mut sqlx::PgConnection,
    id: Uuid,
    worker: &str,
) -> Result<Option<Duty>, sqlx::Error> {
    let duty = outbox::duty_lock(transaction, id).await?;
    Ok(duty.filter(|duty| duty.state == DutyState::Started && duty.worker_id.as_deref() == Some(worker)))
}

/// What a site is to be told next. On the caller's connection: one that waited for a second one could starve the pool.
async fn notify(transaction: &mut sqlx::PgConnection, duty: &Duty) -> Result<Planned, sqlx::Error> {
    let site: SiteName = parsed(&duty.target)?;
    geo_log::geo_log_place_in_txn(&mut *transaction).await?;
    let events = geo_log::geo_log_read(&mut *transaction, &site, EVENTS_PER_NOTIFICATION).await?;
    if events.is_empty() {
        return Ok(Err("the site has been told everything"));
    }
    let events = events
        .into_iter()
        .map(|event| wire::GeoEvent {
            position: event.position,
            kind: match event.kind.as_str() {
                "created" => wire::GeoEventKind::Created,
                "updated" => wire::GeoEventKind::Updated,
                "renamed" => wire::GeoEventKind::Renamed,
                "deleted" => wire::GeoEventKind::Deleted,
                _ => wire::GeoEventKind::Unspecified,
            }
            .into(),
            repository_id: event.repository_id,
            virtual_storage: event.virtual_storage,
            relative_path: event.relative_path,
            old_relative_path: event.old_relative_path,
            generation: event.generation,
        })
        .collect();
    Ok(Ok(Work::Notify(wire::NotifyWork { site: site.to_string(), events })))
}

fn refused(reason: String) -> Response<wire::BeginSyncResponse> {
    Response::new(wire::BeginSyncResponse { decision: Some(Decision::Refused(wire::SyncRefused { reason })) })
}

#[tonic::async_trait]
impl DutyService for Duties {
    async fn start_duty(
        &self,
        request: Request<wire::StartDutyRequest>,
    ) -> Result<Response<wire::StartDutyResponse>, Status> {
        let request = request.into_inner();
        let id = argument("duty_id", &request.duty_id)?;
        let worker = worker(&request.worker_id)?;
        match self.0.db.retrying(|| self.start(id, worker)).await? {
            Start::Work(work) => Ok(Response::new(wire::StartDutyResponse { work: Some(*work) })),
            Start::Busy => Err(Status::unavailable("a worker has this duty; ask again later")),
        }
    }

    async fn renew_duty(
        &self,
        request: Request<wire::RenewDutyRequest>,
    ) -> Result<Response<wire::RenewDutyResponse>, Status> {
        let request = request.into_inner();
        let id = argument("duty_id", &request.duty_id)?;
        if repair::renew(&self.0, id, worker(&request.worker_id)?).await? {
            Ok(Response::new(wire::RenewDutyResponse {}))
        } else {
            Err(Status::failed_precondition(
                "the duty is not held any more: it was finished, or its lease ran out",
            ))
        }
    }

    async fn finish_duty(
        &self,
        request: Request<wire::FinishDutyRequest>,
    ) -> Result<Response<wire::FinishDutyResponse>, Status> {
        let request = request.into_inner();
        let id = argument("duty_id", &request.duty_id)?;
        let worker = worker(&request.worker_id)?;
        let db = &self.0.db;
        let found = db.retrying(|| outbox::duty_find(db.pool(), id)).await?;
        let copy = found.is_some_and(|duty| duty.kind == DutyKind::Replicate);
        let report = Report { duty: id, worker: worker.to_owned(), attempt: request.attempt };
        let disposition = match request.outcome {
            Some(finish_duty_request::Outcome::Succeeded(_)) if copy => {
                repair::copied(&self.0, report).await?
            }
            Some(finish_duty_request::Outcome::Succeeded(succeeded)) => {
                db.retrying(|| self.succeed(id, worker, succeeded.reached)).await?;
                repair::done()
            }
            Some(finish_duty_request::Outcome::Failed(failed)) => {
                let error = shortened(failed.message.clone());
                if copy {
                    repair::failed(&self.0, &report, &failed, &error).await?
                } else {
                    db.retrying(|| self.fail(id, worker, failed.unreachable, &error)).await?
                }
            }
            None => return Err(Status::invalid_argument("outcome is not set")),
        };
        self.0.bell.notify_one();
        Ok(Response::new(wire::FinishDutyResponse { disposition: Some(disposition) }))
    }

    async fn begin_sync(
        &self,
        request: Request<wire::BeginSyncRequest>,
    ) -> Result<Response<wire::BeginSyncResponse>, Status> {
        let request = request.into_inner();
        let site: SiteName = argument("home_site", &request.home_site)?;
        let worker = worker(&request.worker_id)?;
        let key = RepositoryKey {
            virtual_storage: super::virtual_storage(&request.virtual_storage)?,
            relative_path: relative_path(&request.relative_path)?,
        };
        if self.0.topology.get().virtual_storage(&key.virtual_storage).is_none() {
            return Err(NameError::UnknownVirtualStorage.into());
        }
        if !self.0.config.home_sites.iter().any(|home| home.name == site) {
            return Ok(refused(format!("`{site}` is not a home site of mirrors here")));
        }
        let db = &self.0.db;
        let present = db.retrying(|| repositories::repository_resolve(db.pool(), &key)).await?;
        if let Some(repository) = &present
            && repository.home_site.as_ref() != Some(&site)
        {
            return Ok(refused(match &repository.home_site {
                Some(other) => format!("the repository of that name is a mirror of {other}"),
                None => "a repository of that name lives here".to_owned(),
            }));
        }
        let claim_id = Uuid::now_v7();
        let lease = self.0.config.timing.sync_lease.0;
        let claimed = db
            .retrying(|| geo_registry::mirror_claim(db.pool(), &key, &site, claim_id, lease, worker))
            .await?;
        let decision = match claimed {
            Claimed::Yes => Decision::Claim(wire::SyncClaim {
                claim_id: claim_id.to_string(),
                repository_exists: present.is_some(),
                lease_milliseconds: u32::try_from(lease.as_millis()).unwrap_or(u32::MAX),
            }),
            Claimed::UnderWay => Decision::UnderWay(wire::SyncUnderWay {}),
            Claimed::OtherSite(other) => {
                return Ok(refused(format!("the name belongs to a mirror of {other}")));
            }
        };
        Ok(Response::new(wire::BeginSyncResponse { decision: Some(decision) }))
    }

    async fn finish_sync(
        &self,
        request: Request<wire::FinishSyncRequest>,
    ) -> Result<Response<wire::FinishSyncResponse>, Status> {
        let request = request.into_inner();
        let claim_id = argument("claim_id", &request.claim_id)?;
        let outcome = request.outcome.ok_or_else(|| Status::invalid_argument("outcome is not set"))?;
        let next: Result<_, DbError> = self.0.db.retrying(|| self.finish_sync(claim_id, &outcome)).await;
        let next = next?.ok_or_else(|| {
            Status::failed_precondition("the claim is not held any more: it was finished, or it ran out")
        })?;
        Ok(Response::new(wire::FinishSyncResponse { next: Some(next) }))
    }
}
