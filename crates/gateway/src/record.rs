//! One line in the log and one count in the metrics for every request, however it ends.

use std::{sync::Arc, time::Instant};

use http::{Method, StatusCode};
use tabularium_common::telemetry::CorrelationId;
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    freshness::Freshness,
    metrics::{Metrics, RequestLabels, ServiceLabels},
    traffic::Traffic,
};

/// Status in the metrics when the client left before an answer began.
const CLIENT_LEFT: u16 = 499;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The client left, or nothing else was recorded.
    Left,
    /// The whole answer was handed to the connection.
    Complete,
    /// The answer was broken off after its first byte.
    Broken,
}

/// A request being served. It is dropped with the answer's body, or with the handler when the client leaves first.
pub(crate) struct Record {
    started: Instant,
    method: Method,
    path: String,
    service: &'static str,
    correlation_id: CorrelationId,
    traffic: Arc<Traffic>,
    freshness: Freshness,
    metrics: Arc<Metrics>,
    status: Option<StatusCode>,
    outcome: Outcome,
    permit: Option<OwnedSemaphorePermit>,
}

impl Record {
    pub(crate) fn new(
        method: Method,
        path: String,
        correlation_id: CorrelationId,
        metrics: Arc<Metrics>,
    ) -> Self {
        metrics.running.inc();
        Self {
            started: Instant::now(),
            method,
            path,
            service: "none",
            correlation_id,
            traffic: Arc::default(),
            freshness: Freshness::default(),
            metrics,
            status: None,
            outcome: Outcome::Left,
            permit: None,
        }
    }

    /// What it turned out to ask for.
    pub(crate) fn set_service(&mut self, service: &'static str) {
        self.service = service;
    }

    /// Its share of the concurrency limit, given back when it ends.
    pub(crate) fn hold(&mut self, permit: OwnedSemaphorePermit) {
        self.permit = Some(permit);
    }

    /// What it asks of the repository.
    pub(crate) fn ask(&mut self, freshness: Freshness) {
        self.freshness = freshness;
    }

    pub(crate) fn freshness(&self) -> &Freshness {
        &self.freshness
    }

    pub(crate) fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    pub(crate) fn correlation_id(&self) -> &CorrelationId {
        &self.correlation_id
    }

    /// The answer begins.
    pub(crate) fn answer(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    /// The answer's last byte was handed over.
    pub(crate) fn complete(&mut self) {
        self.outcome = Outcome::Complete;
    }

    /// The answer was broken off.
    pub(crate) fn broken(&mut self) {
        self.outcome = Outcome::Broken;
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let elapsed = self.started.elapsed();
        let status = self.status.map_or(CLIENT_LEFT, |status| status.as_u16());
        let service = self.service;
        let (bytes_in, bytes_out) = (self.traffic.received(), self.traffic.sent());
        let metrics = &self.metrics;
        metrics.running.dec();
        metrics.requests.get_or_create(&RequestLabels { service, status: status.into() }).inc();
        metrics.seconds.get_or_create(&ServiceLabels { service }).observe(elapsed.as_secs_f64());
        metrics.received_bytes.inc_by(bytes_in);
        metrics.sent_bytes.inc_by(bytes_out);
        let outcome = match self.outcome {
            Outcome::Left => "client left",
            Outcome::Complete => "complete",
            Outcome::Broken => {
                metrics.broken.get_or_create(&ServiceLabels { service }).inc();
                "broken off"
            }
        };
        tracing::info!(
            method = %self.method,
            path = %self.path,
            service,
            status,
            outcome,
            elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            bytes_in,
            bytes_out,
            correlation_id = %self.correlation_id,
            "request"
        );
    }
}
