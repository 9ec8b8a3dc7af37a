//! What the gateway counts.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// Labels of a finished request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    /// `git-upload-pack`, `git-receive-pack`, `api` or `none`.
    pub(crate) service: &'static str,
    /// HTTP status, or 499 when the client left before there was one.
    pub(crate) status: u32,
}

/// Labels of a duration.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ServiceLabels {
    /// As in [`RequestLabels`].
    pub(crate) service: &'static str,
}

/// All counters.
pub(crate) struct Metrics {
    pub(crate) requests: Family<RequestLabels, Counter>,
    pub(crate) broken: Family<ServiceLabels, Counter>,
    pub(crate) seconds: Family<ServiceLabels, Histogram>,
    pub(crate) running: Gauge,
    pub(crate) connections: Gauge,
    pub(crate) received_bytes: Counter,
    pub(crate) sent_bytes: Counter,
    pub(crate) failovers: Counter,
}

impl Metrics {
    /// Registers them under `tabularium_gateway_`.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            broken: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 4.0, 10))),
            running: Gauge::default(),
            connections: Gauge::default(),
            received_bytes: Counter::default(),
            sent_bytes: Counter::default(),
            failovers: Counter::default(),
        };
        let registry = registry.sub_registry_with_prefix("tabularium_gateway");
        registry.register("requests", "Requests that ended", metrics.requests.clone());
        registry.register("broken", "Answers broken off after their first byte", metrics.broken.clone());
        registry.register("request_seconds", "From headers to the last byte", metrics.seconds.clone());
        registry.register("requests_running", "Requests being served", metrics.running.clone());
        registry.register("connections", "Open client connections", metrics.connections.clone());
        registry.register("received_bytes", "Bytes of request bodies", metrics.received_bytes.clone());
        registry.register("sent_bytes", "Bytes of answers", metrics.sent_bytes.clone());
        registry.register("failovers", "Upstreams passed over", metrics.failovers.clone());
        metrics
    }
}
