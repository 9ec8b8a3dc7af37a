//! Asks every node for its health, twice a second, so that a node that is down is avoided before a client finds out, and
//! one that is back is used again. What is asked for is the health of the very file system that the coordinator knows: a
//! node that came back with another disk is not used.

use std::sync::Arc;

use futures::future::join_all;
use tabularium_common::grpc::storage_health_service;
use tabularium_proto::gitaly::{ServerInfoRequest, server_service_client::ServerServiceClient};
use tokio::time::{MissedTickBehavior, timeout};
use tonic::{Code, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{Node, Nodes};
use crate::limits::{PROBE_INTERVAL, PROBE_TIMEOUT};

impl Nodes {
    /// Probes for as long as the router runs.
    pub(crate) async fn probe(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(PROBE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let directory = self.directory();
            let nodes = directory.iter().flat_map(|(_, storages)| storages);
            join_all(nodes.map(|node| probe(node))).await;
        }
    }
}

async fn probe(node: &Node) {
    match timeout(PROBE_TIMEOUT, check(node)).await {
        Err(_) => node.believe_slow(),
        Ok(Err(status)) => node.believe(false, status.message()),
        Ok(Ok(None)) => node.believe(true, ""),
        Ok(Ok(Some(problem))) => node.believe(false, problem),
    }
}

/// What is wrong, if something is.
async fn check(node: &Node) -> Result<Option<&'static str>, Status> {
    let expected = node.filesystem_id();
    if !expected.is_empty() {
        let service = storage_health_service(&node.storage, &expected);
        match serving(node, service).await {
            // Gitaly knows no such services; neither does a node of ours with another disk.
            Err(status) if status.code() == Code::NotFound => {
                if !has_filesystem(node, &expected).await? {
                    return Ok(Some("another file system is in its storage"));
                }
            }
            checked => return checked.map(told),
        }
    }
    serving(node, String::new()).await.map(told)
}

fn told(serving: bool) -> Option<&'static str> {
    (!serving).then_some("the node says that it is not serving")
}

async fn serving(node: &Node, service: String) -> Result<bool, Status> {
    let mut client = HealthClient::new(node.channel());
    let answer = client.check(HealthCheckRequest { service }).await?;
    Ok(answer.get_ref().status() == ServingStatus::Serving)
}

async fn has_filesystem(node: &Node, expected: &str) -> Result<bool, Status> {
    let mut client = ServerServiceClient::new(node.channel());
    let info = client.server_info(ServerInfoRequest {}).await?.into_inner();
    let mut statuses = info.storage_statuses.iter();
    Ok(statuses.any(|status| *status.storage_name == *node.storage && status.filesystem_id == expected))
}
