//! The router's configuration file.

use std::{net::SocketAddr, ops::RangeInclusive, time::Duration};

use serde::Deserialize;
use tabularium_common::{
    config::{ConfigDuration, Fault, SecretFile, Validate},
    grpc::{Address, ListenAddresses},
    telemetry::TelemetryConfig,
    tls::TlsConfig,
};

use crate::{feature_flags::FeatureFlags, routes::WithoutRecords};

/// Most worker threads that can be asked for.
const MAX_WORKERS: usize = 64;
/// Longest drain, in seconds.
const MAX_DRAIN_SECONDS: u64 = 24 * 3600;
/// What a node may be given to answer before another one is asked beside it.
const MAX_HOLD_ANSWERS: Duration = Duration::from_secs(10);
const HEDGE_AFTER: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(10);

/// Everything in `router.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where clients connect, one address or a list of them: `address:port` (port 0: any free one), `tls://address:port`,
    /// `unix:/path`.
    pub listen: ListenAddresses,
    /// Metrics, liveness and readiness, `address:port`.
    pub admin_listen: SocketAddr,
    /// Every coordinator: `tcp://host:port`, `tls://host:port`, `dns:host:port`, `unix:/path`. The first that answers is used.
    pub coordinators: Vec<Address>,
    /// File with the secret that clients' tokens are signed with. Absent: clients are not asked for a token.
    pub token_file: Option<SecretFile>,
    /// Whether clients without a good token are let in all the same, and only counted: while the secret is introduced or
    /// changed.
    #[serde(default)]
    pub token_transitioning: bool,
    /// File with the secret of the storage nodes. Absent: they get no token.
    pub node_token_file: Option<SecretFile>,
    /// File with the secret of the coordinators. Absent: they get no token.
    pub coordinator_token_file: Option<SecretFile>,
    /// Threads that relay. A connection stays with one of them, and each has its own connections to the nodes, so that
    /// fewer cost less and more carry more. Absent: half the processors, at least 1, at most 4.
    pub workers: Option<usize>,
    /// How long RPCs may go on after the router was told to stop, in seconds.
    #[serde(default = "default_drain_seconds")]
    pub drain_seconds: u64,
    /// A read is asked of a second node when the first has been silent for four times what is usual for its method, and at
    /// least for this.
    #[serde(default = "default_hedge_after")]
    pub hedge_after: ConfigDuration,
    /// How many reads of a hundred may be asked twice, beside a few at once; 0: none.
    #[serde(default = "default_hedge_percent")]
    pub hedge_percent: u32,
    /// How long the beginning of a read's answer is held at most, from its first bytes on: one that is whole by then, and less
    /// than 64 KiB, is given by another node when the first one dies while it is at it.
    #[serde(default = "default_hold_answers")]
    pub hold_answers: ConfigDuration,
    /// Whether, while no coordinator can be reached, replicas are read whose nodes keep no record of how new they are, as
    /// Gitaly's do not: `serve` by the route that was known last, or `refuse`.
    #[serde(default = "default_without_database")]
    pub without_database: WithoutRecords,
    /// Feature flags of Gitaly by name, `true` or `false`: what nodes are told when a client says nothing of a flag. For the time
    /// in which nodes are of two versions that differ in their defaults.
    #[serde(default)]
    pub feature_flags: FeatureFlags,
    /// Certificates, keys, and whom to believe.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

fn default_without_database() -> WithoutRecords {
    WithoutRecords::Refuse
}

fn default_drain_seconds() -> u64 {
    30
}

fn default_hedge_after() -> ConfigDuration {
    ConfigDuration::from_millis(100)
}

fn default_hedge_percent() -> u32 {
    5
}

fn default_hold_answers() -> ConfigDuration {
    ConfigDuration::from_millis(20)
}

impl Config {
    /// How many threads relay.
    pub(crate) fn worker_count(&self) -> usize {
        self.workers.unwrap_or_else(|| {
            let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            (processors / 2).clamp(1, 4)
        })
    }
}

impl Validate for Config {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = self.telemetry.faults();
        faults.extend(self.tls.faults(self.listen.iter()));
        if self.coordinators.is_empty() {
            faults.push(Fault::new("coordinators", "[]", "at least one tcp://host:port or unix:/path"));
        }
        if let Some(workers) = self.workers
            && !(1..=MAX_WORKERS).contains(&workers)
        {
            faults.push(Fault::new("workers", workers, format!("1 to {MAX_WORKERS}")));
        }
        if self.drain_seconds > MAX_DRAIN_SECONDS {
            faults.push(Fault::new("drain_seconds", self.drain_seconds, format!("0 to {MAX_DRAIN_SECONDS}")));
        }
        if !HEDGE_AFTER.contains(&self.hedge_after.0) {
            let allowed = format!("{:?} to {:?}", HEDGE_AFTER.start(), HEDGE_AFTER.end());
            faults.push(Fault::new("hedge_after", self.hedge_after, allowed));
        }
        if self.hold_answers.0 > MAX_HOLD_ANSWERS {
            let allowed = format!("0s to {MAX_HOLD_ANSWERS:?}");
            faults.push(Fault::new("hold_answers", self.hold_answers, allowed));
        }
        if self.hedge_percent > 100 {
            faults.push(Fault::new("hedge_percent", self.hedge_percent, "0 to 100"));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tabularium_common::config::{example, parse};

    use super::*;

    #[test]
    fn the_example_is_a_configuration() {
        let text = include_str!("../../../deploy/config/router.toml");
        let config: Config = parse(Path::new("router.toml"), text).unwrap();
        assert_eq!(config.drain_seconds, 30);
        assert!(config.worker_count() >= 1);
    }

    #[test]
    fn the_example_shows_every_key() {
        let example = example::uncommented(include_str!("../../../deploy/config/router.toml"));
        assert_eq!(example::missing_keys::<Config>(&example).unwrap(), [""; 0]);
    }

    #[test]
    fn every_fault_is_named() {
        let text =
            "listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\ncoordinators = []\nworkers = 0\n";
        let error = parse::<Config>(Path::new("r.toml"), text).unwrap_err().to_string();
        assert!(error.contains("`coordinators` is `[]`") && error.contains("`workers` is `0`"), "{error}");
        let error = parse::<Config>(Path::new("r.toml"), "listne = 1").unwrap_err().to_string();
        assert!(error.contains("listne"), "{error}");
    }
}
