//! A coordinator with its state in memory, whose every answer the test decides.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tabularium_common::{
    grpc::{ListenAddress, Listener},
    lifecycle::Tasks,
};
use tabularium_proto::coordinator::{
    AbortWriteRequest, AbortWriteResponse, BeginWriteRequest, BeginWriteResponse, CommitWriteRequest,
    CommitWriteResponse, RemoveRepositoryRequest, RemoveRepositoryResponse, RenewWritesRequest,
    RenewWritesResponse, Replica, ReportReplicaRequest, ReportReplicaResponse, RepositoryName,
    ResolveRepositoryRequest, ResolveRepositoryResponse, RevokeRoute, Route, SessionRenewed, SessionRequest,
    SessionResponse, SessionWelcome, Storage, Topology, VirtualStorage,
    operator_service_server::OperatorServiceServer,
    repair_service_server::RepairServiceServer,
    routing_service_server::{RoutingService, RoutingServiceServer},
    session_request, session_response,
};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, codegen::BoxStream};

/// What the test sets and sees.
pub(crate) struct State {
    pub(crate) storages: Vec<(String, String)>,
    pub(crate) routes: HashMap<String, Route>,
    /// Renewals are granted.
    pub(crate) grant: bool,
    pub(crate) lease_milliseconds: u32,
    pub(crate) write_lease_milliseconds: u32,
    pub(crate) resolves: Vec<ResolveRepositoryRequest>,
    pub(crate) begins: Vec<BeginWriteRequest>,
    pub(crate) commits: Vec<CommitWriteRequest>,
    pub(crate) aborts: Vec<AbortWriteRequest>,
    pub(crate) renewals: Vec<RenewWritesRequest>,
    pub(crate) lost_writes: Vec<String>,
    /// Renewals of writes are heard and not answered, as by a process that is stopped.
    pub(crate) renewals_hang: bool,
    /// All up-to-date storages take part in writes, and this many of them must agree; 0: only the primary does.
    pub(crate) quorum: u32,
    /// `BeginWrite` is refused as many times as out of date.
    pub(crate) outdated: usize,
    /// Writes that hold a ticket, by repository.
    pub(crate) tickets: HashMap<String, String>,
    /// How many writes ever held the ticket of one repository at once.
    pub(crate) most_tickets: usize,
    /// What `CommitWrite` answers instead.
    pub(crate) commit_failure: Option<Status>,
    pub(crate) acknowledged: Vec<u64>,
    pub(crate) sessions: Vec<mpsc::Sender<Result<SessionResponse, Status>>>,
    pub(crate) correlation_ids: Vec<String>,
    pub(crate) reports: Vec<ReportReplicaRequest>,
    /// What operators had done.
    pub(crate) operators: Vec<String>,
}

struct Inner {
    state: Mutex<State>,
    /// Commits pass one permit each.
    commits_allowed: Semaphore,
    /// Resolutions pass one permit each.
    resolves_allowed: Semaphore,
    stop: CancellationToken,
    silence: CancellationToken,
    tasks: Tasks,
}

#[derive(Clone)]
pub(crate) struct Coordinator(Arc<Inner>);

const PLENTY: usize = 1_000_000;

impl Coordinator {
    /// Listens on a socket file in `directory`.
    pub(crate) async fn start(
        directory: &Path,
        name: &str,
        storages: &[(String, String)],
        tasks: &Tasks,
    ) -> Self {
        let coordinator = Self(Arc::new(Inner {
            state: Mutex::new(State {
                storages: storages.to_vec(),
                routes: HashMap::new(),
                grant: true,
                lease_milliseconds: 60_000,
                write_lease_milliseconds: 60_000,
                resolves: Vec::new(),
                begins: Vec::new(),
                commits: Vec::new(),
                aborts: Vec::new(),
                renewals: Vec::new(),
                lost_writes: Vec::new(),
                renewals_hang: false,
                quorum: 0,
                outdated: 0,
                tickets: HashMap::new(),
                most_tickets: 0,
                commit_failure: None,
                acknowledged: Vec::new(),
                sessions: Vec::new(),
                correlation_ids: Vec::new(),
                reports: Vec::new(),
                operators: Vec::new(),
            }),
            commits_allowed: Semaphore::new(PLENTY),
            resolves_allowed: Semaphore::new(PLENTY),
            stop: CancellationToken::new(),
            silence: CancellationToken::new(),
            tasks: tasks.clone(),
        }));
        let address = ListenAddress::Unix(directory.join(name));
        let listener = Listener::bind(&address).await.unwrap();
        let routes = tonic::service::Routes::new(RoutingServiceServer::new(coordinator.clone()))
            .add_service(RepairServiceServer::new(coordinator.clone()))
            .add_service(OperatorServiceServer::new(coordinator.clone()));
        let service = TowerToHyperService::new(routes.prepare());
        let (stop, owner) = (coordinator.0.stop.clone(), tasks.clone());
        let silence = coordinator.0.silence.clone();
        tasks.spawn("fake coordinator", async move {
            loop {
                let connection = tokio::select! {
                    () = stop.cancelled() => return,
                    accepted = listener.accept() => accepted.unwrap(),
                };
                let (stop, silence, service) = (stop.clone(), silence.clone(), service.clone());
                owner.spawn("fake coordinator connection", async move {
                    let Ok(connection) = connection.secure().await else { return };
                    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let served = builder.serve_connection(TokioIo::new(connection), service);
                    let mut served = std::pin::pin!(served);
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => {}
                        // The connection stays open, and nobody is at it.
                        () = silence.cancelled() => stop.cancelled().await,
                        _ = &mut served => {}
                    }
                });
            }
        });
        coordinator
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// As a killed process: its sessions and its listener are gone.
    pub(crate) fn kill(&self) {
        self.0.stop.cancel();
        self.state().sessions.clear();
    }

    /// As a process that is stopped, or a network that swallows everything: connections are accepted, and that is all.
    pub(crate) fn fall_silent(&self) {
        self.0.silence.cancel();
    }

    pub(crate) fn commits_allowed(&self) -> &Semaphore {
        &self.0.commits_allowed
    }

    pub(crate) fn resolves_allowed(&self) -> &Semaphore {
        &self.0.resolves_allowed
    }

    async fn hear(
        &self,
        message: Option<session_request::Message>,
        ours: &mpsc::Sender<Result<SessionResponse, Status>>,
    ) {
        match message {
            Some(session_request::Message::Renew(renew)) if self.state().grant => {
                let renewed = SessionRenewed { sequence: renew.sequence };
                let message = Some(session_response::Message::Renewed(renewed));
                ours.send(Ok(SessionResponse { message })).await.ok();
            }
            Some(session_request::Message::RouteRevoked(revoked)) => {
                self.state().acknowledged.push(revoked.revocation_id);
            }
            _ => {}
        }
    }

    /// A repository on all storages, at one generation; the first is the primary.
    pub(crate) fn add(&self, relative_path: &str) {
        let mut state = self.state();
        let id = i64::try_from(state.routes.len()).unwrap() + 1;
        let route = Route {
            repository_id: id,
            name: Some(RepositoryName {
                virtual_storage: "default".into(),
                relative_path: relative_path.into(),
            }),
            replica_path: format!("@cluster/repositories/aa/bb/{id}"),
            primary: state.storages[0].0.clone(),
            generation: 5,
            epoch: 1,
            replicas: state
                .storages
                .iter()
                .map(|(storage, _)| Replica { storage: storage.clone(), generation: 5 })
                .collect(),
            home_site: String::new(),
            write_quorum: 0,
        };
        state.routes.insert(relative_path.to_owned(), route);
    }

    /// Changes a route.
    pub(crate) fn change(&self, relative_path: &str, change: impl FnOnce(&mut Route)) {
        change(self.state().routes.get_mut(relative_path).unwrap());
    }

    /// Sends a message to every session.
    pub(crate) async fn tell(&self, message: session_response::Message) {
        let sessions = self.state().sessions.clone();
        for session in sessions {
            session.send(Ok(SessionResponse { message: Some(message.clone()) })).await.ok();
        }
    }

    pub(crate) async fn revoke(&self, revocation_id: u64, relative_path: &str, generation: i64) {
        let name = RepositoryName { virtual_storage: "default".into(), relative_path: relative_path.into() };
        self.tell(session_response::Message::RevokeRoute(RevokeRoute {
            revocation_id,
            name: Some(name),
            repository_id: 1,
            generation,
        }))
        .await;
    }

    fn route(&self, name: Option<&RepositoryName>) -> Result<Route, Status> {
        let path = &name.unwrap().relative_path;
        self.state().routes.get(path).cloned().ok_or_else(|| Status::not_found("repository not found"))
    }
}

fn topology(state: &State) -> Topology {
    let storages = state
        .storages
        .iter()
        .map(|(name, address)| Storage { name: name.clone(), address: address.clone(), ..Storage::default() })
        .collect();
    Topology {
        site: "here".into(),
        virtual_storages: vec![VirtualStorage { name: "default".into(), storages }],
    }
}

#[tonic::async_trait]
impl RoutingService for Coordinator {
    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<BoxStream<SessionResponse>>, Status> {
        let mut theirs = request.into_inner();
        let (ours, queue) = mpsc::channel(100);
        let Some(session_request::Message::Hello(_)) = theirs.message().await?.and_then(|m| m.message) else {
            return Err(Status::invalid_argument("hello"));
        };
        let welcome = {
            let mut state = self.state();
            state.sessions.push(ours.clone());
            SessionWelcome {
                session_id: format!("session-{}", state.sessions.len()),
                lease_milliseconds: state.lease_milliseconds,
                topology: Some(topology(&state)),
            }
        };
        let message = Some(session_response::Message::Welcome(welcome));
        ours.try_send(Ok(SessionResponse { message })).unwrap();
        let this = self.clone();
        self.0.tasks.spawn("fake session", async move {
            while let Ok(Some(message)) = theirs.message().await {
                this.hear(message.message, &ours).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }

    async fn resolve_repository(
        &self,
        request: Request<ResolveRepositoryRequest>,
    ) -> Result<Response<ResolveRepositoryResponse>, Status> {
        let correlation = request.metadata().get("x-gitlab-correlation-id").cloned();
        let request = request.into_inner();
        let mut answer = self.route(request.name.as_ref());
        if let Ok(route) = &mut answer {
            route.write_quorum = self.state().quorum;
        }
        let cacheable = !request.session_id.is_empty();
        {
            let mut state = self.state();
            state.resolves.push(request);
            state.correlation_ids.extend(correlation.map(|value| value.to_str().unwrap().to_owned()));
        }
        self.0.resolves_allowed.acquire().await.unwrap().forget();
        Ok(Response::new(ResolveRepositoryResponse { route: Some(answer?), cacheable }))
    }

    async fn begin_write(
        &self,
        request: Request<BeginWriteRequest>,
    ) -> Result<Response<BeginWriteResponse>, Status> {
        let request = request.into_inner();
        let name = request.name.clone();
        let unreachable = request.unreachable_storages.clone();
        let path = name.clone().unwrap().relative_path;
        self.state().begins.push(request.clone());
        if request.kind == 2 {
            if self.state().routes.contains_key(&path) {
                return Err(Status::already_exists(
                    "route repository creation: reserve repository id: repository already exists",
                ));
            }
            self.add(&path);
        }
        let mut route = self.route(name.as_ref())?;
        if unreachable.contains(&route.primary) {
            let Some(next) = route.replicas.iter().find(|replica| !unreachable.contains(&replica.storage))
            else {
                return Err(Status::failed_precondition("repository is in read-only mode"));
            };
            route.primary.clone_from(&next.storage);
            route.epoch += 1;
            self.change(&path, |own| {
                own.primary.clone_from(&route.primary);
                own.epoch = route.epoch;
            });
        }
        let additional_replica_path = match &request.additional_repository {
            Some(name) => self.route(Some(name))?.replica_path,
            None => String::new(),
        };
        let mut state = self.state();
        if let Some(asked) = &request.asked_nodes {
            let holds = asked.epoch == route.epoch && asked.primary == route.primary;
            if !holds || state.outdated > 0 {
                state.outdated = state.outdated.saturating_sub(1);
                return Err(Status::aborted("the route is out of date"));
            }
        }
        let mut participants = Vec::new();
        if state.quorum > 0 {
            let asked = request.asked_nodes.as_ref().map(|asked| &asked.storages);
            participants = route
                .replicas
                .iter()
                .filter(|replica| replica.generation == route.generation)
                .map(|replica| replica.storage.clone())
                .filter(|storage| !unreachable.contains(storage))
                .filter(|storage| asked.is_none_or(|asked| asked.contains(storage)))
                .collect();
            participants.sort_by_key(|storage| *storage != route.primary);
            if participants.len() < state.quorum as usize {
                return Err(Status::failed_precondition("repository is in read-only mode"));
            }
        }
        route.write_quorum = state.quorum;
        let write_id = format!("write-{}", state.begins.len());
        if state.tickets.insert(path, write_id.clone()).is_some() {
            state.most_tickets = state.most_tickets.max(2);
        }
        state.most_tickets = state.most_tickets.max(1);
        Ok(Response::new(BeginWriteResponse {
            write_id,
            route: Some(route),
            additional_replica_path,
            lease_milliseconds: state.write_lease_milliseconds,
            assigned_secondaries: Vec::new(),
            participants,
            waited_milliseconds: 0,
        }))
    }

    async fn commit_write(
        &self,
        request: Request<CommitWriteRequest>,
    ) -> Result<Response<CommitWriteResponse>, Status> {
        self.0.commits_allowed.acquire().await.unwrap().forget();
        let mut state = self.state();
        let request = request.into_inner();
        state.tickets.retain(|_, holder| *holder != request.write_id);
        state.commits.push(request);
        match &state.commit_failure {
            Some(status) => Err(status.clone()),
            None => {
                Ok(Response::new(CommitWriteResponse { generation: 6, ..CommitWriteResponse::default() }))
            }
        }
    }

    async fn abort_write(
        &self,
        request: Request<AbortWriteRequest>,
    ) -> Result<Response<AbortWriteResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.tickets.retain(|_, holder| *holder != request.write_id);
        state.aborts.push(request);
        Ok(Response::new(AbortWriteResponse {}))
    }

    async fn renew_writes(
        &self,
        request: Request<RenewWritesRequest>,
    ) -> Result<Response<RenewWritesResponse>, Status> {
        if self.state().renewals_hang {
            std::future::pending::<()>().await;
        }
        let mut state = self.state();
        state.renewals.push(request.into_inner());
        Ok(Response::new(RenewWritesResponse { lost_write_ids: state.lost_writes.clone() }))
    }

    async fn remove_repository(
        &self,
        request: Request<RemoveRepositoryRequest>,
    ) -> Result<Response<RemoveRepositoryResponse>, Status> {
        let name = request.into_inner().name;
        let route = self.route(name.as_ref())?;
        self.state().routes.remove(&name.unwrap().relative_path);
        Ok(Response::new(RemoveRepositoryResponse { repository_id: route.repository_id }))
    }

    async fn report_replica(
        &self,
        request: Request<ReportReplicaRequest>,
    ) -> Result<Response<ReportReplicaResponse>, Status> {
        self.state().reports.push(request.into_inner());
        Ok(Response::new(ReportReplicaResponse { looked_into: true }))
    }
}
