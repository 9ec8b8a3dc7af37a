//! What `coordinator.toml` says.

use std::{collections::BTreeSet, fmt, time::Duration};

use secrecy::SecretString;
use serde::Deserialize;
use tabularium_common::{
    config::{ConfigDuration, Fault, SecretFile, Validate},
    grpc::{Address, ListenAddress, ListenAddresses},
    ids::{SiteName, StorageName, VirtualStorageName},
    telemetry::TelemetryConfig,
    tls::TlsConfig,
};

use crate::{
    database_tls::DatabaseTls, fsck_config::FsckConfig, quorum::QuorumPolicy, repair_config::RepairConfig,
};

/// The longest `timing.write_lease`: one in the database that stands for longer than this has the database's clock against it.
pub(crate) const MAX_WRITE_LEASE: Duration = Duration::from_secs(60);

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this site. Mirrors of its repositories elsewhere know it by this name.
    pub site: SiteName,
    /// Where gRPC is served: one address or a list of them.
    #[serde(default = "default_listen")]
    pub listen: ListenAddresses,
    /// Where status, metrics, liveness and readiness are served over HTTP: one address or a list of them.
    #[serde(default = "default_http_listen")]
    pub http_listen: ListenAddresses,
    /// The address that routers and other coordinators dial. Absent: the bound address, with the machine's host name
    /// when that is all interfaces.
    #[serde(default)]
    pub advertise: Option<Address>,
    /// Secret that callers must prove to know, and that coordinators prove to each other. Absent: no authentication.
    #[serde(default)]
    pub token_file: Option<SecretFile>,
    /// `postgres://user@host:port/database`.
    pub database_url: DatabaseUrl,
    /// Password of the database's user. Absent: what the URL or the environment of libpq says.
    #[serde(default)]
    pub database_password_file: Option<SecretFile>,
    /// How the connection to Postgres is secured.
    #[serde(default)]
    pub database_tls: DatabaseTls,
    /// Schema that holds all tables; a plain lower-case identifier. It is made when it is missing.
    #[serde(default = "default_schema")]
    pub database_schema: String,
    /// Most connections to Postgres.
    #[serde(default = "default_connections")]
    pub max_database_connections: u32,
    /// `nats://host:port`.
    pub nats_url: String,
    /// Secret that storage nodes want from us. Absent: none is sent.
    #[serde(default)]
    pub node_token_file: Option<SecretFile>,
    /// Virtual storages with their storages.
    #[serde(rename = "virtual_storage", default)]
    pub virtual_storages: Vec<VirtualStorageConfig>,
    /// Sites that are told of every change here.
    #[serde(rename = "subscriber", default)]
    pub subscribers: Vec<SubscriberConfig>,
    /// Sites whose repositories may be mirrored here.
    #[serde(rename = "home_site", default)]
    pub home_sites: Vec<HomeSiteConfig>,
    /// How long things may take.
    #[serde(default)]
    pub timing: Timing,
    /// How replicas that are behind are brought up to date.
    #[serde(default)]
    pub repair: RepairConfig,
    /// How often the objects of replicas are looked through.
    #[serde(default)]
    pub fsck: FsckConfig,
    /// How long a stop may wait for what is running, in seconds.
    #[serde(default = "default_drain")]
    pub drain_seconds: u64,
    /// Certificates, keys, and whom to believe.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// What clients of the routers call a storage.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtualStorageConfig {
    /// Its name.
    pub name: VirtualStorageName,
    /// How many storages hold a new repository; 0: all of them.
    #[serde(default)]
    pub default_replication_factor: u16,
    /// How many of the storages that hold a repository must have a write before it is acknowledged.
    #[serde(default)]
    pub write_quorum: QuorumPolicy,
    /// Its storages.
    #[serde(rename = "storage", default)]
    pub storages: Vec<StorageConfig>,
}

/// One node's storage.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageConfig {
    /// Its name, as the node itself calls it.
    pub name: StorageName,
    /// Where the node is reached.
    pub address: Address,
}

/// A site that is told of every change here.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubscriberConfig {
    /// Its name.
    pub name: SiteName,
}

/// A site whose repositories may be mirrored here.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HomeSiteConfig {
    /// Its name.
    pub name: SiteName,
    /// Base of its gateway, shown to people who try to push to a mirror.
    pub url: String,
}

/// How long things may take, and how often they are tried.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timing {
    /// How long a router may answer from its cache after it renewed its session. A router that is cut off delays a
    /// commit by at most this.
    pub router_lease: ConfigDuration,
    /// How long other coordinators take this one for alive after its last sign. A coordinator that died delays a commit
    /// by at most this. At least twice `router_lease`.
    pub coordinator_lease: ConfigDuration,
    /// How long the intent of a write stands without being renewed. Longer than a node waits for the word of a router that
    /// is silent.
    pub write_lease: ConfigDuration,
    /// How long a write waits at most for the one before it.
    pub ticket_wait: ConfigDuration,
    /// How long a node may take to say what it holds when a write in doubt is settled; one that takes longer counts as lost.
    pub settle_patience: ConfigDuration,
    /// How often expired intents are looked for.
    pub sweep_interval: ConfigDuration,
    /// How long after a write in doubt was settled its storage is looked at again. Longer than a node that was cut off
    /// from its router goes on with the write.
    pub settle_again_after: ConfigDuration,
    /// How long the claim on a mirror's sync stands.
    pub sync_lease: ConfigDuration,
    /// How often storage nodes are asked for their health.
    pub probe_interval: ConfigDuration,
    /// How often the outbox is looked at when nobody rings.
    pub relay_interval: ConfigDuration,
    /// How often replicas that are behind without a duty are looked for.
    pub reconcile_interval: ConfigDuration,
    /// A published duty without a result for this long is published again.
    pub republish_after: ConfigDuration,
    /// A started duty without a result for this long is published again. Longer than any copy takes.
    pub restart_after: ConfigDuration,
    /// How long after its first failure a duty is tried again; doubles with every failure.
    pub retry_delay: ConfigDuration,
    /// Longest time between two tries.
    pub max_retry_delay: ConfigDuration,
    /// A duty is set aside after this many failures; failures to reach the other end do not count.
    pub parked_after: u32,
    /// How long finished duties stay listed.
    pub keep_done_duties: ConfigDuration,
    /// How long events stay in the geo log while no site subscribes, and how long a subscriber that no configuration
    /// names any more still holds them. What every subscriber was told of is removed at once.
    pub keep_geo_log: ConfigDuration,
    /// How often replicas that are to move are looked at.
    pub movement_interval: ConfigDuration,
    /// How many replicas may come to, or leave, one storage at a time.
    pub moves_per_storage: u32,
    /// How long the files of a replica that was given up stay: reads that began before may still use them.
    pub replica_removal_grace: ConfigDuration,
    /// How often some of the replicas that are due are compared with each other.
    pub verification_interval: ConfigDuration,
    /// How long a node may take to say what it holds when replicas are compared.
    pub verification_patience: ConfigDuration,
    /// How long after replicas were compared they are compared again.
    pub verify_after: ConfigDuration,
    /// How long to wait for Postgres at start before giving up.
    pub database_start: ConfigDuration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            router_lease: ConfigDuration::from_secs(2),
            coordinator_lease: ConfigDuration::from_secs(4),
            write_lease: ConfigDuration::from_secs(4),
            ticket_wait: ConfigDuration::from_secs(10),
            settle_patience: ConfigDuration::from_millis(500),
            sweep_interval: ConfigDuration::from_millis(250),
            settle_again_after: ConfigDuration::from_secs(60),
            sync_lease: ConfigDuration::from_secs(300),
            probe_interval: ConfigDuration::from_secs(1),
            relay_interval: ConfigDuration::from_millis(500),
            reconcile_interval: ConfigDuration::from_secs(5),
            republish_after: ConfigDuration::from_secs(60),
            restart_after: ConfigDuration::from_secs(3600),
            retry_delay: ConfigDuration::from_millis(500),
            max_retry_delay: ConfigDuration::from_secs(30),
            parked_after: 10,
            keep_done_duties: ConfigDuration::from_secs(600),
            keep_geo_log: ConfigDuration::from_secs(7 * 24 * 3600),
            movement_interval: ConfigDuration::from_secs(1),
            moves_per_storage: 8,
            replica_removal_grace: ConfigDuration::from_secs(60),
            verification_interval: ConfigDuration::from_secs(2),
            verification_patience: ConfigDuration::from_secs(5),
            verify_after: ConfigDuration::from_secs(7 * 24 * 3600),
            database_start: ConfigDuration::from_secs(60),
        }
    }
}

impl Timing {
    fn faults(&self) -> Vec<Fault> {
        let lengths = [
            ("router_lease", self.router_lease),
            ("write_lease", self.write_lease),
            ("ticket_wait", self.ticket_wait),
            ("settle_patience", self.settle_patience),
            ("sweep_interval", self.sweep_interval),
            ("settle_again_after", self.settle_again_after),
            ("sync_lease", self.sync_lease),
            ("probe_interval", self.probe_interval),
            ("relay_interval", self.relay_interval),
            ("reconcile_interval", self.reconcile_interval),
            ("republish_after", self.republish_after),
            ("restart_after", self.restart_after),
            ("retry_delay", self.retry_delay),
            ("max_retry_delay", self.max_retry_delay),
            ("keep_geo_log", self.keep_geo_log),
            ("movement_interval", self.movement_interval),
            ("verification_interval", self.verification_interval),
            ("verification_patience", self.verification_patience),
        ];
        let shortest = ConfigDuration::from_millis(10);
        let mut faults: Vec<Fault> = lengths
            .into_iter()
            .filter(|(_, length)| *length < shortest)
            .map(|(key, length)| Fault::new(format!("timing.{key}"), length, "10ms or more"))
            .collect();
        if self.write_lease.0 > MAX_WRITE_LEASE {
            let longest = format!("{} s at most", MAX_WRITE_LEASE.as_secs());
            faults.push(Fault::new("timing.write_lease", self.write_lease, longest));
        }
        if self.coordinator_lease.0 < self.router_lease.0 * 2 {
            faults.push(Fault::new(
                "timing.coordinator_lease",
                self.coordinator_lease,
                "at least twice timing.router_lease, or leases of routers would outlive it",
            ));
        }
        if self.parked_after == 0 {
            faults.push(Fault::new("timing.parked_after", self.parked_after, "1 or more"));
        }
        faults
    }
}

/// The database's URL. It may hold a password, so it is never shown.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// From a text, for tests and composed configurations.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub(crate) fn secret(&self) -> SecretString {
        SecretString::from(self.0.clone())
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DatabaseUrl(..)")
    }
}

fn default_listen() -> ListenAddresses {
    ListenAddress::Tcp(([127, 0, 0, 1], 2306).into()).into()
}

fn default_http_listen() -> ListenAddresses {
    ListenAddress::Tcp(([127, 0, 0, 1], 8090).into()).into()
}

fn default_schema() -> String {
    "tabularium".to_owned()
}

fn default_connections() -> u32 {
    16
}

fn default_drain() -> u64 {
    30
}

/// Longest schema name that Postgres does not cut.
const MAX_SCHEMA_BYTES: usize = 63;

fn is_identifier(text: &str) -> bool {
    text.len() <= MAX_SCHEMA_BYTES
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn repeated<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = BTreeSet::new();
    names.filter(|name| !seen.insert(*name)).collect()
}

impl Validate for Config {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = self.telemetry.faults();
        faults.extend(self.tls.faults(self.listen.iter().chain(self.http_listen.iter())));
        faults.extend(self.database_tls.faults());
        faults.extend(self.timing.faults());
        faults.extend(self.repair.faults());
        faults.extend(self.fsck.faults());
        if !is_identifier(&self.database_schema) {
            faults.push(Fault::new(
                "database_schema",
                &self.database_schema,
                "lower-case letters, digits and '_', not starting with a digit, at most 63",
            ));
        }
        // The value is not repeated: it may hold a password.
        let url = &self.database_url.0;
        let is_postgres = url.starts_with("postgres://") || url.starts_with("postgresql://");
        if !is_postgres || url.parse::<sqlx::postgres::PgConnectOptions>().is_err() {
            faults.push(Fault::new("database_url", "(not shown)", "postgres://user@host:port/database"));
        }
        if self.max_database_connections < 2 {
            faults.push(Fault::new("max_database_connections", self.max_database_connections, "2 or more"));
        }
        if self.virtual_storages.is_empty() {
            faults.push(Fault::new("virtual_storage", "", "at least one [[virtual_storage]]"));
        }
        let names = self.virtual_storages.iter().map(|storage| storage.name.as_str());
        for name in repeated(names) {
            faults.push(Fault::new("virtual_storage.name", name, "each name once"));
        }
        for virtual_storage in &self.virtual_storages {
            if virtual_storage.storages.is_empty() {
                let key = "virtual_storage.storage";
                faults.push(Fault::new(
                    key,
                    &virtual_storage.name,
                    "at least one [[virtual_storage.storage]]",
                ));
            }
            for name in repeated(virtual_storage.storages.iter().map(|storage| storage.name.as_str())) {
                faults.push(Fault::new("virtual_storage.storage.name", name, "each name once"));
            }
        }
        for name in repeated(self.subscribers.iter().map(|site| site.name.as_str())) {
            faults.push(Fault::new("subscriber.name", name, "each name once"));
        }
        for name in repeated(self.home_sites.iter().map(|site| site.name.as_str())) {
            faults.push(Fault::new("home_site.name", name, "each name once"));
        }
        let sites = self.subscribers.iter().map(|site| ("subscriber.name", &site.name));
        for (key, name) in sites.chain(self.home_sites.iter().map(|site| ("home_site.name", &site.name))) {
            if *name == self.site {
                faults.push(Fault::new(key, name, "another site than this one"));
            }
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tabularium_common::config::example;

    use super::*;

    const EXAMPLE: &str = include_str!("../../../deploy/config/coordinator.toml");

    fn parse(text: &str) -> Result<Config, String> {
        tabularium_common::config::parse(Path::new("coordinator.toml"), text)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_example_is_valid() {
        let config = parse(EXAMPLE).unwrap();
        assert_eq!(config.virtual_storages[0].storages.len(), 3);
        assert_eq!(config.timing.parked_after, Timing::default().parked_after);
    }

    #[test]
    fn the_example_shows_every_key_and_what_it_is_without() {
        let text = example::uncommented(EXAMPLE);
        assert_eq!(example::missing_keys::<Config>(&text).unwrap(), [""; 0]);
        // Not checked: the files that it names are not here.
        let shown: Config = toml::from_str(&text).unwrap();
        let without = parse(EXAMPLE).unwrap();
        assert_eq!(format!("{:?}", shown.timing), format!("{:?}", Timing::default()));
        assert_eq!(format!("{:?}", shown.repair), format!("{:?}", RepairConfig::default()));
        assert_eq!(format!("{:?}", shown.fsck), format!("{:?}", FsckConfig::default()));
        assert_eq!(shown.max_database_connections, without.max_database_connections);
        assert_eq!(shown.drain_seconds, without.drain_seconds);
        assert_eq!(shown.virtual_storages[0].write_quorum, without.virtual_storages[0].write_quorum);
    }

    #[test]
    fn every_fault_is_named_at_once_and_the_url_is_not_shown() {
        let text = EXAMPLE
            .replace("database_schema = \"tabularium\"", "database_schema = \"Tab ularium\"")
            .replace("postgres://", "mysql://user:hunter2@")
            .replace("name = \"gitaly-2\"", "name = \"gitaly-1\"");
        let error = parse(&text).unwrap_err();
        for expected in ["database_schema", "`Tab ularium`", "database_url", "virtual_storage.storage.name"] {
            assert!(error.contains(expected), "{expected}: {error}");
        }
        assert!(!error.contains("hunter2"), "{error}");
        assert!(!format!("{:?}", DatabaseUrl::new("hunter2")).contains("hunter2"));
    }

    #[test]
    fn a_coordinators_lease_covers_its_routers() {
        let text = format!("{EXAMPLE}\n[timing]\nrouter_lease = \"3s\"\ncoordinator_lease = \"4s\"\n");
        assert!(parse(&text).unwrap_err().contains("twice timing.router_lease"));
    }
}
