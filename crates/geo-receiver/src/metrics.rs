//! What the receiver counts.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Outcome {
    /// On the bus.
    Accepted,
    /// On the bus already.
    Duplicate,
    /// Not about the contents of a repository.
    Ignored,
    /// No token, or one that nobody has.
    Unauthorized,
    /// Not JSON, too large, too slow, or no event.
    Malformed,
    /// Names a repository that cannot be.
    BadPath,
    /// Too many requests at once.
    Overloaded,
    /// The bus did not take it.
    BusLost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfOutcome {
    outcome: Outcome,
}

/// The figures of one process.
#[derive(Clone)]
pub(crate) struct Metrics {
    events: Family<OfOutcome, Counter>,
    in_flight: Gauge,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self { events: Family::default(), in_flight: Gauge::default() };
        let registry = registry.sub_registry_with_prefix("tabularium_geo_receiver");
        registry.register("events", "Events received, by what became of them", metrics.events.clone());
        registry.register("in_flight", "Requests being handled", metrics.in_flight.clone());
        metrics
    }

    pub(crate) fn count(&self, outcome: Outcome) {
        self.events.get_or_create(&OfOutcome { outcome }).inc();
    }

    /// A request begins; it ends when the answer is dropped.
    pub(crate) fn begin(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }
}

/// Counts one request as being handled.
pub(crate) struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}
