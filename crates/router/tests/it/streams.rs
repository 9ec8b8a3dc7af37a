use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::StreamExt as _;
use prost::Message as _;
use tabularium_proto::gitaly::{
    GetBlobRequest, GetBlobResponse, PostReceivePackRequest, blob_service_client::BlobServiceClient,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::house::{House, exists, repository, soon, until};

async fn blob(house: &House, mode: &'static str) -> Result<Response<Streaming<GetBlobResponse>>, Status> {
    let mut client = BlobServiceClient::new(house.channel.clone());
    client.get_blob(blob_request(mode)).await
}

fn blob_request(mode: &'static str) -> Request<GetBlobRequest> {
    let mut request = Request::new(GetBlobRequest { repository: repository(), ..Default::default() });
    request.metadata_mut().insert("x-mode", mode.parse().unwrap());
    request
}

fn count(house: &House, counter: impl Fn(&crate::node::Node) -> usize) -> usize {
    house.nodes.iter().map(counter).sum()
}

#[tokio::test]
async fn a_stream_comes_through_message_by_message_with_its_trailers() {
    let house = House::new().await;
    let mut stream = blob(&house, "three").await.unwrap().into_inner();
    let mut messages = 0;
    while let Some(message) = stream.message().await.unwrap() {
        assert_eq!(message.data.len(), 10);
        messages += 1;
    }
    assert_eq!(messages, 3);
    assert!(stream.trailers().await.unwrap().unwrap().get_bin("x-trailer-bin").is_some());
}

#[tokio::test]
async fn an_open_stream_ends_when_the_clients_time_is_up() {
    let house = House::new().await;
    for mode in ["hang", "endless"] {
        let mut request = blob_request(mode);
        // Only the header: the client's own timer would hide the router's.
        request.metadata_mut().insert("grpc-timeout", "300m".parse().unwrap());
        let started = Instant::now();
        let mut client = BlobServiceClient::new(house.channel.clone());
        let mut stream = client.get_blob(request).await.unwrap().into_inner();
        let status = soon(async {
            loop {
                if let Err(status) = stream.message().await {
                    return status;
                }
            }
        })
        .await;
        assert_eq!(
            (status.code(), status.message()),
            (Code::DeadlineExceeded, "context deadline exceeded"),
            "{mode}"
        );
        assert!(started.elapsed() >= Duration::from_millis(290));
    }
    until("the node is told", async || count(&house, |node| node.0.cancelled.load(Ordering::Relaxed)) == 2)
        .await;
    let seen: Vec<_> = house.nodes.iter().flat_map(|node| node.seen("GetBlob")).collect();
    assert_eq!(seen[0].headers.get("grpc-timeout").unwrap(), "300m");
}

#[tokio::test]
async fn a_malformed_timeout_is_refused() {
    let house = House::new().await;
    let mut request = Request::new(exists());
    request.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    let status = house.ref_exists(request).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Internal, "malformed grpc-timeout"));
}

#[tokio::test]
async fn a_client_that_goes_away_takes_its_call_along() {
    let house = House::new().await;
    let mut stream = blob(&house, "hang").await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    until("the node is told", async || count(&house, |node| node.0.cancelled.load(Ordering::Relaxed)) == 1)
        .await;
    let cancelled = "rpcs_total{operation=\"Accessor\",code=\"1\"} 1";
    until("it is counted", async || house.metrics("/metrics").await.contains(cancelled)).await;
    assert!(house.metrics("/metrics").await.contains("tabularium_router_open_streams 0"));
}

#[tokio::test]
async fn a_node_that_dies_in_the_midst_of_a_small_answer_is_replaced() {
    let house = House::with("hold_answers = \"10s\"\nhedge_percent = 0", |_| {}).await;
    let asking = blob(&house, "hang-first");
    let striking = async {
        let asked = |node: &&crate::node::Node| !node.seen("GetBlob").is_empty();
        let begun = || house.nodes.iter().any(|node| node.0.sent.load(Ordering::Relaxed) > 0);
        until("one has begun to answer", async || begun()).await;
        house.nodes.iter().for_each(|node| node.0.goes_on.store(true, Ordering::Relaxed));
        house.nodes.iter().find(asked).unwrap().kill();
    };
    let (stream, ()) = soon(async { tokio::join!(asking, striking) }).await;
    let mut stream = stream.unwrap().into_inner();
    let mut messages = 0;
    while stream.message().await.unwrap().is_some() {
        messages += 1;
    }
    assert_eq!(messages, 3);
    assert_eq!(count(&house, |node| node.seen("GetBlob").len()), 2);
}

#[tokio::test]
async fn a_node_that_dies_mid_stream_is_unavailable() {
    let house = House::new().await;
    let mut stream = blob(&house, "hang").await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    for node in &house.nodes {
        node.kill();
    }
    let status = soon(stream.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("was lost"), "{}", status.message());
}

#[tokio::test]
async fn a_storm_of_cancellations_does_not_harm_the_shared_connection() {
    let house = House::new().await;
    house.leased().await;
    house.read().await.unwrap();
    let mut kept = blob(&house, "hang").await.unwrap().into_inner();
    kept.message().await.unwrap().unwrap();
    for _ in 0..20 {
        let storm = (0..100).map(|number| {
            let call = blob(&house, "hang");
            async move {
                // Some go before the answer, some after.
                if number % 2 == 0 {
                    drop(call.await.unwrap());
                } else {
                    drop(tokio::time::timeout(Duration::from_millis(1), call).await);
                }
            }
        });
        futures::future::join_all(storm).await;
    }
    for _ in 0..20 {
        house.read().await.unwrap();
    }
    assert!(
        tokio::time::timeout(Duration::from_millis(50), kept.message()).await.is_err(),
        "the stream that was open before is still open"
    );
    let connections = house.metrics("/metrics").await;
    assert!(connections.contains("tabularium_router_connections 1"), "{connections}");
}

#[tokio::test]
async fn a_slow_reader_holds_up_the_node_and_not_the_routers_memory() {
    let house = House::new().await;
    // The client's own window is large; what matters is what nobody has read.
    let stream = blob(&house, "endless").await.unwrap().into_inner();
    let sent = || count(&house, |node| node.0.sent.load(Ordering::Relaxed));
    until("the stream stands still", async || {
        let before = sent();
        tokio::time::sleep(Duration::from_millis(300)).await;
        before > 0 && before == sent()
    })
    .await;
    // The client's window and send buffers of client, node and router, and at most 1 MiB in the router.
    let client_window = 1024 * 1024;
    let nodes_send_buffer = 512 * 1024;
    assert!(sent() <= client_window + nodes_send_buffer + 1024 * 1024, "{}", sent());
    drop(stream);
}

#[tokio::test]
async fn both_directions_alternate_and_the_half_close_arrives() {
    let house = House::new().await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let first = PostReceivePackRequest { repository: repository(), ..Default::default() };
    sender.send(Bytes::from(first.encode_to_vec())).await.unwrap();
    let path = "/gitaly.SmartHTTPService/PostReceivePack";
    let answer = House::raw_stream(house.channel.clone(), path, ReceiverStream::new(receiver)).await.unwrap();
    let mut answer = answer.into_inner();
    soon(answer.next()).await.unwrap().unwrap();
    for number in 0..50u8 {
        sender.send(Bytes::from(vec![0x12, 1, number])).await.unwrap();
        assert_eq!(soon(answer.next()).await.unwrap().unwrap(), &[0x12, 1, number][..]);
    }
    drop(sender);
    assert!(soon(answer.next()).await.is_none());
    assert_eq!(house.nodes[0].0.whole.load(Ordering::Relaxed), 1);
    assert_eq!(house.coordinator.state().commits.len(), 1);
}

#[tokio::test]
async fn large_messages_pass_whole() {
    let house = House::new().await;
    let first = PostReceivePackRequest { repository: repository(), ..Default::default() };
    let large = PostReceivePackRequest { data: Bytes::from(vec![9; 3_000_000]), ..Default::default() };
    let messages = [first, large.clone(), large.clone()].map(|message| Bytes::from(message.encode_to_vec()));
    let path = "/gitaly.SmartHTTPService/PostReceivePack";
    let answer =
        House::raw_stream(house.channel.clone(), path, futures::stream::iter(messages)).await.unwrap();
    let answers: Vec<Bytes> = answer.into_inner().map(Result::unwrap).collect().await;
    assert_eq!(answers.len(), 3);
    assert_eq!(PostReceivePackRequest::decode(&answers[2][..]).unwrap(), large);
}

#[tokio::test]
async fn a_stop_lets_what_runs_finish_and_takes_nothing_new() {
    let mut house = House::new().await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let first = PostReceivePackRequest { repository: repository(), ..Default::default() };
    sender.send(Bytes::from(first.encode_to_vec())).await.unwrap();
    let path = "/gitaly.SmartHTTPService/PostReceivePack";
    let answer = House::raw_stream(house.channel.clone(), path, ReceiverStream::new(receiver)).await.unwrap();
    let mut answer = answer.into_inner();
    soon(answer.next()).await.unwrap().unwrap();

    house.stop();
    until("not ready", async || house.metrics("/ready").await.contains("503")).await;
    until("nothing new is taken", async || {
        house.address.parse::<tabularium_common::grpc::Address>().unwrap().connect().await.is_err()
    })
    .await;
    assert!(!house.router.is_finished());
    sender.send(Bytes::from_static(b"\x12\x01x")).await.unwrap();
    assert_eq!(soon(answer.next()).await.unwrap().unwrap(), &b"\x12\x01x"[..]);
    drop(sender);
    assert!(soon(answer.next()).await.is_none(), "ended with OK");
    assert_eq!(house.coordinator.state().commits.len(), 1);
    soon(&mut house.router).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_drain_is_bounded() {
    let mut house = House::with("drain_seconds = 1", |_| {}).await;
    let mut stream = blob(&house, "hang").await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    house.stop();
    soon(&mut house.router).await.unwrap().unwrap();
}
