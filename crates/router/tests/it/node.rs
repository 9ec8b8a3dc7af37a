//! A storage node below the level of messages: every header, frame and trailer is as the test wants it.
//!
//! The request's own metadata says how it is answered: `x-fail` is a code to fail with, `x-mode` how a stream behaves,
//! `x-votes` what is voted on the way (see `voter`).

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prost::Message as _;
use tabularium_common::{
    grpc::{ListenAddress, Listener, MAX_CONCURRENT_STREAMS},
    lifecycle::Tasks,
    multiplex::{self, Backchannel},
    records::{EXPECTED_REPLICA, NODE_INSTANCE},
};
use tabularium_proto::{
    gitaly::{
        CalculateChecksumResponse, DiskStatisticsResponse, GetBlobResponse, GetObjectPoolResponse,
        ObjectPool, RefExistsResponse, Repository, ServerInfoResponse, ServerSignatureResponse,
        disk_statistics_response, server_info_response,
    },
    node::{ExpectedReplica, ReadRecordResponse},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

use crate::voter::{Play, Seat, Told};

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What one request looked like.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) message: Bytes,
}

pub(crate) struct Inner {
    pub(crate) storage: String,
    path: PathBuf,
    pub(crate) seen: Mutex<Vec<Seen>>,
    /// Answers that were dropped before their end.
    pub(crate) cancelled: AtomicUsize,
    /// Requests that were cut off.
    pub(crate) cut: AtomicUsize,
    /// Requests that ended as they should.
    pub(crate) whole: AtomicUsize,
    /// Bytes that an endless answer got rid of.
    pub(crate) sent: AtomicUsize,
    /// Ends a stream that it would break off otherwise.
    pub(crate) goes_on: AtomicBool,
    pub(crate) serving: AtomicBool,
    /// What it answers to every RPC but health checks.
    pub(crate) fails: Mutex<Option<Status>>,
    /// Begins streams before it fails them.
    pub(crate) fails_late: AtomicBool,
    /// Reads no request to its end.
    pub(crate) deaf: AtomicBool,
    /// The way back of the last write.
    pub(crate) back: Mutex<Option<Channel>>,
    /// How it votes.
    pub(crate) play: Mutex<Play>,
    /// What it keeps beside its replicas.
    pub(crate) record: Mutex<ReadRecordResponse>,
    /// Where the pool is that all its replicas share; empty: they have none.
    pub(crate) pool: Mutex<String>,
    pub(crate) signing_key: Mutex<Vec<u8>>,
    /// What its replica holds.
    pub(crate) checksum: Mutex<String>,
    /// Which process it is, if it says so to whoever knew another one.
    pub(crate) instance: Mutex<Option<&'static str>>,
    /// What it was told when it voted.
    pub(crate) told: Mutex<Vec<Told>>,
    tasks: Tasks,
    life: Mutex<CancellationToken>,
}

#[derive(Clone)]
pub(crate) struct Node(pub(crate) Arc<Inner>);

impl Node {
    pub(crate) async fn start(directory: &Path, storage: &str, tasks: &Tasks) -> Self {
        let node = Self(Arc::new(Inner {
            storage: storage.to_owned(),
            path: directory.join(storage),
            seen: Mutex::default(),
            cancelled: AtomicUsize::new(0),
            cut: AtomicUsize::new(0),
            whole: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
            goes_on: AtomicBool::new(false),
            serving: AtomicBool::new(true),
            fails: Mutex::default(),
            fails_late: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
            back: Mutex::default(),
            play: Mutex::default(),
            record: Mutex::default(),
            pool: Mutex::default(),
            signing_key: Mutex::new(b"key".to_vec()),
            checksum: Mutex::new("abc".into()),
            instance: Mutex::default(),
            told: Mutex::default(),
            tasks: tasks.clone(),
            life: Mutex::default(),
        }));
        node.revive().await;
        node
    }

    pub(crate) fn address(&self) -> String {
        format!("unix:{}", self.0.path.display())
    }

    pub(crate) fn seen(&self, path: &str) -> Vec<Seen> {
        self.0.seen.lock().unwrap().iter().filter(|seen| seen.path.ends_with(path)).cloned().collect()
    }

    /// As `kill -9`: nothing listens, every connection is cut.
    pub(crate) fn kill(&self) {
        self.0.life.lock().unwrap().cancel();
    }

    /// Listens again.
    pub(crate) async fn revive(&self) {
        let listener = Listener::bind(&ListenAddress::Unix(self.0.path.clone())).await.unwrap();
        let life = CancellationToken::new();
        *self.0.life.lock().unwrap() = life.clone();
        let node = self.clone();
        let mut incoming = multiplex::Incoming::new(listener, self.0.tasks.clone());
        self.0.tasks.spawn("fake node", async move {
            loop {
                let connection = tokio::select! {
                    () = life.cancelled() => return,
                    accepted = incoming.next() => accepted.unwrap(),
                };
                let Ok(connection) = connection else { continue };
                let node = node.clone();
                let life = life.clone();
                node.0.tasks.clone().spawn("fake node connection", async move {
                    let back = connection.backchannel().map(Backchannel::channel);
                    let service = hyper::service::service_fn(move |request| {
                        let (node, back) = (node.clone(), back.clone());
                        async move { Ok::<_, Infallible>(node.answer(request, back).await) }
                    });
                    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    builder
                        .timer(TokioTimer::new())
                        .auto_date_header(false)
                        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
                        .max_pending_accept_reset_streams(100_000)
                        .max_local_error_reset_streams(None)
                        .max_header_list_size(1024 * 1024);
                    let served = builder.serve_connection(TokioIo::new(connection), service);
                    tokio::select! {
                        () = life.cancelled() => {}
                        _ = served => {}
                    }
                });
            }
        });
    }

    async fn answer(&self, request: Request<Incoming>, back: Option<Channel>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        if back.is_some() {
            self.0.back.lock().unwrap().clone_from(&back);
        }
        let seat = Seat::of(&parts.headers, back);
        if self.0.deaf.load(Ordering::Relaxed) && parts.uri.path() != "/grpc.health.v1.Health/Check" {
            std::future::pending::<()>().await;
        }
        let path = parts.uri.path().to_owned();
        match path.rsplit('/').next().unwrap() {
            "Check" => {
                let serving = u8::from(!self.0.serving.load(Ordering::Relaxed)) + 1;
                return unary(&[8, serving]);
            }
            "PostReceivePack" if seat.is_none() => return self.echo(path, parts.headers, body),
            _ => {}
        }
        let Ok(message) = body.collect().await else {
            self.0.cut.fetch_add(1, Ordering::Relaxed);
            return failed(&Status::cancelled("cut"));
        };
        self.0.whole.fetch_add(1, Ordering::Relaxed);
        let message = message.to_bytes();
        let header =
            |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok().map(str::to_owned));
        let (fail, mode) = (header("x-fail"), header("x-mode"));
        let message = message.slice(5.min(message.len())..);
        let other = self.started_since(&parts.headers);
        self.0.seen.lock().unwrap().push(Seen { path: path.clone(), headers: parts.headers, message });
        if let Some(status) = other {
            return failed(&status);
        }
        let fails = self.0.fails.lock().unwrap().clone();
        if let Some(status) = fails {
            if !self.0.fails_late.load(Ordering::Relaxed) {
                return failed(&status);
            }
            let frames = [Ok(Frame::trailers(trailers(&status)))];
            return response(StreamBody::new(futures::stream::iter(frames)).boxed_unsync());
        }
        if let Some(code) = fail {
            let mut response = failed(&Status::with_details(
                tonic::Code::from_bytes(code.as_bytes()),
                "as you wish: größer",
                Bytes::from_static(b"\x08\x05\x12\x01x"),
            ));
            response.headers_mut().insert("x-reason-bin", HeaderValue::from_static("AQID"));
            return response;
        }
        if let Some(seat) = seat
            && let Err(status) = self.vote(seat).await
        {
            return failed(&status);
        }
        if mode.as_deref() == Some("stall") {
            /// A call that is dropped was cut off.
            struct Stalled(Node);
            impl Drop for Stalled {
                fn drop(&mut self) {
                    self.0.0.cut.fetch_add(1, Ordering::Relaxed);
                }
            }
            let _stalled = Stalled(self.clone());
            std::future::pending::<()>().await;
        }
        match path.as_str() {
            "/gitaly.BlobService/GetBlob" => self.stream(mode.as_deref().unwrap_or("three")),
            "/gitaly.RepositoryService/CalculateChecksum" => {
                let checksum = self.0.checksum.lock().unwrap().clone();
                unary(&CalculateChecksumResponse { checksum }.encode_to_vec())
            }
            "/tabularium.node.v1.ReplicaService/ReadRecord" => {
                let record = self.0.record.lock().unwrap().encode_to_vec();
                unary(&record)
            }
            "/gitaly.ServerService/ServerInfo" => unary(&self.info().encode_to_vec()),
            "/gitaly.ServerService/ServerSignature" => {
                let public_key = self.0.signing_key.lock().unwrap().clone();
                unary(&ServerSignatureResponse { public_key }.encode_to_vec())
            }
            "/gitaly.ObjectPoolService/GetObjectPool" => unary(&self.pool().encode_to_vec()),
            "/gitaly.ServerService/DiskStatistics" => unary(&self.disk().encode_to_vec()),
            _ => unary(&RefExistsResponse { value: true }.encode_to_vec()),
        }
    }

    fn started_since(&self, headers: &HeaderMap) -> Option<Status> {
        let instance = (*self.0.instance.lock().unwrap())?;
        let expected = STANDARD_NO_PAD.decode(headers.get(EXPECTED_REPLICA)?).unwrap();
        let known = ExpectedReplica::decode(&expected[..]).unwrap().node_instance?;
        let mut status = Status::unavailable("started since");
        status.metadata_mut().insert(NODE_INSTANCE, instance.parse().unwrap());
        (known != instance).then_some(status)
    }

    fn info(&self) -> ServerInfoResponse {
        let status = |name: &str, id: &str| server_info_response::StorageStatus {
            storage_name: name.into(),
            readable: true,
            writeable: true,
            fs_type: "ext".into(),
            filesystem_id: id.into(),
            replication_factor: 1,
        };
        ServerInfoResponse {
            server_version: "16.7.0".into(),
            git_version: "2.47.3".into(),
            storage_statuses: vec![status("another", "y"), status(&self.0.storage, "x")],
        }
    }

    fn pool(&self) -> GetObjectPoolResponse {
        let relative_path = self.0.pool.lock().unwrap().clone();
        let repository =
            Repository { storage_name: self.0.storage.clone(), relative_path, ..Repository::default() };
        let pool = ObjectPool { repository: Some(repository) };
        let there = pool.repository.as_ref().is_some_and(|repository| !repository.relative_path.is_empty());
        GetObjectPoolResponse { object_pool: there.then_some(pool) }
    }

    fn disk(&self) -> DiskStatisticsResponse {
        let status = disk_statistics_response::StorageStatus {
            storage_name: self.0.storage.clone(),
            available: 7,
            used: 3,
        };
        DiskStatisticsResponse { storage_statuses: vec![status] }
    }

    /// Sends back what comes, and says how the request ended.
    fn echo(&self, path: String, headers: HeaderMap, mut body: Incoming) -> Response<Body> {
        let node = self.clone();
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        self.0.tasks.spawn("fake echo", async move {
            let mut seen = Some(Seen { path, headers, message: Bytes::new() });
            loop {
                match body.frame().await {
                    Some(Ok(frame)) => {
                        let Ok(data) = frame.into_data() else { continue };
                        if let Some(mut seen) = seen.take() {
                            seen.message = data.slice(5.min(data.len())..);
                            node.0.seen.lock().unwrap().push(seen);
                        }
                        if sender.send(Ok::<_, Infallible>(Frame::data(data))).await.is_err() {
                            return;
                        }
                    }
                    Some(Err(_)) => {
                        node.0.cut.fetch_add(1, Ordering::Relaxed);
                        return;
                    }
                    None => {
                        node.0.whole.fetch_add(1, Ordering::Relaxed);
                        sender.send(Ok(Frame::trailers(trailers(&Status::ok(""))))).await.ok();
                        return;
                    }
                }
            }
        });
        response(StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receiver)).boxed_unsync())
    }

    fn stream(&self, mode: &str) -> Response<Body> {
        let node = self.clone();
        let count = match mode {
            "three" => 3,
            "endless" => usize::MAX,
            "hang-first" if self.0.goes_on.load(Ordering::Relaxed) => 3,
            "hang" | "hang-first" => 1,
            other => panic!("{other}"),
        };
        let hang = count == 1;
        let size = if mode == "endless" { 64 * 1024 } else { 10 };
        let guard = OnDrop { node, finished: false };
        let frames = futures::stream::unfold((0, guard), move |(number, mut guard)| async move {
            if number < count {
                let blob = GetBlobResponse { data: Bytes::from(vec![7; size]), ..Default::default() };
                let data = frame(&blob.encode_to_vec());
                guard.node.0.sent.fetch_add(data.len(), Ordering::Relaxed);
                Some((Ok(Frame::data(data)), (number + 1, guard)))
            } else if hang {
                std::future::pending().await
            } else if number == count {
                guard.finished = true;
                Some((Ok(Frame::trailers(trailers(&Status::ok("")))), (number + 1, guard)))
            } else {
                None
            }
        });
        response(StreamBody::new(frames).boxed_unsync())
    }
}

struct OnDrop {
    node: Node,
    finished: bool,
}

impl Drop for OnDrop {
    fn drop(&mut self) {
        if !self.finished {
            self.node.0.cancelled.fetch_add(1, Ordering::Relaxed);
        }
    }
}

pub(crate) fn frame(message: &[u8]) -> Bytes {
    let mut out = vec![0];
    out.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    out.extend(message);
    out.into()
}

fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    status.add_header(&mut trailers).unwrap();
    trailers.insert("x-trailer-bin", HeaderValue::from_static("AAEC"));
    trailers
}

fn response(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert("content-type", HeaderValue::from_static("application/grpc"));
    headers.insert("x-node-said", HeaderValue::from_static("hello"));
    response
}

fn unary(message: &[u8]) -> Response<Body> {
    let frames = [Ok(Frame::data(frame(message))), Ok(Frame::trailers(trailers(&Status::ok(""))))];
    response(StreamBody::new(futures::stream::iter(frames)).boxed_unsync())
}

fn failed(status: &Status) -> Response<Body> {
    let mut response = response(http_body_util::Empty::new().boxed_unsync());
    status.add_header(response.headers_mut()).unwrap();
    response
}
