//! `gitaly.ServerService`: what this node is and how its disks are doing (wire reference, section b.9).

use std::sync::Arc;

use tabularium_common::VERSION;
use tabularium_proto::gitaly::{
    DiskStatisticsRequest, DiskStatisticsResponse, ReadinessCheckRequest, ReadinessCheckResponse,
    ServerInfoRequest, ServerInfoResponse, ServerSignatureRequest, ServerSignatureResponse,
    disk_statistics_response, readiness_check_response, server_info_response,
    server_service_server::ServerService,
};
use tonic::{Request, Response, Status};

use crate::{node::Node, storage::Storage, storage_health::Report};

/// Answers from the last look at each disk: one that hangs holds up nobody.
pub(crate) struct ServerInfoServer(Arc<Node>);

impl ServerInfoServer {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }

    fn reports(&self) -> impl Iterator<Item = (&Storage, Report)> {
        let reported = |storage: &Storage| self.0.storage_health.report(&storage.name);
        self.0.storages.iter().filter_map(move |storage| Some((storage, reported(storage)?)))
    }
}

fn bytes(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
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
            storage_statuses: self
                .reports()
                .map(|(storage, report)| server_info_response::StorageStatus {
                    storage_name: storage.name.clone(),
                    readable: report.readable,
                    writeable: report.writeable && report.problem.is_none(),
                    fs_type: report.fs_type,
                    filesystem_id: storage.filesystem_id.clone(),
                    replication_factor: 1,
                })
                .collect(),
        }))
    }

    async fn disk_statistics(
        &self,
        _: Request<DiskStatisticsRequest>,
    ) -> Result<Response<DiskStatisticsResponse>, Status> {
        let storage_statuses = self
            .reports()
            .map(|(storage, report)| disk_statistics_response::StorageStatus {
                storage_name: storage.name.clone(),
                available: bytes(report.available),
                used: bytes(report.used),
            })
            .collect();
        Ok(Response::new(DiskStatisticsResponse { storage_statuses }))
    }

    async fn readiness_check(
        &self,
        _: Request<ReadinessCheckRequest>,
    ) -> Result<Response<ReadinessCheckResponse>, Status> {
        let failed_checks: Vec<_> = self
            .reports()
            .filter_map(|(storage, report)| {
                Some(readiness_check_response::failure::Response {
                    name: format!("storage {}", storage.name),
                    error_message: report.problem?.to_string(),
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
        let public_key = match &self.0.signing {
            Some(signing) => signing.public_key().map_err(|error| Status::internal(error.to_string()))?,
            None => Vec::new(),
        };
        Ok(Response::new(ServerSignatureResponse { public_key }))
    }
}
