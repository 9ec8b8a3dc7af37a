//! The storage nodes: how they are reached, and whether they are believed to be healthy.
//!
//! The opinion comes from real traffic (a connection that cannot be opened) and from a probe twice a second. It is this
//! router's own, and only steers: a coordinator decides what is true.

mod multiplexed;
mod pool;
mod probe;
mod punctuality;
mod silence;
mod token;

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use http::HeaderValue;
use hyper::body::Incoming;
use prometheus_client::metrics::gauge::Gauge;
use tabularium_common::{
    auth::{NodeTokens, SendToken},
    grpc::{Address, channel},
    lifecycle::Tasks,
    multiplex::sidechannel::Offer,
};
use tabularium_proto::coordinator::Topology;
use tonic::{
    service::{Routes, interceptor::InterceptedService},
    transport::Channel,
};

use crate::{
    body::Spliced,
    limits::SLOW_PROBES,
    metrics::{Metrics, StorageLabels},
    replay::Tail,
};
use multiplexed::Multiplexed;
pub(crate) use multiplexed::OutgoingWrite;
use pool::Pool;
pub(crate) use pool::{SendError, Traffic};
use punctuality::Punctuality;
use silence::Silence;
use token::Token;

/// A request as nodes get it.
pub(crate) type Outgoing = http::Request<Spliced<Tail<Incoming>>>;

/// One storage.
pub(crate) struct Node {
    /// Its name.
    pub(crate) storage: Arc<str>,
    address: Address,
    /// The file system that must be there; empty while no coordinator knows.
    filesystem_id: RwLock<Arc<str>>,
    /// The process that is known to be there, as it calls itself; empty while none has.
    instance: RwLock<Arc<str>>,
    healthy: AtomicBool,
    slow_probes: AtomicU8,
    silence: Silence,
    gauge: Gauge,
    /// One pool per worker: a request never changes threads.
    pools: Box<[Pool]>,
    /// The same for writes.
    multiplexed: Box<[Multiplexed]>,
    /// And for what has a sidechannel.
    beside: Box<[Multiplexed]>,
    /// How it keeps up with others when it votes.
    pub(crate) punctuality: Punctuality,
    /// What it wants to see of us, for each worker: they need not wait for one another.
    tokens: Box<[Token]>,
    /// For what the router asks for itself.
    channel: Signed,
}

/// A connection whose calls carry what its node wants to see.
pub(crate) type Signed = InterceptedService<Channel, SendToken>;

impl Node {
    /// Believed to be healthy.
    pub(crate) fn healthy(&self) -> bool {
        self.healthy.load(Ordering::Relaxed)
    }

    /// Healthy, and no read has waited for it in vain just now.
    pub(crate) fn prompt(&self) -> bool {
        self.healthy() && !self.silence.lasts()
    }

    /// Another node answered what this one was asked first.
    pub(crate) fn was_silent(&self) {
        self.silence.begins();
    }

    /// It answered a read.
    pub(crate) fn spoke(&self) {
        self.silence.ends();
    }

    fn filesystem_id(&self) -> Arc<str> {
        Arc::clone(&self.filesystem_id.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn expect_filesystem(&self, id: &str) {
        let mut present = self.filesystem_id.write().unwrap_or_else(PoisonError::into_inner);
        if **present != *id {
            *present = id.into();
        }
    }

    /// The process that is known to be there.
    pub(crate) fn instance(&self) -> Arc<str> {
        Arc::clone(&self.instance.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// It says which process it is. If that is another one, what was learned of its replicas is forgotten before anybody gets
    /// to know it: its disk may be older than that.
    pub(crate) fn is_instance(&self, instance: &str, forget: impl FnOnce()) {
        let mut known = self.instance.write().unwrap_or_else(PoisonError::into_inner);
        if **known != *instance {
            forget();
            *known = instance.into();
        }
    }

    /// For typed questions of the router's own.
    pub(crate) fn channel(&self) -> Signed {
        self.channel.clone()
    }

    /// For what a worker sends over its own connections.
    pub(crate) fn token(&self, worker: usize) -> Option<HeaderValue> {
        self.tokens[worker].header()
    }

    /// Relays a request over a worker's connections. A node that cannot be dialled counts as down from here on.
    pub(crate) async fn send(
        &self,
        worker: usize,
        traffic: Traffic,
        request: Outgoing,
    ) -> Result<http::Response<Incoming>, SendError> {
        let sent = self.pools[worker].send(&self.address, traffic, request).await;
        if let Err(SendError::Unsent { problem, .. }) = &sent {
            self.believe(false, problem);
        }
        sent
    }

    /// Sends a write to this node, which votes on the way back of the same connection. A node that cannot be dialled, or
    /// whose connection broke, counts as down from here on.
    pub(crate) async fn send_write(
        &self,
        worker: usize,
        request: OutgoingWrite,
    ) -> Result<http::Response<Incoming>, SendError<OutgoingWrite>> {
        self.judged(self.multiplexed[worker].send(&self.address, request).await)
    }

    /// Offers this node a sidechannel, to be named in what is sent to it with [`Node::send_beside`] by the same worker.
    /// `None`: too many are offered.
    pub(crate) fn offer(&self, worker: usize) -> Option<Offer> {
        self.beside[worker].offer()
    }

    /// Sends a read that has a sidechannel to this node. The same goes for its health as for a write.
    pub(crate) async fn send_beside(
        &self,
        worker: usize,
        request: OutgoingWrite,
    ) -> Result<http::Response<Incoming>, SendError<OutgoingWrite>> {
        self.judged(self.beside[worker].send(&self.address, request).await)
    }

    fn judged<R>(
        &self,
        sent: Result<http::Response<Incoming>, SendError<R>>,
    ) -> Result<http::Response<Incoming>, SendError<R>> {
        match &sent {
            Err(SendError::Unsent { problem, .. }) => self.believe(false, problem),
            Err(SendError::Lost(error)) if pool::is_connection_lost(error) => {
                self.believe(false, "its connection broke");
            }
            _ => {}
        }
        sent
    }

    fn believe(&self, healthy: bool, reason: &str) {
        self.slow_probes.store(0, Ordering::Relaxed);
        if self.healthy.swap(healthy, Ordering::Relaxed) == healthy {
            return;
        }
        self.gauge.set(i64::from(healthy));
        if healthy {
            tracing::info!(storage = %self.storage, "node is healthy again");
        } else {
            tracing::warn!(storage = %self.storage, address = %self.address, reason, "node is not healthy");
        }
    }

    /// A probe ran out of time.
    fn believe_slow(&self) {
        if self.slow_probes.fetch_add(1, Ordering::Relaxed) + 1 >= SLOW_PROBES {
            self.believe(false, "no answer to health checks");
        }
    }
}

/// The storages of one virtual storage, in the coordinator's order.
pub(crate) type Storages = Vec<Arc<Node>>;

/// What the coordinator told last.
#[derive(Default)]
pub(crate) struct Directory {
    virtual_storages: HashMap<String, Storages>,
    known: bool,
}

impl Directory {
    /// False until a coordinator has told it.
    pub(crate) fn known(&self) -> bool {
        self.known
    }

    /// The storages of a virtual storage.
    pub(crate) fn storages(&self, virtual_storage: &str) -> Option<&Storages> {
        self.virtual_storages.get(virtual_storage)
    }

    /// All of them, by virtual storage.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Storages)> {
        self.virtual_storages.iter()
    }
}

/// The storage of that name.
pub(crate) fn named<'n>(storages: &'n Storages, storage: &str) -> Option<&'n Arc<Node>> {
    storages.iter().find(|node| &*node.storage == storage)
}

/// Believed to be healthy; unknown storages are not.
pub(crate) fn is_healthy(storages: &Storages, storage: &str) -> bool {
    named(storages, storage).is_some_and(|node| node.healthy())
}

/// All nodes. Shared by all workers.
pub(crate) struct Nodes {
    directory: RwLock<Arc<Directory>>,
    workers: usize,
    tokens: NodeTokens,
    /// What nodes are served on the way back.
    votes: Routes,
    tasks: Tasks,
    metrics: Arc<Metrics>,
}

impl Nodes {
    /// None known yet. `votes` is what nodes are served while they are at a write; `tasks` owns the connections.
    pub(crate) fn new(
        workers: usize,
        tokens: NodeTokens,
        votes: Routes,
        tasks: Tasks,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { directory: RwLock::default(), workers, tokens, votes, tasks, metrics }
    }

    /// What is known now.
    pub(crate) fn directory(&self) -> Arc<Directory> {
        Arc::clone(&self.directory.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes over a new topology. Nodes that stay keep their connections and their health. Call it inside the runtime
    /// that is to own the channels.
    pub(crate) fn update(&self, topology: Topology) {
        let old = self.directory();
        let mut virtual_storages = HashMap::new();
        for virtual_storage in topology.virtual_storages {
            let known = old.storages(&virtual_storage.name);
            let mut storages = Storages::new();
            for storage in virtual_storage.storages {
                let Ok(address) = storage.address.parse::<Address>() else {
                    tracing::error!(storage = %storage.name, address = %storage.address, "address cannot be dialled");
                    continue;
                };
                let same = known
                    .and_then(|storages| named(storages, &storage.name))
                    .filter(|node| node.address == address);
                let node = match same {
                    Some(node) => Arc::clone(node),
                    None => Arc::new(self.node(&virtual_storage.name, storage.name, address)),
                };
                node.expect_filesystem(&storage.filesystem_id);
                storages.push(node);
            }
            virtual_storages.insert(virtual_storage.name, storages);
        }
        let directory = Arc::new(Directory { virtual_storages, known: true });
        *self.directory.write().unwrap_or_else(PoisonError::into_inner) = directory;
    }

    fn multiplexed(&self) -> Box<[Multiplexed]> {
        (0..self.workers).map(|_| Multiplexed::new(self.votes.clone(), self.tasks.clone())).collect()
    }

    fn node(&self, virtual_storage: &str, storage: String, address: Address) -> Node {
        let labels = StorageLabels { virtual_storage: virtual_storage.to_owned(), storage: storage.clone() };
        let gauge = self.metrics.node_healthy.get_or_create(&labels).clone();
        gauge.set(1);
        let token = self.tokens.to_send(&address);
        Node {
            storage: storage.into(),
            tokens: (0..self.workers).map(|_| Token::new(token.clone())).collect(),
            channel: InterceptedService::new(channel(&address), token),
            address,
            filesystem_id: RwLock::new("".into()),
            instance: RwLock::new("".into()),
            // Until something says otherwise: a router that starts must not blame nodes it has never asked.
            healthy: AtomicBool::new(true),
            slow_probes: AtomicU8::new(0),
            silence: Silence::default(),
            gauge,
            punctuality: Punctuality::default(),
            pools: (0..self.workers).map(|_| Pool::new(self.tasks.clone())).collect(),
            multiplexed: self.multiplexed(),
            beside: self.multiplexed(),
        }
    }
}
