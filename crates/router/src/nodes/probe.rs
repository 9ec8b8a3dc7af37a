//! Asks every node for its health, once a second, so that a node that is down is avoided before a client finds out, and
//! one that is back is used again.

use std::sync::Arc;

use futures::future::join_all;
use tabularium_common::auth::SendToken;
use tokio::time::{MissedTickBehavior, timeout};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{Node, Nodes};
use crate::limits::{PROBE_INTERVAL, PROBE_TIMEOUT};

impl Nodes {
    /// Probes for as long as the router runs.
    pub(crate) async fn probe(self: Arc<Self>, token: SendToken) {
        let mut ticks = tokio::time::interval(PROBE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let directory = self.directory();
            let nodes = directory.iter().flat_map(|(_, storages)| storages);
            join_all(nodes.map(|node| probe(node, &token))).await;
        }
    }
}

async fn probe(node: &Node, token: &SendToken) {
    let mut client = HealthClient::with_interceptor(node.channel(), token.clone());
    let check = client.check(HealthCheckRequest { service: String::new() });
    match timeout(PROBE_TIMEOUT, check).await {
        Err(_) => node.believe_slow(),
        Ok(Err(status)) => node.believe(false, status.message()),
        Ok(Ok(answer)) => {
            let serving = answer.into_inner().status() == ServingStatus::Serving;
            node.believe(serving, "the node says that it is not serving");
        }
    }
}
