//! What a file's values have to mean, in two tongues of Praefect's: the one fault that a start or a command dies of, and
//! the list that `configuration validate` prints.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::{File, duration::GoDuration};

/// yamux' smallest window.
const MIN_WINDOW: u32 = 262_144;
const MINUTE: GoDuration = GoDuration::from_secs(60);
const STRATEGIES: [&str; 3] = ["local", "sql", "per_repository"];

/// A value that cannot be used, with the way to its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) key: Vec<String>,
    pub(crate) message: String,
}

/// The first fault that keeps Praefect from starting.
pub(crate) fn fatal(file: &File) -> Option<String> {
    if !STRATEGIES.contains(&file.failover.election_strategy.as_str()) {
        return Some(format!("invalid election strategy: {:?}", file.failover.election_strategy));
    }
    if file.listen_addr.is_empty() && file.socket_path.is_empty() && file.tls_listen_addr.is_empty() {
        return Some("no listen address or socket path configured".to_owned());
    }
    if file.virtual_storages.is_empty() {
        return Some("no virtual storages configured".to_owned());
    }
    if file.replication.batch_size < 1 {
        return Some(format!("replication batch size was {} but must be >=1", file.replication.batch_size));
    }
    virtual_storages(file).or_else(|| cleanup(file)).or_else(|| yamux(file)).or_else(|| ours(file))
}

fn virtual_storages(file: &File) -> Option<String> {
    let mut names = BTreeSet::new();
    for known in &file.virtual_storages {
        if known.name.is_empty() {
            return Some("virtual storages must have a name".to_owned());
        }
        let of = |fault: &str| Some(format!("virtual storage {:?}: {fault}", known.name));
        if known.nodes.is_empty() {
            return of("no primary gitaly backends configured");
        }
        if !names.insert(&known.name) {
            return of("virtual storages must have unique names");
        }
        let mut storages = BTreeSet::new();
        for node in &known.nodes {
            if node.storage.is_empty() {
                return of("all gitaly nodes must have a storage");
            }
            if node.address.is_empty() {
                return of("all gitaly nodes must have an address");
            }
            if !storages.insert(&node.storage) {
                return of("internal gitaly storages are not unique");
            }
        }
        let nodes = i64::try_from(known.nodes.len()).unwrap_or(i64::MAX);
        if known.default_replication_factor > nodes {
            return Some(format!(
                "virtual storage {:?} has a default replication factor ({}) which is higher than the number of storages ({nodes})",
                known.name, known.default_replication_factor
            ));
        }
    }
    None
}

fn cleanup(file: &File) -> Option<String> {
    let cleanup = &file.repositories_cleanup;
    if cleanup.run_interval <= GoDuration::default() {
        return None;
    }
    [("check_interval", cleanup.check_interval), ("run_interval", cleanup.run_interval)]
        .into_iter()
        .find(|(_, interval)| *interval < MINUTE)
        .map(|(key, _)| {
            format!("repositories_cleanup.{key} is less then {MINUTE}, which could lead to a database performance problem")
        })
}

fn yamux(file: &File) -> Option<String> {
    let window = file.yamux.maximum_stream_window_size_bytes;
    if window < MIN_WINDOW {
        return Some(format!(
            "yamux.maximum_stream_window_size_bytes must be at least {MIN_WINDOW} but it was {window}"
        ));
    }
    let backlog = file.yamux.accept_backlog;
    (backlog < 1).then(|| format!("yamux.accept_backlog must be at least 1 but it was {backlog}"))
}

/// What only we cannot use.
fn ours(file: &File) -> Option<String> {
    if !["majority", "available"].contains(&file.tabularium.write_quorum.as_str()) {
        let found = &file.tabularium.write_quorum;
        return Some(format!("tabularium.write_quorum is {found:?}; allowed: majority, available"));
    }
    if !["", "json", "text"].contains(&file.logging.format.as_str()) {
        return Some(format!("invalid logger format: {:?}", file.logging.format));
    }
    if file.tls.key.get().is_some() && !file.tls.key_path.as_os_str().is_empty() {
        return Some("tls.key_path and tls.key cannot both be set".to_owned());
    }
    let mut tokens = BTreeMap::new();
    let nodes = file.virtual_storages.iter().flat_map(|known| &known.nodes);
    nodes.map(|node| (&node.address, node.token.expose())).find_map(|(address, token)| {
        let known = *tokens.entry(address).or_insert(token);
        (known != token).then(|| {
            format!("virtual_storage.node.token differs between nodes at {address:?}; a server has one token")
        })
    })
}

/// Every fault that `configuration validate` tells.
pub(crate) fn all(file: &File) -> Vec<Fault> {
    let mut found = Faults::default();
    if file.socket_path.is_empty() && file.listen_addr.is_empty() && file.tls_listen_addr.is_empty() {
        found.push(&[], r#"none of "socket_path", "listen_addr" or "tls_listen_addr" is set"#);
    }
    let verification = file.background_verification.verification_interval;
    found.not_negative(&["background_verification", "verification_interval"], verification);
    let reconciliation = &file.reconciliation;
    found.not_negative(&["reconciliation", "scheduling_interval"], reconciliation.scheduling_interval);
    if !reconciliation.scheduling_interval.is_zero() && !reconciliation.histogram_buckets.is_sorted() {
        found.push(&["reconciliation", "histogram_buckets"], "bad order");
    }
    let replication = &file.replication;
    found.at_least(&["replication", "batch_size"], replication.batch_size, 1);
    let workers = replication.parallel_storage_processing_workers;
    found.at_least(&["replication", "parallel_storage_processing_workers"], workers, 1);
    prometheus(file, &mut found);
    tls(file, &mut found);
    failover(file, &mut found);
    found.not_negative(&["graceful_stop_timeout"], file.graceful_stop_timeout);
    let cleanup = &file.repositories_cleanup;
    if !cleanup.run_interval.is_zero() {
        for (key, interval) in
            [("check_interval", cleanup.check_interval), ("run_interval", cleanup.run_interval)]
        {
            found.at_least(&["repositories_cleanup", key], interval, MINUTE);
        }
        let batch = cleanup.repositories_in_batch;
        found.at_least(&["repositories_cleanup", "repositories_in_batch"], batch, 1);
    }
    let window = file.yamux.maximum_stream_window_size_bytes;
    found.at_least(&["yamux", "maximum_stream_window_size_bytes"], window, MIN_WINDOW);
    found.at_least(&["yamux", "accept_backlog"], file.yamux.accept_backlog, 1);
    if file.virtual_storages.is_empty() {
        found.push(&["virtual_storage"], "not set");
    }
    for (index, known) in file.virtual_storages.iter().enumerate() {
        let place = format!("[{index}]");
        found.not_blank(&["virtual_storage", &place, "name"], &known.name);
        if known.nodes.is_empty() {
            found.push(&["virtual_storage", &place, "node"], "not set");
        }
        for (index, node) in known.nodes.iter().enumerate() {
            let node_place = format!("[{index}]");
            let key = |last| ["virtual_storage", &place, "node", &node_place, last].map(str::to_owned);
            found.not_blank(&key("storage").each_ref().map(String::as_str), &node.storage);
            found.not_blank(&key("address").each_ref().map(String::as_str), &node.address);
        }
    }
    found.0
}

fn prometheus(file: &File, found: &mut Faults) {
    let prometheus = &file.prometheus;
    if prometheus.grpc_latency_buckets.is_empty() {
        return;
    }
    found.not_negative(&["prometheus", "scrape_timeout"], prometheus.scrape_timeout);
    if !prometheus.grpc_latency_buckets.is_sorted() {
        let told: Vec<_> = prometheus.grpc_latency_buckets.iter().map(ToString::to_string).collect();
        let message = format!("bad order: expected asc: [{}]", told.join(" "));
        found.push(&["prometheus", "grpc_latency_buckets"], &message);
    }
}

fn tls(file: &File, found: &mut Faults) {
    let tls = &file.tls;
    let unset = |path: &Path| path.as_os_str().is_empty();
    if unset(&tls.certificate_path) && unset(&tls.key_path) && tls.key.get().is_none() {
        return;
    }
    if tls.key.get().is_some() && !unset(&tls.key_path) {
        return found.push(&["tls", "key_path", "key"], "key_path and key cannot both be set");
    }
    found.is_file(&["tls", "certificate_path"], &tls.certificate_path);
    if tls.key.get().is_none() {
        found.is_file(&["tls", "key_path"], &tls.key_path);
    }
}

fn failover(file: &File, found: &mut Faults) {
    let failover = &file.failover;
    if !failover.enabled {
        return;
    }
    if !STRATEGIES.contains(&failover.election_strategy.as_str()) {
        let message = format!("not supported: {:?}", failover.election_strategy);
        found.push(&["failover", "election_strategy"], &message);
    }
    found.not_negative(&["failover", "bootstrap_interval"], failover.bootstrap_interval);
    found.not_negative(&["failover", "monitor_interval"], failover.monitor_interval);
    found.not_negative(&["failover", "error_threshold_window"], failover.error_threshold_window);
    let thresholds = [
        ("error_threshold_window", failover.error_threshold_window.is_zero()),
        ("write_error_threshold_count", failover.write_error_threshold_count == 0),
        ("read_error_threshold_count", failover.read_error_threshold_count == 0),
    ];
    // None of them, or all.
    if thresholds.iter().any(|(_, unset)| !unset) {
        for (key, _) in thresholds.iter().filter(|(_, unset)| *unset) {
            found.push(&["failover", key], "not set");
        }
    }
}

#[derive(Default)]
struct Faults(Vec<Fault>);

impl Faults {
    fn push(&mut self, key: &[&str], message: &str) {
        let key = key.iter().map(ToString::to_string).collect();
        self.0.push(Fault { key, message: message.to_owned() });
    }

    fn at_least<T: Copy + PartialOrd + std::fmt::Display>(&mut self, key: &[&str], value: T, least: T) {
        if value < least {
            self.push(key, &format!("not in range: {value} is not greater than or equal to {least}"));
        }
    }

    fn not_negative(&mut self, key: &[&str], value: GoDuration) {
        if value.is_negative() {
            self.at_least(key, value, GoDuration::default());
        }
    }

    fn not_blank(&mut self, key: &[&str], value: &str) {
        if value.trim().is_empty() {
            self.push(key, "blank or empty");
        }
    }

    fn is_file(&mut self, key: &[&str], path: &Path) {
        let shown = path.display().to_string();
        if !path.exists() {
            self.push(key, &format!("doesn't exist: {shown:?}"));
        } else if path.is_dir() {
            self.push(key, &format!("not a file: {shown:?}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::read::parse;

    const NODE: &str = "[[virtual_storage.node]]\nstorage = 's'\naddress = 'tcp://a:1'\n";

    fn file(text: &str) -> File {
        parse(text).unwrap().file
    }

    fn usable() -> String {
        format!("socket_path = '/s'\n[[virtual_storage]]\nname = 'default'\n{NODE}")
    }

    #[test]
    fn a_start_dies_of_praefects_words() {
        assert_eq!(fatal(&file(&usable())), None);
        let quoted = format!("[[virtual_storage]]\nname = 'default'\n{NODE}");
        for (text, expected) in [
            (quoted.clone(), "no listen address or socket path configured"),
            ("socket_path = '/s'".to_owned(), "no virtual storages configured"),
            (
                format!("{}{NODE}", usable()),
                "virtual storage \"default\": internal gitaly storages are not unique",
            ),
            (
                format!("{}{quoted}", usable()),
                "virtual storage \"default\": virtual storages must have unique names",
            ),
            (
                usable().replace("name = 'default'", "name = 'default'\ndefault_replication_factor = 2"),
                "virtual storage \"default\" has a default replication factor (2) which is higher than the number of storages (1)",
            ),
            (
                format!("{}[failover]\nelection_strategy = 'best'", usable()),
                "invalid election strategy: \"best\"",
            ),
            (
                format!("{}[replication]\nbatch_size = 0", usable()),
                "replication batch size was 0 but must be >=1",
            ),
            (
                format!("{}[repositories_cleanup]\ncheck_interval = '5s'", usable()),
                "repositories_cleanup.check_interval is less then 1m0s, which could lead to a database performance problem",
            ),
            (
                format!("{}[yamux]\nmaximum_stream_window_size_bytes = 5", usable()),
                "yamux.maximum_stream_window_size_bytes must be at least 262144 but it was 5",
            ),
            (
                format!("{}token = 'a'\n{}", usable(), NODE.replace("'s'", "'t'")),
                "virtual_storage.node.token differs between nodes at \"tcp://a:1\"; a server has one token",
            ),
            (
                format!("{}[tls]\nkey = 'k'\nkey_path = '/k'", usable()),
                "tls.key_path and tls.key cannot both be set",
            ),
        ] {
            assert_eq!(fatal(&file(&text)).as_deref(), Some(expected));
        }
    }

    #[test]
    fn validation_tells_everything_at_once() {
        assert_eq!(all(&file(&usable())), []);
        let text = "graceful_stop_timeout = '-1s'\n[[virtual_storage]]\nname = ' '\n[[virtual_storage.node]]\nstorage = 's'\n\
            [replication]\nbatch_size = 0\n[tls]\ncertificate_path = '/nowhere'\n[failover]\nread_error_threshold_count = 1\n\
            [prometheus]\ngrpc_latency_buckets = [2.0, 1.5]";
        let found: Vec<_> = all(&file(text))
            .into_iter()
            .map(|fault| format!("{}: {}", fault.key.join("."), fault.message))
            .collect();
        assert_eq!(
            found,
            [
                r#": none of "socket_path", "listen_addr" or "tls_listen_addr" is set"#,
                "replication.batch_size: not in range: 0 is not greater than or equal to 1",
                "prometheus.grpc_latency_buckets: bad order: expected asc: [2 1.5]",
                r#"tls.certificate_path: doesn't exist: "/nowhere""#,
                r#"tls.key_path: doesn't exist: """#,
                "failover.error_threshold_window: not set",
                "failover.write_error_threshold_count: not set",
                "graceful_stop_timeout: not in range: -1s is not greater than or equal to 0s",
                "virtual_storage.[0].name: blank or empty",
                "virtual_storage.[0].node.[0].address: blank or empty",
            ]
        );
    }
}
