//! What happens when an end is killed, frozen or cut off.

use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;

use super::{process::Process, *};

/// At once: far from every timeout that could be at work instead.
const AT_ONCE: Duration = Duration::from_millis(500);

/// A router's end in a process of its own that has a request under way, in whose midst the node waits for an answer.
async fn router_with_a_vote(
    node: &Node,
) -> (Process, tokio::task::JoinHandle<hyper::Result<Response<Answer>>>) {
    let address = node.address.clone();
    let connect = async move || multiplexed(&address, &Tasks::new()).await;
    let (router, mut sender) = Process::start(connect).await;
    let pending = tokio::spawn(async move { post_to(&mut sender, "/vote", "/never").await });
    node.asked.notified().await;
    (router, pending)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_router_fails_votes_at_once() {
    let mut node = start_node().await;
    let (mut router, _pending) = router_with_a_vote(&node).await;
    let since = Instant::now();
    router.kill();
    node.told.recv().await.unwrap().unwrap_err();
    assert!(since.elapsed() < AT_ONCE, "{:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_fell_silent_fails_votes_within_the_fence() {
    let mut node = start_node().await;
    let (mut router, _pending) = router_with_a_vote(&node).await;
    let since = Instant::now();
    router.freeze();
    node.told.recv().await.unwrap().unwrap_err();
    let fence = VOTE_PING_INTERVAL + VOTE_PING_TIMEOUT;
    assert!(since.elapsed() <= fence + AT_ONCE, "{:?}", since.elapsed());
    // It was the pings, and the whole connection went with the backchannel.
    assert!(since.elapsed() >= VOTE_PING_TIMEOUT, "{:?}", since.elapsed());
    node.tasks_of_connections_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_fell_silent_under_load_fails_votes_within_the_fence() {
    let mut node = start_node().await;
    let address = node.address.clone();
    let (mut router, mut sender) =
        Process::start(async move || multiplexed(&address, &Tasks::new()).await).await;
    // The socket's and every stream's buffers are full when the router stops to read: pings no longer leave the node.
    let load = post_to(&mut sender, "/plenty", (1024 * MIB).to_string()).await.unwrap();
    let _reader = tokio::spawn(count(Body::new(load.into_body())));
    let _pending = tokio::spawn(async move { post_to(&mut sender, "/vote", "/never").await });
    node.asked.notified().await;
    let since = Instant::now();
    router.freeze();
    node.told.recv().await.unwrap().unwrap_err();
    let fence = VOTE_PING_INTERVAL + VOTE_PING_TIMEOUT;
    assert!(since.elapsed() <= fence + AT_ONCE, "{:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_is_only_slow_is_waited_for() {
    let node = start_node().await;
    let mut sender = multiplexed(&node.address, &Tasks::new()).await;
    assert_eq!(said(&mut sender, "/vote", "/late").await, (StatusCode::OK, "commit".into()));
    // Nor does the connection go afterwards.
    tokio::time::sleep(VOTE_PING_INTERVAL + VOTE_PING_TIMEOUT).await;
    assert_eq!(said(&mut sender, "/vote", "/commit").await, (StatusCode::OK, "change: commit".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_node_fails_requests_at_once() {
    let (mut process, node) = Process::start(start_node).await;
    let tasks = Tasks::new();
    let mut sender = multiplexed(&node.address, &tasks).await;
    let pending = tokio::spawn({
        let mut sender = sender.clone();
        async move { post_to(&mut sender, "/vote", "/never").await }
    });
    let stalled = post_to(&mut sender, "/plenty", (64 * MIB).to_string()).await.unwrap();
    node.asked.notified().await;
    let since = Instant::now();
    process.kill();
    pending.await.unwrap().unwrap_err();
    let cut = axum::body::to_bytes(Body::new(stalled.into_body()), usize::MAX).await;
    assert!(cut.is_err(), "an answer that was cut off must not pass for a whole one");
    assert!(since.elapsed() < AT_ONCE, "{:?}", since.elapsed());
    sender.ready().await.unwrap_err();
    // Nothing is left behind: no task waits for a peer that is gone.
    tasks.drain(Duration::from_secs(5)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connection_of_the_requests_goes_with_the_backchannel() {
    use tokio_util::compat::{FuturesAsyncReadCompatExt as _, TokioAsyncReadCompatExt as _};
    let mut node = start_node().await;
    let mut connection = node.address.connect().await.unwrap();
    connection.write_all(crate::multiplex::BACKCHANNEL).await.unwrap();
    let mut yamux =
        yamux::Connection::new(connection.compat(), yamux::Config::default(), yamux::Mode::Client);
    let rpcs = std::future::poll_fn(|cx| yamux.poll_new_outbound(cx)).await.unwrap();
    let (opened, mut back) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        while let Some(Ok(stream)) = std::future::poll_fn(|cx| yamux.poll_next_inbound(cx)).await {
            opened.send(stream).await.unwrap();
        }
    });
    let mut sender = http2(rpcs.compat()).await;
    let pending = tokio::spawn(async move { post_to(&mut sender, "/vote", "/never").await });
    let back = back.recv().await.unwrap();
    let since = Instant::now();
    drop(back);
    node.told.recv().await.unwrap().unwrap_err();
    // The node may have had its answer under way; the connection is closed behind it.
    let _ = pending.await.unwrap();
    assert!(since.elapsed() < AT_ONCE, "{:?}", since.elapsed());
    node.tasks_of_connections_end().await;
}

impl Node {
    /// No session is left; what listens still does.
    async fn tasks_of_connections_end(&self) {
        let ended = async {
            while self.tasks.running() != ["grpc"] {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), ended).await.unwrap();
    }
}
