use std::collections::BTreeSet;

use prost::Message as _;
use tabularium_proto::gitaly::{
    FindRemoteRepositoryRequest, RefExistsRequest, RepositorySizeRequest,
    remote_service_client::RemoteServiceClient, repository_service_client::RepositoryServiceClient,
};
use tonic::{Code, Request};

use crate::house::{House, REPOSITORY, exists, repository, until};

#[tokio::test]
async fn a_read_reaches_a_replica_rewritten_and_comes_back_as_the_node_sent_it() {
    let house = House::new().await;
    let mut request = Request::new(exists());
    let metadata = request.metadata_mut();
    metadata.insert("x-gitlab-correlation-id", "corr-1".parse().unwrap());
    metadata.insert("authorization", "Bearer of-the-client".parse().unwrap());
    metadata.insert("gitaly-feature-x", "true".parse().unwrap());
    metadata.insert_bin("gitaly-client-context-bin", tonic::metadata::MetadataValue::from_bytes(b"\x00\xff"));
    let answer = house.ref_exists(request).await.unwrap();
    assert!(answer.get_ref().value);
    assert_eq!(answer.metadata().get("x-node-said").unwrap(), "hello");
    assert_eq!(answer.metadata().get_bin("x-trailer-bin").unwrap().to_bytes().unwrap(), &b"\x00\x01\x02"[..]);
    assert!(answer.metadata().get("date").is_none());

    let seen: Vec<_> = house.nodes.iter().flat_map(|node| node.seen("RefExists")).collect();
    let [seen] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!(seen.headers.get("x-gitlab-correlation-id").unwrap(), "corr-1");
    assert_eq!(seen.headers.get("gitaly-feature-x").unwrap(), "true");
    assert_eq!(seen.headers.get("gitaly-client-context-bin").unwrap(), "AP8");
    assert!(seen.headers.get("authorization").is_none());
    let repository = RefExistsRequest::decode(&seen.message[..]).unwrap().repository.unwrap();
    assert!(repository.storage_name.starts_with("node-"));
    assert_eq!(repository.relative_path, "@cluster/repositories/aa/bb/1");
    assert_eq!(house.coordinator.state().correlation_ids, ["corr-1"]);
}

#[tokio::test]
async fn status_details_and_binary_trailers_come_through() {
    let house = House::new().await;
    let mut request = Request::new(exists());
    request.metadata_mut().insert("x-fail", "5".parse().unwrap());
    let status = house.ref_exists(request).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "as you wish: größer"));
    assert_eq!(status.details(), b"\x08\x05\x12\x01x");
    assert_eq!(status.metadata().get_bin("x-reason-bin").unwrap().to_bytes().unwrap(), &b"\x01\x02\x03"[..]);
}

#[tokio::test]
async fn fields_this_build_does_not_know_survive() {
    let house = House::new().await;
    let mut message = exists().encode_to_vec();
    message.extend(b"\x82\x7d\x02hi");
    house.raw("/gitaly.RefService/RefExists", &message).await.unwrap();
    let seen: Vec<_> = house.nodes.iter().flat_map(|node| node.seen("RefExists")).collect();
    assert!(seen[0].message.ends_with(b"\x82\x7d\x02hi"), "{:?}", seen[0].message);
}

#[tokio::test]
async fn reads_are_spread_and_a_replica_that_is_behind_serves_none() {
    let house = House::with("", |coordinator| {
        coordinator.change(REPOSITORY, |route| route.replicas[1].generation = 4);
    })
    .await;
    let mut storages = BTreeSet::new();
    for _ in 0..8 {
        storages.insert(house.read().await.unwrap());
    }
    assert_eq!(storages.into_iter().collect::<Vec<_>>(), ["node-1", "node-3"]);
}

#[tokio::test]
async fn only_the_primary_serves_what_asks_for_it() {
    let house = House::new().await;
    for _ in 0..4 {
        let mut request = Request::new(exists());
        request
            .metadata_mut()
            .insert("gitaly-route-repository-accessor-policy", "primary-only".parse().unwrap());
        house.ref_exists(request).await.unwrap();
    }
    let mut client = RepositoryServiceClient::new(house.channel.clone());
    client.repository_size(RepositorySizeRequest { repository: repository() }).await.unwrap();
    assert_eq!(house.nodes[0].seen("RefExists").len(), 4);
    assert_eq!(house.nodes[0].seen("RepositorySize").len(), 1);
}

#[tokio::test]
async fn a_dead_node_is_read_around_avoided_and_used_again() {
    let house = House::new().await;
    house.leased().await;
    for _ in 0..3 {
        house.read().await.unwrap();
    }
    house.nodes[1].kill();
    for _ in 0..20 {
        assert_ne!(house.read().await.unwrap(), "node-2");
    }
    let unhealthy = "node_healthy{virtual_storage=\"default\",storage=\"node-2\"} 0";
    until("node-2 is known to be dead", async || house.metrics("/metrics").await.contains(unhealthy)).await;
    house.nodes[1].revive().await;
    until("node-2 serves again", async || house.read().await.unwrap() == "node-2").await;
}

#[tokio::test]
async fn a_node_that_says_it_is_not_serving_is_avoided() {
    let house = House::new().await;
    house.nodes[2].0.serving.store(false, std::sync::atomic::Ordering::Relaxed);
    let unhealthy = "node_healthy{virtual_storage=\"default\",storage=\"node-3\"} 0";
    until("node-3 is avoided", async || house.metrics("/metrics").await.contains(unhealthy)).await;
    for _ in 0..6 {
        assert_ne!(house.read().await.unwrap(), "node-3");
    }
}

#[tokio::test]
async fn a_node_that_is_unavailable_is_tried_elsewhere_and_its_word_counts_if_nobody_does_better() {
    let house = House::new().await;
    let mut request = Request::new(exists());
    request.metadata_mut().insert("x-fail", "14".parse().unwrap());
    let status = house.ref_exists(request).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "as you wish: größer"));
    let asked: Vec<usize> = house.nodes.iter().map(|node| node.seen("RefExists").len()).collect();
    assert_eq!(asked, [1, 1, 1]);
}

#[tokio::test]
async fn storage_scope_goes_to_any_storage_under_its_own_name() {
    let house = House::new().await;
    let mut client = RemoteServiceClient::new(house.channel.clone());
    for _ in 0..3 {
        let request =
            FindRemoteRepositoryRequest { remote: "https://x".into(), storage_name: "default".into() };
        client.find_remote_repository(request).await.unwrap();
    }
    for node in &house.nodes {
        let seen = node.seen("FindRemoteRepository");
        assert_eq!(seen.len(), 1, "spread");
        let request = FindRemoteRepositoryRequest::decode(&seen[0].message[..]).unwrap();
        assert_eq!((&request.remote[..], &request.storage_name), ("https://x", &node.0.storage));
    }
}

#[tokio::test]
async fn two_workers_serve_several_connections() {
    let house = House::with("workers = 2", |_| {}).await;
    for _ in 0..6 {
        let mut client = tabularium_proto::gitaly::ref_service_client::RefServiceClient::new(house.connect());
        assert!(client.ref_exists(exists()).await.unwrap().into_inner().value);
    }
}
