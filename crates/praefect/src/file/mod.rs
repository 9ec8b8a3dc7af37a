//! Praefect's configuration file, as its operators have it.
//!
//! Every key of 16.7 to 18.x is known by name. What Praefect does not know is not its business, so unknown keys are named
//! in the log and forgotten; values that make no sense are refused, here ([`read`]) for their type and in [`faults`] for
//! their meaning. One table is ours, and Praefect leaves it alone: `[tabularium]`.

pub(crate) mod duration;
pub(crate) mod faults;
pub(crate) mod read;

use std::path::PathBuf;

use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use duration::GoDuration;

/// A text that is never shown.
#[derive(Clone, Default, Deserialize)]
#[serde(from = "String")]
pub(crate) struct Secret(Option<SecretString>);

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self((!text.is_empty()).then(|| text.into()))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Secret(..)" } else { "Secret()" })
    }
}

impl Secret {
    /// The secret, if one is set.
    pub(crate) fn get(&self) -> Option<&SecretString> {
        self.0.as_ref()
    }

    /// For comparison and for what is sent.
    pub(crate) fn expose(&self) -> &str {
        self.0.as_ref().map_or("", |secret| secret.expose_secret())
    }
}

/// The whole file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct File {
    /// Prints JSON that is laid over the file.
    pub(crate) config_command: String,
    #[serde(rename = "i_understand_my_election_strategy_is_unsupported_and_will_be_removed_without_warning")]
    pub(crate) allow_legacy_electors: bool,
    pub(crate) background_verification: BackgroundVerification,
    pub(crate) reconciliation: Reconciliation,
    pub(crate) replication: Replication,
    pub(crate) listen_addr: String,
    pub(crate) tls_listen_addr: String,
    pub(crate) socket_path: String,
    #[serde(rename = "virtual_storage")]
    pub(crate) virtual_storages: Vec<VirtualStorage>,
    pub(crate) logging: Logging,
    pub(crate) sentry: Sentry,
    pub(crate) prometheus_listen_addr: String,
    pub(crate) prometheus: Prometheus,
    pub(crate) auth: Auth,
    pub(crate) tls: Tls,
    pub(crate) database: Database,
    pub(crate) failover: Failover,
    pub(crate) memory_queue_enabled: bool,
    pub(crate) graceful_stop_timeout: GoDuration,
    pub(crate) repositories_cleanup: RepositoriesCleanup,
    pub(crate) yamux: Yamux,
    /// What Praefect has no word for.
    pub(crate) tabularium: Tabularium,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub(crate) struct BackgroundVerification {
    pub(crate) verification_interval: GoDuration,
    pub(crate) delete_invalid_records: bool,
}

impl Default for BackgroundVerification {
    fn default() -> Self {
        Self { verification_interval: GoDuration::from_secs(7 * 24 * 3600), delete_invalid_records: true }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub(crate) struct Reconciliation {
    pub(crate) scheduling_interval: GoDuration,
    pub(crate) histogram_buckets: Vec<f64>,
}

impl Default for Reconciliation {
    fn default() -> Self {
        Self { scheduling_interval: GoDuration::from_secs(5 * 60), histogram_buckets: Vec::new() }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub(crate) struct Replication {
    pub(crate) batch_size: u32,
    pub(crate) parallel_storage_processing_workers: u32,
}

impl Default for Replication {
    fn default() -> Self {
        Self { batch_size: 10, parallel_storage_processing_workers: 1 }
    }
}

/// `[[virtual_storage]]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct VirtualStorage {
    pub(crate) name: String,
    /// 0 or below: all nodes.
    pub(crate) default_replication_factor: i64,
    #[serde(rename = "node")]
    pub(crate) nodes: Vec<Node>,
}

/// `[[virtual_storage.node]]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Node {
    pub(crate) storage: String,
    pub(crate) address: String,
    pub(crate) token: Secret,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Logging {
    pub(crate) format: String,
    pub(crate) level: String,
    pub(crate) dir: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Sentry {
    #[serde(rename = "sentry_dsn")]
    pub(crate) dsn: Secret,
    #[serde(rename = "sentry_environment")]
    pub(crate) environment: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub(crate) struct Prometheus {
    pub(crate) scrape_timeout: GoDuration,
    pub(crate) grpc_latency_buckets: Vec<f64>,
}

impl Default for Prometheus {
    fn default() -> Self {
        Self { scrape_timeout: GoDuration::from_secs(10), grpc_latency_buckets: Vec::new() }
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Auth {
    pub(crate) token: Secret,
    /// Of 18.x: the file that holds the token.
    pub(crate) token_file: Option<PathBuf>,
    pub(crate) transitioning: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Tls {
    #[serde(alias = "cert_path")]
    pub(crate) certificate_path: PathBuf,
    pub(crate) key_path: PathBuf,
    /// The key itself, in place of its file.
    pub(crate) key: Secret,
    pub(crate) min_version: String,
}

/// `[database]`. Its first keys are those of [`Connection`] again: were they flattened into it, nobody would hear of unknown
/// ones.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Database {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) user: String,
    pub(crate) password: Secret,
    pub(crate) dbname: String,
    pub(crate) sslmode: String,
    pub(crate) sslcert: String,
    pub(crate) sslkey: String,
    pub(crate) sslrootcert: String,
    /// Past a pooler that lends connections for one transaction only.
    pub(crate) session_pooled: Connection,
    /// Deprecated names of `session_pooled.host` and `.port`.
    pub(crate) host_no_proxy: String,
    pub(crate) port_no_proxy: u16,
}

/// How Postgres is reached, where that is not what `[database]` says.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Connection {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) user: String,
    pub(crate) password: Secret,
    pub(crate) dbname: String,
    pub(crate) sslmode: String,
    pub(crate) sslcert: String,
    pub(crate) sslkey: String,
    pub(crate) sslrootcert: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub(crate) struct Failover {
    pub(crate) enabled: bool,
    pub(crate) election_strategy: String,
    pub(crate) error_threshold_window: GoDuration,
    pub(crate) write_error_threshold_count: u32,
    pub(crate) read_error_threshold_count: u32,
    pub(crate) bootstrap_interval: GoDuration,
    pub(crate) monitor_interval: GoDuration,
}

impl Default for Failover {
    fn default() -> Self {
        Self {
            enabled: true,
            election_strategy: "per_repository".to_owned(),
            error_threshold_window: GoDuration::default(),
            write_error_threshold_count: 0,
            read_error_threshold_count: 0,
            bootstrap_interval: GoDuration::default(),
            monitor_interval: GoDuration::default(),
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub(crate) struct RepositoriesCleanup {
    pub(crate) check_interval: GoDuration,
    pub(crate) run_interval: GoDuration,
    pub(crate) repositories_in_batch: u32,
}

impl Default for RepositoriesCleanup {
    fn default() -> Self {
        Self {
            check_interval: GoDuration::from_secs(30 * 60),
            run_interval: GoDuration::from_secs(24 * 3600),
            repositories_in_batch: 16,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub(crate) struct Yamux {
    pub(crate) maximum_stream_window_size_bytes: u32,
    pub(crate) accept_backlog: u32,
}

impl Default for Yamux {
    fn default() -> Self {
        Self { maximum_stream_window_size_bytes: 262_144, accept_backlog: 256 }
    }
}

/// `[tabularium]`: what Praefect has no word for. Its own programs read past it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub(crate) struct Tabularium {
    /// Schema of the database that holds our tables, beside Praefect's.
    pub(crate) database_schema: String,
    /// How many of a repository's replicas must have a write before it is acknowledged: `majority`, or `available` as
    /// with Praefect.
    pub(crate) write_quorum: String,
    /// `nats://host:port`, where replicators run elsewhere too. Empty: this process does its copies by itself.
    pub(crate) nats_url: String,
    /// Beside our own metrics those that dashboards for Praefect ask for, under Praefect's names.
    pub(crate) praefect_metrics: bool,
}

impl Default for Tabularium {
    fn default() -> Self {
        Self {
            database_schema: "tabularium".to_owned(),
            write_quorum: "majority".to_owned(),
            nats_url: String::new(),
            praefect_metrics: false,
        }
    }
}
