//! Metrics of the whole process on one listener, at the paths where Praefect has them; where that is asked for, under
//! Praefect's names as well, so that dashboards and alerts made for Praefect go on showing something.
//!
//! A metric of Praefect's is made of ours when both are read, and only where ours means the same. What Praefect tells of
//! each virtual storage and ours of all of them has no label for it.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse as _, routing::get};
use prometheus_client::{encoding::text::encode, registry::Registry};
use tabularium_common::{
    admin,
    grpc::Listener,
    lifecycle::{Readiness, Tasks},
};

use crate::file::Tabularium;

/// A label of Praefect's.
enum Label {
    /// Always the same.
    Is(&'static str, &'static str),
    /// The value of a label of ours.
    From(&'static str, &'static str),
}

/// How a metric of ours is called at Praefect.
struct Alias {
    ours: &'static str,
    /// Only those with this label.
    only: Option<(&'static str, &'static str)>,
    theirs: &'static str,
    kind: Kind,
    labels: &'static [Label],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

const CACHE: &str = "gitaly_praefect_uptodate_storages_cache_access";
const TRANSACTIONS: &str = "gitaly_praefect_transactions";
const QUEUE: &str = "gitaly_praefect_replication_queue_depth";
const JOBS: &str = "gitaly_praefect_replication_jobs";

const fn counter(ours: &'static str, theirs: &'static str, labels: &'static [Label]) -> Alias {
    Alias { ours, only: None, theirs, kind: Kind::Counter, labels }
}

const fn gauge(
    ours: &'static str,
    only: (&'static str, &'static str),
    theirs: &'static str,
    labels: &'static [Label],
) -> Alias {
    Alias { ours, only: Some(only), theirs, kind: Kind::Gauge, labels }
}

const ALIASES: [Alias; 15] = [
    counter("tabularium_router_route_cache_hits_total", CACHE, &[Label::Is("type", "hit")]),
    counter("tabularium_router_route_cache_misses_total", CACHE, &[Label::Is("type", "miss")]),
    counter("tabularium_router_route_revocations_total", CACHE, &[Label::Is("type", "evict")]),
    Alias {
        ours: "tabularium_router_node_healthy",
        only: None,
        theirs: "gitaly_praefect_node_last_healthcheck_up",
        kind: Kind::Gauge,
        labels: &[Label::From("storage", "gitaly_storage")],
    },
    Alias {
        only: Some(("step", "Begin")),
        ..counter("tabularium_coordinator_writes_total", TRANSACTIONS, &[Label::Is("action", "started")])
    },
    Alias {
        only: Some(("step", "Commit")),
        ..counter("tabularium_coordinator_writes_total", TRANSACTIONS, &[Label::Is("action", "committed")])
    },
    Alias {
        only: Some(("step", "Abort")),
        ..counter("tabularium_coordinator_writes_total", TRANSACTIONS, &[Label::Is("action", "canceled")])
    },
    gauge("tabularium_coordinator_duties", ("state", "pending"), QUEUE, &[Label::Is("state", "ready")]),
    gauge("tabularium_coordinator_duties", ("state", "published"), QUEUE, &[Label::Is("state", "ready")]),
    gauge("tabularium_coordinator_duties", ("state", "started"), QUEUE, &[Label::Is("state", "in_progress")]),
    gauge("tabularium_coordinator_duties", ("state", "parked"), QUEUE, &[Label::Is("state", "failed")]),
    gauge(
        "tabularium_replicator_in_flight",
        ("class", "Replication"),
        JOBS,
        &[Label::Is("change_type", "update")],
    ),
    gauge(
        "tabularium_replicator_in_flight",
        ("class", "Cleanup"),
        JOBS,
        &[Label::Is("change_type", "delete_replica")],
    ),
    counter(
        "tabularium_router_authentications_total",
        "gitaly_authentications",
        &[Label::From("enforced", "enforced"), Label::From("status", "status")],
    ),
    counter("tabularium_router_rpcs_total", "grpc_server_handled", &[Label::From("code", "grpc_code")]),
];

/// Go's names of the codes, by number.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// A line of ours, taken apart: name, labels, value.
type Sample<'a> = (&'a str, Vec<(&'a str, &'a str)>, f64);

fn sample(line: &str) -> Option<Sample<'_>> {
    let (head, value) = line.rsplit_once(' ')?;
    let value = value.parse().ok()?;
    let (name, labels) = head.split_once('{').unwrap_or((head, "}"));
    let labels = labels.strip_suffix('}')?;
    // None of our labels' values has a comma or a quote in it: they are names of storages, and words of ours.
    let labels = labels.split(',').filter_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        Some((key, value.trim_matches('"')))
    });
    Some((name, labels.collect(), value))
}

/// Samples by name and whether they are counters, then by labels.
type Families = BTreeMap<(&'static str, bool), BTreeMap<String, f64>>;

/// What of a text of ours Praefect has a name for, under that name.
fn as_praefect(text: &str) -> String {
    let mut found = Families::new();
    for (name, labels, value) in text.lines().filter_map(sample) {
        for alias in ALIASES.iter().filter(|alias| alias.ours == name) {
            if alias.only.is_some_and(|wanted| !labels.contains(&wanted)) {
                continue;
            }
            let mut theirs = Vec::new();
            for label in alias.labels {
                let (key, value) = match *label {
                    Label::Is(key, value) => (key, value),
                    Label::From(ours, theirs) => {
                        let value =
                            labels.iter().find(|(key, _)| *key == ours).map_or("", |(_, value)| value);
                        let code = value.parse().ok().and_then(|code: usize| CODES.get(code)).copied();
                        (theirs, if theirs == "grpc_code" { code.unwrap_or(value) } else { value })
                    }
                };
                theirs.push(format!("{key}=\"{value}\""));
            }
            let family = found.entry((alias.theirs, alias.kind == Kind::Counter)).or_default();
            *family.entry(theirs.join(",")).or_default() += value;
        }
    }
    let mut out = String::new();
    for ((name, is_counter), samples) in found {
        let (kind, suffix) = if is_counter { ("counter", "_total") } else { ("gauge", "") };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "# HELP {name} As Praefect calls it.\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(out, "{name}{suffix}{{{labels}}} {value}");
        }
    }
    out
}

/// `/metrics`, `/live`, `/ready`.
pub(crate) fn routes(registry: Registry, readiness: Readiness, wanted: &Tabularium) -> Router {
    let registry = Arc::new(registry);
    let plain = admin::routes(Arc::clone(&registry), readiness);
    if !wanted.praefect_metrics {
        return plain;
    }
    Router::new().route("/metrics", get(both)).with_state(registry).fallback_service(plain)
}

async fn both(State(registry): State<Arc<Registry>>) -> axum::response::Response {
    let mut text = String::new();
    if encode(&mut text, &registry).is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    let text = text.trim_end().trim_end_matches("# EOF");
    let body = format!("{text}{}# EOF\n", as_praefect(text));
    ([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], body).into_response()
}

/// Serves until the tasks stop.
pub(crate) fn serve(listener: Listener, routes: Router, tasks: &Tasks) {
    let stopping = tasks.stopping();
    tasks.spawn("metrics", async move {
        let served =
            axum::serve(listener.connections(), routes).with_graceful_shutdown(stopping.cancelled_owned());
        if let Err(error) = served.await {
            tracing::error!(%error, "metrics are not served any more");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_praefect_has_a_name_for_has_it() {
        let text = "# TYPE tabularium_router_route_cache_hits counter\ntabularium_router_route_cache_hits_total 5\n\
            tabularium_router_node_healthy{virtual_storage=\"default\",storage=\"gitaly-1\"} 1\n\
            tabularium_router_rpcs_total{operation=\"Accessor\",code=\"5\"} 2\n\
            tabularium_router_rpcs_total{operation=\"Mutator\",code=\"5\"} 3\n\
            tabularium_coordinator_duties{state=\"pending\"} 4\ntabularium_coordinator_duties{state=\"published\"} 3\n\
            tabularium_coordinator_writes_total{step=\"Commit\",result=\"Done\"} 9\nsomething_else 1\n";
        assert_eq!(
            as_praefect(text),
            "# HELP gitaly_praefect_node_last_healthcheck_up As Praefect calls it.\n\
             # TYPE gitaly_praefect_node_last_healthcheck_up gauge\n\
             gitaly_praefect_node_last_healthcheck_up{gitaly_storage=\"gitaly-1\"} 1\n\
             # HELP gitaly_praefect_replication_queue_depth As Praefect calls it.\n\
             # TYPE gitaly_praefect_replication_queue_depth gauge\n\
             gitaly_praefect_replication_queue_depth{state=\"ready\"} 7\n\
             # HELP gitaly_praefect_transactions As Praefect calls it.\n\
             # TYPE gitaly_praefect_transactions counter\n\
             gitaly_praefect_transactions_total{action=\"committed\"} 9\n\
             # HELP gitaly_praefect_uptodate_storages_cache_access As Praefect calls it.\n\
             # TYPE gitaly_praefect_uptodate_storages_cache_access counter\n\
             gitaly_praefect_uptodate_storages_cache_access_total{type=\"hit\"} 5\n\
             # HELP grpc_server_handled As Praefect calls it.\n\
             # TYPE grpc_server_handled counter\n\
             grpc_server_handled_total{grpc_code=\"NotFound\"} 5\n"
        );
    }
}
