//! The configuration file, and the secrets it names.

use std::net::SocketAddr;

use secrecy::SecretString;
use serde::Deserialize;
use tabularium_common::{
    auth::NodeTokens,
    config::{ConfigDuration, ConfigError, Fault, SecretFile, Validate},
    duties::Class,
    grpc::Address,
    ids::SiteName,
    program::ServiceConfig,
    telemetry::TelemetryConfig,
    tls::TlsConfig,
};

/// Most workers of one class in one process.
pub const MAX_CONCURRENCY: usize = 256;

/// `replicator.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicatorConfig {
    /// Address and port of metrics, liveness and readiness.
    pub admin_listen: SocketAddr,
    /// Coordinators, any one of which will do; the next is asked when one cannot be reached.
    pub coordinators: Vec<Address>,
    /// Holds the token sent to coordinators. Absent: none is sent.
    pub coordinator_token_file: Option<SecretFile>,
    /// The message bus: `nats://host:port`.
    pub nats_url: String,
    /// Holds the token sent to storage nodes. Absent: none is sent.
    pub node_token_file: Option<SecretFile>,
    /// Router of this site, through which mirrors are written. Needed when there are home sites.
    pub router: Option<Address>,
    /// Holds the token sent to the router. Absent: none is sent.
    pub router_token_file: Option<SecretFile>,
    /// How many duties of each class run at once in this process.
    #[serde(default)]
    pub concurrency: Concurrency,
    /// Longest a copy or a sync may take; then it is given up and tried again. A sync also ends a second before the
    /// coordinators' `sync_lease` does, so that no other worker can have begun it meanwhile.
    #[serde(default = "default_job_deadline")]
    pub job_deadline: ConfigDuration,
    /// Base URL of this site's gateway, such as `https://git.example.org`; put into the events that subscribed sites
    /// get, for people and for receivers that show it.
    pub external_url: Option<String>,
    /// Sites that are told what changes here.
    #[serde(default)]
    pub subscriber: Vec<Subscriber>,
    /// Sites whose repositories are mirrored here.
    #[serde(default)]
    pub home_site: Vec<HomeSite>,
    /// How long running work may go on after the signal to stop, in seconds; the rest goes back to the bus.
    #[serde(default = "default_drain_seconds")]
    pub drain_seconds: u64,
    /// Certificates, keys, and whom to believe.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// Workers for each class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Concurrency {
    /// Copies.
    pub replication: usize,
    /// Removals.
    pub cleanup: usize,
    /// Notifications.
    pub geo_notify: usize,
    /// Syncs from home sites.
    pub geo_sync: usize,
}

impl Default for Concurrency {
    fn default() -> Self {
        Self { replication: 4, cleanup: 2, geo_notify: 4, geo_sync: 4 }
    }
}

/// A site that is told.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subscriber {
    /// Its name, as the coordinator has it.
    pub name: SiteName,
    /// Where its events go: `http(s)://host[:port]/api/v4/geo/receive_events`.
    pub hook_url: String,
    /// Holds the token that goes with every event.
    pub hook_token_file: SecretFile,
}

/// A site that is mirrored.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HomeSite {
    /// Its name, as the coordinator has it.
    pub name: SiteName,
    /// Base URL of its gateway; `/<group>/<project>.git` is appended.
    pub url: String,
    /// Holds the token sent as `Authorization: Bearer`. Absent: none is sent.
    pub token_file: Option<SecretFile>,
}

fn default_job_deadline() -> ConfigDuration {
    ConfigDuration::from_secs(30 * 60)
}

fn default_drain_seconds() -> u64 {
    30
}

impl ReplicatorConfig {
    /// How many workers of `class` this process runs. None for what it has no configuration for: those messages are
    /// left to a replicator that has.
    pub fn workers(&self, class: Class) -> usize {
        match class {
            Class::Replication => self.concurrency.replication,
            Class::Cleanup => self.concurrency.cleanup,
            Class::GeoNotify if self.subscriber.is_empty() => 0,
            Class::GeoNotify => self.concurrency.geo_notify,
            Class::GeoSync if self.home_site.is_empty() => 0,
            Class::GeoSync => self.concurrency.geo_sync,
        }
    }

    /// Reads every secret the file names.
    pub fn read_secrets(&self) -> Result<Secrets, ConfigError> {
        let read = |file: &Option<SecretFile>| file.as_ref().map(SecretFile::read).transpose();
        Ok(Secrets {
            coordinator: read(&self.coordinator_token_file)?,
            nodes: read(&self.node_token_file)?.into(),
            router: read(&self.router_token_file)?,
            subscribers: self
                .subscriber
                .iter()
                .map(|site| site.hook_token_file.read())
                .collect::<Result<_, _>>()?,
            home_sites: self.home_site.iter().map(|site| read(&site.token_file)).collect::<Result<_, _>>()?,
        })
    }
}

/// The secrets that a configuration names.
pub struct Secrets {
    /// For coordinators.
    pub coordinator: Option<SecretString>,
    /// For storage nodes.
    pub nodes: NodeTokens,
    /// For the router.
    pub router: Option<SecretString>,
    /// For each subscriber, in the file's order.
    pub subscribers: Vec<SecretString>,
    /// For each home site, in the file's order.
    pub home_sites: Vec<Option<SecretString>>,
}

impl Secrets {
    /// All of them, to be struck out of texts that others see.
    pub fn all(&self) -> Vec<SecretString> {
        let single = [&self.coordinator, &self.router].into_iter().flatten().chain(self.nodes.secrets());
        single.chain(&self.subscribers).chain(self.home_sites.iter().flatten()).cloned().collect()
    }
}

impl ServiceConfig for ReplicatorConfig {
    fn telemetry(&self) -> &TelemetryConfig {
        &self.telemetry
    }

    fn tls(&self) -> &TlsConfig {
        &self.tls
    }

    fn check_secrets(&self) -> Result<(), ConfigError> {
        self.read_secrets().map(drop)
    }
}

impl Validate for ReplicatorConfig {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = self.telemetry.faults();
        faults.extend(self.tls.faults([]));
        if self.coordinators.is_empty() {
            faults.push(Fault::new(
                "coordinators",
                "[]",
                "one address or more, such as tcp://127.0.0.1:2306",
            ));
        }
        // The URL may hold a password: it is not repeated.
        if self.nats_url.parse::<async_nats::ServerAddr>().is_err() {
            faults.push(Fault::new("nats_url", "(not shown)", "nats://host:port or tls://host:port"));
        }
        for (key, workers) in [
            ("concurrency.replication", self.concurrency.replication),
            ("concurrency.cleanup", self.concurrency.cleanup),
            ("concurrency.geo_notify", self.concurrency.geo_notify),
            ("concurrency.geo_sync", self.concurrency.geo_sync),
        ] {
            if workers > MAX_CONCURRENCY {
                faults.push(Fault::new(key, workers, format!("0 to {MAX_CONCURRENCY}")));
            }
        }
        if self.job_deadline.0.is_zero() {
            faults.push(Fault::new("job_deadline", self.job_deadline, "more than 0"));
        }
        if !self.home_site.is_empty() && self.router.is_none() {
            faults.push(Fault::new(
                "router",
                "absent",
                "the local router's address: mirrors are written through it",
            ));
        }
        faults.extend(self.external_url.iter().filter_map(|url| url_fault("external_url", url)));
        faults.extend(
            self.subscriber.iter().filter_map(|site| url_fault("subscriber.hook_url", &site.hook_url)),
        );
        faults.extend(self.home_site.iter().filter_map(|site| url_fault("home_site.url", &site.url)));
        faults.extend(repeated("subscriber.name", self.subscriber.iter().map(|site| &site.name)));
        faults.extend(repeated("home_site.name", self.home_site.iter().map(|site| &site.name)));
        faults
    }
}

/// Credentials in a URL end up in logs, so they are refused; tokens have files of their own.
fn url_fault(key: &str, text: &str) -> Option<Fault> {
    const ALLOWED: &str = "http://host[:port][/path] or https://…, without user, password, query or fragment";
    if text.contains('@') {
        return Some(Fault::new(key, "(not shown)", ALLOWED));
    }
    let usable = text.parse::<http::Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some() && uri.query().is_none()
    });
    (!usable || text.contains('#')).then(|| Fault::new(key, text, ALLOWED))
}

fn repeated<'a>(key: &str, names: impl Iterator<Item = &'a SiteName>) -> Vec<Fault> {
    let mut seen = std::collections::BTreeSet::new();
    names.filter(|name| !seen.insert(*name)).map(|name| Fault::new(key, name, "each name once")).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tabularium_common::config::{example, parse};

    use super::*;

    const MINIMAL: &str = "admin_listen = \"127.0.0.1:0\"\ncoordinators = [\"tcp://127.0.0.1:2306\"]\n\
                           nats_url = \"nats://127.0.0.1:4222\"\n";

    fn error(extra: &str) -> String {
        parse::<ReplicatorConfig>(Path::new("r.toml"), &format!("{MINIMAL}{extra}")).unwrap_err().to_string()
    }

    #[test]
    fn the_example_parses() {
        let text = include_str!("../../../deploy/config/replicator.toml");
        let config: ReplicatorConfig = parse(Path::new("replicator.toml"), text).unwrap();
        assert_eq!(config.workers(Class::Replication), 4);
        assert_eq!(config.workers(Class::GeoSync), 4);
    }

    #[test]
    fn the_example_shows_every_key() {
        let example = example::uncommented(include_str!("../../../deploy/config/replicator.toml"));
        // Nobody connects to a replicator with a certificate.
        assert_eq!(example::missing_keys::<ReplicatorConfig>(&example).unwrap(), ["tls.client_ca_path"]);
    }

    #[test]
    fn what_is_not_configured_is_left_to_others() {
        let config: ReplicatorConfig = parse(Path::new("r.toml"), MINIMAL).unwrap();
        assert_eq!(config.workers(Class::GeoNotify), 0);
        assert_eq!(config.workers(Class::GeoSync), 0);
        assert_eq!(config.job_deadline.0.as_secs(), 1800);
    }

    #[test]
    fn faults_name_the_key() {
        let home = "[[home_site]]\nname = \"a\"\nurl = \"http://h\"\n";
        assert!(error(home).contains("`router` is `absent`"));
        let ftp = error(&home.replace("http://h", "ftp://h"));
        assert!(ftp.contains("home_site.url") && ftp.contains("ftp://h"), "{ftp}");
        let credentials = error(&home.replace("http://h", "http://u:hunter2@h"));
        assert!(credentials.contains("home_site.url") && !credentials.contains("hunter2"), "{credentials}");
        assert!(error("concurrency = { cleanup = 1000 }\n").contains("concurrency.cleanup"));
        assert!(error("concurrency = { cleaning = 1 }\n").contains("cleaning"));
        assert!(error(&format!("router = \"tcp://r:1\"\n{home}{home}")).contains("each name once"));
    }
}
