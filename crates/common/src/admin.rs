//! Metrics, liveness and readiness, on a listener of their own so that they answer when the service is busy.
//!
//! * `GET /metrics`: the registry in OpenMetrics text.
//! * `GET /live`: 200 while the process runs.
//! * `GET /ready`: 200 while the service takes work, else 503.

use std::{net::SocketAddr, sync::Arc};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::net::TcpListener;

use crate::lifecycle::{Readiness, Tasks};

#[derive(Clone)]
struct Shared {
    registry: Arc<Registry>,
    readiness: Readiness,
}

/// The routes, for services that mount them on an HTTP listener they have anyway.
pub fn routes(registry: Arc<Registry>, readiness: Readiness) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .with_state(Shared { registry, readiness })
}

/// Binds `listen` and serves the routes until the tasks stop. Answers the bound address.
pub async fn serve(
    listen: SocketAddr,
    registry: Arc<Registry>,
    readiness: Readiness,
    tasks: &Tasks,
) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(listen).await?;
    let address = listener.local_addr()?;
    serve_on(listener, routes(registry, readiness), tasks);
    Ok(address)
}

/// Serves routes until the tasks stop.
pub fn serve_on(listener: TcpListener, app: Router, tasks: &Tasks) {
    let stopping = tasks.stopping();
    tasks.spawn("admin", async move {
        let served = axum::serve(listener, app).with_graceful_shutdown(stopping.cancelled_owned()).await;
        if let Err(error) = served {
            tracing::error!(%error, "admin listener failed");
        }
    });
}

async fn metrics(State(shared): State<Shared>) -> axum::response::Response {
    let mut text = String::new();
    if encode(&mut text, &shared.registry).is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    ([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
}

async fn ready(State(shared): State<Shared>) -> (StatusCode, &'static str) {
    if shared.readiness.get() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}
