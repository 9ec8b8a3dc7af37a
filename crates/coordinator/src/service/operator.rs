//! What the command line, the dashboard and the gateway ask.

use std::{collections::BTreeMap, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use tabularium_common::{bus::Link, duties as subjects};
use tabularium_proto::coordinator::{self as wire, operator_service_server::OperatorService};
use time::OffsetDateTime;
use tonic::{Request, Response, Status};

use super::{argument, key, relative_path};
use crate::{
    app::Shared,
    db::{
        DbError, attempts, geo_log, geo_registry,
        history::{self, EndedAttempt},
        outbox::{self, Duty, DutyKind, DutyState, ListedDuty},
        parsed,
        repositories::{self, RenameRefused, RepositoryDetails},
        routers,
        storages::{self, StorageState},
        writes,
    },
    error::{NameError, WriteError},
    records,
    revocation::Peer,
};

/// Repositories on one page, and the most a caller gets.
const PAGE_SIZE: u32 = 100;
const MAX_PAGE_SIZE: u32 = 1000;
/// Duties listed, and the most a caller gets.
const DUTY_LIMIT: u32 = 100;
const MAX_DUTY_LIMIT: u32 = 10_000;

pub(crate) struct Operator(pub(crate) Arc<Shared>);

pub(super) fn timestamp(time: OffsetDateTime) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.unix_timestamp(),
        nanos: i32::try_from(time.nanosecond()).unwrap_or(0),
    }
}

/// The subject under which a duty is published.
pub(crate) fn subject(duty: &Duty) -> Result<String, sqlx::Error> {
    Ok(match duty.kind {
        DutyKind::Replicate => {
            subjects::replication_subject(&parsed(&duty.virtual_storage)?, &parsed(&duty.target)?)
        }
        DutyKind::Cleanup => {
            subjects::cleanup_subject(&parsed(&duty.virtual_storage)?, &parsed(&duty.target)?)
        }
        DutyKind::Notify => subjects::notify_subject(&parsed(&duty.target)?),
    })
}

fn ended_attempt(ended: &EndedAttempt) -> wire::EndedAttempt {
    wire::EndedAttempt {
        worker_id: ended.worker_id.clone(),
        source: ended.source.clone().unwrap_or_default(),
        copy_attempt: ended.copy_attempt.unwrap_or_default(),
        generation: ended.generation.unwrap_or_default(),
        under_ticket: ended.under_ticket,
        outcome: ended.outcome.clone(),
        error: ended.error.clone(),
        started_at: Some(timestamp(ended.started_at)),
        ended_at: Some(timestamp(ended.ended_at)),
    }
}

fn duty_details(listed: ListedDuty, ended: &[EndedAttempt]) -> Result<wire::DutyDetails, DbError> {
    let ListedDuty { duty, relative_path } = listed;
    let ended_attempts = ended.iter().filter(|ended| ended.is_of(&duty)).map(ended_attempt).collect();
    Ok(wire::DutyDetails {
        duty_id: duty.id.to_string(),
        subject: subject(&duty)?,
        state: duty.state.as_str().to_owned(),
        repository_id: duty.repository_id.0,
        relative_path,
        target: duty.target,
        attempts: duty.attempts,
        last_error: duty.last_error,
        created_at: Some(timestamp(duty.created_at)),
        next_attempt_at: Some(timestamp(duty.next_attempt_at)),
        ended_attempts,
    })
}

/// Everything an operator wants to see at once.
pub(crate) async fn status(shared: &Shared) -> Result<wire::GetStatusResponse, DbError> {
    let db = &shared.db;
    let pool = db.pool();
    db.retrying(|| geo_log::geo_log_place(db)).await?;
    let duties: BTreeMap<&str, i64> =
        outbox::duty_count(pool).await?.into_iter().map(|(state, count)| (state.as_str(), count)).collect();
    let count = |state: DutyState| duties.get(state.as_str()).copied().unwrap_or(0);
    let me = shared.identity.get();
    let sessions = shared.sessions.routers();
    db.retrying(|| routers::router_set(pool, &me, &sessions)).await?;
    let peers = shared.revoker.peers().await?;
    Ok(wire::GetStatusResponse {
        site: shared.config.site.to_string(),
        version: tabularium_common::VERSION.to_owned(),
        virtual_storages: virtual_storages(shared).await?,
        coordinators: peers
            .into_iter()
            .filter(Peer::lives)
            .map(|Peer { registered, .. }| wire::CoordinatorStatus {
                answering: registered.id == me,
                id: registered.id,
                address: registered.address,
            })
            .collect(),
        routers: routers::router_list(pool)
            .await?
            .into_iter()
            .map(|(router_id, coordinator_id)| wire::RouterStatus { router_id, coordinator_id })
            .collect(),
        duties: Some(wire::DutyCounts {
            pending: count(DutyState::Pending),
            published: count(DutyState::Published),
            started: count(DutyState::Started),
            parked: count(DutyState::Parked),
        }),
        writes_under_way: writes::write_count(pool).await?,
        sites: sites(shared).await?,
        geo_log_position: geo_log::geo_log_position(pool).await?,
        message_bus_connected: *shared.link.borrow() == Link::Up,
    })
}

async fn virtual_storages(shared: &Shared) -> Result<Vec<wire::VirtualStorageStatus>, DbError> {
    let pool = shared.db.pool();
    let repositories = repositories::repository_count(pool).await?;
    let counts = storages::storage_count_replicas(pool).await?;
    let topology = shared.topology.get();
    let storage_status = |virtual_storage, known: &crate::topology::KnownStorage| {
        let opinion = shared.health.opinion(virtual_storage, &known.name);
        let held = counts.iter().find(|held| {
            held.virtual_storage == virtual_storage.as_str() && held.storage == known.name.as_str()
        });
        let problem = match known.state {
            _ if known.configured || !opinion.problem.is_empty() => opinion.problem,
            StorageState::Draining => String::new(),
            StorageState::Active | StorageState::Removed => "not in the configuration any more".to_owned(),
        };
        wire::StorageStatus {
            name: known.name.to_string(),
            address: known.address.to_string(),
            healthy: opinion.healthy,
            problem,
            replicas: held.map_or(0, |held| held.replicas),
            replicas_behind: held.map_or(0, |held| held.behind),
            primaries: held.map_or(0, |held| held.primaries),
        }
    };
    Ok(topology
        .virtual_storages
        .iter()
        .map(|known| {
            let held = repositories.iter().find(|held| held.virtual_storage == known.name.as_str());
            wire::VirtualStorageStatus {
                name: known.name.to_string(),
                repositories: held.map_or(0, |held| held.repositories),
                repositories_behind: held.map_or(0, |held| held.behind),
                storages: known.storages.iter().map(|storage| storage_status(&known.name, storage)).collect(),
            }
        })
        .collect())
}

async fn sites(shared: &Shared) -> Result<Vec<wire::SiteStatus>, DbError> {
    let pool = shared.db.pool();
    let mut sites: Vec<wire::SiteStatus> = geo_log::subscriber_list(pool)
        .await?
        .into_iter()
        .map(|(name, notified_position)| wire::SiteStatus {
            name,
            subscriber: true,
            notified_position,
            ..wire::SiteStatus::default()
        })
        .collect();
    let mirrors = geo_registry::mirror_count(pool).await?;
    let known = shared.config.home_sites.iter().map(|home| home.name.to_string());
    let names = known.chain(mirrors.iter().map(|held| held.home_site.clone()));
    for name in names.collect::<std::collections::BTreeSet<_>>() {
        let held = mirrors.iter().find(|held| held.home_site == name);
        sites.push(wire::SiteStatus {
            name,
            subscriber: false,
            notified_position: 0,
            mirrors: held.map_or(0, |held| held.mirrors),
            mirrors_synced: held.map_or(0, |held| held.synced),
            mirrors_failed: held.map_or(0, |held| held.failed),
        });
    }
    Ok(sites)
}

impl Operator {
    fn details(&self, details: &RepositoryDetails) -> wire::RepositoryDetails {
        let repository = &details.repository;
        let mirror = repository.home_site.as_ref().map(|site| {
            let home = self.0.config.home_sites.iter().find(|home| home.name == *site);
            let state = details.mirror.as_ref();
            wire::MirrorDetails {
                home_site: site.to_string(),
                home_url: home
                    .map(|home| {
                        format!("{}/{}", home.url.trim_end_matches('/'), repository.key.relative_path)
                    })
                    .unwrap_or_default(),
                state: state.map(|mirror| mirror.state.clone()).unwrap_or_default(),
                last_error: state.map(|mirror| mirror.last_error.clone()).unwrap_or_default(),
                synced_at: state.and_then(|mirror| mirror.synced_at).map(timestamp),
            }
        });
        wire::RepositoryDetails {
            route: Some(repository.into()),
            created_at: Some(timestamp(details.created_at)),
            written_at: Some(timestamp(details.written_at)),
            mirror,
        }
    }
}

#[tonic::async_trait]
impl OperatorService for Operator {
    async fn get_status(
        &self,
        _request: Request<wire::GetStatusRequest>,
    ) -> Result<Response<wire::GetStatusResponse>, Status> {
        Ok(Response::new(status(&self.0).await?))
    }

    async fn list_repositories(
        &self,
        request: Request<wire::ListRepositoriesRequest>,
    ) -> Result<Response<wire::ListRepositoriesResponse>, Status> {
        let request = request.into_inner();
        if request.virtual_storage.is_empty() {
            return Err(NameError::StorageNotSet.into());
        }
        let virtual_storage = super::virtual_storage(&request.virtual_storage)?;
        if self.0.topology.get().virtual_storage(&virtual_storage).is_none() {
            return Err(NameError::UnknownVirtualStorage.into());
        }
        if request.prefix.contains('\0') {
            return Err(Status::invalid_argument("prefix contains a control character"));
        }
        let page_size = if request.page_size == 0 { PAGE_SIZE } else { request.page_size.min(MAX_PAGE_SIZE) };
        let after = URL_SAFE_NO_PAD
            .decode(&request.page_token)
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .filter(|text| !text.contains('\0'))
            .ok_or_else(|| Status::invalid_argument("page_token is not one of ours"))?;
        let db = &self.0.db;
        // One more than the page tells whether another page follows.
        let mut found = db
            .retrying(|| {
                repositories::repository_list(
                    db.pool(),
                    &virtual_storage,
                    &after,
                    &request.prefix,
                    page_size + 1,
                )
            })
            .await?;
        let more = found.len() > page_size as usize;
        found.truncate(page_size as usize);
        let next_page_token = match found.last() {
            Some(last) if more => URL_SAFE_NO_PAD.encode(last.repository.key.relative_path.as_str()),
            _ => String::new(),
        };
        let repositories = found.iter().map(|details| self.details(details)).collect();
        Ok(Response::new(wire::ListRepositoriesResponse { repositories, next_page_token }))
    }

    async fn get_repository(
        &self,
        request: Request<wire::GetRepositoryRequest>,
    ) -> Result<Response<wire::GetRepositoryResponse>, Status> {
        let name = key(request.get_ref().name.as_ref())?;
        if self.0.topology.get().virtual_storage(&name.virtual_storage).is_none() {
            return Err(NameError::UnknownVirtualStorage.into());
        }
        let db = &self.0.db;
        let details = db
            .promptly(|| repositories::repository_details(db.pool(), &name))
            .await?
            .ok_or(WriteError::NotFound)?;
        Ok(Response::new(wire::GetRepositoryResponse { repository: Some(self.details(&details)) }))
    }

    async fn rename_repository(
        &self,
        request: Request<wire::RenameRepositoryRequest>,
    ) -> Result<Response<wire::RenameRepositoryResponse>, Status> {
        let request = request.into_inner();
        let name = key(request.name.as_ref())?;
        let to = relative_path(&request.new_relative_path)?;
        if self.0.topology.get().virtual_storage(&name.virtual_storage).is_none() {
            return Err(NameError::UnknownVirtualStorage.into());
        }
        if to == name.relative_path {
            return Err(Status::already_exists("target repo exists already"));
        }
        let db = &self.0.db;
        match db.retrying(|| repositories::repository_rename(db.pool(), &name, &to)).await? {
            Ok(gone) => {
                self.0.bell.notify_one();
                let id = gone.revoked.id;
                self.0.revoke_now(gone.revoked, gone.revocation).await?;
                if let Some(renamed) = db.retrying(|| repositories::repository_find(db.pool(), id)).await? {
                    records::note_rename(&self.0, &renamed).await;
                }
                Ok(Response::new(wire::RenameRepositoryResponse {}))
            }
            Err(RenameRefused::NotFound) => Err(WriteError::NotFound.into()),
            Err(RenameRefused::NameTaken) => Err(Status::already_exists("target repo exists already")),
        }
    }

    async fn list_duties(
        &self,
        request: Request<wire::ListDutiesRequest>,
    ) -> Result<Response<wire::ListDutiesResponse>, Status> {
        let request = request.into_inner();
        let state = match request.state.as_str() {
            "" => None,
            text => Some(DutyState::parse(text).ok_or_else(|| {
                Status::invalid_argument(format!(
                    "state `{text}`; allowed: pending, published, started, done, parked"
                ))
            })?),
        };
        let limit = if request.limit == 0 { DUTY_LIMIT } else { request.limit.min(MAX_DUTY_LIMIT) };
        let db = &self.0.db;
        let duties = db.retrying(|| outbox::duty_list(db.pool(), state, limit)).await?;
        let ended = db
            .retrying(|| history::history_list(db.pool(), duties.iter().map(|listed| &listed.duty)))
            .await?;
        let duties =
            duties.into_iter().map(|listed| duty_details(listed, &ended)).collect::<Result<_, _>>()?;
        Ok(Response::new(wire::ListDutiesResponse { duties }))
    }

    async fn retry_duty(
        &self,
        request: Request<wire::RetryDutyRequest>,
    ) -> Result<Response<wire::RetryDutyResponse>, Status> {
        let id = argument("duty_id", &request.get_ref().duty_id)?;
        let db = &self.0.db;
        if !db.retrying(|| attempts::duty_retry_now(db.pool(), id)).await? {
            return Err(Status::not_found("no such duty is parked, or the same is owed already"));
        }
        self.0.bell.notify_one();
        Ok(Response::new(wire::RetryDutyResponse {}))
    }

    async fn dial_nodes(
        &self,
        _request: Request<wire::DialNodesRequest>,
    ) -> Result<Response<wire::DialNodesResponse>, Status> {
        let nodes = self.0.health.dial_all(&self.0.topology.get()).await;
        let nodes = nodes
            .into_iter()
            .map(|(virtual_storage, known, dialled)| wire::NodeDialled {
                virtual_storage: virtual_storage.to_string(),
                storage: known.name.to_string(),
                address: known.address.to_string(),
                reachable: dialled.reachable,
                storage_served: dialled.storage_served,
                server_version: dialled.server_version,
                git_version: dialled.git_version,
                problem: dialled.problem,
                round_trip_microseconds: u32::try_from(dialled.round_trip.as_micros()).unwrap_or(u32::MAX),
            })
            .collect();
        Ok(Response::new(wire::DialNodesResponse { nodes }))
    }
}
