//! Reads while no coordinator answers: the replicas say themselves which of them is the newest.

use std::time::{Duration, Instant};

use tabularium_proto::{
    gitaly::{WriteRefRequest, repository_service_client::RepositoryServiceClient},
    node::{ReadRecordResponse, ReplicaRecord},
};
use tonic::Code;

use crate::{
    coordinator::Coordinator,
    house::{House, REPOSITORY, repository, soon, until},
};

const SHORT_LEASE_MILLISECONDS: u32 = 300;

fn record(generation: i64) -> ReplicaRecord {
    ReplicaRecord { repository_id: 1, generation, changes: 1, complete: true, ..ReplicaRecord::default() }
}

fn records(house: &House, records: [Option<ReplicaRecord>; 3]) {
    for (node, record) in house.nodes.iter().zip(records) {
        *node.0.record.lock().unwrap() = ReadRecordResponse { exists: true, record };
    }
}

fn short_lease(coordinator: &Coordinator) {
    let mut state = coordinator.state();
    state.lease_milliseconds = SHORT_LEASE_MILLISECONDS;
    state.quorum = 2;
}

/// A router that has read the repository once, and has no coordinator and no lease any more.
async fn forsaken(config: &str) -> House {
    let house = House::with(config, short_lease).await;
    house.leased().await;
    house.read().await.unwrap();
    assert!(!asked_for_records(&house), "under the lease nobody is asked");
    house.coordinator.kill();
    until("the end of the lease", async || {
        house.metrics("/metrics").await.contains("lease_until_seconds 0.0")
    })
    .await;
    house
}

fn asked_for_records(house: &House) -> bool {
    house.nodes.iter().any(|node| !node.seen("ReadRecord").is_empty())
}

#[tokio::test]
async fn the_newest_of_a_majority_is_read() {
    let house = forsaken("").await;
    records(&house, [Some(record(5)), Some(record(6)), None]);
    for _ in 0..6 {
        assert_eq!(soon(house.read()).await.unwrap(), "node-2");
    }
    // Another router went on writing.
    records(&house, [Some(record(7)), Some(record(6)), None]);
    for _ in 0..6 {
        assert_eq!(soon(house.read()).await.unwrap(), "node-1", "nothing is kept from one read to the next");
    }
    house.nodes[2].kill();
    assert_eq!(soon(house.read()).await.unwrap(), "node-1");
}

#[tokio::test]
async fn without_a_majority_nothing_is_read() {
    let house = forsaken("").await;
    let mixture = ReplicaRecord { complete: false, ..record(6) };
    records(&house, [Some(record(6)), None, Some(mixture)]);
    let status = soon(house.read()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(
        status.message(),
        "no coordinator can be reached, and of 2 replicas that have to say how new they are 1 do"
    );
    house.nodes[0].kill();
    assert_eq!(soon(house.read()).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn nodes_without_records_are_read_where_that_is_wanted() {
    let house = forsaken("without_database = \"serve\"\n").await;
    records(&house, [None, None, None]);
    for _ in 0..3 {
        soon(house.read()).await.unwrap();
    }
}

#[tokio::test]
async fn writes_fail_fast() {
    let house = forsaken("").await;
    records(&house, [Some(record(5)), Some(record(5)), Some(record(5))]);
    let began = Instant::now();
    let request = WriteRefRequest {
        repository: repository(),
        r#ref: b"refs/heads/a".to_vec(),
        revision: b"main".to_vec(),
        ..WriteRefRequest::default()
    };
    let written = RepositoryServiceClient::new(house.channel.clone()).write_ref(request).await;
    assert_eq!(written.unwrap_err().code(), Code::Unavailable);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_route_that_was_revoked_is_known_again_when_the_coordinators_go_away() {
    let house = House::with("", short_lease).await;
    house.leased().await;
    house.read().await.unwrap();
    house.coordinator.revoke(1, REPOSITORY, 6).await;
    until("the question about the revoked route", async || house.coordinator.state().resolves.len() == 2)
        .await;
    // Its answer is kept before the next one is asked for.
    until("the answer", async || {
        house.read().await.unwrap();
        house.coordinator.state().resolves.len() == 2
    })
    .await;
    house.coordinator.kill();
    until("the end of the lease", async || {
        house.metrics("/metrics").await.contains("lease_until_seconds 0.0")
    })
    .await;
    records(&house, [Some(record(5)), Some(record(6)), None]);
    assert_eq!(soon(house.read()).await.unwrap(), "node-2");
}
