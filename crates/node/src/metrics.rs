//! What the node counts. One struct, made from a registry in the composition root.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// Seconds; a slot is normally free at once, and [`crate::git::command::QUEUE_WAIT`] is the longest wait.
const QUEUE_BUCKETS: [f64; 8] = [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 10.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RpcLabels {
    method: String,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GitLabels {
    subcommand: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PushLabels {
    how: &'static str,
}

/// How a secondary took part in a push.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SecondaryPush {
    /// No process was started for it.
    FollowedInProcess,
    /// Git did a part of it.
    FollowedWithGit,
    /// Git and its hooks did all of it, as on the primary.
    Run,
}

/// Seconds; GitLab looks at what is pushed before it answers.
const GITLAB_BUCKETS: [f64; 9] = [0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GitlabLabels {
    endpoint: &'static str,
    outcome: &'static str,
}

/// What became of a call to GitLab.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GitlabOutcome {
    /// Whatever the answer was.
    Answered,
    /// GitLab refused or failed.
    Refused,
    /// There was no answer, or none in time.
    Unreachable,
}

/// The node's metrics. Clones share the same values.
#[derive(Clone)]
pub(crate) struct Metrics {
    rpcs: Family<RpcLabels, Counter>,
    git_started: Family<GitLabels, Counter>,
    git_running: Gauge,
    git_killed: Counter,
    git_queue: Histogram,
    secondary_pushes: Family<PushLabels, Counter>,
    gitlab_calls: Family<GitlabLabels, Counter>,
    gitlab_seconds: Histogram,
}

impl Metrics {
    /// Registers everything.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            rpcs: Family::default(),
            git_started: Family::default(),
            git_running: Gauge::default(),
            git_killed: Counter::default(),
            git_queue: Histogram::new(QUEUE_BUCKETS),
            secondary_pushes: Family::default(),
            gitlab_calls: Family::default(),
            gitlab_seconds: Histogram::new(GITLAB_BUCKETS),
        };
        registry.register(
            "tabularium_node_gitlab_calls",
            "Calls to GitLab, by endpoint and what became of them",
            metrics.gitlab_calls.clone(),
        );
        registry.register(
            "tabularium_node_gitlab_call_seconds",
            "How long calls to GitLab took",
            metrics.gitlab_seconds.clone(),
        );
        registry.register("tabularium_node_rpcs", "RPCs ended, by method and code", metrics.rpcs.clone());
        registry.register(
            "tabularium_node_git_processes_started",
            "git processes started, by subcommand",
            metrics.git_started.clone(),
        );
        registry.register(
            "tabularium_node_git_processes_running",
            "git processes that have not been reaped",
            metrics.git_running.clone(),
        );
        registry.register(
            "tabularium_node_git_processes_killed",
            "git processes killed because their request ended before they did",
            metrics.git_killed.clone(),
        );
        registry.register(
            "tabularium_node_git_queue_seconds",
            "How long a git process waited for a slot",
            metrics.git_queue.clone(),
        );
        registry.register(
            "tabularium_node_secondary_pushes",
            "Pushes that other nodes were the primary of: followed in_process, followed with_git, or run",
            metrics.secondary_pushes.clone(),
        );
        metrics
    }

    /// An RPC ended. `method` is one of the registry's names, or `unknown`.
    pub(crate) fn rpc(&self, method: &str, code: tonic::Code) {
        let labels = RpcLabels { method: method.to_owned(), code: format!("{code:?}") };
        self.rpcs.get_or_create(&labels).inc();
    }

    /// GitLab was called.
    pub(crate) fn gitlab_called(&self, endpoint: &'static str, outcome: GitlabOutcome, took: Duration) {
        let outcome = match outcome {
            GitlabOutcome::Answered => "answered",
            GitlabOutcome::Refused => "refused",
            GitlabOutcome::Unreachable => "unreachable",
        };
        self.gitlab_calls.get_or_create(&GitlabLabels { endpoint, outcome }).inc();
        self.gitlab_seconds.observe(took.as_secs_f64());
    }

    /// A process waited this long for its slot.
    pub(crate) fn git_queued(&self, waited: Duration) {
        self.git_queue.observe(waited.as_secs_f64());
    }

    /// A process was started.
    pub(crate) fn git_started(&self, subcommand: &'static str) {
        self.git_started.get_or_create(&GitLabels { subcommand }).inc();
        self.git_running.inc();
    }

    /// A process was reaped.
    pub(crate) fn git_ended(&self) {
        self.git_running.dec();
    }

    /// A push was taken part in.
    pub(crate) fn secondary_push(&self, how: SecondaryPush) {
        let how = match how {
            SecondaryPush::FollowedInProcess => "in_process",
            SecondaryPush::FollowedWithGit => "with_git",
            SecondaryPush::Run => "run",
        };
        self.secondary_pushes.get_or_create(&PushLabels { how }).inc();
    }

    /// A process was sent SIGTERM.
    pub(crate) fn git_killed(&self) {
        self.git_killed.inc();
    }
}
