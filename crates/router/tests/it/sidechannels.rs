//! Clients with multiplexed connections, and what goes beside their RPCs.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Uri;
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tabularium_common::{
    grpc::{self, Address, DEADLINE_EXCEEDED, DeadlineLayer, ListenAddress, Listener},
    lifecycle::Tasks,
    multiplex::{
        self, BACKCHANNEL, Backchannel,
        sidechannel::{self, Client, METADATA, Server, SidechannelId, Sidechannels, generation},
    },
    records::NODE_INSTANCE,
};
use tabularium_proto::gitaly::{
    InfoRefsRequest, InfoRefsResponse, PackfileNegotiationStatistics, PostReceivePackRequest,
    PostReceivePackResponse, PostUploadPackWithSidechannelRequest, PostUploadPackWithSidechannelResponse,
    RefExistsRequest,
    ref_service_client::RefServiceClient,
    smart_http_service_client::SmartHttpServiceClient,
    smart_http_service_server::{SmartHttpService, SmartHttpServiceServer},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Response, Status, Streaming, client::GrpcService, codegen::BoxStream, service::Routes,
};
use tower::util::MapRequestLayer;

use crate::house::{House, exists, repository, soon, until};

/// What a node does when it is asked for a fetch.
#[derive(Debug, Clone)]
enum Play {
    /// Says back what it hears, in capitals.
    Echo,
    /// Says so many bytes.
    Flood(usize),
    /// Fails before it has opened the sidechannel.
    Refuse(Status),
    /// Fails when it has heard everything.
    Fail(Status),
    /// Says so many bytes and is killed.
    Die(usize),
    /// Hears and says nothing.
    Wait,
    /// Succeeds without a sidechannel.
    Skip,
}

#[derive(Default)]
struct Stage {
    /// What is played next; after that, [`Play::Echo`].
    plays: Mutex<VecDeque<Play>>,
    asked: Mutex<Vec<(String, PostUploadPackWithSidechannelRequest)>>,
    asked_with: Mutex<Vec<tonic::metadata::MetadataMap>>,
    /// Offered to the nodes.
    ids: Mutex<Vec<SidechannelId>>,
    said: AtomicUsize,
    /// Sidechannels that were opened.
    opened: AtomicUsize,
    /// Fetches that did not end well.
    broken: AtomicUsize,
}

/// A fetch that is under way; it counts as broken unless it says that it has ended.
struct UnderWay<'s>(Option<&'s Stage>);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if let Some(stage) = self.0 {
            stage.broken.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct Uploader {
    storage: String,
    stage: Arc<Stage>,
    life: CancellationToken,
}

#[tonic::async_trait]
impl SmartHttpService for Uploader {
    async fn info_refs_upload_pack(
        &self,
        _: Request<InfoRefsRequest>,
    ) -> Result<Response<BoxStream<InfoRefsResponse>>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn info_refs_receive_pack(
        &self,
        _: Request<InfoRefsRequest>,
    ) -> Result<Response<BoxStream<InfoRefsResponse>>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn post_receive_pack(
        &self,
        _: Request<Streaming<PostReceivePackRequest>>,
    ) -> Result<Response<BoxStream<PostReceivePackResponse>>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn post_upload_pack_with_sidechannel(
        &self,
        request: Request<PostUploadPackWithSidechannelRequest>,
    ) -> Result<Response<PostUploadPackWithSidechannelResponse>, Status> {
        let back = request.extensions().get::<Backchannel>().cloned();
        let id = SidechannelId::offered(request.metadata().as_ref()).unwrap();
        self.stage.ids.lock().unwrap().push(id);
        self.stage.asked_with.lock().unwrap().push(request.metadata().clone());
        self.stage.asked.lock().unwrap().push((self.storage.clone(), request.into_inner()));
        let play = self.stage.plays.lock().unwrap().pop_front().unwrap_or(Play::Echo);
        match &play {
            Play::Refuse(status) => return Err(status.clone()),
            Play::Skip => return Ok(done()),
            _ => {}
        }
        let side = sidechannel::open(back.as_ref(), id).await;
        let side = Server::new(side.map_err(|error| Status::internal(format!("open sidechannel: {error}")))?);
        self.stage.opened.fetch_add(1, Ordering::Relaxed);
        let mut under_way = UnderWay(Some(&*self.stage));
        if self.play(play, &side).await?.is_err() {
            return Err(Status::cancelled("user canceled the request"));
        }
        under_way.0 = None;
        side.finish();
        Ok(done())
    }
}

fn done() -> Response<PostUploadPackWithSidechannelResponse> {
    let statistics = PackfileNegotiationStatistics { wants: 7, ..Default::default() };
    Response::new(PostUploadPackWithSidechannelResponse { packfile_negotiation_statistics: Some(statistics) })
}

impl Uploader {
    async fn play(&self, play: Play, side: &Server) -> Result<std::io::Result<()>, Status> {
        let flood = async |bytes: usize| {
            let (mut left, piece) = (bytes, Bytes::from(vec![7; 64 * 1024]));
            while left > 0 {
                let part = piece.slice(..left.min(piece.len()));
                left -= part.len();
                self.stage.said.fetch_add(part.len(), Ordering::Relaxed);
                side.write(part).await?;
            }
            std::io::Result::Ok(())
        };
        let hear = async || {
            while side.read().await?.is_some() {}
            std::io::Result::Ok(())
        };
        Ok(match play {
            Play::Echo => {
                let echo = async {
                    while let Some(piece) = side.read().await? {
                        side.write(piece.to_ascii_uppercase().into()).await?;
                    }
                    Ok(())
                };
                echo.await
            }
            Play::Flood(bytes) => flood(bytes).await,
            Play::Fail(status) => {
                if let Err(error) = hear().await {
                    return Ok(Err(error));
                }
                return Err(status);
            }
            Play::Die(bytes) => {
                let _ = flood(bytes).await;
                self.life.cancel();
                std::future::pending().await
            }
            Play::Wait => match hear().await {
                Ok(()) => std::future::pending().await,
                broken => broken,
            },
            Play::Refuse(_) | Play::Skip => Ok(()),
        })
    }
}

/// Takes the place of one of the house's nodes.
async fn uploader(house: &House, storage: &str, stage: &Arc<Stage>, life: &CancellationToken) {
    let path = house.directory.path().join(storage);
    let listener = Listener::bind(&ListenAddress::Unix(path)).await.unwrap();
    let tasks = Tasks::new();
    let incoming = multiplex::Incoming::new(listener, tasks.clone());
    let service = Uploader { storage: storage.to_owned(), stage: Arc::clone(stage), life: life.clone() };
    let (health, served) = tonic_health::server::health_reporter();
    health.set_service_status("", tonic_health::ServingStatus::Serving).await;
    let routes = Routes::new(served).add_service(SmartHttpServiceServer::new(service));
    let server = grpc::server()
        .layer(DeadlineLayer)
        .layer(MapRequestLayer::new(multiplex::introduce))
        .add_routes(routes);
    let life = life.clone();
    house.tasks.spawn("uploader", async move {
        let serving = server.serve_with_incoming(incoming);
        tokio::select! {
            _ = serving => {}
            () = life.cancelled() => {}
        }
        // As when it is killed: no connection is left.
        let _ = tasks.drain(Duration::ZERO).await;
    });
}

struct Scene {
    house: House,
    stage: Arc<Stage>,
    sidechannels: Sidechannels,
    client: SmartHttpServiceClient<tonic::transport::Channel>,
}

impl Scene {
    /// A client, a router, and nodes that play these.
    async fn new(plays: impl IntoIterator<Item = Play>) -> Self {
        Self::with("", plays).await
    }

    async fn with(config: &str, plays: impl IntoIterator<Item = Play>) -> Self {
        let house = House::with(config, |_| {}).await;
        let stage = Arc::new(Stage::default());
        stage.plays.lock().unwrap().extend(plays);
        for node in &house.nodes {
            node.kill();
        }
        for storage in ["node-1", "node-2", "node-3"] {
            uploader(&house, storage, &stage, &CancellationToken::new()).await;
        }
        until("all nodes are healthy", async || {
            let metrics = house.metrics("/metrics").await;
            let healthy = |line: &&str| line.contains("node_healthy{") && line.ends_with(" 1");
            metrics.lines().filter(healthy).count() == 3
        })
        .await;
        let sidechannels = Sidechannels::default();
        let address: Address = house.address.parse().unwrap();
        let channel = multiplex::channel(&address, sidechannels.clone(), &house.tasks);
        Self { house, stage, sidechannels, client: SmartHttpServiceClient::new(channel) }
    }

    /// A client that sends its timeout and does not watch it: what it hears of its end is the router's word.
    async fn client_without_a_clock(
        &self,
    ) -> SmartHttpServiceClient<
        impl GrpcService<tonic::body::Body, ResponseBody = Incoming, Future: Send> + Clone + use<>,
    > {
        let address: Address = self.house.address.parse().unwrap();
        let tasks = &self.house.tasks;
        let stream = multiplex::dial(&address, self.sidechannels.clone(), tasks).await.unwrap();
        let (sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tasks.spawn("connection", connection);
        let service = tower::service_fn(move |request| sender.clone().send_request(request));
        SmartHttpServiceClient::with_origin(service, Uri::from_static("http://tabularium.invalid"))
    }

    fn request(id: SidechannelId) -> Request<PostUploadPackWithSidechannelRequest> {
        let message = PostUploadPackWithSidechannelRequest { repository: repository(), ..Default::default() };
        let mut request = Request::new(message);
        request.metadata_mut().as_mut().insert(METADATA, id.header());
        request
    }

    /// Says something, and answers what it heard and how the RPC ended.
    async fn fetch(&self, says: &[u8]) -> (Vec<u8>, Result<PostUploadPackWithSidechannelResponse, Status>) {
        self.fetch_asking(says, |_| {}).await
    }

    async fn fetch_asking(
        &self,
        says: &[u8],
        ask: impl FnOnce(&mut tonic::metadata::MetadataMap),
    ) -> (Vec<u8>, Result<PostUploadPackWithSidechannelResponse, Status>) {
        let mut offer = self.sidechannels.offer().unwrap();
        let mut client = self.client.clone();
        let mut request = Self::request(offer.id());
        ask(request.metadata_mut());
        let call = client.post_upload_pack_with_sidechannel(request);
        let talk = async {
            let client = Client::new(offer.opened().await.accept().await.unwrap());
            client.write(says).await.unwrap();
            client.finish().await.unwrap();
            let mut heard = Vec::new();
            loop {
                match client.read().await {
                    Ok(Some(piece)) => heard.extend_from_slice(&piece),
                    Ok(None) => return heard,
                    Err(_) => {
                        heard.extend_from_slice(b" and then it broke");
                        return heard;
                    }
                }
            }
        };
        let mut talk = std::pin::pin!(talk);
        let mut call = std::pin::pin!(call);
        soon(async {
            tokio::select! {
                heard = &mut talk => (heard, call.await.map(Response::into_inner)),
                ended = &mut call => {
                    // What has been said may still be on its way; when nothing was opened nothing comes.
                    let rest = tokio::time::timeout(Duration::from_millis(300), talk).await;
                    (rest.unwrap_or_default(), ended.map(Response::into_inner))
                }
            }
        })
        .await
    }

    fn asked(&self) -> Vec<String> {
        self.stage.asked.lock().unwrap().iter().map(|(storage, _)| storage.clone()).collect()
    }
}

fn code(ended: Result<PostUploadPackWithSidechannelResponse, Status>) -> (Code, String) {
    match ended {
        Ok(_) => (Code::Ok, String::new()),
        Err(status) => (status.code(), status.message().to_owned()),
    }
}

#[tokio::test]
async fn bytes_pass_as_they_are_and_then_the_answer() {
    let scene = Scene::new([]).await;
    let says = [vec![b'a'; 100_000], b"0000\xff\x00".to_vec()].concat();
    let (heard, ended) = scene.fetch(&says).await;
    assert!(heard == says.to_ascii_uppercase());
    assert_eq!(ended.unwrap().packfile_negotiation_statistics.unwrap().wants, 7);
    // One after the other, and side by side, on the same connection.
    let many = (0..20).map(|number| {
        let scene = &scene;
        async move {
            let says = format!("client {number}");
            let (heard, ended) = scene.fetch(says.as_bytes()).await;
            assert_eq!((heard, code(ended).0), (says.to_ascii_uppercase().into_bytes(), Code::Ok));
        }
    });
    futures::future::join_all(many).await;
    let (_, request) = scene.stage.asked.lock().unwrap()[0].clone();
    let repository = request.repository.unwrap();
    assert!(repository.storage_name.starts_with("node-"));
    assert_eq!(repository.relative_path, "@cluster/repositories/aa/bb/1");
}

#[tokio::test]
async fn how_new_the_replica_is_comes_before_everything_for_whoever_asks() {
    let failure = Status::internal("disk");
    let scene = Scene::new([Play::Fail(failure), Play::Echo, Play::Echo]).await;
    let ask = |metadata: &mut tonic::metadata::MetadataMap| {
        metadata.insert(generation::ASK, "1".parse().unwrap());
    };
    let (heard, ended) = scene.fetch_asking(b"says", ask).await;
    let expected = [&generation::preface(5)[..], b"SAYS"].concat();
    assert_eq!((heard, code(ended).0), (expected, Code::Ok), "once, although two nodes were asked");
    assert_eq!(scene.asked().len(), 2);
    let (heard, ended) = scene.fetch_asking(b"", ask).await;
    assert_eq!((heard, code(ended).0), (Vec::new(), Code::Ok), "nothing, when there is nothing else");
    let metadata = scene.stage.asked_with.lock().unwrap().clone();
    assert!(!metadata.is_empty() && !metadata.iter().any(|keys| keys.contains_key(generation::ASK)));
}

#[tokio::test]
async fn everything_else_works_on_a_multiplexed_connection_too() {
    let house = House::new().await;
    let address: Address = house.address.parse().unwrap();
    let channel = multiplex::channel(&address, Sidechannels::default(), &house.tasks);
    let answer = RefServiceClient::new(channel.clone()).ref_exists(exists()).await.unwrap();
    assert_eq!(answer.metadata().get("x-node-said").unwrap(), "hello");
    let nameless = RefExistsRequest::default();
    let status = RefServiceClient::new(channel).ref_exists(nameless).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "repository not set"));
}

#[tokio::test]
async fn a_client_that_does_not_read_slows_the_node_down() {
    const BYTES: usize = 64 * 1024 * 1024;
    let scene = Scene::new([Play::Flood(BYTES)]).await;
    let mut offer = scene.sidechannels.offer().unwrap();
    let mut client = scene.client.clone();
    let call = Scene::request(offer.id());
    let call =
        scene.house.tasks.spawn("call", async move { client.post_upload_pack_with_sidechannel(call).await });
    let client = Client::new(soon(offer.opened()).await.accept().await.unwrap());
    // Two windows, two queues, and what the sockets take.
    let said = || scene.stage.said.load(Ordering::Relaxed);
    let seen = AtomicUsize::new(0);
    until("the node stands still", async || {
        let before = seen.swap(said(), Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(100)).await;
        before > 0 && said() == before
    })
    .await;
    let mut last = 0;
    assert!(said() < 8 * 1024 * 1024, "{}", said());
    while let Some(piece) = soon(client.read()).await.unwrap() {
        last += piece.len();
    }
    assert_eq!(last, BYTES);
    soon(call).await.unwrap().unwrap();
}

#[tokio::test]
async fn another_replica_takes_over_before_the_first_byte() {
    for (play, opened) in [
        (Play::Refuse(Status::unavailable("stopping")), false),
        (Play::Refuse(Status::internal("git is broken")), false),
        (Play::Fail(Status::internal("an object is damaged")), true),
    ] {
        let scene = Scene::new([play.clone()]).await;
        let (heard, ended) = scene.fetch(b"want").await;
        assert_eq!((heard, code(ended).0), (b"WANT".to_vec(), Code::Ok), "{play:?}");
        let asked = scene.asked();
        assert!(asked.len() == 2 && asked[0] != asked[1], "{opened}: {asked:?}");
    }
}

#[tokio::test]
async fn nodes_that_were_all_started_anew_are_asked_again() {
    let mut anew = Status::unavailable("started since");
    anew.metadata_mut().insert(NODE_INSTANCE, "another".parse().unwrap());
    let scene = Scene::new([1, 2, 3].map(|_| Play::Refuse(anew.clone()))).await;
    let (heard, ended) = scene.fetch(b"want").await;
    assert_eq!((heard, code(ended).0), (b"WANT".to_vec(), Code::Ok));
    assert_eq!(scene.asked().len(), 4);
}

#[tokio::test]
async fn a_node_that_dies_before_it_has_said_anything_is_replaced() {
    let scene = Scene::new([Play::Die(0)]).await;
    let (heard, ended) = scene.fetch(b"want").await;
    assert_eq!((heard, code(ended).0), (b"WANT".to_vec(), Code::Ok));
    assert_eq!(scene.asked().len(), 2);
}

#[tokio::test]
async fn a_node_that_dies_in_the_midst_of_little_is_replaced() {
    let scene = Scene::with("hold_answers = \"10s\"", [Play::Die(1000)]).await;
    let (heard, ended) = scene.fetch(b"want").await;
    assert_eq!((heard, code(ended).0), (b"WANT".to_vec(), Code::Ok));
    assert_eq!(scene.asked().len(), 2);
}

#[tokio::test]
async fn a_node_that_dies_in_the_midst_of_it_leaves_no_answer_that_looks_whole() {
    let scene = Scene::new([Play::Die(100_000)]).await;
    let (heard, ended) = scene.fetch(b"want").await;
    assert!(heard.ends_with(b" and then it broke"), "{}", heard.len());
    let (code, text) = code(ended);
    assert_eq!(code, Code::Unavailable, "{text}");
    assert_eq!(scene.asked().len(), 1);
}

#[tokio::test]
async fn a_word_of_a_node_that_nobody_betters_is_the_clients() {
    let refusal = || Play::Refuse(Status::not_found("repository not found"));
    let scene = Scene::new([refusal(), refusal(), refusal()]).await;
    let (_, ended) = scene.fetch(b"").await;
    assert_eq!(code(ended), (Code::NotFound, "repository not found".to_owned()));
    let wrong = Status::invalid_argument("git config option");
    let scene = Scene::new([Play::Refuse(wrong), Play::Skip]).await;
    let (_, ended) = scene.fetch(b"").await;
    assert_eq!(code(ended), (Code::InvalidArgument, "git config option".to_owned()));
    assert_eq!(scene.asked().len(), 1);
    let (heard, ended) = scene.fetch(b"").await;
    assert_eq!((heard.len(), code(ended).0), (0, Code::Ok));
}

#[tokio::test]
async fn a_client_without_a_way_back_or_an_offer_is_told_so() {
    let scene = Scene::new([]).await;
    let opening = |text: &str| (Code::Internal, format!("open sidechannel: sidechannel: {text}"));
    let unoffered = scene.sidechannels.offer().unwrap().id();
    let mut client = scene.client.clone();
    let ended = client.post_upload_pack_with_sidechannel(Scene::request(unoffered)).await;
    assert_eq!(code(ended.map(Response::into_inner)), opening("receive confirmation: EOF"));
    assert_eq!(scene.asked().len(), 1, "what the client did is no node's fault");

    let mut bare = Scene::request(unoffered);
    bare.metadata_mut().remove(METADATA);
    let ended = client.post_upload_pack_with_sidechannel(bare).await;
    assert_eq!(
        code(ended.map(Response::into_inner)),
        opening("sidechannel-id not found in incoming metadata")
    );

    let mut plain = SmartHttpServiceClient::new(scene.house.connect());
    let ended = plain.post_upload_pack_with_sidechannel(Scene::request(unoffered)).await;
    let expected = opening("fail to extract yamux session: cannot get yamux session");
    assert_eq!(code(ended.map(Response::into_inner)), expected);
    assert_eq!(scene.fetch(b"still there").await.0, b"STILL THERE");
}

#[tokio::test]
async fn whoever_gives_up_ends_it_everywhere() {
    let scene = Scene::new([Play::Wait, Play::Wait, Play::Flood(1 << 30)]).await;
    let broken = |count: usize| {
        let stage = &scene.stage;
        until("the node notices", async move || stage.broken.load(Ordering::Relaxed) == count)
    };
    // The RPC is cancelled.
    let mut offer = scene.sidechannels.offer().unwrap();
    let (mut client, request) = (scene.client.clone(), Scene::request(offer.id()));
    let call = scene
        .house
        .tasks
        .spawn("call", async move { client.post_upload_pack_with_sidechannel(request).await });
    let side = soon(offer.opened()).await.accept().await.unwrap();
    until("the node is agreed with", async || scene.stage.opened.load(Ordering::Relaxed) == 1).await;
    call.abort();
    broken(1).await;
    soon(side.read_piece()).await.unwrap_err();
    // Its time is up.
    let mut offer = scene.sidechannels.offer().unwrap();
    let mut request = Scene::request(offer.id());
    request.metadata_mut().insert("grpc-timeout", "300m".parse().unwrap());
    let mut client = scene.client_without_a_clock().await;
    let call = scene
        .house
        .tasks
        .spawn("call", async move { client.post_upload_pack_with_sidechannel(request).await });
    let side = soon(offer.opened()).await.accept().await.unwrap();
    let ended = soon(call).await.unwrap().map(Response::into_inner);
    assert_eq!(code(ended), (Code::DeadlineExceeded, DEADLINE_EXCEEDED.to_owned()));
    broken(2).await;
    soon(side.read_piece()).await.unwrap_err();
    // Its sidechannel is dropped.
    let mut offer = scene.sidechannels.offer().unwrap();
    let (mut client, request) = (scene.client.clone(), Scene::request(offer.id()));
    let call = scene
        .house
        .tasks
        .spawn("call", async move { client.post_upload_pack_with_sidechannel(request).await });
    let side = soon(offer.opened()).await.accept().await.unwrap();
    side.read_piece().await.unwrap().unwrap();
    drop(side);
    broken(3).await;
    let ended = soon(call).await.unwrap().map(Response::into_inner);
    assert_eq!(code(ended), (Code::Cancelled, "user canceled the request".to_owned()));
}

#[tokio::test]
async fn a_router_that_stops_finishes_what_goes_beside() {
    const BYTES: usize = 32 * 1024 * 1024;
    let mut scene = Scene::new([Play::Flood(BYTES)]).await;
    let mut offer = scene.sidechannels.offer().unwrap();
    let (mut client, request) = (scene.client.clone(), Scene::request(offer.id()));
    let call = scene
        .house
        .tasks
        .spawn("call", async move { client.post_upload_pack_with_sidechannel(request).await });
    let side = Client::new(soon(offer.opened()).await.accept().await.unwrap());
    let mut heard = side.read().await.unwrap().unwrap().len();
    scene.house.stop();
    let ready = async || scene.house.metrics("/ready").await.contains("200 OK");
    until("it is stopping", async || !ready().await).await;
    while let Some(piece) = soon(side.read()).await.unwrap() {
        heard += piece.len();
    }
    assert_eq!(heard, BYTES);
    soon(call).await.unwrap().unwrap();
    drop((side, scene.client));
    soon(&mut scene.house.router).await.unwrap().unwrap();
}

fn frame(kind: u8, flags: u8, stream: u32, length: u32) -> Vec<u8> {
    [&[0, kind, 0, flags][..], &stream.to_be_bytes(), &length.to_be_bytes()].concat()
}

#[tokio::test]
async fn clients_that_know_only_half_of_it_disturb_nobody() {
    let scene = Scene::new([]).await;
    let address: PathBuf = scene.house.directory.path().join("router");
    let mut others = Vec::new();
    for beginning in [
        Vec::new(),
        b"PRI *".to_vec(),
        BACKCHANNEL.to_vec(),
        [&BACKCHANNEL[..], &[0xff; 100]].concat(),
        [&BACKCHANNEL[..], &frame(1, 1, 1, 0), &frame(0, 0, 1, 5), b"hello"].concat(),
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
    ] {
        let mut other = tokio::net::UnixStream::connect(&address).await.unwrap();
        other.write_all(&beginning).await.unwrap();
        others.push(other);
    }
    // One stream is for RPCs; ten thousand are not.
    let mut greedy = tokio::net::UnixStream::connect(&address).await.unwrap();
    let mut streams = [&BACKCHANNEL[..], &frame(1, 1, 1, 0)].concat();
    for number in 1..10_000 {
        streams.extend(frame(0, 1, 2 * number + 1, 4));
        streams.extend(b"data");
    }
    let (mut reader, mut writer) = greedy.split();
    let reset = async {
        let (mut resets, mut header) = (0, [0; 12]);
        while resets < 9_999 {
            reader.read_exact(&mut header).await.unwrap();
            // The router speaks HTTP/2 on the first.
            let length = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
            if header[1] == 0 {
                reader.read_exact(&mut vec![0; length as usize]).await.unwrap();
            }
            resets += usize::from(header[1] == 1 && header[3] == 8);
        }
    };
    let (written, ()) = soon(async { tokio::join!(writer.write_all(&streams), reset) }).await;
    written.unwrap();
    assert_eq!(scene.fetch(b"still there").await.0, b"STILL THERE");
}
