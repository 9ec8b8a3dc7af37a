//! Logs, traces and the correlation id.
//!
//! Logs go to standard error, one event a line, as text for people or JSON for collectors. Traces go to an OTLP
//! collector when one is configured. Every request carries `x-gitlab-correlation-id`: taken from the caller, or made
//! here, and forwarded on every call it causes, so that one push can be followed through all services.

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use serde::Deserialize;
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::config::Fault;

/// Metadata key of the correlation id (wire reference, section f).
pub const CORRELATION_ID: &str = "x-gitlab-correlation-id";
/// Longest correlation id taken from a caller, in bytes; a longer one is replaced.
pub const MAX_CORRELATION_ID_BYTES: usize = 128;

/// The `[telemetry]` table of every service.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// `text` or `json`.
    pub log_format: LogFormat,
    /// What is logged, in `tracing` filter syntax, such as `info` or `info,tabularium_router=debug`.
    pub log_filter: String,
    /// gRPC address of an OTLP collector, such as `http://127.0.0.1:4317`. Absent: no traces are exported.
    pub otlp_endpoint: Option<String>,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { log_format: LogFormat::Text, log_filter: "info".to_owned(), otlp_endpoint: None }
    }
}

impl TelemetryConfig {
    /// Faults of this table, for the service's own check.
    pub fn faults(&self) -> Vec<Fault> {
        match EnvFilter::try_new(&self.log_filter) {
            Ok(_) => Vec::new(),
            Err(_) => vec![Fault::new(
                "telemetry.log_filter",
                &self.log_filter,
                "a level (error, warn, info, debug, trace), or target=level pairs with commas",
            )],
        }
    }
}

/// How log events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why telemetry could not be started.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error("log filter: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// The exporter cannot be built.
    #[error("OTLP exporter: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    /// A subscriber is installed already.
    #[error("logging was started twice: {0}")]
    Installed(#[from] tracing_subscriber::util::TryInitError),
}

/// Flushes traces when the service ends. Keep it until the end of `main`.
pub struct TelemetryGuard(Option<SdkTracerProvider>);

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        if let Some(provider) = self.0.take()
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "traces were not flushed");
        }
    }
}

/// Starts logging, and tracing where it is configured. Called once, inside the runtime, by `main`.
pub fn start(service: &'static str, config: &TelemetryConfig) -> Result<TelemetryGuard, TelemetryError> {
    let filter = EnvFilter::try_new(&config.log_filter)?;
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let format = match config.log_format {
        LogFormat::Text => format.boxed(),
        LogFormat::Json => format.json().flatten_event(true).boxed(),
    };
    let provider = match &config.otlp_endpoint {
        None => None,
        Some(endpoint) => {
            let exporter =
                opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(endpoint).build()?;
            let resource = Resource::builder().with_service_name(service).build();
            Some(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
        }
    };
    let traces = provider
        .as_ref()
        .map(|provider| tracing_opentelemetry::layer().with_tracer(provider.tracer("tabularium")));
    tracing_subscriber::registry().with(filter).with(format).with(traces).try_init()?;
    Ok(TelemetryGuard(provider))
}

/// The id that ties together everything one request caused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CorrelationId(String);

impl CorrelationId {
    /// A new one.
    pub fn new() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }

    /// The caller's, or a new one when it sent none, or one that is too long or not printable.
    pub fn of(headers: &http::HeaderMap) -> Self {
        let given = headers.get(CORRELATION_ID).and_then(|value| value.to_str().ok());
        match given {
            Some(text)
                if !text.is_empty()
                    && text.len() <= MAX_CORRELATION_ID_BYTES
                    && text.bytes().all(|byte| byte.is_ascii_graphic()) =>
            {
                Self(text.to_owned())
            }
            _ => Self::new(),
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As a header's value.
    pub fn header(&self) -> Option<http::HeaderValue> {
        http::HeaderValue::from_str(&self.0).ok()
    }
}

impl Default for CorrelationId {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Display for CorrelationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_correlation_id_is_kept_when_it_is_sane() {
        let mut headers = http::HeaderMap::new();
        headers.insert(CORRELATION_ID, "01HX".parse().unwrap());
        assert_eq!(CorrelationId::of(&headers).as_str(), "01HX");
        headers.insert(CORRELATION_ID, "x".repeat(MAX_CORRELATION_ID_BYTES + 1).parse().unwrap());
        assert_eq!(CorrelationId::of(&headers).as_str().len(), 32);
        headers.insert(CORRELATION_ID, "two words".parse().unwrap());
        assert_eq!(CorrelationId::of(&headers).as_str().len(), 32);
    }

    #[test]
    fn a_bad_filter_is_named() {
        let config = TelemetryConfig { log_filter: "a=b=c".into(), ..TelemetryConfig::default() };
        assert_eq!(config.faults()[0].key, "telemetry.log_filter");
    }
}
