//! Whether each storage can be used, found out by using it: an answer over the network says nothing about a disk.
//!
//! Once per interval a small file is written, synced, read back and removed, the storage's identity is read again, and
//! the free space is counted. A storage that fails in any of it is not served (`grpc.health.v1`) and says why; so is one
//! that does not come to an end: each storage has a thread of its own that may hang for ever in a system call, with at
//! most one look under way, while everything that asks is answered from the last report.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::fs::{statfs, statvfs};
use serde::{Deserialize, Serialize};
use tabularium_common::{grpc::storage_health_service, lifecycle::Tasks};
use tokio::sync::oneshot;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    config::StorageHealthConfig,
    storage::{OWN_DIRECTORY, Storage},
};

/// The file with the storage's identity (wire reference, section k.5).
pub(crate) const IDENTITY_FILE: &str = ".gitaly-metadata";
/// What a look writes: more than fits into a directory entry.
const TEST_BYTES: [u8; 4096] = [0x5a; 4096];

/// What [`IDENTITY_FILE`] holds.
#[derive(Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) gitaly_filesystem_id: String,
}

/// Why a storage is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Problem {
    #[error("the disk has not answered for {}", humantime(*.0))]
    Hangs(Duration),
    #[error("its identity file cannot be read: {0}")]
    IdentityUnreadable(String),
    #[error("another file system is in its place: id {found} instead of {expected}; is the disk mounted?")]
    OtherIdentity { expected: String, found: String },
    #[error("it cannot be read: {0}")]
    Unreadable(String),
    #[error("it cannot be written: {0}")]
    Unwriteable(String),
    #[error("only {} MiB are free, fewer than {} MiB", available >> 20, needed >> 20)]
    Full { available: u64, needed: u64 },
}

fn humantime(length: Duration) -> String {
    format!("{} ms", length.as_millis())
}

/// What the last look at a storage found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) readable: bool,
    pub(crate) writeable: bool,
    pub(crate) fs_type: String,
    /// Bytes.
    pub(crate) available: u64,
    /// Bytes.
    pub(crate) used: u64,
    pub(crate) problem: Option<Problem>,
}

impl Report {
    /// Of a storage that was never seen to the end.
    fn unknown(problem: Problem) -> Self {
        let fs_type = "unknown".to_owned();
        Self { readable: false, writeable: false, fs_type, available: 0, used: 0, problem: Some(problem) }
    }
}

/// What a look brings home, before it is judged.
#[derive(Debug, Clone)]
struct Findings {
    identity: Result<String, String>,
    listed: Result<(), String>,
    written: Result<(), String>,
    available: u64,
}

/// The first thing that is wrong, the most telling first: what is not mounted is not "full".
fn judge(found: &Findings, expected_identity: &str, minimum_free: u64) -> Option<Problem> {
    if let Err(error) = &found.listed {
        return Some(Problem::Unreadable(error.clone()));
    }
    match &found.identity {
        Err(error) => return Some(Problem::IdentityUnreadable(error.clone())),
        Ok(identity) if identity != expected_identity => {
            let (expected, found) = (expected_identity.to_owned(), identity.clone());
            return Some(Problem::OtherIdentity { expected, found });
        }
        Ok(_) => {}
    }
    if found.available < minimum_free {
        return Some(Problem::Full { available: found.available, needed: minimum_free });
    }
    found.written.clone().err().map(Problem::Unwriteable)
}

/// Reads a storage's identity.
pub(crate) fn read_identity(root: &Path) -> io::Result<String> {
    let bytes = fs::read(root.join(IDENTITY_FILE))?;
    let identity: Identity = serde_json::from_slice(&bytes)
        .map_err(|error| io::Error::other(format!("{IDENTITY_FILE}: {error}")))?;
    Ok(identity.gitaly_filesystem_id)
}

/// Writes, syncs, reads back, removes.
fn write_and_read_back(root: &Path) -> io::Result<()> {
    let directory = root.join(OWN_DIRECTORY);
    let mut file = tempfile::Builder::new().prefix("+testWrite").tempfile_in(directory)?;
    file.write_all(&TEST_BYTES)?;
    file.as_file().sync_all()?;
    file.rewind()?;
    let mut read = Vec::with_capacity(TEST_BYTES.len());
    file.read_to_end(&mut read)?;
    if read != TEST_BYTES {
        return Err(io::Error::other("what was written reads differently"));
    }
    file.close()
}

/// Names of common file systems, as Gitaly reports them.
fn file_system_type(root: &Path) -> String {
    let Ok(found) = statfs(root) else { return "unknown".to_owned() };
    match found.f_type {
        0xef53 => "ext2/ext3".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683e => "btrfs".to_owned(),
        0x0102_1994 => "tmpfs".to_owned(),
        0x794c_7630 => "overlayfs".to_owned(),
        0x2fc1_2fc1 => "zfs".to_owned(),
        0x6969 => "nfs".to_owned(),
        other => format!("unknown ({other:#x})"),
    }
}

/// One look. Blocks, perhaps for ever.
fn look(storage: &Storage, minimum_free: u64) -> Report {
    let listed = fs::read_dir(&storage.root).and_then(|mut entries| entries.next().transpose().map(drop));
    let (available, used) = statvfs(&storage.root).map_or((0, 0), |found| {
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        (bytes(found.f_bavail), bytes(found.f_blocks.saturating_sub(found.f_bfree)))
    });
    let findings = Findings {
        identity: read_identity(&storage.root).map_err(|error| error.to_string()),
        listed: listed.map_err(|error| error.to_string()),
        written: write_and_read_back(&storage.root).map_err(|error| error.to_string()),
        available,
    };
    Report {
        readable: findings.listed.is_ok(),
        writeable: findings.written.is_ok(),
        fs_type: file_system_type(&storage.root),
        available,
        used,
        problem: judge(&findings, &storage.filesystem_id, minimum_free),
    }
}

/// Asks a storage's thread for one look.
type Order = oneshot::Sender<Report>;

/// The thread that looks at one storage. It ends when nobody can order any more; one that hangs ends with the process.
fn looker(storage: Storage, minimum_free: u64) -> io::Result<std::sync::mpsc::SyncSender<Order>> {
    let (orders, ordered) = std::sync::mpsc::sync_channel::<Order>(1);
    std::thread::Builder::new().name(format!("look {}", storage.name)).spawn(move || {
        for order in ordered {
            // Whoever ordered may have stopped meanwhile.
            let _ = order.send(look(&storage, minimum_free));
        }
    })?;
    Ok(orders)
}

/// The last reports on all storages.
pub(crate) struct StorageHealth {
    reports: Mutex<BTreeMap<String, Report>>,
    reporter: HealthReporter,
}

impl StorageHealth {
    /// Looks at every storage once, within the configured patience, and from then on for as long as `tasks` run.
    pub(crate) async fn start(
        storages: &[Storage],
        config: &StorageHealthConfig,
        reporter: HealthReporter,
        tasks: &Tasks,
    ) -> io::Result<Arc<Self>> {
        let health = Arc::new(Self { reports: Mutex::default(), reporter });
        let minimum_free = config.minimum_free_mebibytes.saturating_mul(1 << 20);
        let mut first_looks = Vec::new();
        for storage in storages {
            let orders = looker(storage.clone(), minimum_free)?;
            let (seen, first) = oneshot::channel();
            first_looks.push(first);
            let (health, config, storage) = (Arc::clone(&health), config.clone(), storage.clone());
            let stopping = tasks.stopping();
            tasks.spawn("storage health", async move {
                tokio::select! {
                    () = health.watch(&storage, &config, &orders, seen) => {}
                    () = stopping.cancelled() => {}
                }
            });
        }
        for first in first_looks {
            // It says so after its patience at the latest; an error means that we are told to stop.
            let _ = first.await;
        }
        Ok(health)
    }

    async fn watch(
        &self,
        storage: &Storage,
        config: &StorageHealthConfig,
        orders: &std::sync::mpsc::SyncSender<Order>,
        seen: oneshot::Sender<()>,
    ) {
        let mut seen = Some(seen);
        loop {
            let (order, mut report) = oneshot::channel();
            if orders.try_send(order).is_err() {
                tracing::error!(storage = storage.name, "nobody looks at the storage any more");
                return;
            }
            let looked = tokio::time::timeout(config.patience.0, &mut report).await;
            let found = if let Ok(found) = looked {
                found
            } else {
                self.publish(storage, Report::unknown(Problem::Hangs(config.patience.0))).await;
                seen.take().map(|seen| seen.send(()));
                report.await
            };
            let Ok(found) = found else { return };
            self.publish(storage, found).await;
            seen.take().map(|seen| seen.send(()));
            tokio::time::sleep(config.interval.0).await;
        }
    }

    async fn publish(&self, storage: &Storage, report: Report) {
        let healthy = report.problem.is_none();
        let (was_healthy, all_healthy) = {
            let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
            match &report.problem {
                Some(problem) if reports.get(&storage.name).is_none_or(|old| old.problem.is_none()) => {
                    tracing::error!(storage = storage.name, %problem, "storage cannot be used");
                }
                _ => {}
            }
            let old = reports.insert(storage.name.clone(), report);
            (old.map(|old| old.problem.is_none()), reports.values().all(|report| report.problem.is_none()))
        };
        if was_healthy == Some(healthy) {
            return;
        }
        if was_healthy == Some(false) {
            tracing::info!(storage = storage.name, "storage can be used again");
        }
        let status = |well| if well { ServingStatus::Serving } else { ServingStatus::NotServing };
        let own = storage_health_service(&storage.name, &storage.filesystem_id);
        self.reporter.set_service_status(own, status(healthy)).await;
        self.reporter.set_service_status("", status(all_healthy)).await;
    }

    /// The last report; of a storage that is not ours there is none.
    pub(crate) fn report(&self, storage: &str) -> Option<Report> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).get(storage).cloned()
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tabularium_common::config::ConfigDuration;
    use tonic::Request;
    use tonic_health::pb::{HealthCheckRequest, health_server::Health as _};

    use super::*;

    struct Watched {
        _directory: tempfile::TempDir,
        storage: Storage,
        health: Arc<StorageHealth>,
        service: tonic_health::server::HealthService,
        tasks: Tasks,
    }

    impl Watched {
        async fn start(minimum_free_mebibytes: u64) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let root = directory.path().join("storage");
            fs::create_dir_all(root.join(OWN_DIRECTORY)).unwrap();
            give_identity(&root, "one");
            let storage = Storage { name: "a".into(), root, filesystem_id: "one".into() };
            let (reporter, _) = tonic_health::server::health_reporter();
            let service = tonic_health::server::HealthService::from_health_reporter(reporter.clone());
            let config = StorageHealthConfig {
                interval: ConfigDuration::from_millis(10),
                patience: ConfigDuration::from_millis(200),
                minimum_free_mebibytes,
            };
            let tasks = Tasks::new();
            let health = StorageHealth::start(std::slice::from_ref(&storage), &config, reporter, &tasks)
                .await
                .unwrap();
            Self { _directory: directory, storage, health, service, tasks }
        }

        async fn serving(&self, service: &str) -> bool {
            let request = Request::new(HealthCheckRequest { service: service.to_owned() });
            self.service.check(request).await.unwrap().into_inner().status()
                == tonic_health::pb::health_check_response::ServingStatus::Serving
        }

        fn problem(&self) -> Option<Problem> {
            self.health.report("a").unwrap().problem
        }

        async fn until(&self, wanted: impl Fn(Option<Problem>) -> bool) {
            let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
            while !wanted(self.problem()) {
                assert!(tokio::time::Instant::now() < deadline, "never; last: {:?}", self.problem());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let well = self.problem().is_none();
            // The word goes out right after the report.
            while self.serving("").await != well {
                assert!(tokio::time::Instant::now() < deadline, "health is not told");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(self.serving(&storage_health_service("a", "one")).await, well);
        }

        async fn stop(self) {
            self.tasks.drain(Duration::from_secs(5)).await.unwrap();
        }
    }

    fn give_identity(root: &Path, id: &str) {
        fs::write(root.join(IDENTITY_FILE), format!("{{\"gitaly_filesystem_id\":\"{id}\"}}")).unwrap();
    }

    #[tokio::test]
    async fn a_disk_that_is_not_mounted_is_not_served_until_it_is_back() {
        let watched = Watched::start(0).await;
        watched.until(|problem| problem.is_none()).await;
        let (root, aside) = (watched.storage.root.clone(), watched.storage.root.with_extension("aside"));
        fs::rename(&root, &aside).unwrap();
        fs::create_dir_all(root.join(OWN_DIRECTORY)).unwrap();
        watched.until(|problem| matches!(problem, Some(Problem::IdentityUnreadable(_)))).await;
        give_identity(&root, "two");
        watched.until(|problem| matches!(problem, Some(Problem::OtherIdentity { .. }))).await;
        fs::remove_dir_all(&root).unwrap();
        watched.until(|problem| matches!(problem, Some(Problem::Unreadable(_)))).await;
        fs::rename(&aside, &root).unwrap();
        watched.until(|problem| problem.is_none()).await;
        watched.stop().await;
    }

    #[tokio::test]
    async fn a_disk_that_cannot_be_written_is_not_served() {
        let watched = Watched::start(0).await;
        let own = watched.storage.root.join(OWN_DIRECTORY);
        fs::remove_dir(&own).unwrap();
        fs::write(&own, "in the way").unwrap();
        watched.until(|problem| matches!(problem, Some(Problem::Unwriteable(_)))).await;
        assert!(watched.health.report("a").unwrap().readable);
        fs::remove_file(&own).unwrap();
        fs::create_dir(&own).unwrap();
        watched.until(|problem| problem.is_none()).await;
        watched.stop().await;
    }

    #[tokio::test]
    async fn a_full_disk_is_not_served() {
        let watched = Watched::start(u64::MAX >> 20).await;
        watched.until(|problem| matches!(problem, Some(Problem::Full { .. }))).await;
        watched.stop().await;
    }

    /// Opening a pipe that nobody writes to blocks like a disk that does not answer.
    #[tokio::test]
    async fn a_disk_that_hangs_is_not_served_and_holds_up_nobody() {
        let watched = Watched::start(0).await;
        let identity = watched.storage.root.join(IDENTITY_FILE);
        let pipe = identity.with_extension("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        fs::rename(&pipe, &identity).unwrap();
        watched.until(|problem| matches!(problem, Some(Problem::Hangs(_)))).await;
        // Only now does the look come to its end; the next one finds everything in order.
        let hanging = identity.with_extension("hanging");
        fs::rename(&identity, &hanging).unwrap();
        give_identity(&watched.storage.root, "one");
        fs::write(&hanging, "{}").unwrap();
        watched.until(|problem| problem.is_none()).await;
        watched.stop().await;
    }

    #[test]
    fn what_is_most_telling_is_said() {
        let well = Findings { identity: Ok("one".into()), listed: Ok(()), written: Ok(()), available: 10 };
        assert_eq!(judge(&well, "one", 10), None);
        assert!(matches!(judge(&well, "one", 11), Some(Problem::Full { .. })));
        let unmounted =
            Findings { identity: Err("not found".into()), written: Err("no".into()), ..well.clone() };
        assert!(matches!(judge(&unmounted, "one", 11), Some(Problem::IdentityUnreadable(_))));
        let other = Findings { identity: Ok("two".into()), ..well.clone() };
        let said = judge(&other, "one", 0).unwrap().to_string();
        assert!(said.contains("one") && said.contains("two"), "{said}");
        let read_only = Findings { written: Err("Read-only file system".into()), ..well };
        assert!(judge(&read_only, "one", 0).unwrap().to_string().contains("Read-only"));
    }
}
