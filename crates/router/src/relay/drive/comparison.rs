//! Nodes whose votes do not tell what they have: it is found out before anybody is told that a write is done.
//!
//! A node that changes its references without voting on them has asked nobody, and that others voted like it says nothing of
//! what it did. Nodes of different versions vote on different things of a repository that they make, so that different votes
//! say nothing either. Those that came to a good end are asked what they hold, under the ticket. What as many of them as the
//! quorum asks for hold, the primary among them, is recorded as theirs; all others are behind. Otherwise the write is in
//! doubt: the coordinator settles it, and the client hears that it did not succeed.

use std::sync::Arc;

use futures::{FutureExt as _, future::join_all};
use tabularium_proto::{
    coordinator::Route,
    gitaly::{CalculateChecksumRequest, Repository, repository_service_client::RepositoryServiceClient},
};
use tokio::time::timeout;

use super::Drive;
use crate::{limits::COMPARISON_PATIENCE, nodes::Node, votes::transaction::VoterId, writes::Settlement};

impl Drive<'_> {
    /// Asks these what they hold; the first one is the primary.
    pub(super) fn start_comparing(&mut self, voters: &[VoterId]) {
        let Some(held) = &self.held else { return };
        let route = Arc::clone(held.write.route());
        let nodes: Vec<_> = voters.iter().map(|voter| Arc::clone(&self.nodes[*voter])).collect();
        let method = self.story.call.path();
        if self.transaction.is_unasked() {
            let storages = self.names(voters);
            tracing::warn!(
                method,
                ?storages,
                correlation_id = self.story.call.correlation.to_str().ok(),
                "nodes may have changed references without voting on them; are their hooks installed?"
            );
            self.story.shared.metrics.unasked_writes.inc();
        } else {
            tracing::info!(method, "nodes voted differently on a new repository; what they hold is compared");
        }
        let compare = async move {
            let checksums = join_all(nodes.iter().map(|node| checksum(node, &route))).await;
            let primary = checksums.first().and_then(Option::as_deref);
            let alike = nodes.iter().zip(&checksums);
            let alike = alike.filter(|(_, checksum)| checksum.is_some() && checksum.as_deref() == primary);
            alike.map(|(node, _)| node.storage.to_string()).collect()
        };
        self.comparing = Some(compare.boxed());
    }

    /// These hold what the primary holds.
    pub(super) fn on_compared(&mut self, storages: Vec<String>) {
        self.comparing = None;
        let enough = self.transaction.is_quorum(storages.len());
        let settlement =
            if enough { Settlement::Commit { storages, unvoted: false } } else { Settlement::InDoubt };
        self.settle(settlement, false);
    }
}

/// `None`: it cannot say.
async fn checksum(node: &Node, route: &Route) -> Option<String> {
    let repository = Repository {
        storage_name: node.storage.to_string(),
        relative_path: route.replica_path.clone(),
        ..Repository::default()
    };
    let request = CalculateChecksumRequest { repository: Some(repository) };
    let mut client = RepositoryServiceClient::new(node.channel());
    match timeout(COMPARISON_PATIENCE, client.calculate_checksum(request)).await {
        Ok(Ok(answer)) => Some(answer.into_inner().checksum),
        Ok(Err(status)) => {
            tracing::warn!(storage = %node.storage, error = status.message(), "a node does not say what it holds");
            None
        }
        Err(_) => None,
    }
}
