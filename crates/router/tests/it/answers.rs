use tabularium_proto::gitaly::{
    ClockSyncedRequest, DeleteObjectPoolRequest, DiskStatisticsRequest, ObjectPool, ReadinessCheckRequest,
    RemoveRepositoryRequest, RepositoryExistsRequest, ServerInfoRequest, ServerSignatureRequest,
    object_pool_service_client::ObjectPoolServiceClient, readiness_check_response::Result as Readiness,
    repository_service_client::RepositoryServiceClient, server_service_client::ServerServiceClient,
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::house::{House, REPOSITORY, named};

#[tokio::test]
async fn the_router_itself_is_healthy_and_describes_its_services() {
    let house = House::new().await;
    let mut health = HealthClient::new(house.channel.clone());
    let answer = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(answer.status, 1);
    // Neither Gitaly nor Praefect says anything of a single service.
    let of_one = HealthCheckRequest { service: "gitaly.RefService".into() };
    assert_eq!(health.check(of_one).await.unwrap_err().code(), Code::NotFound);
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let mut reflection = ServerReflectionClient::new(house.channel.clone());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let stream = reflection.server_reflection_info(futures::stream::iter([request])).await.unwrap();
    let answer = stream.into_inner().message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(services) = answer else { panic!("{answer:?}") };
    assert!(services.service.iter().any(|service| service.name == "gitaly.RepositoryService"));
}

#[tokio::test]
async fn existence_and_removal_are_the_coordinators_word() {
    let house = House::new().await;
    let mut client = RepositoryServiceClient::new(house.channel.clone());
    let mut pools = ObjectPoolServiceClient::new(house.channel.clone());
    let exists = |path: &str| RepositoryExistsRequest { repository: named("default", path) };
    assert!(client.repository_exists(exists(REPOSITORY)).await.unwrap().into_inner().exists);
    assert!(!client.repository_exists(exists("no.git")).await.unwrap().into_inner().exists);
    // Names under which nothing can be are names under which nothing is, as for Praefect.
    for impossible in [("nowhere", REPOSITORY), ("default", "../a.git")] {
        let repository = || named(impossible.0, impossible.1);
        let asked = RepositoryExistsRequest { repository: repository() };
        assert!(!client.repository_exists(asked).await.unwrap().into_inner().exists, "{impossible:?}");
        let removed = RemoveRepositoryRequest { repository: repository() };
        let status = client.remove_repository(removed).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::NotFound, "repository does not exist"));
        let pool = DeleteObjectPoolRequest { object_pool: Some(ObjectPool { repository: repository() }) };
        pools.delete_object_pool(pool).await.unwrap();
    }
    let unnamed = RepositoryExistsRequest { repository: named("", "a.git") };
    assert_eq!(client.repository_exists(unnamed).await.unwrap_err().message(), "storage name not set");

    let remove = || RemoveRepositoryRequest { repository: named("default", REPOSITORY) };
    client.remove_repository(remove()).await.unwrap();
    let status = client.remove_repository(remove()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "repository does not exist"));
    assert!(house.nodes.iter().all(|node| node.seen("Repository").is_empty()), "no node was asked");
}

#[tokio::test]
async fn server_answers_are_put_together_from_the_nodes() {
    let house = House::new().await;
    let mut client = ServerServiceClient::new(house.channel.clone());
    let info = client.server_info(ServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((&info.server_version[..], &info.git_version[..]), ("16.7.0", "2.47.3"));
    let [status] = &info.storage_statuses[..] else { panic!("{info:?}") };
    assert_eq!((&status.storage_name[..], status.replication_factor), ("default", 3));
    let namespace = uuid::uuid!("1ef1a8c6-cf52-4d0a-92a6-ca643e8bc7c5");
    assert_eq!(status.filesystem_id, uuid::Uuid::new_v5(&namespace, b"default").to_string());
    assert!(status.readable && status.writeable);

    let disk = client.disk_statistics(DiskStatisticsRequest {}).await.unwrap().into_inner();
    let names: Vec<_> = disk.storage_statuses.iter().map(|status| &status.storage_name[..]).collect();
    assert_eq!(names, ["node-1", "node-2", "node-3"]);

    let signature = client.server_signature(ServerSignatureRequest {}).await.unwrap().into_inner();
    assert_eq!(signature.public_key, b"key");
    *house.nodes[1].0.signing_key.lock().unwrap() = b"other".to_vec();
    let status = client.server_signature(ServerSignatureRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().starts_with("signature mismatch with storage"), "{}", status.message());
}

#[tokio::test]
async fn the_clock_is_compared_with_a_server_that_is_named() {
    let house = House::new().await;
    let mut client = ServerServiceClient::new(house.channel.clone());
    let threshold = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    for (host, drift_threshold) in [("127.0.0.1", None), ("", threshold(1))] {
        let request = ClockSyncedRequest { ntp_host: host.into(), drift_threshold };
        assert_eq!(client.clock_synced(request).await.unwrap_err().code(), Code::InvalidArgument);
    }
    // A server whose clock stands still in 1900.
    let server = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let ntp_host = server.local_addr().unwrap().to_string();
    let request = ClockSyncedRequest { ntp_host, drift_threshold: threshold(1) };
    let serve = async {
        let mut packet = [0; 48];
        let (_, from) = server.recv_from(&mut packet).await.unwrap();
        let asked = packet[40..48].to_vec();
        packet = [0; 48];
        packet[0] = 0b0010_0100;
        packet[24..32].copy_from_slice(&asked);
        packet[47] = 1;
        server.send_to(&packet, from).await.unwrap();
    };
    let (answer, ()) = tokio::join!(client.clock_synced(request), serve);
    assert!(!answer.unwrap().into_inner().synced);
}

#[tokio::test]
async fn readiness_names_what_is_wrong() {
    let house = House::new().await;
    house.leased().await;
    let mut client = ServerServiceClient::new(house.channel.clone());
    let request = ReadinessCheckRequest::default;
    let answer = client.readiness_check(request()).await.unwrap().into_inner();
    assert!(matches!(answer.result, Some(Readiness::OkResponse(_))), "{answer:?}");
    house.coordinator.kill();
    crate::house::until("not ready", async || {
        let answer = client.clone().readiness_check(request()).await.unwrap().into_inner();
        matches!(answer.result, Some(Readiness::FailureResponse(failure)) if failure.failed_checks[0].name == "coordinator")
    })
    .await;
}
