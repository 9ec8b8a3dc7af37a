//! One RPC's account: opened when it arrives, closed once with the status the client was sent, or as cancelled when the
//! client goes away first. Closing counts it and writes its log line.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use http::{HeaderMap, HeaderValue};
use tabularium_common::telemetry::CorrelationId;
use tabularium_proto::coordinator::Route;
use tonic::Code;

use crate::{
    metrics::{Metrics, OperationLabel},
    routing::generation_of,
    table::{Action, Entry},
};

/// What is known of a write by the task that drives it, and may change while it does.
#[derive(Clone, Default)]
pub(crate) struct Notes(Arc<Mutex<Noted>>);

#[derive(Default)]
struct Noted {
    route: Option<Arc<Route>>,
    storage: Option<Arc<str>>,
    write_id: Option<String>,
    generation: Option<i64>,
}

impl Notes {
    /// Where it goes.
    pub(crate) fn route(&self, route: &Arc<Route>, storage: &Arc<str>) {
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        noted.route = Some(Arc::clone(route));
        noted.storage = Some(Arc::clone(storage));
    }

    /// What it made of the repository.
    pub(crate) fn recorded(&self, generation: i64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).generation = Some(generation);
    }

    /// Its ticket.
    pub(crate) fn write_id(&self, id: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_id = Some(id.to_owned());
    }
}

/// The account of one RPC.
pub(crate) struct Account {
    metrics: Arc<Metrics>,
    entry: Option<Arc<Entry>>,
    correlation: Option<HeaderValue>,
    started: Instant,
    closed: bool,
    /// The repository, once it is known.
    pub(crate) route: Option<Arc<Route>>,
    /// The storage that served it.
    pub(crate) storage: Option<Arc<str>>,
    /// What the task that drives the write has noted, if it is one.
    pub(crate) notes: Option<Notes>,
    write_id: Option<String>,
    /// Why the router itself ended it.
    pub(crate) refusal: Option<String>,
}

impl Account {
    /// Opens it.
    pub(crate) fn open(metrics: Arc<Metrics>, entry: Option<Arc<Entry>>) -> Self {
        metrics.open_streams.inc();
        Self {
            metrics,
            entry,
            correlation: None,
            started: Instant::now(),
            closed: false,
            route: None,
            storage: None,
            notes: None,
            write_id: None,
            refusal: None,
        }
    }

    /// Says under which correlation id it is logged.
    pub(crate) fn correlate(&mut self, correlation: HeaderValue) {
        self.correlation = Some(correlation);
    }

    /// The same for a request that is not relayed, by the headers that the client sent.
    pub(crate) fn correlate_by(&mut self, headers: &HeaderMap) {
        self.correlation = CorrelationId::of(headers).header();
    }

    /// The generation that the client is told: of a write that is recorded its own, of a read that of the replica.
    pub(crate) fn generation(&self) -> Option<HeaderValue> {
        let generation = match (&self.notes, &self.route, &self.storage) {
            (Some(notes), ..) => notes.0.lock().unwrap_or_else(PoisonError::into_inner).generation?,
            (None, Some(route), Some(storage)) => generation_of(route, storage),
            _ => return None,
        };
        Some(HeaderValue::from(generation))
    }

    fn operation(&self) -> OperationLabel {
        match self.entry.as_ref().map(|entry| &entry.action) {
            None => OperationLabel::Unknown,
            Some(Action::Read { .. } | Action::ReadStorage { .. }) => OperationLabel::Accessor,
            Some(Action::Write { .. }) => OperationLabel::Mutator,
            Some(Action::Maintain { .. }) => OperationLabel::Maintenance,
            Some(
                Action::RepositoryExists | Action::RemoveRepository { .. } | Action::Typed | Action::NotBuilt,
            ) => OperationLabel::Intercepted,
        }
    }

    /// Closes it; only the first time counts.
    pub(crate) fn close(&mut self, code: Code) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        if let Some(notes) = self.notes.take() {
            let noted = notes.0.lock().unwrap_or_else(PoisonError::into_inner);
            self.route.clone_from(&noted.route);
            self.storage.clone_from(&noted.storage);
            self.write_id.clone_from(&noted.write_id);
        }
        let operation = self.operation();
        self.metrics.open_streams.dec();
        self.metrics.rpc(operation, code).inc();
        if code == Code::Ok && operation != OperationLabel::Mutator {
            if tracing::enabled!(tracing::Level::DEBUG) {
                self.log_debug(code);
            }
        } else {
            self.log_info(code);
        }
    }

    fn log_debug(&self, code: Code) {
        let name = self.route.as_ref().and_then(|route| route.name.as_ref());
        tracing::debug!(
            method = self.entry.as_ref().map(|entry| entry.method.path.as_str()),
            correlation_id = self.correlation.as_ref().and_then(|value| value.to_str().ok()),
            virtual_storage = name.map(|name| name.virtual_storage.as_str()),
            relative_path = name.map(|name| name.relative_path.as_str()),
            storage = self.storage.as_deref(),
            grpc_code = code as i32,
            elapsed_ms = self.elapsed_ms(),
            "rpc"
        );
    }

    fn log_info(&self, code: Code) {
        let name = self.route.as_ref().and_then(|route| route.name.as_ref());
        tracing::info!(
            method = self.entry.as_ref().map(|entry| entry.method.path.as_str()),
            correlation_id = self.correlation.as_ref().and_then(|value| value.to_str().ok()),
            virtual_storage = name.map(|name| name.virtual_storage.as_str()),
            relative_path = name.map(|name| name.relative_path.as_str()),
            repository_id = self.route.as_ref().map(|route| route.repository_id),
            storage = self.storage.as_deref(),
            write_id = self.write_id.as_deref(),
            error = self.refusal.as_deref(),
            grpc_code = code as i32,
            elapsed_ms = self.elapsed_ms(),
            "rpc"
        );
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.close(Code::Cancelled);
    }
}
