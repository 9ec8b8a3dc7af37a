//! What the workers count.

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use tabularium_common::duties::Class;

use crate::settlement::Outcome;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
enum ClassLabel {
    Replication,
    Cleanup,
    GeoNotify,
    GeoSync,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfClass {
    class: ClassLabel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfOutcome {
    class: ClassLabel,
    outcome: Outcome,
}

fn of(class: Class) -> OfClass {
    let class = match class {
        Class::Replication => ClassLabel::Replication,
        Class::Cleanup => ClassLabel::Cleanup,
        Class::GeoNotify => ClassLabel::GeoNotify,
        Class::GeoSync => ClassLabel::GeoSync,
    };
    OfClass { class }
}

/// The figures of one process.
#[derive(Clone)]
pub(crate) struct Metrics {
    outcomes: Family<OfOutcome, Counter>,
    in_flight: Family<OfClass, Gauge>,
    duration: Family<OfClass, Histogram>,
    unsettled: Family<OfClass, Counter>,
    consumer_faults: Family<OfClass, Counter>,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            outcomes: Family::default(),
            in_flight: Family::default(),
            // 10 ms to 3 hours.
            duration: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.01, 4.0, 11))),
            unsettled: Family::default(),
            consumer_faults: Family::default(),
        };
        let registry = registry.sub_registry_with_prefix("tabularium_replicator");
        registry.register(
            "messages",
            "Messages handled, by class and how the work ended",
            metrics.outcomes.clone(),
        );
        registry.register("in_flight", "Messages being worked on", metrics.in_flight.clone());
        registry.register(
            "duration_seconds",
            "How long the work on a message took",
            metrics.duration.clone(),
        );
        registry.register(
            "settlements_failed",
            "Messages whose settlement the bus did not confirm; they come again",
            metrics.unsettled.clone(),
        );
        registry.register(
            "consumer_faults",
            "Times a consumer could not be pulled from or made",
            metrics.consumer_faults.clone(),
        );
        metrics
    }

    /// Work on a message begins; it ends when the answer is dropped.
    pub(crate) fn begin(&self, class: Class) -> InFlight {
        let gauge = self.in_flight.get_or_create(&of(class)).clone();
        gauge.inc();
        InFlight(gauge)
    }

    pub(crate) fn ended(&self, class: Class, outcome: Outcome, took: Duration) {
        self.outcomes.get_or_create(&OfOutcome { class: of(class).class, outcome }).inc();
        self.duration.get_or_create(&of(class)).observe(took.as_secs_f64());
    }

    pub(crate) fn unsettled(&self, class: Class) {
        self.unsettled.get_or_create(&of(class)).inc();
    }

    pub(crate) fn consumer_fault(&self, class: Class) {
        self.consumer_faults.get_or_create(&of(class)).inc();
    }
}

/// Counts one message as being worked on.
pub(crate) struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}
