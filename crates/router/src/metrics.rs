//! What the router counts. One struct, made from the registry that the composition root hands down.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tonic::Code;

/// How an RPC is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum OperationLabel {
    /// Relayed to one replica or storage.
    Accessor,
    /// Relayed to the primary.
    Mutator,
    /// Relayed to every replica.
    Maintenance,
    /// Answered here.
    Intercepted,
    /// Not known.
    Unknown,
}

const OPERATIONS: [OperationLabel; 5] = [
    OperationLabel::Accessor,
    OperationLabel::Mutator,
    OperationLabel::Maintenance,
    OperationLabel::Intercepted,
    OperationLabel::Unknown,
];
/// gRPC knows the codes 0 to 16.
const CODES: usize = 17;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RpcLabels {
    operation: OperationLabel,
    code: i32,
}

/// Labels of what is counted per storage.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct StorageLabels {
    /// Virtual storage.
    pub(crate) virtual_storage: String,
    /// Storage.
    pub(crate) storage: String,
}

/// The router's metrics.
pub(crate) struct Metrics {
    /// By operation and code, looked up once: no map on the way of an RPC.
    rpcs: Vec<Counter>,
    /// RPCs being served.
    pub(crate) open_streams: Gauge,
    /// Client connections.
    pub(crate) connections: Gauge,
    /// Attempts beyond the first, reads and writes.
    pub(crate) retries: Counter,
    /// Reads asked of a second node because the first was silent.
    pub(crate) hedges: Counter,
    /// Replicas that failed a read which another one answered.
    pub(crate) suspicions: Counter,
    /// Reads served from the route cache.
    pub(crate) cache_hits: Counter,
    /// Reads that asked a coordinator.
    pub(crate) cache_misses: Counter,
    /// Revocations received.
    pub(crate) revocations: Counter,
    /// End of the present lease, in seconds since the process started; 0: none.
    pub(crate) lease_until: Gauge<f64, AtomicU64>,
    /// 1 while the node is believed to be healthy.
    pub(crate) node_healthy: Family<StorageLabels, Gauge>,
    /// Writes between their beginning and their settlement.
    pub(crate) open_writes: Gauge,
    /// Settlements that no coordinator took in time.
    pub(crate) unsettled_writes: Counter,
    /// Writes on which the nodes did not vote though they were asked to.
    pub(crate) unvoted_writes: Counter,
    /// Writes in which a node went ahead without asking whether it may.
    pub(crate) unasked_writes: Counter,
    /// Nodes that were left behind in a write because they were late.
    pub(crate) late_votes: Family<StorageLabels, Counter>,
}

impl Metrics {
    /// Registers all of them.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("tabularium_router");
        let rpcs = Family::<RpcLabels, Counter>::default();
        registry.register("rpcs", "RPCs ended, by operation and gRPC code", rpcs.clone());
        let metrics = Self {
            rpcs: OPERATIONS
                .iter()
                .flat_map(|operation| (0..17).map(|code| RpcLabels { operation: *operation, code }))
                .map(|labels| rpcs.get_or_create(&labels).clone())
                .collect(),
            open_streams: Gauge::default(),
            connections: Gauge::default(),
            retries: Counter::default(),
            hedges: Counter::default(),
            suspicions: Counter::default(),
            cache_hits: Counter::default(),
            cache_misses: Counter::default(),
            revocations: Counter::default(),
            lease_until: Gauge::default(),
            node_healthy: Family::default(),
            open_writes: Gauge::default(),
            unsettled_writes: Counter::default(),
            unvoted_writes: Counter::default(),
            unasked_writes: Counter::default(),
            late_votes: Family::default(),
        };
        registry.register("open_streams", "RPCs being served", metrics.open_streams.clone());
        registry.register("connections", "Client connections", metrics.connections.clone());
        registry.register("relay_retries", "Attempts on another node", metrics.retries.clone());
        registry.register(
            "hedged_reads",
            "Reads asked of a second node because the first was silent",
            metrics.hedges.clone(),
        );
        registry.register(
            "suspected_replicas",
            "Reads that one replica failed and another answered",
            metrics.suspicions.clone(),
        );
        registry.register(
            "route_cache_hits",
            "Reads served from the route cache",
            metrics.cache_hits.clone(),
        );
        registry.register(
            "route_cache_misses",
            "Reads that asked a coordinator",
            metrics.cache_misses.clone(),
        );
        registry.register(
            "route_revocations",
            "Routes revoked by a coordinator",
            metrics.revocations.clone(),
        );
        registry.register(
            "lease_until_seconds",
            "End of the route lease, in seconds since the process started; 0 without one",
            metrics.lease_until.clone(),
        );
        registry.register("node_healthy", "1 while a node is healthy", metrics.node_healthy.clone());
        registry.register("open_writes", "Writes begun and not settled", metrics.open_writes.clone());
        registry.register(
            "unsettled_writes",
            "Settlements that no coordinator took in time",
            metrics.unsettled_writes.clone(),
        );
        registry.register(
            "unvoted_writes",
            "Writes that are known to be on the primary only, because no node voted on them",
            metrics.unvoted_writes.clone(),
        );
        registry.register(
            "unasked_writes",
            "Writes in which a node may have changed references without voting on it",
            metrics.unasked_writes.clone(),
        );
        registry.register(
            "late_votes",
            "Writes in which a node was left behind because it was late",
            metrics.late_votes.clone(),
        );
        metrics
    }

    /// The counter of an operation that ended with a code.
    pub(crate) fn rpc(&self, operation: OperationLabel, code: Code) -> &Counter {
        &self.rpcs[operation as usize * CODES + (code as usize).min(CODES - 1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_and_code_has_its_own_counter() {
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        metrics.rpc(OperationLabel::Mutator, Code::Unavailable).inc();
        metrics.rpc(OperationLabel::Unknown, Code::Unauthenticated).inc();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("tabularium_router_rpcs_total{operation=\"Mutator\",code=\"14\"} 1"), "{text}");
        assert!(text.contains("tabularium_router_rpcs_total{operation=\"Unknown\",code=\"16\"} 1"), "{text}");
    }
}
