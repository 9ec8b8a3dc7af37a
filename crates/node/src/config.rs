//! The node's configuration file.

mod backup;
mod gitlab;
mod signing;

use std::{collections::HashSet, ffi::OsString, net::SocketAddr, path::PathBuf};

use serde::Deserialize;
use tabularium_common::{
    config::{ConfigDuration, Fault, SecretFile, Validate},
    grpc::ListenAddresses,
    ids::StorageName,
    telemetry::TelemetryConfig,
    tls::TlsConfig,
};

pub use backup::{BackupConfig, BackupLayout};
pub(crate) use gitlab::Place;
pub use gitlab::{GitlabConfig, HooksConfig, HttpSettings};
pub use signing::SigningConfig;

/// Fewest git processes that may be configured: a listing needs two at once.
const MIN_GIT_PROCESSES: usize = 2;
/// Most git processes that may be configured. Beyond it the machine, not the limit, decides.
const MAX_GIT_PROCESSES: usize = 4096;

/// Largest pack that may be configured to be read into memory.
const LARGEST_PACK_KIBIBYTES: u64 = 16 * 1024;

/// The file name of the program that git runs as its hooks.
const HOOK_PROGRAM: &str = "tabularium-hook";

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where gRPC is served, one address or a list of them: `127.0.0.1:8075`, port 0 for the kernel's choice,
    /// `tls://127.0.0.1:9999`, `unix:/path`.
    pub listen: ListenAddresses,
    /// Where metrics, liveness and readiness are served.
    pub admin_listen: SocketAddr,
    /// File with the secret that callers sign their calls with. Absent: every caller is let in.
    #[serde(default)]
    pub token_file: Option<SecretFile>,
    /// Whether callers without a good token are let in all the same, and only counted: while the secret is introduced or
    /// changed.
    #[serde(default)]
    pub token_transitioning: bool,
    /// The git program, at least 2.39; a bare name is looked up in `PATH`.
    #[serde(default = "default_git")]
    pub git: PathBuf,
    /// Git processes at once, at least 2, because some calls need two that work together. More wait up to ten seconds and are then refused with `RESOURCE_EXHAUSTED`.
    #[serde(default = "default_max_git_processes")]
    pub max_git_processes: usize,
    /// The program that git runs as its hooks in writes that several replicas decide about together. Absent:
    /// `tabularium-hook` beside the node's own program.
    #[serde(default)]
    pub hook_program: Option<PathBuf>,
    /// How long running calls may take to finish after SIGTERM, in seconds.
    #[serde(default = "default_drain_seconds")]
    pub drain_seconds: u64,
    /// At least one.
    #[serde(default)]
    pub storage: Vec<StorageConfig>,
    /// How the storages are looked after.
    #[serde(default)]
    pub storage_health: StorageHealthConfig,
    /// Which corrupt replicas are kept aside when they are made again.
    #[serde(default)]
    pub kept: KeptConfig,
    /// How a secondary takes part in pushes.
    #[serde(default)]
    pub following: FollowingConfig,
    /// Whom changes are checked with. Absent: nobody is asked.
    #[serde(default)]
    pub gitlab: Option<GitlabConfig>,
    /// Hooks of all repositories.
    #[serde(default)]
    pub hooks: HooksConfig,
    /// Where repositories are backed up to. Absent: nowhere.
    #[serde(default)]
    pub backup: Option<BackupConfig>,
    /// What the commits that are made for users are signed with. Absent: they are not signed.
    #[serde(default)]
    pub signing: Option<SigningConfig>,
    /// Certificates, keys, and whom to believe.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// A `[[storage]]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageConfig {
    /// Physical storage name.
    pub name: StorageName,
    /// Its directory, which must exist: a volume that is not mounted must not look like an empty storage.
    pub path: PathBuf,
}

/// The `[storage_health]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StorageHealthConfig {
    /// Pause between two looks at a storage, each of which writes, syncs, reads and removes a small file.
    pub interval: ConfigDuration,
    /// A storage that takes longer for it is not served until it is done.
    pub patience: ConfigDuration,
    /// A storage with less free space than this is not served.
    pub minimum_free_mebibytes: u64,
}

impl Default for StorageHealthConfig {
    fn default() -> Self {
        Self {
            interval: ConfigDuration::from_secs(1),
            patience: ConfigDuration::from_secs(5),
            minimum_free_mebibytes: 128,
        }
    }
}

/// The `[kept]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeptConfig {
    /// How many on each storage; 0: none. The oldest go first.
    pub most: usize,
    /// For how long.
    pub longest: ConfigDuration,
    /// While a storage has less free space than this none is kept.
    pub minimum_free_mebibytes: u64,
}

impl Default for KeptConfig {
    fn default() -> Self {
        Self { most: 3, longest: ConfigDuration::from_secs(14 * 24 * 3600), minimum_free_mebibytes: 4 * 1024 }
    }
}

impl KeptConfig {
    pub(crate) fn minimum_free_bytes(&self) -> u64 {
        self.minimum_free_mebibytes.saturating_mul(1024 * 1024)
    }
}

/// The `[following]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FollowingConfig {
    /// Largest pack that a secondary takes in without starting git; 0: none.
    pub largest_pack_kibibytes: u64,
}

impl Default for FollowingConfig {
    fn default() -> Self {
        Self { largest_pack_kibibytes: 4 * 1024 }
    }
}

impl FollowingConfig {
    /// What a whole pack may have for that; it is read into memory.
    pub(crate) fn largest_pack_bytes(&self) -> u64 {
        self.largest_pack_kibibytes.min(LARGEST_PACK_KIBIBYTES) * 1024
    }
}

/// Shortest time that a look may be given, or that may lie between two.
const SHORTEST_HEALTH_TIME: ConfigDuration = ConfigDuration::from_millis(10);

/// What the node takes from the process it runs in.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// The node's own program; git runs `<program> fetch-proxy` to fetch from another node.
    pub fetch_proxy: PathBuf,
    /// What git runs as its hooks, unless the configuration names another program.
    pub hook_program: PathBuf,
    /// Where git and what git starts are looked up.
    pub search_path: OsString,
}

impl Surroundings {
    /// Of this process.
    pub fn of_this_process() -> std::io::Result<Self> {
        let search_path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
        let fetch_proxy = std::env::current_exe()?;
        let hook_program = fetch_proxy.with_file_name(HOOK_PROGRAM);
        Ok(Self { fetch_proxy, hook_program, search_path })
    }
}

fn default_git() -> PathBuf {
    "git".into()
}

fn default_max_git_processes() -> usize {
    64
}

fn default_drain_seconds() -> u64 {
    30
}

impl Validate for Config {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = self.telemetry.faults();
        faults.extend(self.tls.faults(self.listen.iter()));
        faults.extend(self.gitlab.iter().flat_map(Validate::faults));
        faults.extend(self.hooks.faults());
        faults.extend(self.signing.iter().flat_map(Validate::faults));
        if let Some(backup) = &self.backup {
            faults.extend(backup.faults());
            let within =
                |storage: &StorageConfig| backup.directory().is_some_and(|it| it.starts_with(&storage.path));
            if self.storage.iter().any(within) {
                let allowed = "a directory outside of all storages";
                faults.push(Fault::new("backup.go_cloud_url", "a directory in a storage", allowed));
            }
        }
        if self.storage.is_empty() {
            faults.push(Fault::new("storage", "none", "at least one [[storage]] table with name and path"));
        }
        let mut names = HashSet::new();
        for storage in &self.storage {
            if !names.insert(&storage.name) {
                faults.push(Fault::new("storage.name", &storage.name, "a name used once"));
            }
            if !storage.path.is_dir() {
                let key = format!("storage.path of {}", storage.name);
                faults.push(Fault::new(key, storage.path.display(), "a directory that exists"));
            }
        }
        let StorageHealthConfig { interval, patience, .. } = self.storage_health;
        for (key, length) in [("interval", interval), ("patience", patience)] {
            if length < SHORTEST_HEALTH_TIME {
                let allowed = format!("{SHORTEST_HEALTH_TIME} or more");
                faults.push(Fault::new(format!("storage_health.{key}"), length, allowed));
            }
        }
        let following = self.following.largest_pack_kibibytes;
        if following > LARGEST_PACK_KIBIBYTES {
            let allowed = format!("0 to {LARGEST_PACK_KIBIBYTES}");
            faults.push(Fault::new("following.largest_pack_kibibytes", following, allowed));
        }
        if !(MIN_GIT_PROCESSES..=MAX_GIT_PROCESSES).contains(&self.max_git_processes) {
            let allowed = format!("{MIN_GIT_PROCESSES} to {MAX_GIT_PROCESSES}");
            faults.push(Fault::new("max_git_processes", self.max_git_processes, allowed));
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
        let directory = tempfile::tempdir().unwrap();
        let text = include_str!("../../../deploy/config/node.toml")
            .replace("/var/lib/tabularium/storage", directory.path().to_str().unwrap())
            .replace("# token_file", "token_file");
        let config: Config = parse(Path::new("node.toml"), &text).unwrap();
        assert_eq!(config.max_git_processes, default_max_git_processes());
        assert_eq!(config.storage[0].name.as_str(), "node-1");
    }

    #[test]
    fn the_example_shows_every_key() {
        let example = example::uncommented(include_str!("../../../deploy/config/node.toml"));
        assert_eq!(example::missing_keys::<Config>(&example).unwrap(), [""; 0]);
    }

    #[test]
    fn a_missing_storage_is_named() {
        let text = "listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n[[storage]]\nname = \"a\"\npath = \"/no/such\"\n";
        let error = parse::<Config>(Path::new("n.toml"), text).unwrap_err().to_string();
        assert_eq!(error, "n.toml: `storage.path of a` is `/no/such`; allowed: a directory that exists");
    }
}
