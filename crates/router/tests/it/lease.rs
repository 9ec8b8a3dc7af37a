use tabularium_proto::coordinator::{Topology, session_response::Message};
use tonic::Code;

use crate::{
    coordinator::Coordinator,
    house::{House, REPOSITORY, soon, until},
};

fn resolves(house: &House) -> usize {
    house.coordinator.state().resolves.len()
}

#[tokio::test]
async fn under_a_lease_a_route_is_asked_for_once() {
    let house = House::new().await;
    house.leased().await;
    for _ in 0..10 {
        house.read().await.unwrap();
    }
    assert_eq!(resolves(&house), 1);
    assert_eq!(house.coordinator.state().resolves[0].session_id, "session-1");
    let metrics = house.metrics("/metrics").await;
    assert!(metrics.contains("tabularium_router_route_cache_hits_total 9"), "{metrics}");
}

#[tokio::test]
async fn a_path_written_differently_is_the_same_repository() {
    let house = House::new().await;
    house.leased().await;
    house.read().await.unwrap();
    let request = tabularium_proto::gitaly::RefExistsRequest {
        repository: crate::house::named("default", "group//./project.git"),
        ..Default::default()
    };
    house.ref_exists(tonic::Request::new(request)).await.unwrap();
    assert_eq!(resolves(&house), 1);
}

#[tokio::test]
async fn without_a_lease_every_read_asks() {
    let house = House::with("", |coordinator| coordinator.state().grant = false).await;
    for _ in 0..3 {
        house.read().await.unwrap();
    }
    assert_eq!(resolves(&house), 3);
    assert!(house.coordinator.state().resolves.iter().all(|resolve| resolve.session_id.is_empty()));
}

#[tokio::test]
async fn a_revoked_route_is_not_used_once_it_is_acknowledged() {
    let house = House::new().await;
    house.leased().await;
    house.read().await.unwrap();
    house.coordinator.change(REPOSITORY, |route| {
        route.generation = 6;
        route.replicas[2].generation = 6;
    });
    house.coordinator.revoke(41, REPOSITORY, 6).await;
    until("the acknowledgement", async || house.coordinator.state().acknowledged == [41]).await;
    for _ in 0..6 {
        assert_eq!(house.read().await.unwrap(), "node-3");
    }
    assert_eq!(resolves(&house), 2);
}

#[tokio::test]
async fn an_answer_that_is_overtaken_by_a_revocation_is_not_kept() {
    let house = House::new().await;
    house.leased().await;
    let allowed = house.coordinator.resolves_allowed();
    allowed.acquire_many(1_000_000).await.unwrap().forget();
    let early = house.read();
    let meanwhile = async {
        until("the question", async || resolves(&house) == 1).await;
        house.coordinator.change(REPOSITORY, |route| {
            route.generation = 6;
            route.replicas[2].generation = 6;
        });
        house.coordinator.revoke(1, REPOSITORY, 6).await;
        until("the acknowledgement", async || house.coordinator.state().acknowledged == [1]).await;
        allowed.add_permits(1_000_000);
    };
    let (early, ()) = soon(async { tokio::join!(early, meanwhile) }).await;
    early.unwrap();
    assert_eq!(house.read().await.unwrap(), "node-3");
    assert_eq!(resolves(&house), 2, "the late answer was not kept");
}

#[tokio::test]
async fn many_readers_ask_one_question() {
    let house = House::new().await;
    house.leased().await;
    let allowed = house.coordinator.resolves_allowed();
    allowed.acquire_many(1_000_000).await.unwrap().forget();
    let readers = futures::future::join_all((0..50).map(|_| house.read()));
    let release = async {
        until("the question", async || resolves(&house) == 1).await;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        allowed.add_permits(1_000_000);
    };
    let (answers, ()) = soon(async { tokio::join!(readers, release) }).await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(resolves(&house), 1);
}

#[tokio::test]
async fn a_lease_that_runs_out_ends_the_use_of_cached_routes() {
    let house = House::with("", |coordinator| coordinator.state().lease_milliseconds = 600).await;
    house.leased().await;
    house.read().await.unwrap();
    house.coordinator.state().grant = false;
    tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    let before = resolves(&house);
    house.read().await.unwrap();
    house.read().await.unwrap();
    assert_eq!(resolves(&house), before + 2);
}

#[tokio::test]
async fn when_the_session_is_lost_the_next_coordinator_takes_over() {
    let house = House::new().await;
    house.leased().await;
    house.read().await.unwrap();
    let storages = house.coordinator.state().storages.clone();
    let second = Coordinator::start(house.directory.path(), "coordinator-2", &storages, &house.tasks).await;
    second.add(REPOSITORY);
    house.coordinator.kill();
    until("a session with the other", async || !second.state().sessions.is_empty()).await;
    house.leased().await;
    for _ in 0..3 {
        house.read().await.unwrap();
    }
    assert_eq!(second.state().resolves.len(), 1, "asked again, and kept under the new lease");
}

#[tokio::test]
async fn without_a_coordinator_a_read_is_unavailable() {
    let house = House::with("", |coordinator| coordinator.state().grant = false).await;
    house.coordinator.kill();
    let status = soon(house.read()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().starts_with("no coordinator can be reached"), "{}", status.message());
}

#[tokio::test]
async fn a_changed_topology_is_taken_over() {
    let house = House::new().await;
    house.read().await.unwrap();
    house.coordinator.tell(Message::Topology(Topology::default())).await;
    until("the virtual storage is gone", async || {
        let answer = house.read().await;
        answer.is_err_and(|status| status.message() == "storage name not found")
    })
    .await;
}
