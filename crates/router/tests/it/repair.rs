//! Reads that one replica fails and another one answers.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::StreamExt as _;
use prost::Message as _;
use tabularium_proto::{
    gitaly::{GetBlobRequest, blob_service_client::BlobServiceClient},
    node::UploadPackRequest,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status};

use crate::{
    house::{House, REPOSITORY, exists, repository, soon, until},
    node::{Node, frame},
};

fn fail(house: &House, node: usize, code: Code, text: &str) {
    *house.nodes[node].0.fails.lock().unwrap() = Some(Status::new(code, text));
}

/// Reads through the other replicas, however often.
async fn reads_go_well(house: &House, bad: &[&str]) {
    for _ in 0..12 {
        soon(house.ref_exists(Request::new(exists()))).await.unwrap();
        let mut client = BlobServiceClient::new(house.channel.clone());
        let request = GetBlobRequest { repository: repository(), ..Default::default() };
        let mut blobs = soon(client.get_blob(request)).await.unwrap().into_inner();
        let mut count = 0;
        while let Some(blob) = soon(blobs.message()).await.unwrap() {
            assert_eq!(blob.data.len(), 10);
            count += 1;
        }
        assert_eq!(count, 3, "{bad:?}");
    }
}

#[tokio::test]
async fn a_replica_that_is_gone_or_corrupt_is_read_around_and_told_of_once() {
    for (code, text) in [
        (Code::NotFound, "repository not found"),
        (Code::FailedPrecondition, "repository not valid: \"objects\" does not exist"),
        (Code::Internal, "git cat-file: exit code 128"),
        (Code::DataLoss, "a pack is broken"),
    ] {
        for late in [false, true] {
            let house = House::new().await;
            house.leased().await;
            fail(&house, 0, code, text);
            house.nodes[0].0.fails_late.store(late, Ordering::Relaxed);
            reads_go_well(&house, &["node-1"]).await;
            until("it is told", async || !house.coordinator.state().reports.is_empty()).await;
            assert!(!house.nodes[0].seen("RefExists").is_empty());
            let reports = house.coordinator.state().reports.clone();
            let [report] = &reports[..] else { panic!("{reports:?}") };
            assert_eq!((report.repository_id, &report.storage[..], report.generation), (1, "node-1", 5));
            assert!(report.what.contains(text), "{}", report.what);
        }
    }
}

#[tokio::test]
async fn one_good_replica_of_three_is_enough() {
    let house = House::new().await;
    house.leased().await;
    fail(&house, 0, Code::NotFound, "repository not found");
    fail(&house, 1, Code::Internal, "git: killed");
    reads_go_well(&house, &["node-1", "node-2"]).await;
    until("both are told of", async || house.coordinator.state().reports.len() == 2).await;
}

#[tokio::test]
async fn what_nobody_has_is_answered_in_the_primarys_words_and_nobody_is_suspected() {
    let house = House::with("", |coordinator| {
        coordinator.change(REPOSITORY, |route| route.primary = "node-2".into());
    })
    .await;
    house.leased().await;
    fail(&house, 0, Code::NotFound, "first: repository not found");
    fail(&house, 1, Code::NotFound, "repository not found");
    fail(&house, 2, Code::Unavailable, "third");
    for _ in 0..6 {
        let status = soon(house.ref_exists(Request::new(exists()))).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::NotFound, "repository not found"));
    }
    // What a repository does not have is another matter.
    fail(&house, 0, Code::NotFound, "tree entry not found");
    fail(&house, 2, Code::NotFound, "tree entry not found");
    fail(&house, 1, Code::NotFound, "tree entry not found");
    let asked = house.nodes.iter().map(|node| node.seen("RefExists").len()).sum::<usize>();
    soon(house.ref_exists(Request::new(exists()))).await.unwrap_err();
    assert_eq!(house.nodes.iter().map(|node| node.seen("RefExists").len()).sum::<usize>(), asked + 1);
    assert!(house.coordinator.state().reports.is_empty());
}

#[tokio::test]
async fn the_primary_alone_is_asked_when_only_the_primary_may_answer() {
    let house = House::new().await;
    house.leased().await;
    let primary_only = || {
        let mut request = Request::new(exists());
        let policy = "gitaly-route-repository-accessor-policy";
        request.metadata_mut().insert(policy, "primary-only".parse().unwrap());
        request
    };
    fail(&house, 0, Code::Internal, "broken");
    let status = soon(house.ref_exists(primary_only())).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Internal, "broken"));
    house.nodes[0].kill();
    for _ in 0..4 {
        soon(house.ref_exists(primary_only())).await.unwrap_err();
    }
    // The primary moves, and the reads go with it.
    house.coordinator.change(REPOSITORY, |route| route.primary = "node-2".into());
    house.coordinator.revoke(1, REPOSITORY, 5).await;
    until("the route is revoked", async || !house.coordinator.state().acknowledged.is_empty()).await;
    for _ in 0..4 {
        soon(house.ref_exists(primary_only())).await.unwrap();
    }
    assert_eq!(house.nodes[1].seen("RefExists").len(), 4);
    assert!(house.nodes[2].seen("RefExists").is_empty());
}

#[tokio::test]
async fn two_of_three_nodes_are_killed_under_reads_and_no_read_fails() {
    let house = House::new().await;
    house.leased().await;
    let reading = async {
        let reads = (0..400).map(|_| house.ref_exists(Request::new(exists())));
        let answers: Vec<_> = futures::stream::iter(reads).buffered(8).collect().await;
        answers.into_iter().filter_map(Result::err).collect::<Vec<_>>()
    };
    let killing = async {
        until("reads are under way", async || !house.nodes[0].seen("RefExists").is_empty()).await;
        house.nodes[0].kill();
        house.nodes[2].kill();
    };
    let (failed, ()) = soon(async { tokio::join!(reading, killing) }).await;
    assert!(failed.is_empty(), "{failed:?}");
}

#[tokio::test]
async fn a_node_that_dies_before_its_first_word_is_replaced_whatever_was_uploaded_to_it() {
    streams_outlive(Node::kill).await;
}

#[tokio::test]
async fn a_node_that_keeps_its_connections_and_does_not_answer_is_replaced_as_soon_as_it_counts_as_down() {
    streams_outlive(|node| node.0.serving.store(false, Ordering::Relaxed)).await;
}

/// One of three streams is with a node that hears nothing when that happens to it.
async fn streams_outlive(harm: impl FnOnce(&Node)) {
    let house = House::with("hedge_percent = 0", |_| {}).await;
    house.leased().await;
    house.nodes[0].0.deaf.store(true, Ordering::Relaxed);
    let open = |text: &'static [u8]| {
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let first = UploadPackRequest { repository: repository(), ..Default::default() };
        sender.try_send(Bytes::from(first.encode_to_vec())).unwrap();
        let more = UploadPackRequest { data: Bytes::from_static(text), ..Default::default() };
        sender.try_send(Bytes::from(more.encode_to_vec())).unwrap();
        drop(sender);
        let path = "/tabularium.node.v1.UploadPackService/UploadPack";
        let channel = house.channel.clone();
        async move {
            let mut answer =
                House::raw_stream(channel, path, ReceiverStream::new(receiver)).await?.into_inner();
            while answer.message().await?.is_some() {}
            Ok::<_, Status>(())
        }
    };
    let streams = futures::future::join_all([open(b"one"), open(b"two"), open(b"three")]);
    let dying = async {
        until("the others have answered", async || {
            house.nodes.iter().map(|node| node.seen("UploadPack").len()).sum::<usize>() == 2
        })
        .await;
        harm(&house.nodes[0]);
    };
    let (answers, ()) = soon(async { tokio::join!(streams, dying) }).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    let seen: Vec<_> = house.nodes.iter().flat_map(|node| node.seen("UploadPack")).collect();
    assert_eq!(seen.len(), 3);
    for text in [&b"one"[..], b"two", b"three"] {
        let more = UploadPackRequest { data: Bytes::copy_from_slice(text), ..Default::default() };
        let end = frame(&more.encode_to_vec());
        assert!(seen.iter().any(|seen| seen.message.ends_with(&end)), "{}", String::from_utf8_lossy(text));
    }
}

#[tokio::test]
async fn a_silent_node_costs_a_pause_and_is_left_alone_for_a_while() {
    let house = House::with("hedge_after = \"50ms\"", |_| {}).await;
    house.leased().await;
    house.nodes[1].0.deaf.store(true, Ordering::Relaxed);
    let mut slow = 0;
    for _ in 0..60 {
        let started = Instant::now();
        soon(house.ref_exists(Request::new(exists()))).await.unwrap();
        slow += usize::from(started.elapsed() >= Duration::from_millis(50));
    }
    assert!(slow >= 1, "nothing was asked of the silent node");
    let metrics = house.metrics("/metrics").await;
    assert!(!metrics.contains("hedged_reads_total 0\n"), "{metrics}");
    assert!(house.coordinator.state().reports.is_empty(), "to be silent is nothing to be suspected of");
}

#[tokio::test]
async fn when_all_look_dead_they_are_asked_all_the_same() {
    let house = House::new().await;
    house.leased().await;
    for node in &house.nodes {
        node.0.serving.store(false, Ordering::Relaxed);
    }
    let healthy = "node_healthy{virtual_storage=\"default\",storage=\"node-";
    until("all look dead", async || {
        let metrics = house.metrics("/metrics").await;
        metrics.lines().filter(|line| line.contains(healthy)).all(|line| line.ends_with(" 0"))
    })
    .await;
    soon(house.read()).await.unwrap();
}
