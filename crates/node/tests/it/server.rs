//! What the node says of itself, and to whom.

use std::fs;

use tabularium_proto::gitaly::{
    DiskStatisticsRequest, ReadinessCheckRequest, RepositoryExistsRequest, ServerInfoRequest,
    ServerSignatureRequest, WalkReposRequest, WriteBackupIdRequest,
    backup_service_client::BackupServiceClient, internal_gitaly_client::InternalGitalyClient,
    readiness_check_response, repository_service_client::RepositoryServiceClient,
    server_service_client::ServerServiceClient,
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::harness::TestNode;

#[tokio::test]
async fn the_node_describes_itself() {
    let node = TestNode::start().await;
    let mut client = ServerServiceClient::new(node.channel());
    let info = client.server_info(ServerInfoRequest {}).await.unwrap().into_inner();
    assert!(info.git_version.starts_with("2."), "{}", info.git_version);
    let storage = &info.storage_statuses[0];
    assert!(storage.readable && storage.writeable && storage.storage_name == "default");
    assert_eq!(storage.replication_factor, 1);
    let metadata = fs::read_to_string(node.path(".gitaly-metadata")).unwrap();
    assert_eq!(metadata, format!(r#"{{"gitaly_filesystem_id":"{}"}}"#, storage.filesystem_id));

    let disks = client.disk_statistics(DiskStatisticsRequest {}).await.unwrap().into_inner().storage_statuses;
    assert!(disks[0].available > 0 && disks[0].used > 0);
    let ready = client.readiness_check(ReadinessCheckRequest::default()).await.unwrap().into_inner();
    assert!(matches!(ready.result, Some(readiness_check_response::Result::OkResponse(_))));
    let signature = client.server_signature(ServerSignatureRequest {}).await.unwrap().into_inner();
    assert!(signature.public_key.is_empty());
    HealthClient::new(node.channel()).check(HealthCheckRequest::default()).await.unwrap();
}

#[tokio::test]
async fn repositories_are_found_where_they_are() {
    let node = TestNode::start().await;
    for path in ["@cluster/repositories/6b/86/1", "z.git", "a/b.git"] {
        node.create(path).await;
    }
    fs::create_dir_all(node.path("+gitaly/tmp/x/repository/objects")).unwrap();
    fs::create_dir_all(node.path("empty/dir")).unwrap();
    let mut client = InternalGitalyClient::new(node.channel());
    let request = WalkReposRequest { storage_name: "default".into() };
    let mut stream = client.walk_repos(request).await.unwrap().into_inner();
    let mut found = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        assert!(message.modification_time.is_some());
        found.push(message.relative_path);
    }
    assert_eq!(found, ["@cluster/repositories/6b/86/1", "a/b.git", "z.git"]);
    let unknown = client.walk_repos(WalkReposRequest { storage_name: "x".into() }).await.unwrap_err();
    assert_eq!(
        (unknown.code(), unknown.message()),
        (Code::InvalidArgument, "looking up storage: storage name not found")
    );
}

#[tokio::test]
async fn callers_without_the_token_are_refused_everywhere() {
    let node = TestNode::start().await;
    let channel = tabularium_common::grpc::channel(&node.address);
    let health = HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.unwrap_err();
    assert_eq!((health.code(), health.message()), (Code::Unauthenticated, "authentication required"));
    let request = RepositoryExistsRequest { repository: Some(node.named("a.git")) };
    let exists = RepositoryServiceClient::new(channel).repository_exists(request).await.unwrap_err();
    assert_eq!(exists.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn what_is_not_written_says_so() {
    let node = TestNode::start().await;
    let mut client = BackupServiceClient::new(node.channel());
    let status = client.write_backup_id(WriteBackupIdRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}
