//! `gitaly.ServerService`: what the nodes say of themselves, put together as one server's answer.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use tabularium_common::VERSION;
use tabularium_proto::gitaly::{
    ClockSyncedRequest, ClockSyncedResponse, DiskStatisticsRequest, DiskStatisticsResponse,
    ReadinessCheckRequest, ReadinessCheckResponse, ServerInfoRequest, ServerInfoResponse,
    ServerSignatureRequest, ServerSignatureResponse,
    readiness_check_response::{Failure, Ok as Ready, Result as Readiness, failure},
    server_info_response::StorageStatus,
    server_service_client::ServerServiceClient,
    server_service_server::ServerService,
};
use tokio::time::timeout;
use tonic::{Request, Response, Status};
use uuid::{Uuid, uuid};

use super::{asked, clock};
use crate::{
    nodes::{Node, Nodes, Storages},
    refusal::Refusal,
    relay::QUESTION,
    routes::Routes,
};

/// Namespace of the file system ids of virtual storages (wire reference, section b.9).
const FILESYSTEM_NAMESPACE: Uuid = uuid!("1ef1a8c6-cf52-4d0a-92a6-ca643e8bc7c5");

/// The service.
pub(crate) struct Server {
    /// Who is asked.
    pub(crate) nodes: Arc<Nodes>,
    /// Says whether a coordinator can be reached.
    pub(crate) routes: Arc<Routes>,
}

async fn node_info(node: &Node) -> Option<(ServerInfoResponse, StorageStatus)> {
    let mut client = ServerServiceClient::new(node.channel());
    let mut info = match asked(client.server_info(ServerInfoRequest {})).await {
        Ok(info) => info,
        Err(status) => {
            tracing::warn!(storage = %node.storage, error = status.message(), "ServerInfo");
            return None;
        }
    };
    let place = info.storage_statuses.iter().position(|status| *status.storage_name == *node.storage)?;
    let status = info.storage_statuses.swap_remove(place);
    Some((info, status))
}

/// The first of a virtual storage's nodes, in their order, that answers.
async fn virtual_storage_info(
    name: &str,
    storages: &Storages,
) -> Option<(ServerInfoResponse, StorageStatus)> {
    let healthy = storages.iter().filter(|node| node.healthy());
    let answers = join_all(healthy.map(|node| node_info(node))).await;
    let (info, mut status) = answers.into_iter().flatten().next()?;
    name.clone_into(&mut status.storage_name);
    status.replication_factor = u32::try_from(storages.len()).unwrap_or(u32::MAX);
    if storages.len() > 1 {
        status.filesystem_id = Uuid::new_v5(&FILESYSTEM_NAMESPACE, name.as_bytes()).to_string();
    }
    Some((info, status))
}

#[tonic::async_trait]
impl ServerService for Server {
    async fn server_info(
        &self,
        _: Request<ServerInfoRequest>,
    ) -> Result<Response<ServerInfoResponse>, Status> {
        let directory = self.nodes.directory();
        if !directory.known() {
            return Err(Refusal::NoTopology.status());
        }
        let mut virtual_storages: Vec<_> = directory.iter().collect();
        virtual_storages.sort_by_key(|(name, _)| *name);
        let asked = virtual_storages.iter().map(|(name, storages)| virtual_storage_info(name, storages));
        let mut answer = ServerInfoResponse { server_version: VERSION.to_owned(), ..Default::default() };
        for (info, status) in join_all(asked).await.into_iter().flatten() {
            if answer.storage_statuses.is_empty() {
                answer.server_version = info.server_version;
                answer.git_version = info.git_version;
            }
            answer.storage_statuses.push(status);
        }
        if answer.storage_statuses.is_empty() && !virtual_storages.is_empty() {
            return Err(Status::unavailable("no storage node answers"));
        }
        Ok(Response::new(answer))
    }

    async fn disk_statistics(
        &self,
        _: Request<DiskStatisticsRequest>,
    ) -> Result<Response<DiskStatisticsResponse>, Status> {
        let directory = self.nodes.directory();
        if !directory.known() {
            return Err(Refusal::NoTopology.status());
        }
        let mut nodes: Vec<&Arc<Node>> = directory.iter().flat_map(|(_, storages)| storages).collect();
        nodes.sort_by(|one, other| one.storage.cmp(&other.storage));
        let questions = nodes.iter().map(|node| async move {
            let mut client = ServerServiceClient::new(node.channel());
            (node, asked(client.disk_statistics(DiskStatisticsRequest {})).await)
        });
        let mut answer = DiskStatisticsResponse::default();
        let mut failure = None;
        for (node, statistics) in join_all(questions).await {
            match statistics {
                Ok(statistics) => answer.storage_statuses.extend(
                    statistics
                        .storage_statuses
                        .into_iter()
                        .filter(|status| *status.storage_name == *node.storage),
                ),
                Err(status) => {
                    tracing::warn!(storage = %node.storage, error = status.message(), "DiskStatistics");
                    failure = Some(status);
                }
            }
        }
        match failure {
            Some(status) if answer.storage_statuses.is_empty() => {
                Err(Status::unavailable(format!("no storage node answers: {}", status.message())))
            }
            _ => Ok(Response::new(answer)),
        }
    }

    async fn readiness_check(
        &self,
        _: Request<ReadinessCheckRequest>,
    ) -> Result<Response<ReadinessCheckResponse>, Status> {
        let mut failed_checks = Vec::new();
        let mut fail = |name: &str, error_message: String| {
            failed_checks.push(failure::Response { name: name.to_owned(), error_message });
        };
        if !self.routes.leased() {
            fail("coordinator", "no coordinator renews this router's lease".to_owned());
        }
        let directory = self.nodes.directory();
        for (name, storages) in directory.iter() {
            let dead: Vec<&str> =
                storages.iter().filter(|node| !node.healthy()).map(|node| &*node.storage).collect();
            if !dead.is_empty() {
                fail("gitaly node connectivity", format!("{name}: not healthy: {}", dead.join(", ")));
            }
        }
        failed_checks
            .sort_by(|one, other| (&one.name, &one.error_message).cmp(&(&other.name, &other.error_message)));
        let result = if failed_checks.is_empty() {
            Readiness::OkResponse(Ready {})
        } else {
            Readiness::FailureResponse(Failure { failed_checks })
        };
        Ok(Response::new(ReadinessCheckResponse { result: Some(result) }))
    }

    async fn clock_synced(
        &self,
        request: Request<ClockSyncedRequest>,
    ) -> Result<Response<ClockSyncedResponse>, Status> {
        let ClockSyncedRequest { ntp_host, drift_threshold } = request.into_inner();
        let threshold = drift_threshold.ok_or_else(|| Status::invalid_argument("invalid nil Duration"))?;
        let threshold = Duration::try_from(threshold)
            .map_err(|error| Status::invalid_argument(format!("invalid duration: {error}")))?;
        if ntp_host.is_empty() {
            return Err(Status::invalid_argument("no time server is named"));
        }
        let drift = match timeout(QUESTION, clock::drift(&ntp_host)).await {
            Ok(drift) => drift.map_err(|error| Status::internal(error.to_string()))?,
            Err(_) => return Err(Status::internal(format!("{ntp_host} did not answer in time"))),
        };
        Ok(Response::new(ClockSyncedResponse { synced: drift <= threshold }))
    }

    async fn server_signature(
        &self,
        _: Request<ServerSignatureRequest>,
    ) -> Result<Response<ServerSignatureResponse>, Status> {
        let directory = self.nodes.directory();
        let healthy = directory.iter().flat_map(|(_, storages)| storages).filter(|node| node.healthy());
        let answers = join_all(healthy.map(|node| async move {
            let mut client = ServerServiceClient::new(node.channel());
            (&*node.storage, asked(client.server_signature(ServerSignatureRequest {})).await)
        }));
        let mut first: Option<ServerSignatureResponse> = None;
        let mut failure = Refusal::NoHealthyNodes.status();
        for (storage, answer) in answers.await {
            match (answer, &first) {
                (Ok(answer), None) => first = Some(answer),
                // Whoever checks a signature must not depend on which node made it.
                (Ok(answer), Some(known)) if answer != *known => {
                    return Err(Status::internal(format!("signature mismatch with storage {storage:?}")));
                }
                (Ok(_), Some(_)) => {}
                (Err(status), _) => {
                    tracing::warn!(storage, error = status.message(), "ServerSignature");
                    failure = status;
                }
            }
        }
        first.map(Response::new).ok_or(failure)
    }
}
