//! What is counted, under `tabularium_coordinator_`.

use std::{fmt::Write as _, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::db::outbox::DutyState;

/// Upper bounds of waits for routers, in seconds: from one round trip to beyond any lease.
const WAIT_BUCKETS: [f64; 9] = [0.0005, 0.001, 0.0025, 0.01, 0.05, 0.25, 1.0, 3.0, 10.0];

/// How an attempt to begin or end a write went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum WriteResult {
    Ok,
    /// The repository, its state or the caller is not such that this can be done.
    Refused,
    /// The database could not be reached, or failed.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum WriteStep {
    Begin,
    Commit,
    Abort,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WriteLabels {
    step: WriteStep,
    result: WriteResult,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VirtualStorageLabels {
    virtual_storage: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StorageLabels {
    virtual_storage: String,
    storage: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: StateLabel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct StateLabel(DutyState);

impl EncodeLabelValue for StateLabel {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), std::fmt::Error> {
        encoder.write_str(self.0.as_str())
    }
}

/// Handles to all metrics. Clones count into the same.
#[derive(Clone)]
pub(crate) struct Metrics {
    writes: Family<WriteLabels, Counter>,
    primary_moves: Counter,
    settled_writes: Counter,
    revocations: Counter,
    lease_waits: Counter,
    revocation_seconds: Histogram,
    published: Counter,
    repositories: Family<VirtualStorageLabels, Gauge>,
    replicas_behind: Family<StorageLabels, Gauge>,
    duties: Family<StateLabels, Gauge>,
    pub(crate) replicas_different: Counter,
    pub(crate) replicas_damaged: Counter,
    pub(crate) writes_open: Gauge,
    pub(crate) sessions: Gauge,
    pub(crate) bus_connected: Gauge,
}

impl Metrics {
    /// Registers everything.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("tabularium_coordinator");
        let metrics = Self {
            writes: Family::default(),
            primary_moves: Counter::default(),
            settled_writes: Counter::default(),
            revocations: Counter::default(),
            lease_waits: Counter::default(),
            revocation_seconds: Histogram::new(WAIT_BUCKETS),
            published: Counter::default(),
            repositories: Family::default(),
            replicas_behind: Family::default(),
            duties: Family::default(),
            replicas_different: Counter::default(),
            replicas_damaged: Counter::default(),
            writes_open: Gauge::default(),
            sessions: Gauge::default(),
            bus_connected: Gauge::default(),
        };
        registry.register("writes", "Writes begun, committed and aborted, by result", metrics.writes.clone());
        registry.register(
            "primary_moves",
            "Primaries moved to another replica",
            metrics.primary_moves.clone(),
        );
        registry.register(
            "settled_writes",
            "Writes in doubt that were settled",
            metrics.settled_writes.clone(),
        );
        registry.register("revocations", "Routes taken back from routers", metrics.revocations.clone());
        registry.register("lease_waits", "Leases of silent peers waited out", metrics.lease_waits.clone());
        let waits = metrics.revocation_seconds.clone();
        registry.register("revocation_seconds", "Time until no router could use a route", waits);
        registry.register("duties_published", "Duties told to the message bus", metrics.published.clone());
        registry.register("repositories", "Repositories", metrics.repositories.clone());
        registry.register("replicas_behind", "Replicas that lack a write", metrics.replicas_behind.clone());
        registry.register("duties", "Duties that are not done, by state", metrics.duties.clone());
        registry.register(
            "replicas_different",
            "Replicas found to differ from the others though they were recorded as equal",
            metrics.replicas_different.clone(),
        );
        registry.register(
            "replicas_damaged",
            "Replicas taken out of reads because git found their objects damaged",
            metrics.replicas_damaged.clone(),
        );
        registry.register("writes_open", "Intents that stand", metrics.writes_open.clone());
        registry.register("sessions", "Routers with a session here", metrics.sessions.clone());
        registry.register(
            "bus_connected",
            "1 while the message bus is connected",
            metrics.bus_connected.clone(),
        );
        metrics
    }

    pub(crate) fn write(&self, step: WriteStep, result: WriteResult) {
        self.writes.get_or_create(&WriteLabels { step, result }).inc();
    }

    pub(crate) fn primary_moved(&self) {
        self.primary_moves.inc();
    }

    pub(crate) fn write_settled(&self) {
        self.settled_writes.inc();
    }

    pub(crate) fn revoked(&self, routes: usize, waited: Duration) {
        self.revocations.inc_by(routes as u64);
        self.revocation_seconds.observe(waited.as_secs_f64());
    }

    pub(crate) fn lease_waited(&self) {
        self.lease_waits.inc();
    }

    pub(crate) fn duties_published(&self, count: usize) {
        self.published.inc_by(count as u64);
    }

    pub(crate) fn repositories(&self, virtual_storage: &str, count: i64) {
        let labels = VirtualStorageLabels { virtual_storage: virtual_storage.to_owned() };
        self.repositories.get_or_create(&labels).set(count);
    }

    pub(crate) fn replicas_behind(&self, virtual_storage: &str, storage: &str, count: i64) {
        let labels =
            StorageLabels { virtual_storage: virtual_storage.to_owned(), storage: storage.to_owned() };
        self.replicas_behind.get_or_create(&labels).set(count);
    }

    pub(crate) fn duties(&self, state: DutyState, count: i64) {
        self.duties.get_or_create(&StateLabels { state: StateLabel(state) }).set(count);
    }
}
