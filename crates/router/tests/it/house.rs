//! One router, three nodes, one coordinator, one client, all in one process and one directory.

use std::{
    future::Future,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use bytes::{Buf as _, BufMut as _, Bytes};
use tabularium_common::{announce::Announcement, config::parse, grpc::channel, lifecycle::Tasks};
use tabularium_proto::gitaly::{RefExistsRequest, RefExistsResponse, Repository};
use tabularium_router::{Config, RunError, run};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::{
    Request, Response, Status, Streaming,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

use crate::{coordinator::Coordinator, node::Node};

pub(crate) const REPOSITORY: &str = "group/project.git";

pub(crate) struct House {
    pub(crate) nodes: Vec<Node>,
    pub(crate) coordinator: Coordinator,
    pub(crate) channel: Channel,
    pub(crate) admin: String,
    pub(crate) address: String,
    pub(crate) router: JoinHandle<Result<(), RunError>>,
    stop: Option<oneshot::Sender<()>>,
    pub(crate) tasks: Tasks,
    pub(crate) directory: TempDir,
}

/// Waits until `check` holds.
pub(crate) async fn until(what: &str, check: impl AsyncFn() -> bool) {
    let started = Instant::now();
    while !check().await {
        assert!(started.elapsed() < Duration::from_secs(20), "not within 20 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl House {
    pub(crate) async fn new() -> Self {
        Self::with("", |_| {}).await
    }

    /// `config` is added to the router's; `prepare` may change what the coordinator says first.
    pub(crate) async fn with(config: &str, prepare: impl FnOnce(&Coordinator)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tasks = Tasks::new();
        let mut nodes = Vec::new();
        for storage in ["node-1", "node-2", "node-3"] {
            nodes.push(Node::start(directory.path(), storage, &tasks).await);
        }
        let storages: Vec<_> = nodes.iter().map(|node| (node.0.storage.clone(), node.address())).collect();
        let coordinator = Coordinator::start(directory.path(), "coordinator", &storages, &tasks).await;
        coordinator.add(REPOSITORY);
        prepare(&coordinator);

        let path = directory.path().display();
        let text = format!(
            "listen = \"unix:{path}/router\"\nadmin_listen = \"127.0.0.1:0\"\n\
             coordinators = [\"unix:{path}/absent\", \"unix:{path}/coordinator\", \"unix:{path}/coordinator-2\"]\n{config}"
        );
        let config: Config = parse(Path::new("router.toml"), &text).unwrap();
        let announce = directory.path().join("announce.json");
        let (stop, stopped) = oneshot::channel::<()>();
        let router = tasks.spawn(
            "router",
            run(config, Some(announce.clone()), async move {
                stopped.await.ok();
                Ok(())
            }),
        );
        until("the router announces itself", async || announce.exists()).await;
        let announcement = Announcement::read(&announce).unwrap().unwrap();
        let address = announcement.grpc.unwrap();
        let house = Self {
            nodes,
            coordinator,
            channel: channel(&address.parse().unwrap()),
            admin: announcement.admin.unwrap(),
            address,
            router,
            stop: Some(stop),
            tasks,
            directory,
        };
        until("the router is ready", async || house.metrics("/ready").await.contains("200 OK")).await;
        house
    }

    /// The lease has been granted.
    pub(crate) async fn leased(&self) {
        until("a lease", async || !self.metrics("/metrics").await.contains("lease_until_seconds 0.0")).await;
    }

    /// What the admin listener says, with its head.
    pub(crate) async fn metrics(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(&self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    pub(crate) fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// A connection of its own.
    pub(crate) fn connect(&self) -> Channel {
        channel(&self.address.parse().unwrap())
    }

    pub(crate) async fn ref_exists(
        &self,
        request: Request<RefExistsRequest>,
    ) -> Result<Response<RefExistsResponse>, Status> {
        let mut client =
            tabularium_proto::gitaly::ref_service_client::RefServiceClient::new(self.channel.clone());
        client.ref_exists(request).await
    }

    /// A plain read; answers the storage that served it.
    pub(crate) async fn read(&self) -> Result<String, Status> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let id = format!("read-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut request = Request::new(exists());
        request.metadata_mut().insert("x-gitlab-correlation-id", id.parse().unwrap());
        self.ref_exists(request).await?;
        let served = self.nodes.iter().find(|node| {
            node.seen("RefExists")
                .iter()
                .any(|seen| seen.headers.get("x-gitlab-correlation-id").unwrap() == &id[..])
        });
        Ok(served.expect("served by a node").0.storage.clone())
    }

    /// Sends bytes as one message to any path.
    pub(crate) async fn raw(&self, path: &str, message: &[u8]) -> Result<Response<Bytes>, Status> {
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let request = Request::new(Bytes::copy_from_slice(message));
        grpc.unary(request, path.parse().unwrap(), Raw).await
    }

    /// Opens a stream of raw messages.
    pub(crate) async fn raw_stream(
        channel: Channel,
        path: &str,
        messages: impl futures::Stream<Item = Bytes> + Send + 'static,
    ) -> Result<Response<Streaming<Bytes>>, Status> {
        let mut grpc = Grpc::new(channel);
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        grpc.streaming(Request::new(messages), path.parse().unwrap(), Raw).await
    }
}

pub(crate) fn repository() -> Option<Repository> {
    named("default", REPOSITORY)
}

#[expect(clippy::unnecessary_wraps, reason = "as the field of a request")]
pub(crate) fn named(storage: &str, path: &str) -> Option<Repository> {
    Some(Repository { storage_name: storage.into(), relative_path: path.into(), ..Repository::default() })
}

pub(crate) fn exists() -> RefExistsRequest {
    RefExistsRequest { repository: repository(), r#ref: b"refs/heads/main".to_vec() }
}

/// Runs something under a deadline of the test's own.
pub(crate) async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("within 20 s")
}

/// Messages as bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        *self
    }
    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}
