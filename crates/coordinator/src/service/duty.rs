//! What replicators ask.

use std::{sync::Arc, time::Duration};

use tabularium_common::ids::{Epoch, Generation, SiteName, StorageName, VirtualStorageName};
use tabularium_proto::coordinator::{
    self as wire, begin_sync_response::Decision, duty_service_server::DutyService, finish_duty_request,
    finish_duty_response::Disposition, finish_sync_request, finish_sync_response::Next,
    start_duty_response::Work,
};
use time::OffsetDateTime;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{argument, relative_path};
use crate::{
    app::Shared,
    db::{
        DbError, geo_log,
        geo_registry::{self, Claimed, SyncEnd},
        outbox::{self, Duty, DutyKind, DutyState},
        parsed, replicas, repositories,
    },
    duties::{self, AfterFailure, Handover},
    error::NameError,
    repository::{RepositoryKey, RevokedRoute},
};

/// Longest error text kept of a failure, in bytes.
const MAX_ERROR_BYTES: usize = 2000;
/// Events handed out with one notification.
const EVENTS_PER_NOTIFICATION: u32 = 256;

pub(crate) struct Duties(pub(crate) Arc<Shared>);

/// What a duty means now, with generation and epoch of what is copied; or why there is nothing to do.
type Planned = Result<(Work, Option<(Generation, Epoch)>), &'static str>;

enum Start {
    Work(Work),
    Busy,
}

fn nothing(reason: impl Into<String>) -> Start {
    Start::Work(Work::Nothing(wire::NothingToDo { reason: reason.into() }))
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

fn proto_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

fn age(duty: &Duty) -> Duration {
    let started = duty.started_at.unwrap_or(OffsetDateTime::UNIX_EPOCH);
    Duration::try_from(OffsetDateTime::now_utc() - started).unwrap_or(Duration::ZERO)
}

impl Duties {
    fn storage_address(
        &self,
        virtual_storage: &VirtualStorageName,
        storage: &StorageName,
    ) -> wire::StorageAddress {
        let topology = self.0.topology.get();
        wire::StorageAddress {
            storage: storage.to_string(),
            address: topology.address(virtual_storage, storage).map(ToString::to_string).unwrap_or_default(),
        }
    }

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
                if duties::hand_over(age(&duty)) == Handover::Wait {
                    return Ok(Start::Busy);
                }
            }
            DutyState::Pending | DutyState::Published => {}
        }
        if let Some(twin) = outbox::duty_started_twin(&mut transaction, &duty).await? {
            // Its own message goes to another worker when its worker is silent. We are another message, which knows
            // nothing of that: a copy may take long, and one that is overtaken counts nothing.
            if age(&twin) < self.0.config.timing.restart_after.0 {
                // When that one ends, what is still missing is owed anew.
                outbox::duty_end_in_txn(&mut transaction, id, "the same is under way").await?;
                transaction.commit().await?;
                return Ok(nothing("the same is under way"));
            }
            outbox::duty_end_in_txn(&mut transaction, twin.id, "its worker was silent; overtaken").await?;
        }
        let work = match duty.kind {
            DutyKind::Replicate => self.replicate(&mut transaction, &duty).await?,
            DutyKind::Cleanup => Ok((self.cleanup(&duty)?, None)),
            DutyKind::Notify => notify(&mut transaction, &duty).await?,
        };
        let start = match work {
            Ok((work, source)) => {
                outbox::duty_start_in_txn(&mut transaction, id, worker, source).await?;
                Start::Work(work)
            }
            Err(reason) => {
                outbox::duty_end_in_txn(&mut transaction, id, reason).await?;
                nothing(reason)
            }
        };
        transaction.commit().await?;
        Ok(start)
    }

    async fn replicate(
        &self,
        transaction: &mut sqlx::PgConnection,
        duty: &Duty,
    ) -> Result<Planned, sqlx::Error> {
        let found = repositories::repository_find(&mut *transaction, duty.repository_id).await?;
        let Some(repository) = found else {
            if duty.attempts > 0 {
                outbox::duty_owe_cleanup_after(transaction, duty).await?;
            }
            return Ok(Err("the repository is gone"));
        };
        let target = outbox::target_storage(duty)?;
        let virtual_storage = &repository.key.virtual_storage;
        let healthy = |storage: &StorageName| self.0.health.is_healthy(virtual_storage, storage);
        let Some(source) = duties::source(&repository, &target, healthy, &mut rand::rng()) else {
            return Ok(Err("there is nothing newer to copy"));
        };
        let work = wire::ReplicateWork {
            repository_id: repository.id.0,
            virtual_storage: virtual_storage.to_string(),
            relative_path: repository.key.relative_path.to_string(),
            replica_path: repository.replica_path.to_string(),
            source: Some(self.storage_address(virtual_storage, &source.storage)),
            target: Some(self.storage_address(virtual_storage, &target)),
            generation: source.generation.0,
            ..wire::ReplicateWork::default()
        };
        Ok(Ok((Work::Replicate(work), Some((source.generation, repository.epoch)))))
    }

    fn cleanup(&self, duty: &Duty) -> Result<Work, sqlx::Error> {
        let target = outbox::target_storage(duty)?;
        Ok(Work::Cleanup(wire::CleanupWork {
            repository_id: duty.repository_id.0,
            replica_path: outbox::target_path(duty)?.to_string(),
            target: Some(self.storage_address(&parsed(&duty.virtual_storage)?, &target)),
        }))
    }

    /// Records a success. Answers the route that shows one up-to-date replica too few, if there is one.
    async fn succeed(
        &self,
        id: Uuid,
        worker: &str,
        reached: i64,
    ) -> Result<Option<RevokedRoute>, sqlx::Error> {
        let mut transaction = self.0.db.begin().await?;
        let Some(seen) = outbox::duty_find(&mut *transaction, id).await? else { return Ok(None) };
        // Repository before duty, as commits do.
        let repository = repositories::repository_lock_id(&mut transaction, seen.repository_id).await?;
        let Some(duty) = outbox::duty_lock(&mut transaction, id).await? else { return Ok(None) };
        if duty.state != DutyState::Started || duty.worker_id.as_deref() != Some(worker) {
            // Overtaken: what this worker did may be older than what was recorded since.
            return Ok(None);
        }
        outbox::duty_end_in_txn(&mut transaction, id, "").await?;
        outbox::duty_unpark_twin_in_txn(&mut transaction, &duty).await?;
        let mut route = None;
        match (duty.kind, repository) {
            (DutyKind::Replicate, Some(repository)) => {
                let target = outbox::target_storage(&duty)?;
                if duty.epoch != Some(repository.epoch) {
                    // The source may have been fenced since, and the copy may hold what was given up with it.
                    if repository.replica(&target).is_some_and(|copy| copy.generation < repository.generation)
                    {
                        let correlation_id = &duty.correlation_id;
                        outbox::duty_owe_copy(&mut *transaction, &repository, &target, correlation_id)
                            .await?;
                    }
                    transaction.commit().await?;
                    return Ok(None);
                }
                let promised = duty.generation.unwrap_or(Generation::UNKNOWN);
                let reached = Generation(reached.min(promised.0));
                let behind =
                    replicas::replica_repaired_in_txn(&mut transaction, repository.id, &target, reached)
                        .await?;
                if behind == Some(true) {
                    outbox::duty_owe_copy(&mut *transaction, &repository, &target, &duty.correlation_id)
                        .await?;
                } else if behind == Some(false) {
                    let generation = repository.generation.next();
                    route = Some(RevokedRoute { key: repository.key, id: repository.id, generation });
                }
            }
            (DutyKind::Replicate, None) => outbox::duty_owe_cleanup_after(&mut *transaction, &duty).await?,
            (DutyKind::Cleanup, _) => {}
            (DutyKind::Notify, _) => {
                let site: SiteName = parsed(&duty.target)?;
                geo_log::subscriber_advance(&mut *transaction, &site, reached).await?;
            }
        }
        transaction.commit().await?;
        Ok(route)
    }

    async fn fail(
        &self,
        id: Uuid,
        worker: &str,
        failed: &wire::DutyFailed,
    ) -> Result<Disposition, sqlx::Error> {
        let mut transaction = self.0.db.begin().await?;
        let Some(seen) = outbox::duty_find(&mut *transaction, id).await? else { return Ok(done()) };
        repositories::repository_lock_id(&mut transaction, seen.repository_id).await?;
        let Some(duty) = outbox::duty_lock(&mut transaction, id).await? else { return Ok(done()) };
        if duty.state != DutyState::Started || duty.worker_id.as_deref() != Some(worker) {
            return Ok(done());
        }
        let error = shortened(failed.message.clone());
        let timing = &self.0.config.timing;
        let next =
            duties::after_failure(duty.attempts, duty.failures, failed.unreachable, timing, &mut rand::rng());
        let disposition = match next {
            AfterFailure::Retry { delay, failures } => {
                if outbox::duty_retry_later_in_txn(&mut transaction, id, delay, failures, &error).await? {
                    Disposition::Retry(wire::DutyRetry { delay: Some(proto_duration(delay)) })
                } else {
                    outbox::duty_end_in_txn(&mut transaction, id, "failed; another waits for the same")
                        .await?;
                    done()
                }
            }
            AfterFailure::Park { failures } => {
                outbox::duty_unpark_twin_in_txn(&mut transaction, &duty).await?;
                outbox::duty_park_in_txn(&mut transaction, id, failures, &error).await?;
                Disposition::Parked(wire::DutyParked { attempts: duty.attempts })
            }
        };
        transaction.commit().await?;
        tracing::warn!(duty_id = %id, repository_id = %duty.repository_id, storage = duty.target, error, "duty failed");
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
    Ok(Ok((Work::Notify(wire::NotifyWork { site: site.to_string(), events }), None)))
}

fn done() -> Disposition {
    Disposition::Done(wire::DutyDone {})
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
            Start::Work(work) => Ok(Response::new(wire::StartDutyResponse { work: Some(work) })),
            Start::Busy => Err(Status::unavailable("a worker has this duty; ask again later")),
        }
    }

    async fn finish_duty(
        &self,
        request: Request<wire::FinishDutyRequest>,
    ) -> Result<Response<wire::FinishDutyResponse>, Status> {
        let request = request.into_inner();
        let id = argument("duty_id", &request.duty_id)?;
        let worker = worker(&request.worker_id)?;
        let disposition = match request.outcome {
            Some(finish_duty_request::Outcome::Succeeded(succeeded)) => {
                let reached = succeeded.reached;
                if let Some(route) = self.0.db.retrying(|| self.succeed(id, worker, reached)).await? {
                    self.0.revoke_later(vec![route], Vec::new());
                }
                done()
            }
            Some(finish_duty_request::Outcome::Failed(failed)) => {
                self.0.db.retrying(|| self.fail(id, worker, &failed)).await?
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
