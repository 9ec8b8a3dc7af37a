//! What has to be true when the faults are over: read from the nodes' disks and from the process table, not asked of the
//! services that are under test.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tabularium_cli::local::git::Git;
use tokio::time::Instant;

use crate::{
    cluster::Site,
    history::{Disk, Event, Finding, Recorder},
};

/// How long copies may take to follow.
const CONVERGED_WITHIN: Duration = Duration::from_secs(120);
/// The same where something is known to be broken.
const BRIEFLY: Duration = Duration::from_secs(15);
/// How long what was left over may lie about.
const CLEAN_WITHIN: Duration = Duration::from_secs(45);
/// Held by a node as long as it runs.
const NODE_LOCK: &str = "node.lock";
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// How long replicas that count as equal may differ while nobody writes. What a write in doubt left open is no such
/// difference: it is settled earlier.
const SILENT: Duration = Duration::from_secs(8);

/// Waits within limits, then writes down what there is. `brief`: not for what was left over.
pub(crate) async fn inspect(
    site: &Site,
    git: &Git,
    repositories: &[String],
    recorder: &Recorder,
    brief: bool,
) -> Result<Duration> {
    let find = |what: &str, detail: String| {
        recorder.record(&Event::Finding(Finding { what: what.to_owned(), detail }))
    };
    let began = Instant::now();
    let within = if brief { BRIEFLY } else { CONVERGED_WITHIN };
    for path in repositories {
        match level(site, path, began + within).await {
            Level::Equal => {}
            // On a busy machine that takes long, and proves nothing.
            Level::Behind(_) if brief => {}
            Level::Different(why) => find("different", format!("{path}: {why}"))?,
            Level::Behind(why) => {
                find("behind", format!("{path} after {} s: {why}", within.as_secs()))?;
            }
        }
    }
    let converged = began.elapsed();
    if brief {
        // Nothing.
    } else if let Err(left) = until(Instant::now() + CLEAN_WITHIN, async || clean(site)).await {
        find("left over", left)?;
    }
    for path in repositories {
        let details = site.test.details(path).await.context("details")?;
        let replica_path = details.route.context("no route")?.replica_path;
        for (storage, replica) in site.replicas(&replica_path) {
            match refs(git, &replica).await {
                Ok(refs) => {
                    let repository = path.clone();
                    recorder.record(&Event::Disk(Disk { repository, storage: storage.clone(), refs }))?;
                }
                Err(error) => find("unreadable", format!("{path} on {storage}: {error:#}"))?,
            }
            let checked = git.output(&replica, ["fsck", "--connectivity-only", "--no-dangling"]).await?;
            if !checked.status.success() {
                let said = String::from_utf8_lossy(&checked.stderr).trim().replace('\n', "; ");
                find("fsck", format!("{path} on {storage}: {said}"))?;
            }
        }
    }
    Ok(converged)
}

async fn until<F>(deadline: Instant, mut condition: impl FnMut() -> F) -> Result<(), String>
where
    F: Future<Output = Result<(), String>>,
{
    loop {
        match condition().await {
            Ok(()) => return Ok(()),
            Err(why) if Instant::now() > deadline => return Err(why),
            Err(_) => tokio::time::sleep(LOOK_INTERVAL).await,
        }
    }
}

/// How replicas are when they were waited for.
enum Level {
    Equal,
    /// They count as equal, and are not.
    Different(String),
    Behind(String),
}

/// Waits for generations and contents to be the same.
async fn level(site: &Site, path: &str, deadline: Instant) -> Level {
    let mut different: Option<(Instant, Vec<String>)> = None;
    loop {
        let why = match site.test.checksums(path).await {
            Ok(checksums) if checksums.windows(2).all(|pair| pair[0] == pair[1]) => return Level::Equal,
            Ok(checksums) => {
                if different.as_ref().is_none_or(|(_, before)| *before != checksums) {
                    different = Some((Instant::now(), checksums.clone()));
                }
                let silent = different.as_ref().is_some_and(|(since, _)| since.elapsed() > SILENT);
                if silent {
                    return Level::Different(format!("{checksums:?}"));
                }
                format!("{checksums:?}")
            }
            Err(why) => {
                different = None;
                why
            }
        };
        if Instant::now() > deadline {
            return Level::Behind(why);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// What is on a disk.
pub(crate) async fn refs(git: &Git, replica: &Path) -> Result<BTreeMap<String, String>> {
    let text = git.run(replica, ["for-each-ref", "--format=%(refname) %(objectname)"]).await?;
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    Ok(lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
}

/// Locks, quarantines, temporary files, and processes that work for nobody.
fn clean(site: &Site) -> Result<(), String> {
    let mut left = Vec::new();
    for storage in site.storages() {
        left_below(&storage, &mut left);
        left.extend(processes(&storage));
    }
    // Enough to see what it is.
    const SHOWN: usize = 8;
    let count = left.len();
    left.truncate(SHOWN);
    if left.is_empty() { Ok(()) } else { Err(format!("{count}: {}", left.join(", "))) }
}

fn left_below(directory: &Path, left: &mut Vec<String>) {
    // What is gone meanwhile is not left.
    let Ok(entries) = fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = directory.ends_with("+gitaly/tmp");
        // What is kept of a corrupt replica is kept as it was found.
        if name == NODE_LOCK || path.ends_with("+gitaly/kept") {
            continue;
        }
        if temporary || name.ends_with(".lock") || name.starts_with("tmp_") || name.starts_with("incoming-") {
            left.push(path.display().to_string());
        }
        if path.is_dir() && !path.is_symlink() {
            left_below(&path, left);
        }
    }
}

/// git and hooks that work below a directory.
fn processes(below: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let process = |path: PathBuf| {
        let directory = fs::read_link(path.join("cwd")).ok()?;
        let command = fs::read(path.join("cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let pid = path.file_name()?.to_string_lossy().into_owned();
        directory.starts_with(below).then(|| format!("process {pid} {command}"))
    };
    entries.flatten().filter_map(|entry| process(entry.path())).collect()
}
