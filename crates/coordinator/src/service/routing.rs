//! What routers ask.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use tabularium_common::ids::{Epoch, RepositoryId, SiteName, StorageName};
use tabularium_proto::coordinator::{
    self as wire, abort_write_request::Outcome, routing_service_server::RoutingService, session_request,
    session_response,
};
use tokio::sync::oneshot;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, codegen::BoxStream};
use uuid::Uuid;

use super::{argument, correlation_id, key, storages};
use crate::{
    app::Shared,
    db::{
        DbError,
        commits::Report,
        ended_writes::Word,
        repositories, verifications,
        writes::{self, Asked, Terms},
    },
    error::{NameError, WriteError},
    leases::SessionId,
    metrics::{WriteResult, WriteStep},
    repository::Repository,
    tasks,
    writing::{self, Begin, Doubt, Kind, Started},
};

/// Longest router id and method name kept, in bytes.
const MAX_TEXT_BYTES: usize = 256;
/// Most intents renewed, and storages named, in one call.
const MAX_LISTED: usize = 10_000;
/// How long a router may take to say hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

pub(crate) struct Routing(pub(crate) Arc<Shared>);

fn text(what: &str, text: String) -> Result<String, Status> {
    if text.is_empty() || text.len() > MAX_TEXT_BYTES {
        return Err(Status::invalid_argument(format!("{what} must have 1 to {MAX_TEXT_BYTES} bytes")));
    }
    Ok(text)
}

fn bounded<T>(what: &str, list: &[T]) -> Result<(), Status> {
    if list.len() > MAX_LISTED {
        return Err(Status::invalid_argument(format!(
            "{} {what}; at most {MAX_LISTED} are taken",
            list.len()
        )));
    }
    Ok(())
}

fn asked(nodes: &wire::AskedNodes) -> Result<Asked, Status> {
    bounded("storages", &nodes.storages)?;
    Ok(Asked {
        repository_id: RepositoryId(nodes.repository_id),
        epoch: Epoch(nodes.epoch),
        primary: argument("primary", &nodes.primary)?,
        storages: storages(&nodes.storages)?,
        can_ask_again: nodes.can_ask_again,
    })
}

fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Cuts the session off however its stream ends, cancellation included.
struct CutOff(Arc<Shared>, SessionId);

impl Drop for CutOff {
    fn drop(&mut self) {
        self.0.sessions.cut_off(self.1);
    }
}

async fn hear(shared: &Arc<Shared>, id: SessionId, mut requests: Streaming<wire::SessionRequest>) {
    let _cut_off = CutOff(Arc::clone(shared), id);
    let stopping = shared.tasks.stopping();
    loop {
        let message = tokio::select! {
            message = requests.message() => message,
            () = stopping.cancelled() => return,
        };
        match message {
            Ok(Some(wire::SessionRequest { message: Some(message) })) => match message {
                session_request::Message::Renew(renew) => shared.sessions.renew(id, renew.sequence),
                session_request::Message::RouteRevoked(revoked) => {
                    shared.sessions.acknowledge(id, revoked.revocation_id);
                }
                session_request::Message::Hello(_) => return,
            },
            // A kind of message that only a later router knows.
            Ok(Some(wire::SessionRequest { message: None })) => {}
            Ok(None) | Err(_) => return,
        }
    }
}

impl Routing {
    async fn find(&self, name: &crate::repository::RepositoryKey) -> Result<Option<Repository>, DbError> {
        let db = &self.0.db;
        db.promptly(|| repositories::repository_resolve(db.pool(), name)).await
    }

    fn counted<T>(&self, step: WriteStep, result: Result<T, WriteError>) -> Result<T, Status> {
        let counted = result.as_ref().map_or_else(WriteError::result, |_| WriteResult::Ok);
        self.0.metrics.write(step, counted);
        result.map_err(Status::from)
    }

    fn parse_begin(&self, request: wire::BeginWriteRequest, correlation_id: String) -> Result<Begin, Status> {
        bounded("storages", &request.unreachable_storages)?;
        let kind = match request.kind() {
            wire::WriteKind::Update => Kind::Update,
            wire::WriteKind::Create => Kind::Create,
            wire::WriteKind::Upsert => Kind::Upsert,
            wire::WriteKind::Unspecified => return Err(Status::invalid_argument("kind is not set")),
        };
        let additional = request.additional_repository.as_ref().map(|name| key(Some(name))).transpose()?;
        let sync_from_site = match request.sync_from_site.as_str() {
            "" => None,
            site => Some(argument::<SiteName>("sync_from_site", site)?),
        };
        let asked = request.asked_nodes.as_ref().map(asked).transpose()?;
        // A router that does not say how long it waits is one that does not count votes.
        let votes = request.wait_milliseconds > 0 || asked.is_some();
        let wait = match request.wait_milliseconds {
            0 => self.0.config.timing.ticket_wait.0,
            wait => Duration::from_millis(wait.into()),
        };
        Ok(Begin {
            key: key(request.name.as_ref())?,
            kind,
            additional,
            terms: Terms {
                sync_from_site,
                unreachable: storages(&request.unreachable_storages)?,
                votes,
                asked,
            },
            wait,
            intent: writes::Intent {
                id: if request.write_id.is_empty() {
                    Uuid::now_v7()
                } else {
                    argument("write_id", &request.write_id)?
                },
                router_id: text("router_id", request.router_id)?,
                method: text("method", request.method)?,
                correlation_id,
                lease: self.0.config.timing.write_lease.0,
            },
        })
    }
}

impl Routing {
    /// Begins a write on behalf of a caller that may hang up: then it stops waiting, and what it has begun is given up.
    async fn begin_for_caller(&self, begin: Begin) -> Result<Result<Started, WriteError>, Status> {
        let (answer, answered) = oneshot::channel();
        let shared = Arc::clone(&self.0);
        let (id, router_id) = (begin.intent.id, begin.intent.router_id.clone());
        let hung_up = CancellationToken::new();
        let waiting = hung_up.clone().drop_guard();
        self.0.tasks.spawn("begin", async move {
            let begun = writing::begin(&shared, &begin, &hung_up).await;
            if let Err(Ok(_)) = answer.send(begun)
                && let Err(error) = writing::discard(&shared, id, &router_id).await
            {
                tracing::debug!(write_id = %id, %error, "a write that nobody waited for is left to run out");
            }
        });
        let begun = answered.await.map_err(|_| Status::internal("beginning the write failed"));
        waiting.disarm();
        begun
    }
}

#[tonic::async_trait]
impl RoutingService for Routing {
    async fn session(
        &self,
        request: Request<Streaming<wire::SessionRequest>>,
    ) -> Result<Response<BoxStream<wire::SessionResponse>>, Status> {
        let shared = Arc::clone(&self.0);
        let mut requests = request.into_inner();
        // Answered at once, so that a router may wait for the headers before it says hello.
        let responses = futures::stream::once(async move {
            let hello = tokio::time::timeout(HELLO_DEADLINE, requests.message())
                .await
                .map_err(|_| Status::deadline_exceeded("no hello"))??;
            let Some(session_request::Message::Hello(hello)) = hello.and_then(|request| request.message)
            else {
                return Err(Status::invalid_argument("the first message must be a hello"));
            };
            let router_id = text("router_id", hello.router_id)?;
            let (id, outlet) = shared
                .sessions
                .open(&router_id)
                .ok_or_else(|| Status::unavailable("this coordinator holds no lease at the moment"))?;
            let welcome = wire::SessionWelcome {
                session_id: shared.sessions.name(id),
                lease_milliseconds: milliseconds(shared.config.timing.router_lease.0),
                topology: Some((&*shared.topology.get()).into()),
            };
            shared.sessions.send(id, session_response::Message::Welcome(welcome));
            let hearing = Arc::clone(&shared);
            shared.tasks.spawn("session", async move { hear(&hearing, id, requests).await });
            Ok(ReceiverStream::new(outlet))
        })
        .flat_map(|opened| match opened {
            Ok(outlet) => outlet.boxed(),
            Err(status) => futures::stream::once(async move { Err(status) }).boxed(),
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn resolve_repository(
        &self,
        request: Request<wire::ResolveRepositoryRequest>,
    ) -> Result<Response<wire::ResolveRepositoryResponse>, Status> {
        let request = request.into_inner();
        let name = key(request.name.as_ref())?;
        if self.0.topology.get().virtual_storage(&name.virtual_storage).is_none() {
            return Err(NameError::UnknownVirtualStorage.into());
        }
        let session = self.0.sessions.parse(&request.session_id);
        let filling = session.map(|id| self.0.sessions.begin_fill(id, &name));
        let repository = self.find(&name).await?.ok_or(WriteError::NotFound)?;
        let cacheable = filling.is_some_and(|filling| filling.end(repository.generation));
        Ok(Response::new(wire::ResolveRepositoryResponse { route: Some((&repository).into()), cacheable }))
    }

    async fn begin_write(
        &self,
        request: Request<wire::BeginWriteRequest>,
    ) -> Result<Response<wire::BeginWriteResponse>, Status> {
        let from_metadata = correlation_id(&request);
        let request = request.into_inner();
        let given = request.correlation_id.as_str();
        let correlation_id = if given.is_empty() || given.len() > MAX_TEXT_BYTES {
            from_metadata.to_string()
        } else {
            given.to_owned()
        };
        bounded("given_up_write_ids", &request.given_up_write_ids)?;
        for id in &request.given_up_write_ids {
            let given_up =
                writing::discard(&self.0, argument("given_up_write_ids", id)?, &request.router_id).await;
            self.counted(WriteStep::Begin, given_up)?;
        }
        let begin = self.parse_begin(request, correlation_id)?;
        let (write_id, lease) = (begin.intent.id, begin.intent.lease);
        let begun = self.begin_for_caller(begin).await?;
        let started = self.counted(WriteStep::Begin, begun)?;
        Ok(Response::new(wire::BeginWriteResponse {
            write_id: write_id.to_string(),
            route: Some((&started.repository).into()),
            additional_replica_path: started.additional.map(String::from).unwrap_or_default(),
            lease_milliseconds: milliseconds(lease),
            assigned_secondaries: started.secondaries.into_iter().map(String::from).collect(),
            participants: started.participants.into_iter().map(String::from).collect(),
            waited_milliseconds: milliseconds(started.waited),
        }))
    }

    async fn commit_write(
        &self,
        request: Request<wire::CommitWriteRequest>,
    ) -> Result<Response<wire::CommitWriteResponse>, Status> {
        let request = request.into_inner();
        bounded("storages", &request.committed_storages)?;
        let id = argument("write_id", &request.write_id)?;
        let storages = storages(&request.committed_storages)?;
        // Not bound to the caller: a commit whose router hangs up must still revoke what it made wrong.
        let shared = Arc::clone(&self.0);
        let (router_id, unvoted) = (request.router_id, request.unvoted);
        let task = self.0.tasks.spawn("commit", async move {
            let report = Report {
                id,
                router_id: &router_id,
                storages: &storages,
                unvoted,
                word: Word::Router,
                doubtful: false,
            };
            writing::commit(&shared, &report).await
        });
        let committed = task.await.map_err(|error| Status::internal(error.to_string()))?;
        let recorded = self.counted(WriteStep::Commit, committed)?;
        Ok(Response::new(wire::CommitWriteResponse {
            generation: recorded.generation.0,
            primary: recorded.primary.to_string(),
            epoch: recorded.epoch.0,
        }))
    }

    async fn abort_write(
        &self,
        request: Request<wire::AbortWriteRequest>,
    ) -> Result<Response<wire::AbortWriteResponse>, Status> {
        let request = request.into_inner();
        bounded("storages", &request.unreachable_storages)?;
        let id: Uuid = argument("write_id", &request.write_id)?;
        let outcome = request.outcome();
        let router_id = request.router_id;
        let shared = Arc::clone(&self.0);
        let task = self.0.tasks.spawn("abort", async move {
            match outcome {
                Outcome::NotApplied => writing::discard(&shared, id, &router_id).await,
                Outcome::InDoubt => writing::settle(&shared, id, &Doubt::Reported { router_id }).await,
                Outcome::Unspecified => Err(WriteError::Argument("outcome is not set".to_owned())),
            }
        });
        let aborted = task.await.map_err(|error| Status::internal(error.to_string()))?;
        self.counted(WriteStep::Abort, aborted)?;
        Ok(Response::new(wire::AbortWriteResponse {}))
    }

    async fn renew_writes(
        &self,
        request: Request<wire::RenewWritesRequest>,
    ) -> Result<Response<wire::RenewWritesResponse>, Status> {
        let request = request.into_inner();
        bounded("writes", &request.write_ids)?;
        let ids: Vec<Uuid> =
            request.write_ids.iter().map(|id| argument("write_id", id)).collect::<Result<_, _>>()?;
        let db = &self.0.db;
        let lease = self.0.config.timing.write_lease.0;
        let kept = db.retrying(|| writes::write_renew(db.pool(), &ids, &request.router_id, lease)).await?;
        let lost_write_ids =
            ids.into_iter().filter(|id| !kept.contains(id)).map(|id| id.to_string()).collect();
        Ok(Response::new(wire::RenewWritesResponse { lost_write_ids }))
    }

    async fn remove_repository(
        &self,
        request: Request<wire::RemoveRepositoryRequest>,
    ) -> Result<Response<wire::RemoveRepositoryResponse>, Status> {
        let correlation_id = correlation_id(&request);
        let name = key(request.get_ref().name.as_ref())?;
        if self.0.topology.get().virtual_storage(&name.virtual_storage).is_none() {
            return Err(NameError::UnknownVirtualStorage.into());
        }
        let db = &self.0.db;
        let gone = db
            .retrying(|| repositories::repository_remove(db.pool(), &name, correlation_id.as_str()))
            .await?
            .ok_or(WriteError::NotFound)?;
        self.0.bell.notify_one();
        let repository_id = gone.revoked.id;
        self.0.revoke_now(gone.revoked, gone.revocation).await?;
        Ok(Response::new(wire::RemoveRepositoryResponse { repository_id: repository_id.0 }))
    }

    async fn report_replica(
        &self,
        request: Request<wire::ReportReplicaRequest>,
    ) -> Result<Response<wire::ReportReplicaResponse>, Status> {
        let request = request.into_inner();
        let id = RepositoryId(request.repository_id);
        let storage: StorageName = argument("storage", &request.storage)?;
        let what = text("what", request.what.chars().take(MAX_TEXT_BYTES / 4).collect())?;
        let db = &self.0.db;
        let Some(place) = self.0.suspicions.admit(id, Instant::now()) else {
            return Ok(Response::new(wire::ReportReplicaResponse { looked_into: false }));
        };
        let repository = db.retrying(|| repositories::repository_find(db.pool(), id)).await?;
        let looked_into = repository.is_some_and(|repository| {
            // A replica that was out of date when it was read is nothing to wonder about.
            repository.generation.0 >= request.generation
                && repository.up_to_date().any(|known| *known == storage)
        });
        if looked_into {
            tracing::warn!(repository_id = %id, %storage, what, "a router suspects a replica");
            // Whatever becomes of the look, it is not forgotten before the replica was compared.
            db.retrying(|| verifications::unverify_replica(db.pool(), id, &storage)).await?;
            tasks::verify::look_into(&self.0, id, place);
        }
        Ok(Response::new(wire::ReportReplicaResponse { looked_into }))
    }
}
