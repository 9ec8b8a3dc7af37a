//! A site to test with: database, bus, played nodes and routers.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{Connection as _, PgConnection};
use tabularium_common::{
    config::ConfigDuration,
    grpc::{self, Address},
};
use tabularium_coordinator::{
    Config, Coordinator, DatabaseTls, DatabaseUrl, FsckConfig, HomeSiteConfig, QuorumPolicy, RepairConfig,
    StorageConfig, SubscriberConfig, Timing, VirtualStorageConfig,
};
use tabularium_proto::coordinator::{
    self as wire, abort_write_request::Outcome, duty_service_client::DutyServiceClient,
    operator_service_client::OperatorServiceClient, routing_service_client::RoutingServiceClient,
    session_request, session_response,
};
use tabularium_testkit::{nats::Nats, postgres::Postgres};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep},
};
use tonic::{Code, Status, transport::Channel};

pub(crate) use crate::node::{Holding, Node, Objects};

/// Longest wait for a condition; the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` answers something.
pub(crate) async fn eventually<T, F, Fut>(what: &str, mut condition: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Postgres, NATS and three nodes.
pub(crate) struct Site {
    _postgres: Postgres,
    _nats: Nats,
    pub(crate) config: Config,
    pub(crate) nodes: Vec<Node>,
    pub(crate) database: String,
}

pub(crate) type Clients = (Routing, DutyServiceClient<Channel>, OperatorServiceClient<Channel>);
pub(crate) type Routing = RoutingServiceClient<Channel>;

impl Site {
    pub(crate) async fn start() -> Self {
        let postgres = Postgres::start().await;
        let nats = Nats::start_own().await;
        let url = nats.url().to_owned();
        Self::with(postgres, Some(nats), url).await
    }

    async fn with(postgres: Postgres, nats: Option<Nats>, nats_url: String) -> Self {
        let database = postgres.database().await;
        let mut nodes = Vec::new();
        for number in 0..3 {
            nodes.push(Node::start(&format!("node-{number}")).await);
        }
        let config = config(&database, &nats_url, &nodes);
        Self { _postgres: postgres, _nats: nats.unwrap(), config, nodes, database }
    }

    pub(crate) async fn coordinator(&self) -> Coordinator {
        Coordinator::start(self.config.clone()).await.unwrap()
    }

    pub(crate) async fn sql(&self) -> PgConnection {
        let mut connection = PgConnection::connect(&self.database).await.unwrap();
        sqlx::query("SET search_path = tabularium").execute(&mut connection).await.unwrap();
        connection
    }

    /// The node of a storage.
    pub(crate) fn node(&self, storage: &str) -> &Node {
        let number: usize = storage.trim_start_matches("node-").parse().unwrap();
        &self.nodes[number]
    }

    /// What must hold whenever nothing is under way.
    pub(crate) async fn check_consistency(&self) {
        let mut sql = self.sql().await;
        let wrong: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM replicas p JOIN repositories r ON r.id = p.repository_id
             WHERE p.behind <> (p.generation < r.generation) OR p.generation > r.generation",
        )
        .fetch_one(&mut sql)
        .await
        .unwrap();
        assert_eq!(wrong, 0, "replicas whose mark and generation disagree");
        let unowed: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM replicas p JOIN repositories r ON r.id = p.repository_id
             WHERE p.behind AND r.state = 'ready' AND NOT EXISTS (
                 SELECT FROM duties d WHERE d.repository_id = r.id AND d.target = p.storage AND d.state <> 'done')",
        )
        .fetch_one(&mut sql)
        .await
        .unwrap();
        assert_eq!(unowed, 0, "replicas that are behind and owed nothing");
    }
}

/// Makes all copies equal in the records, as if they had been repaired.
pub(crate) async fn repair(site: &Site) {
    let mut sql = site.sql().await;
    sqlx::query(
        "UPDATE replicas p SET generation = r.generation, behind = false FROM repositories r
         WHERE r.id = p.repository_id",
    )
    .execute(&mut sql)
    .await
    .unwrap();
}

fn config(database: &str, nats_url: &str, nodes: &[Node]) -> Config {
    Config {
        site: "here".parse().unwrap(),
        listen: grpc::ListenAddress::Tcp(([127, 0, 0, 1], 0).into()).into(),
        http_listen: std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into(),
        advertise: None,
        token_file: None,
        database_url: DatabaseUrl::new(database),
        database_password_file: None,
        database_tls: DatabaseTls::default(),
        database_schema: "tabularium".into(),
        max_database_connections: 8,
        nats_url: nats_url.into(),
        node_token_file: None,
        virtual_storages: vec![VirtualStorageConfig {
            name: "default".parse().unwrap(),
            default_replication_factor: 0,
            write_quorum: QuorumPolicy::Majority,
            storages: nodes
                .iter()
                .enumerate()
                .map(|(number, node)| StorageConfig {
                    name: format!("node-{number}").parse().unwrap(),
                    address: node.address.clone(),
                })
                .collect(),
        }],
        subscribers: vec![SubscriberConfig { name: "tokyo".parse().unwrap() }],
        home_sites: vec![HomeSiteConfig {
            name: "amsterdam".parse().unwrap(),
            url: "https://git.amsterdam.example/".into(),
        }],
        timing: Timing {
            retry_delay: ConfigDuration::from_millis(20),
            relay_interval: ConfigDuration::from_millis(100),
            reconcile_interval: ConfigDuration::from_millis(300),
            parked_after: 2,
            movement_interval: ConfigDuration::from_millis(50),
            // Tests of other things count how often nodes are asked what they hold.
            verification_interval: ConfigDuration::from_secs(3600),
            ..Timing::default()
        },
        repair: RepairConfig::default(),
        fsck: FsckConfig { share_percent: 0, ..FsckConfig::default() },
        drain_seconds: 10,
        tls: tabularium_common::tls::TlsConfig::NONE,
        telemetry: tabularium_common::telemetry::TelemetryConfig::default(),
    }
}

pub(crate) fn clients(coordinator: &Coordinator) -> Clients {
    clients_of(coordinator.grpc_address())
}

pub(crate) fn clients_of(address: &Address) -> Clients {
    let channel = grpc::channel(address);
    (
        RoutingServiceClient::new(channel.clone()),
        DutyServiceClient::new(channel.clone()),
        OperatorServiceClient::new(channel),
    )
}

pub(crate) fn name(path: &str) -> wire::RepositoryName {
    wire::RepositoryName { virtual_storage: "default".into(), relative_path: path.into() }
}

pub(crate) fn begin(path: &str, kind: wire::WriteKind) -> wire::BeginWriteRequest {
    wire::BeginWriteRequest {
        name: Some(name(path)),
        kind: kind.into(),
        router_id: "router".into(),
        method: "/gitaly.SmartHTTPService/PostReceivePack".into(),
        ..wire::BeginWriteRequest::default()
    }
}

/// As a router that counts votes asks.
pub(crate) fn begin_voted(path: &str, kind: wire::WriteKind) -> wire::BeginWriteRequest {
    wire::BeginWriteRequest { wait_milliseconds: 20_000, ..begin(path, kind) }
}

/// Of storages that voted, or of the primary alone without votes.
pub(crate) async fn commit(
    routing: &mut Routing,
    begun: &wire::BeginWriteResponse,
    storages: &[&str],
) -> Result<i64, Status> {
    let request = wire::CommitWriteRequest {
        write_id: begun.write_id.clone(),
        router_id: "router".into(),
        committed_storages: storages.iter().map(ToString::to_string).collect(),
        unvoted: storages.len() == 1,
    };
    routing.commit_write(request).await.map(|response| response.into_inner().generation)
}

pub(crate) async fn abort(
    routing: &mut Routing,
    begun: &wire::BeginWriteResponse,
    outcome: Outcome,
    unreachable: &[&str],
) -> Result<(), Status> {
    let request = wire::AbortWriteRequest {
        write_id: begun.write_id.clone(),
        router_id: "router".into(),
        outcome: outcome.into(),
        unreachable_storages: unreachable.iter().map(ToString::to_string).collect(),
    };
    routing.abort_write(request).await.map(drop)
}

pub(crate) async fn begin_write(routing: &mut Routing, path: &str) -> wire::BeginWriteResponse {
    routing.begin_write(begin(path, wire::WriteKind::Update)).await.unwrap().into_inner()
}

/// A repository whose three copies are equal; answers its route.
pub(crate) async fn create(routing: &mut Routing, path: &str) -> wire::Route {
    let begun = routing.begin_write(begin(path, wire::WriteKind::Create)).await.unwrap().into_inner();
    commit(routing, &begun, &["node-0", "node-1", "node-2"]).await.unwrap();
    resolve(routing, path).await.unwrap()
}

pub(crate) async fn resolve(routing: &mut Routing, path: &str) -> Result<wire::Route, Status> {
    let request = wire::ResolveRepositoryRequest { name: Some(name(path)), session_id: String::new() };
    Ok(routing.resolve_repository(request).await?.into_inner().route.unwrap())
}

/// Generations of the copies, by storage name.
pub(crate) fn generations(route: &wire::Route) -> Vec<i64> {
    route.replicas.iter().map(|replica| replica.generation).collect()
}

pub(crate) fn others(route: &wire::Route) -> Vec<String> {
    route
        .replicas
        .iter()
        .map(|replica| replica.storage.clone())
        .filter(|storage| *storage != route.primary)
        .collect()
}

#[track_caller]
pub(crate) fn assert_refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, text: &str) {
    let status = result.expect_err("must be refused");
    assert_eq!((status.code(), status.message()), (code, text));
}

/// A router's cache, by the rules of the protocol.
#[derive(Default)]
struct Cache {
    session: String,
    lease: Duration,
    usable_until: Option<Instant>,
    sent: Vec<(u64, Instant)>,
    route: Option<wire::Route>,
    floor: i64,
}

/// A router with a session, caching one repository.
pub(crate) struct Router {
    cache: Arc<Mutex<Cache>>,
    routing: Routing,
    path: String,
    /// While set, revocations are obeyed by nobody and not acknowledged.
    pub(crate) deaf: Arc<AtomicBool>,
    _driving: JoinHandle<()>,
}

impl Router {
    pub(crate) async fn start(address: &Address, router_id: &str, path: &str) -> Self {
        let (routing, _, _) = clients_of(address);
        let cache = Arc::new(Mutex::new(Cache::default()));
        let deaf = Arc::new(AtomicBool::new(false));
        let driving = tabularium_common::lifecycle::Tasks::new().spawn(
            "router",
            drive(routing.clone(), router_id.to_owned(), Arc::clone(&cache), Arc::clone(&deaf)),
        );
        let router = Self { cache, routing, path: path.into(), deaf, _driving: driving };
        eventually("the router's lease", || async { router.is_leased().then_some(()) }).await;
        router
    }

    fn is_leased(&self) -> bool {
        self.cache.lock().unwrap().usable_until.is_some_and(|until| Instant::now() < until)
    }

    /// Asks for the route and caches it.
    pub(crate) async fn fill(&self) -> bool {
        let session_id = {
            let mut cache = self.cache.lock().unwrap();
            cache.floor = 0;
            cache.session.clone()
        };
        let request =
            wire::ResolveRepositoryRequest { name: Some(name(&self.path)), session_id: session_id.clone() };
        let Ok(answer) = self.routing.clone().resolve_repository(request).await else { return false };
        let answer = answer.into_inner();
        let route = answer.route.unwrap();
        let mut cache = self.cache.lock().unwrap();
        let keep = answer.cacheable && cache.session == session_id && route.generation >= cache.floor;
        if keep {
            cache.route = Some(route);
        }
        keep
    }

    /// The generation a read that starts now would be served from the cache.
    pub(crate) fn cached_generation(&self) -> Option<i64> {
        let cache = self.cache.lock().unwrap();
        let usable = cache.usable_until.is_some_and(|until| Instant::now() < until);
        cache.route.as_ref().filter(|_| usable).map(|route| route.generation)
    }
}

async fn drive(mut routing: Routing, router_id: String, cache: Arc<Mutex<Cache>>, deaf: Arc<AtomicBool>) {
    use session_request::Message;
    let request = |message| wire::SessionRequest { message: Some(message) };
    loop {
        let (sender, receiver) = mpsc::channel(64);
        sender
            .send(request(Message::Hello(wire::SessionHello { router_id: router_id.clone() })))
            .await
            .unwrap();
        let requests = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let Ok(responses) = routing.session(requests).await else {
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        let mut responses = responses.into_inner();
        let mut sequence = 0;
        let mut renewals = tokio::time::interval(Duration::from_millis(150));
        loop {
            let response = tokio::select! {
                response = responses.message() => response,
                _ = renewals.tick() => {
                    sequence += 1;
                    cache.lock().unwrap().sent.push((sequence, Instant::now()));
                    if sender.send(request(Message::Renew(wire::SessionRenew { sequence }))).await.is_err() { break }
                    continue;
                }
            };
            let Ok(Some(response)) = response else { break };
            let answer = {
                let mut cache = cache.lock().unwrap();
                match response.message.unwrap() {
                    session_response::Message::Welcome(welcome) => {
                        assert_eq!(welcome.topology.unwrap().virtual_storages[0].storages.len(), 3);
                        let lease = Duration::from_millis(welcome.lease_milliseconds.into());
                        *cache = Cache { session: welcome.session_id, lease, ..Cache::default() };
                        None
                    }
                    session_response::Message::Renewed(renewed) => {
                        let lease = cache.lease;
                        let sent = cache.sent.iter().find(|(sequence, _)| *sequence == renewed.sequence);
                        cache.usable_until = sent.map(|(_, sent)| *sent + lease).or(cache.usable_until);
                        None
                    }
                    session_response::Message::RevokeRoute(_) if deaf.load(Ordering::SeqCst) => None,
                    session_response::Message::RevokeRoute(revoke) => {
                        cache.floor = cache.floor.max(revoke.generation);
                        if cache.route.as_ref().is_some_and(|route| route.generation < revoke.generation) {
                            cache.route = None;
                        }
                        Some(wire::RouteRevoked { revocation_id: revoke.revocation_id })
                    }
                    session_response::Message::Topology(_) => None,
                }
            };
            if let Some(revoked) = answer {
                let _ = sender.send(request(Message::RouteRevoked(revoked))).await;
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
}
