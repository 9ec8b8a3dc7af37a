//! Status as JSON.

use std::sync::Arc;

use axum::{Json, Router, extract::State, http::StatusCode, response::IntoResponse as _, routing::get};
use serde_json::{Value, json};
use tabularium_common::{grpc::Listener, lifecycle::Tasks};
use tabularium_proto::coordinator as wire;

use crate::{app::Shared, service};

/// `GET /api/v1/status`.
pub(crate) fn routes(shared: &Arc<Shared>) -> Router {
    Router::new().route("/api/v1/status", get(status)).with_state(Arc::clone(shared))
}

/// Serves until the tasks stop.
pub(crate) fn serve(tasks: &Tasks, listener: Listener, routes: Router) {
    let stopping = tasks.stopping();
    tasks.spawn("http", async move {
        let served = axum::serve(listener.connections(), routes)
            .with_graceful_shutdown(stopping.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "HTTP listener failed");
        }
    });
}

async fn status(State(shared): State<Arc<Shared>>) -> axum::response::Response {
    match service::status(&shared).await {
        Ok(status) => Json(status_json(&status)).into_response(),
        Err(error) => {
            tracing::warn!(%error, "no status");
            let body = json!({ "error": "the database does not answer" });
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
    }
}

fn status_json(status: &wire::GetStatusResponse) -> Value {
    let duties = status.duties.unwrap_or_default();
    json!({
        "site": status.site,
        "version": status.version,
        "virtual_storages": status.virtual_storages.iter().map(virtual_storage_json).collect::<Vec<_>>(),
        "coordinators": status.coordinators.iter().map(|peer| json!({
            "id": peer.id, "address": peer.address, "answering": peer.answering,
        })).collect::<Vec<_>>(),
        "routers": status.routers.iter().map(|router| json!({
            "router_id": router.router_id, "coordinator_id": router.coordinator_id,
        })).collect::<Vec<_>>(),
        "duties": {
            "pending": duties.pending, "published": duties.published,
            "started": duties.started, "parked": duties.parked,
        },
        "writes_under_way": status.writes_under_way,
        "sites": status.sites.iter().map(|site| json!({
            "name": site.name, "subscriber": site.subscriber, "notified_position": site.notified_position,
            "mirrors": site.mirrors, "mirrors_synced": site.mirrors_synced, "mirrors_failed": site.mirrors_failed,
        })).collect::<Vec<_>>(),
        "geo_log_position": status.geo_log_position,
        "message_bus_connected": status.message_bus_connected,
    })
}

fn virtual_storage_json(virtual_storage: &wire::VirtualStorageStatus) -> Value {
    json!({
        "name": virtual_storage.name,
        "repositories": virtual_storage.repositories,
        "repositories_behind": virtual_storage.repositories_behind,
        "storages": virtual_storage.storages.iter().map(|storage| json!({
            "name": storage.name, "address": storage.address, "healthy": storage.healthy,
            "problem": storage.problem, "replicas": storage.replicas,
            "replicas_behind": storage.replicas_behind, "primaries": storage.primaries,
        })).collect::<Vec<_>>(),
    })
}
