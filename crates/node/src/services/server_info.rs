//! `gitaly.ServerService`: what this node is and how its disks are doing (wire reference, section b.9).

use std::{fs, io, path::Path, sync::Arc};

use rustix::fs::{statfs, statvfs};
use tabularium_common::VERSION;
use tabularium_proto::gitaly::{
    DiskStatisticsRequest, DiskStatisticsResponse, ReadinessCheckRequest, ReadinessCheckResponse,
    ServerInfoRequest, ServerInfoResponse, ServerSignatureRequest, ServerSignatureResponse,
    disk_statistics_response, readiness_check_response, server_info_response,
    server_service_server::ServerService,
};
use tonic::{Request, Response, Status};

use crate::{
    node::Node,
    storage::{OWN_DIRECTORY, Storage},
};

pub(crate) struct ServerInfoServer(Arc<Node>);

impl ServerInfoServer {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }

    async fn each<T: Send + 'static>(
        &self,
        look: impl Fn(&Storage) -> T + Send + 'static,
    ) -> Result<Vec<T>, Status> {
        let storages: Vec<Storage> = self.0.storages.iter().cloned().collect();
        tokio::task::spawn_blocking(move || storages.iter().map(look).collect())
            .await
            .map_err(|error| Status::internal(error.to_string()))
    }
}

/// Names of common file systems, as Gitaly reports them.
fn file_system_type(root: &Path) -> String {
    let Ok(found) = statfs(root) else { return "unknown".to_owned() };
    match found.f_type {
        0xef53 => "ext2/ext3".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683e => "btrfs".to_owned(),
        0x0102_1994 => "tmpfs".to_owned(),
        0x794c_7630 => "overlayfs".to_owned(),
        0x2fc1_2fc1 => "zfs".to_owned(),
        0x6969 => "nfs".to_owned(),
        other => format!("unknown ({other:#x})"),
    }
}

/// Whether a file can be created and removed, which a file system that went read-only refuses.
fn write_test(storage: &Storage) -> io::Result<()> {
    let directory = storage.root.join(OWN_DIRECTORY);
    tempfile::Builder::new().prefix("+testWrite").tempfile_in(directory)?.close()
}

fn status(storage: &Storage) -> server_info_response::StorageStatus {
    server_info_response::StorageStatus {
        storage_name: storage.name.clone(),
        readable: fs::read_dir(&storage.root).is_ok(),
        writeable: write_test(storage).is_ok(),
        fs_type: file_system_type(&storage.root),
        filesystem_id: storage.filesystem_id.clone(),
        replication_factor: 1,
    }
}

fn disk(storage: &Storage) -> io::Result<disk_statistics_response::StorageStatus> {
    let found = statvfs(&storage.root)?;
    let bytes = |blocks: u64| i64::try_from(blocks.saturating_mul(found.f_frsize)).unwrap_or(i64::MAX);
    Ok(disk_statistics_response::StorageStatus {
        storage_name: storage.name.clone(),
        available: bytes(found.f_bavail),
        used: bytes(found.f_blocks.saturating_sub(found.f_bfree)),
    })
}

#[tonic::async_trait]
impl ServerService for ServerInfoServer {
    async fn server_info(
        &self,
        _: Request<ServerInfoRequest>,
    ) -> Result<Response<ServerInfoResponse>, Status> {
        Ok(Response::new(ServerInfoResponse {
            server_version: VERSION.to_owned(),
            git_version: self.0.git_version.clone(),
            storage_statuses: self.each(status).await?,
        }))
    }

    async fn disk_statistics(
        &self,
        _: Request<DiskStatisticsRequest>,
    ) -> Result<Response<DiskStatisticsResponse>, Status> {
        let disks: io::Result<Vec<_>> = self.each(disk).await?.into_iter().collect();
        let storage_statuses =
            disks.map_err(|error| Status::internal(format!("disk statistics: {error}")))?;
        Ok(Response::new(DiskStatisticsResponse { storage_statuses }))
    }

    async fn readiness_check(
        &self,
        _: Request<ReadinessCheckRequest>,
    ) -> Result<Response<ReadinessCheckResponse>, Status> {
        let failed_checks: Vec<_> = self
            .each(|storage| (storage.name.clone(), write_test(storage)))
            .await?
            .into_iter()
            .filter_map(|(name, tested)| {
                let error_message = tested.err()?.to_string();
                Some(readiness_check_response::failure::Response {
                    name: format!("storage {name}"),
                    error_message,
                })
            })
            .collect();
        let result = if failed_checks.is_empty() {
            readiness_check_response::Result::OkResponse(readiness_check_response::Ok {})
        } else {
            readiness_check_response::Result::FailureResponse(readiness_check_response::Failure {
                failed_checks,
            })
        };
        Ok(Response::new(ReadinessCheckResponse { result: Some(result) }))
    }

    async fn server_signature(
        &self,
        _: Request<ServerSignatureRequest>,
    ) -> Result<Response<ServerSignatureResponse>, Status> {
        // Commits are not signed, and a node without a signing key has an empty public part.
        Ok(Response::new(ServerSignatureResponse { public_key: Vec::new() }))
    }
}
