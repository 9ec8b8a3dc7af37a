//! How new a repository is: told with every answer, and asked for.

use std::time::{Duration, Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use prost::Message as _;
use tabularium_common::records::{EXPECTED_REPLICA, expectation};
use tabularium_proto::{
    gitaly::{
        GetBlobRequest, WriteRefRequest, blob_service_client::BlobServiceClient,
        repository_service_client::RepositoryServiceClient,
    },
    node::ExpectedReplica,
};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};

use crate::house::{House, REPOSITORY, exists, repository, soon, until};

const GENERATION: &str = "tabularium-generation";

fn generation(metadata: &MetadataMap) -> Option<&str> {
    metadata.get(GENERATION).map(|value| value.to_str().unwrap())
}

fn at_least(generation: &str, wait: Option<&str>) -> Request<tabularium_proto::gitaly::RefExistsRequest> {
    let mut request = Request::new(exists());
    let metadata = request.metadata_mut();
    metadata.insert("tabularium-at-least-generation", generation.parse().unwrap());
    if let Some(wait) = wait {
        metadata.insert("tabularium-wait", wait.parse().unwrap());
    }
    request
}

fn advance(house: &House, generation: i64) {
    house.coordinator.change(REPOSITORY, |route| {
        route.generation = generation;
        for replica in &mut route.replicas {
            replica.generation = generation;
        }
    });
}

async fn write(house: &House, votes: &str) -> Result<Response<()>, Status> {
    let message = WriteRefRequest { repository: repository(), r#ref: b"HEAD".to_vec(), ..Default::default() };
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-votes", votes.parse().unwrap());
    let mut client = RepositoryServiceClient::new(house.channel.clone());
    soon(client.write_ref(request)).await.map(|answer| answer.map(drop))
}

#[tokio::test]
async fn every_answer_says_how_new_the_repository_is() {
    let house = House::with("workers = 1", |coordinator| coordinator.state().quorum = 2).await;
    house.leased().await;
    let answer = soon(house.ref_exists(Request::new(exists()))).await.unwrap();
    assert_eq!(generation(answer.metadata()), Some("5"));
    let mut request = Request::new(exists());
    request.metadata_mut().insert("x-fail", "5".parse().unwrap());
    let status = soon(house.ref_exists(request)).await.unwrap_err();
    assert_eq!(generation(status.metadata()), Some("5"), "{status:?}");
    let message = GetBlobRequest { repository: repository(), ..Default::default() };
    let mut client = BlobServiceClient::new(house.channel.clone());
    let stream = soon(client.get_blob(message)).await.unwrap();
    assert_eq!(generation(stream.metadata()), Some("5"), "before the first message");
    let mut stream = stream.into_inner();
    while soon(stream.message()).await.unwrap().is_some() {}
    assert_eq!(generation(&soon(stream.trailers()).await.unwrap().unwrap()), Some("5"));

    // A write says what it made, and reads by the route that was kept know of it.
    let written = write(&house, "update").await.unwrap();
    assert_eq!(generation(written.metadata()), Some("6"));
    let resolved = house.coordinator.state().resolves.len();
    for _ in 0..3 {
        let answer = soon(house.ref_exists(at_least("6", None))).await.unwrap();
        assert_eq!(generation(answer.metadata()), Some("6"));
    }
    assert_eq!(house.coordinator.state().resolves.len(), resolved, "the route is kept");
}

/// What is known of a replica of a node, and which process of the node was known when that was asked for.
fn said_last(house: &House, node: usize) -> (i64, Option<String>) {
    let seen = house.nodes[node].seen("RefExists").pop().unwrap();
    let expected = STANDARD_NO_PAD.decode(&seen.headers[EXPECTED_REPLICA]).unwrap();
    let expected = ExpectedReplica::decode(&expected[..]).unwrap();
    (expected.generation, expected.node_instance)
}

#[tokio::test]
async fn what_was_learned_before_a_node_was_started_is_not_believed_of_it() {
    let house = House::new().await;
    house.leased().await;
    // Whoever has never met them learns who they are.
    for node in &house.nodes {
        *node.0.instance.lock().unwrap() = Some("first");
    }
    let read_everywhere = async || {
        for _ in 0..30 {
            soon(house.ref_exists(Request::new(exists()))).await.unwrap();
        }
    };
    read_everywhere().await;
    for node in 0..house.nodes.len() {
        assert_eq!(said_last(&house, node), (5, Some("first".into())));
    }
    // Another router writes; nobody is behind, so this one is not told. One node comes back with another disk.
    advance(&house, 6);
    read_everywhere().await;
    assert_eq!(said_last(&house, 0).0, 5, "the route is kept");
    let resolved = house.coordinator.state().resolves.len();
    *house.nodes[0].0.instance.lock().unwrap() = Some("second");
    read_everywhere().await;
    assert_eq!(said_last(&house, 0), (6, Some("second".into())), "what it has to have is asked for again");
    assert_eq!(house.coordinator.state().resolves.len(), resolved + 1);
    // All at once: there is nobody else to ask meanwhile.
    for node in &house.nodes {
        *node.0.instance.lock().unwrap() = Some("third");
    }
    soon(house.ref_exists(Request::new(exists()))).await.unwrap();
    assert_eq!(house.coordinator.state().reports.len(), 0, "that says nothing against their replicas");
}

#[tokio::test]
async fn a_read_gets_at_least_what_it_asks_for_or_is_told_that_it_is_not_there() {
    let house = House::new().await;
    house.leased().await;
    soon(house.ref_exists(at_least("5", None))).await.unwrap();
    for seen in house.nodes.iter().flat_map(|node| node.seen("RefExists")) {
        let ours = |name: &&http::HeaderName| name.as_str().starts_with("tabularium-");
        let told: Vec<_> = seen.headers.keys().filter(ours).collect();
        assert_eq!(told, [EXPECTED_REPLICA], "{seen:?}");
        // The node is told what it has to have.
        let expected = STANDARD_NO_PAD.decode(&seen.headers[EXPECTED_REPLICA]).unwrap();
        let expected = ExpectedReplica::decode(&expected[..]).unwrap();
        assert_eq!((expected.repository_id, expected.generation), (1, 5));
        assert_eq!(expected.relative_path, "@cluster/repositories/aa/bb/1");
    }
    let mut own_word = at_least("5", None);
    let lie = ExpectedReplica { repository_id: 1, generation: 99, ..ExpectedReplica::default() };
    own_word.metadata_mut().insert_bin(EXPECTED_REPLICA, expectation(&lie));
    soon(house.ref_exists(own_word)).await.unwrap();
    for seen in house.nodes.iter().flat_map(|node| node.seen("RefExists")) {
        assert_ne!(
            seen.headers[EXPECTED_REPLICA].as_bytes(),
            expectation(&lie).as_encoded_bytes(),
            "a client's"
        );
    }
    let status = soon(house.ref_exists(at_least("7", None))).await.unwrap_err();
    let text = "the repository is at generation 5 here, and at least 7 was asked for";
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text));
    let started = Instant::now();
    soon(house.ref_exists(at_least("7", Some("150")))).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(10) && started.elapsed() >= Duration::from_millis(50));

    // The route that is kept is too old, the coordinator's is not.
    soon(house.read()).await.unwrap();
    advance(&house, 7);
    let answer = soon(house.ref_exists(at_least("7", None))).await.unwrap();
    assert_eq!(generation(answer.metadata()), Some("7"));

    let waiting = async {
        let answer = soon(house.ref_exists(at_least("8", Some("15000")))).await.unwrap();
        assert_eq!(generation(answer.metadata()), Some("8"));
    };
    let resolved = house.coordinator.state().resolves.len();
    let writing = async {
        until("it has looked", async || house.coordinator.state().resolves.len() > resolved + 1).await;
        advance(&house, 8);
    };
    tokio::join!(waiting, writing);

    for (generation, wait) in [("x", None), ("1", Some("x"))] {
        let status = soon(house.ref_exists(at_least(generation, wait))).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{}", status.message());
    }
}

#[tokio::test]
async fn a_primary_that_is_behind_does_not_serve_what_is_asked_to_be_newer() {
    let house = House::with("", |coordinator| {
        coordinator.change(REPOSITORY, |route| route.replicas[0].generation = 4);
    })
    .await;
    house.leased().await;
    let policy = "gitaly-route-repository-accessor-policy";
    let mut request = at_least("5", None);
    request.metadata_mut().insert(policy, "primary-only".parse().unwrap());
    let status = soon(house.ref_exists(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let mut request = at_least("4", None);
    request.metadata_mut().insert(policy, "primary-only".parse().unwrap());
    let answer = soon(house.ref_exists(request)).await.unwrap();
    assert_eq!(generation(answer.metadata()), Some("4"));
}
