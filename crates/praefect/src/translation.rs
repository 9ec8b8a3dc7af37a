//! What Praefect's file means to our services: a configuration for each, and a list of the keys that mean nothing to them.

use std::{
    net::{SocketAddr, ToSocketAddrs as _},
    path::Path,
    time::Duration,
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use secrecy::SecretString;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tabularium_common::{
    auth::NodeTokens,
    config::Validate,
    grpc::{Address, ListenAddress},
    telemetry::{LogFormat, TelemetryConfig},
};
use tabularium_replicator::config::ReplicatorConfig;

use crate::file::{Connection, File, Secret};

/// Praefect's `graceful_stop_timeout` when the file has none.
const GRACEFUL_STOP: Duration = Duration::from_secs(60);
/// What is left of it for everything but RPCs, at most.
const LAST_STEPS: Duration = Duration::from_secs(5);
/// Copies at once, at least; Praefect does one after another.
const MIN_COPIES: u32 = 4;
/// How long replicas are left alone when the file says that they are not to be looked at.
const NEVER: &str = "87600h";
/// Never bound: the process has one listener for metrics, and that is its own.
const UNUSED: &str = "127.0.0.1:0";

/// A file that cannot be translated.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct TranslationError(String);

/// A key that has no effect here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WithoutEffect {
    pub(crate) key: &'static str,
    pub(crate) why: &'static str,
}

/// The services of the process, as if each had a file of its own. Secrets are not in there.
pub(crate) struct Translated {
    pub(crate) router: tabularium_router::Config,
    pub(crate) coordinator: tabularium_coordinator::Config,
    pub(crate) replicator: ReplicatorConfig,
    pub(crate) telemetry: TelemetryConfig,
    /// Where metrics are served.
    pub(crate) metrics: Option<SocketAddr>,
    /// How long a stop may take altogether.
    pub(crate) graceful_stop: Duration,
}

/// The secrets of a file, apart from the database's.
pub(crate) struct Tokens {
    /// Clients are to know it, and coordinators of other hosts.
    pub(crate) clients: Option<SecretString>,
    /// Storage nodes want them. One that is added while we run gets what all others have, if they have the same.
    pub(crate) nodes: NodeTokens,
}

pub(crate) fn tokens(file: &File) -> Tokens {
    let nodes = || file.virtual_storages.iter().flat_map(|known| &known.nodes);
    let first = nodes().next().map(|node| &node.token);
    let same = first.filter(|first| nodes().all(|node| node.token.expose() == first.expose()));
    let own = nodes().filter_map(|node| Some((node.address.parse().ok()?, node.token.get().cloned())));
    let nodes = NodeTokens::new(same.and_then(Secret::get).cloned(), own);
    Tokens { clients: file.auth.token.get().cloned(), nodes }
}

/// Where clients connect, in the order in which Praefect's own commands try: socket file, TCP, TLS.
pub(crate) fn listens(file: &File) -> Result<Vec<ListenAddress>, TranslationError> {
    let mut listens = Vec::new();
    if !file.socket_path.is_empty() {
        let path = file.socket_path.strip_prefix("unix:").unwrap_or(&file.socket_path);
        listens.push(ListenAddress::Unix(path.strip_prefix("//").unwrap_or(path).into()));
    }
    if !file.listen_addr.is_empty() {
        listens.push(ListenAddress::Tcp(resolve("listen_addr", &file.listen_addr)?));
    }
    if !file.tls_listen_addr.is_empty() {
        listens.push(ListenAddress::Tls(resolve("tls_listen_addr", &file.tls_listen_addr)?));
    }
    let mut seen = std::collections::BTreeSet::new();
    for listen in &listens {
        let bare = listen.to_string();
        if !seen.insert(bare.trim_start_matches("tls://").to_owned()) {
            return Err(TranslationError(format!(
                "same address can't be used for different schemas {bare:?}"
            )));
        }
    }
    Ok(listens)
}

/// `host:port` as Go reads it: no host is every address.
fn resolve(key: &str, text: &str) -> Result<SocketAddr, TranslationError> {
    let bare = text.trim_start_matches("tcp://").trim_start_matches("tls://");
    let bare = if bare.starts_with(':') { format!("[::]{bare}") } else { bare.to_owned() };
    let fault = |why: &dyn std::fmt::Display| TranslationError(format!("{key} {text:?}: {why}"));
    let mut found = bare.to_socket_addrs().map_err(|error| fault(&error))?;
    found.next().ok_or_else(|| fault(&"no such host"))
}

/// Where a command of the same file finds the process.
pub(crate) fn own_address(file: &File) -> Result<Address, TranslationError> {
    let text = match (&file.socket_path, &file.listen_addr, &file.tls_listen_addr) {
        (path, _, _) if !path.is_empty() => format!("unix:{}", path.trim_start_matches("unix:")),
        (_, address, _) if !address.is_empty() => format!("tcp://{}", address.trim_start_matches("tcp://")),
        (_, _, address) if !address.is_empty() => format!("tls://{}", address.trim_start_matches("tls://")),
        _ => return Err(TranslationError("no Praefect address configured".to_owned())),
    };
    let text = text.replacen("://:", "://localhost:", 1);
    text.parse().map_err(|error| TranslationError(format!("{text:?}: {error}")))
}

/// The database past a pooler that lends connections for one transaction only, if the file knows a way: ours are used for
/// more than one.
fn connection(file: &File) -> Connection {
    let (main, session) = (&file.database, &file.database.session_pooled);
    let text = |session: &String, main: &String| if session.is_empty() { main } else { session }.clone();
    let host = text(&session.host, &file.database.host_no_proxy);
    let port = [session.port, file.database.port_no_proxy, main.port].into_iter().find(|port| *port != 0);
    Connection {
        host: text(&host, &main.host),
        port: port.unwrap_or(0),
        user: text(&session.user, &main.user),
        password: if session.password.get().is_some() { &session.password } else { &main.password }.clone(),
        dbname: text(&session.dbname, &main.dbname),
        sslmode: text(&session.sslmode, &main.sslmode),
        sslcert: text(&session.sslcert, &main.sslcert),
        sslkey: text(&session.sslkey, &main.sslkey),
        sslrootcert: text(&session.sslrootcert, &main.sslrootcert),
    }
}

/// Whether Praefect, who names no schema, would find ours: Postgres looks into the schema that is called as the user is before
/// it looks into `public`.
pub(crate) fn hides_praefects_tables(file: &File) -> bool {
    file.database.user == file.tabularium.database_schema
}

/// The connection as a URL, with the password in it.
fn database_url(connection: &Connection) -> String {
    let quoted = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let mut url = "postgres://".to_owned();
    if !connection.user.is_empty() {
        url += &quoted(&connection.user);
        if connection.password.get().is_some() {
            url = format!("{url}:{}", quoted(connection.password.expose()));
        }
        url.push('@');
    }
    let is_directory = connection.host.starts_with('/');
    if is_directory {
        url += "localhost";
    } else if connection.host.contains(':') {
        url = format!("{url}[{}]", connection.host);
    } else {
        url += if connection.host.is_empty() { "localhost" } else { &connection.host };
    }
    if connection.port != 0 {
        url = format!("{url}:{}", connection.port);
    }
    url = format!("{url}/{}", quoted(&connection.dbname));
    if is_directory {
        url = format!("{url}?host={}", quoted(&connection.host));
    }
    url
}

fn telemetry(file: &File) -> TelemetryConfig {
    let level = match file.logging.level.to_ascii_lowercase().as_str() {
        "panic" | "fatal" | "error" => "error",
        "warn" | "warning" => "warn",
        "debug" => "debug",
        "trace" => "trace",
        _ => "info",
    };
    TelemetryConfig {
        log_format: if file.logging.format == "json" { LogFormat::Json } else { LogFormat::Text },
        log_filter: level.to_owned(),
        ..TelemetryConfig::default()
    }
}

fn built<C: DeserializeOwned + Validate>(what: &str, value: Value) -> Result<C, TranslationError> {
    let config: C =
        serde_json::from_value(value).map_err(|error| TranslationError(format!("{what}: {error}")))?;
    let faults: Vec<_> = config.faults().iter().map(ToString::to_string).collect();
    if faults.is_empty() {
        Ok(config)
    } else {
        Err(TranslationError(format!("{what}: {}", faults.join("; "))))
    }
}

/// Leaves out what is empty: absent is not the same to us.
fn present<const N: usize>(pairs: [(&str, String); N]) -> Value {
    let kept = pairs.into_iter().filter(|(_, text)| !text.is_empty());
    Value::Object(kept.map(|(key, text)| (key.to_owned(), Value::String(text))).collect::<Map<_, _>>())
}

/// The configurations. `private` is a directory that only this process uses.
pub(crate) fn translate(file: &File, private: &Path) -> Result<Translated, TranslationError> {
    let listens = listens(file)?;
    let graceful_stop = match file.graceful_stop_timeout.get() {
        Duration::ZERO => GRACEFUL_STOP,
        timeout => timeout,
    };
    let for_rpcs = graceful_stop.saturating_sub(LAST_STEPS.min(graceful_stop / 4));
    let coordinator = format!("unix:{}", private.join("coordinator.sock").display());
    let metrics = match file.prometheus_listen_addr.as_str() {
        "" => None,
        text => Some(resolve("prometheus_listen_addr", text)?),
    };
    Ok(Translated {
        router: built(
            "router",
            json!({
                "listen": listens.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "admin_listen": UNUSED,
                "coordinators": [coordinator],
                "drain_seconds": for_rpcs.as_secs(),
                "token_transitioning": file.auth.transitioning,
                "tls": present([
                    ("certificate_path", file.tls.certificate_path.display().to_string()),
                    ("key_path", file.tls.key_path.display().to_string()),
                ]),
            }),
        )
        .map_err(|error| of_key_itself(file, error))?,
        coordinator: coordinator_config(file, &coordinator)?,
        replicator: built(
            "replicator",
            json!({
                "admin_listen": UNUSED,
                "coordinators": [coordinator],
                "nats_url": file.tabularium.nats_url,
                "concurrency": {
                    "replication": file.replication.parallel_storage_processing_workers.max(MIN_COPIES),
                },
                "drain_seconds": LAST_STEPS.as_secs(),
            }),
        )?,
        telemetry: telemetry(file),
        metrics,
        graceful_stop,
    })
}

/// Where the key stands in the file itself, its path is not what anybody wrote.
fn of_key_itself(file: &File, error: TranslationError) -> TranslationError {
    let path = file.tls.key_path.display().to_string();
    match file.tls.key.get() {
        Some(_) if error.0.contains(&path) => {
            TranslationError(format!("{error}; {path} is what tls.key says"))
        }
        _ => error,
    }
}

/// What the coordinator alone needs; enough for commands that only want the database.
pub(crate) fn coordinator_config(
    file: &File,
    listen: &str,
) -> Result<tabularium_coordinator::Config, TranslationError> {
    let connection = connection(file);
    let verification = file.background_verification.verification_interval;
    let verify_after = if verification.is_zero() {
        NEVER.to_owned()
    } else {
        format!("{}s", verification.get().as_secs().max(1))
    };
    let virtual_storages: Vec<_> = file
        .virtual_storages
        .iter()
        .map(|known| {
            json!({
                "name": known.name,
                "default_replication_factor": known.default_replication_factor.max(0),
                "write_quorum": file.tabularium.write_quorum,
                "storage": known.nodes.iter()
                    .map(|node| json!({ "name": node.storage, "address": node.address }))
                    .collect::<Vec<_>>(),
            })
        })
        .collect();
    built(
        "coordinator",
        json!({
            "site": "home",
            "listen": listen,
            "http_listen": UNUSED,
            "database_url": database_url(&connection),
            "database_schema": file.tabularium.database_schema,
            "database_tls": present([
                ("sslmode", connection.sslmode),
                ("sslrootcert", connection.sslrootcert),
                ("sslcert", connection.sslcert),
                ("sslkey", connection.sslkey),
            ]),
            "nats_url": file.tabularium.nats_url,
            "virtual_storage": virtual_storages,
            "timing": { "verify_after": verify_after },
            "drain_seconds": LAST_STEPS.as_secs(),
        }),
    )
}

/// The keys of a file that mean nothing here.
pub(crate) fn without_effect(file: &File) -> Vec<WithoutEffect> {
    let default = File::default();
    let mut found = Vec::new();
    let mut note = |is_set: bool, key, why| {
        if is_set {
            found.push(WithoutEffect { key, why });
        }
    };
    note(file.memory_queue_enabled, "memory_queue_enabled", "what is owed is in the database");
    note(
        file.allow_legacy_electors || file.failover.election_strategy != default.failover.election_strategy,
        "failover.election_strategy",
        "every repository has its own primary",
    );
    note(
        !file.failover.enabled,
        "failover.enabled",
        "a primary that cannot be reached is replaced by the next write",
    );
    note(
        !file.failover.bootstrap_interval.is_zero() || !file.failover.monitor_interval.is_zero(),
        "failover.bootstrap_interval, failover.monitor_interval",
        "nodes are asked every second, and a broken connection counts at once",
    );
    note(
        !file.failover.error_threshold_window.is_zero(),
        "failover.error_threshold_window, .read_error_threshold_count, .write_error_threshold_count",
        "replicas that fail what others can do are compared with them",
    );
    note(
        file.replication.batch_size != default.replication.batch_size,
        "replication.batch_size",
        "copies begin as soon as they are owed",
    );
    note(
        file.reconciliation.scheduling_interval != default.reconciliation.scheduling_interval,
        "reconciliation.scheduling_interval",
        "copies are owed by the write that makes them necessary; every 5 s it is looked whether one is missing",
    );
    note(
        !file.reconciliation.histogram_buckets.is_empty(),
        "reconciliation.histogram_buckets",
        "there is no such histogram",
    );
    note(
        !file.background_verification.delete_invalid_records,
        "background_verification.delete_invalid_records",
        "a replica that is lost is made again",
    );
    let (cleanup, usual) = (&file.repositories_cleanup, &default.repositories_cleanup);
    note(
        cleanup.check_interval != usual.check_interval
            || cleanup.run_interval != usual.run_interval
            || cleanup.repositories_in_batch != usual.repositories_in_batch,
        "repositories_cleanup",
        "what is on disk and in no record is listed by list-untracked-repositories",
    );
    note(
        file.yamux.maximum_stream_window_size_bytes != default.yamux.maximum_stream_window_size_bytes
            || file.yamux.accept_backlog != default.yamux.accept_backlog,
        "yamux",
        "windows and backlog are those of our own build",
    );
    note(file.sentry.dsn.get().is_some(), "sentry", "errors are told in the log");
    note(
        !file.prometheus.grpc_latency_buckets.is_empty(),
        "prometheus.grpc_latency_buckets",
        "the buckets are those of our own histograms",
    );
    note(!file.logging.dir.is_empty(), "logging.dir", "the log goes to standard error");
    note(!file.tls.min_version.is_empty(), "tls.min_version", "TLS 1.2 is the oldest that is spoken");
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::read::parse;

    const FULL: &str = include_str!("../tests/praefect.config.toml");

    fn file(text: &str) -> File {
        parse(text).unwrap().file
    }

    fn without_tls() -> File {
        let mut file = file(FULL);
        (file.tls, file.tls_listen_addr) = Default::default();
        file
    }

    #[test]
    fn every_service_gets_what_concerns_it() {
        let translated = translate(&without_tls(), Path::new("/private")).unwrap();
        assert_eq!(translated.router.listen.to_string(), "unix:/run/praefect.socket, 127.0.0.1:2305");
        assert_eq!(translated.router.drain_seconds, 25);
        assert_eq!(translated.graceful_stop, Duration::from_secs(30));
        let coordinator = &translated.coordinator;
        assert_eq!(coordinator.virtual_storages[0].default_replication_factor, 2);
        assert_eq!(coordinator.virtual_storages[0].storages[1].address.to_string(), "tcp://127.0.0.1:8076");
        assert_eq!(coordinator.timing.verify_after.0, Duration::from_secs(168 * 3600));
        assert_eq!(translated.replicator.concurrency.replication, 4);
        assert_eq!(translated.metrics.unwrap().port(), 9652);
        assert!(matches!(translated.telemetry.log_format, LogFormat::Json));
    }

    #[test]
    fn the_database_is_reached_past_the_pooler_and_nothing_in_it_breaks_the_url() {
        let url = |text: &str| database_url(&connection(&file(text)));
        assert_eq!(
            url(FULL),
            "postgres://praefect:database%27s%20secret@postgres.internal:5433/praefect%5Fproduction"
        );
        assert_eq!(
            url(
                "[database]\nhost = '/var/run/pg'\nport = 5433\nuser = 'a@b'\ndbname = 'p'\nhost_no_proxy = ''"
            ),
            "postgres://a%40b@localhost:5433/p?host=%2Fvar%2Frun%2Fpg"
        );
        assert_eq!(
            url("[database]\nhost = '::1'\nhost_no_proxy = 'direct'\nport_no_proxy = 7"),
            "postgres://direct:7/"
        );
    }

    #[test]
    fn praefect_would_find_a_schema_that_is_called_as_its_user() {
        assert!(hides_praefects_tables(&file("[database]\nuser = 'tabularium'")));
        assert!(!hides_praefects_tables(&file("[database]\nuser = 'praefect'")));
        assert!(hides_praefects_tables(&file(
            "[database]\nuser = 'git'\n[tabularium]\ndatabase_schema = 'git'"
        )));
    }

    #[test]
    fn every_node_gets_its_own_token() {
        let node = |name: &str, token: &str| {
            format!(
                "[[virtual_storage.node]]\nstorage = '{name}'\naddress = 'tcp://{name}:1'\ntoken = '{token}'\n"
            )
        };
        let of = |nodes: [String; 2], address: &str| {
            let tokens = tokens(&file(&format!("[[virtual_storage]]\n{}", nodes.concat()))).nodes;
            let found = tokens.of(&address.parse().unwrap());
            found.map(|secret| secrecy::ExposeSecret::expose_secret(secret).to_owned())
        };
        let different = || [node("a", "first"), node("b", "")];
        assert_eq!(of(different(), "tcp://a:1").as_deref(), Some("first"));
        assert_eq!(of(different(), "tcp://b:1"), None);
        assert_eq!(of(different(), "tcp://new:1"), None);
        assert_eq!(of([node("a", "same"), node("b", "same")], "tcp://new:1").as_deref(), Some("same"));
    }

    #[test]
    fn what_has_no_effect_is_named() {
        let named = without_effect(&file(FULL));
        let keys: Vec<_> = named.iter().map(|named| named.key).collect();
        assert!(keys.iter().any(|key| key.starts_with("failover.error_threshold_window")), "{keys:?}");
        assert!(without_effect(&File::default()).is_empty());
    }

    #[test]
    fn addresses_are_read_as_go_reads_them() {
        let own = |text: &str| own_address(&file(text)).map(|address| address.to_string());
        assert_eq!(own("listen_addr = ':2305'").unwrap(), "tcp://localhost:2305");
        assert_eq!(own("listen_addr = 'a:1'\nsocket_path = '/s'").unwrap(), "unix:/s");
        assert_eq!(own("").unwrap_err().to_string(), "no Praefect address configured");
        assert_eq!(resolve("x", ":2305").unwrap(), "[::]:2305".parse().unwrap());
        assert_eq!(resolve("x", "tcp://127.0.0.1:1").unwrap(), "127.0.0.1:1".parse().unwrap());
        assert!(resolve("x", "nonsense").is_err());
        let twice = file("listen_addr = '127.0.0.1:1'\ntls_listen_addr = '127.0.0.1:1'");
        assert!(listens(&twice).unwrap_err().to_string().starts_with("same address can't be used"));
    }
}
