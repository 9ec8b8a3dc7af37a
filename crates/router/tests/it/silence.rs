//! Coordinators that are there and say nothing.

use std::time::{Duration, Instant};

use tabularium_common::grpc::NOT_BEGUN;
use tabularium_proto::gitaly::{WriteRefRequest, repository_service_client::RepositoryServiceClient};
use tonic::{Code, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    coordinator::Coordinator,
    house::{House, REPOSITORY, repository, until},
};

async fn write(house: &House) -> Result<(), Status> {
    let request =
        WriteRefRequest { repository: repository(), r#ref: b"HEAD".to_vec(), ..WriteRefRequest::default() };
    RepositoryServiceClient::new(house.channel.clone()).write_ref(request).await.map(|_| ())
}

async fn is_serving(house: &House) -> bool {
    let answer = HealthClient::new(house.channel.clone()).check(HealthCheckRequest::default()).await;
    answer.unwrap().get_ref().status() == ServingStatus::Serving
}

#[tokio::test]
async fn a_silent_coordinator_costs_a_moment() {
    let house = House::new().await;
    house.leased().await;
    let storages = house.coordinator.state().storages.clone();
    let second = Coordinator::start(house.directory.path(), "coordinator-2", &storages, &house.tasks).await;
    second.add(REPOSITORY);
    write(&house).await.unwrap();
    house.coordinator.fall_silent();
    let begun = Instant::now();
    write(&house).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    {
        let state = second.state();
        let [begin] = &state.begins[..] else { panic!("{:?}", state.begins) };
        assert!(!begin.given_up_write_ids.is_empty(), "what the first may have begun is given up");
        assert!(!begin.given_up_write_ids.contains(&begin.write_id));
    }
    until("a session with the other", async || !second.state().sessions.is_empty()).await;
    let begun = Instant::now();
    write(&house).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(400), "it is known by now: {:?}", begun.elapsed());
}

#[tokio::test]
async fn a_router_without_a_coordinator_says_so_soon_and_others_can_be_asked() {
    let house = House::new().await;
    house.leased().await;
    assert!(is_serving(&house).await);
    house.coordinator.fall_silent();
    let begun = Instant::now();
    let status = write(&house).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.metadata().contains_key(NOT_BEGUN), "{status:?}");
    until("it says that it does not serve", async || !is_serving(&house).await).await;
    let begun = Instant::now();
    write(&house).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}
