use tabularium_proto::gitaly::{
    DiskStatisticsRequest, GetRepositoryMetadataRequest, ReadinessCheckRequest, RemoveRepositoryRequest,
    RepositoryExistsRequest, RepositoryReplicasRequest, ServerInfoRequest, ServerSignatureRequest,
    SetReplicationFactorRequest,
    get_repository_metadata_request::{Path, Query},
    praefect_info_service_client::PraefectInfoServiceClient,
    readiness_check_response::Result as Readiness,
    repository_service_client::RepositoryServiceClient,
    server_service_client::ServerServiceClient,
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::house::{House, REPOSITORY, named, repository};

#[tokio::test]
async fn the_router_itself_is_healthy_and_describes_its_services() {
    let house = House::new().await;
    let mut health = HealthClient::new(house.channel.clone());
    let answer = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(answer.status, 1);
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
    let exists = |path: &str| RepositoryExistsRequest { repository: named("default", path) };
    assert!(client.repository_exists(exists(REPOSITORY)).await.unwrap().into_inner().exists);
    assert!(!client.repository_exists(exists("no.git")).await.unwrap().into_inner().exists);
    let nowhere = RepositoryExistsRequest { repository: named("nowhere", "a.git") };
    assert_eq!(
        client.repository_exists(nowhere).await.unwrap_err().message(),
        "virtual storage does not exist"
    );

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

#[tokio::test]
async fn replicas_and_metadata_are_shown() {
    let house = House::with("", |coordinator| {
        coordinator.change(REPOSITORY, |route| route.replicas[1].generation = -1);
    })
    .await;
    let mut client = PraefectInfoServiceClient::new(house.channel.clone());
    let request = RepositoryReplicasRequest { repository: repository() };
    let answer = client.repository_replicas(request).await.unwrap().into_inner();
    let primary = answer.primary.unwrap();
    assert_eq!((primary.repository, &primary.checksum[..]), (named("node-1", REPOSITORY), "abc"));
    assert_eq!(answer.replicas.len(), 1);
    assert_eq!(answer.replicas[0].repository, named("node-3", REPOSITORY));

    let path = Path { virtual_storage: "default".into(), relative_path: REPOSITORY.into() };
    let request = GetRepositoryMetadataRequest { query: Some(Query::Path(path)) };
    let answer = client.get_repository_metadata(request).await.unwrap().into_inner();
    assert_eq!((answer.repository_id, answer.generation), (1, 5));
    assert_eq!(answer.replica_path, "@cluster/repositories/aa/bb/1");
    assert_eq!(answer.replicas[1].generation, -1);
    assert!(answer.replicas[0].valid_primary && !answer.replicas[1].valid_primary);

    let by_id = GetRepositoryMetadataRequest { query: Some(Query::RepositoryId(1)) };
    assert_eq!(client.get_repository_metadata(by_id).await.unwrap_err().code(), Code::Unimplemented);
    let status = client.set_replication_factor(SetReplicationFactorRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}
