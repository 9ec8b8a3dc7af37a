//! Corrupt replicas that are kept aside for inspection when they are made again: few, and not for long.
//!
//! Each is a directory of its own below `+gitaly/kept`, where nobody looks for repositories, with the files of the replica
//! and a note in JSON that says what it was. The bounds of [`KeptConfig`] hold for each storage; the oldest go first. What
//! is kept is for people: nothing is decided by it, and losing it costs nothing else.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tabularium_proto::node as wire;
use tonic::Status;

use crate::{
    config::KeptConfig,
    corruption::Corruption,
    error::internal_io,
    node::Node,
    place::{Temporary, blocking, sync_parent},
    records,
    storage::{OWN_DIRECTORY, RepositoryPath, Storage},
};

const DIRECTORY: &str = "kept";
const NOTE: &str = "note.json";
const FILES: &str = "repository";
/// Largest note that is read.
const MAX_NOTE_BYTES: u64 = 64 * 1024;
/// How often it is looked whether something is to go.
const INTERVAL: Duration = Duration::from_secs(60);
/// What has no files at this age is what a crash left of a beginning.
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);

/// What is written beside the files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    replica_path: String,
    repository_id: i64,
    virtual_storage: String,
    relative_path: String,
    reason: String,
    found_at: i64,
    kept_at: i64,
}

/// Why nothing was kept.
#[derive(Debug, thiserror::Error)]
enum NotKept {
    #[error("none are to be kept")]
    Unwanted,
    #[error("only {} MiB are free, fewer than {} MiB", .free >> 20, .needed >> 20)]
    Full { free: u64, needed: u64 },
    #[error(transparent)]
    Io(#[from] io::Error),
}

fn directory(storage: &Storage) -> PathBuf {
    storage.root.join(OWN_DIRECTORY).join(DIRECTORY)
}

fn free_bytes(storage: &Storage) -> io::Result<u64> {
    let found = rustix::fs::statvfs(&storage.root)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

fn seconds(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// Makes room and a note for a replica; answers the directory that is to take its files.
fn prepare(
    target: &RepositoryPath,
    corruption: &Corruption,
    bounds: &KeptConfig,
) -> Result<PathBuf, NotKept> {
    if bounds.most == 0 {
        return Err(NotKept::Unwanted);
    }
    let (free, needed) = (free_bytes(&target.storage)?, bounds.minimum_free_bytes());
    if free < needed {
        return Err(NotKept::Full { free, needed });
    }
    let record = records::read(&target.path).unwrap_or_default().unwrap_or_default();
    let now = SystemTime::now();
    let note = Note {
        replica_path: target.relative_path.clone(),
        repository_id: record.repository_id,
        virtual_storage: record.virtual_storage,
        relative_path: record.relative_path,
        reason: corruption.reason.clone(),
        found_at: corruption.found_at,
        kept_at: seconds(now),
    };
    let name = target.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let stamp = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let place = directory(&target.storage).join(format!("{name}-{stamp}"));
    fs::create_dir_all(directory(&target.storage))?;
    fs::create_dir(&place)?;
    let file = fs::File::create(place.join(NOTE))?;
    serde_json::to_writer_pretty(&file, &note).map_err(io::Error::from)?;
    file.sync_all()?;
    Ok(place)
}

/// Moves the replica aside, or, when it cannot be kept, into `grave`. Its place is free afterwards.
pub(crate) fn move_aside(
    target: &RepositoryPath,
    corruption: &Corruption,
    bounds: &KeptConfig,
    grave: &Path,
) -> io::Result<()> {
    let kept = prepare(target, corruption, bounds).and_then(|place| {
        let files = place.join(FILES);
        fs::rename(&target.path, &files)?;
        sync_parent(&files)?;
        sync_parent(&place)?;
        Ok(place)
    });
    tell(target, corruption, &kept);
    if kept.is_err() && target.path.exists() {
        fs::rename(&target.path, grave.join(FILES))?;
    }
    sync_parent(&target.path)
}

/// Keeps what the replica holds and leaves it where it is. Objects are shared: git never changes one in place.
pub(crate) async fn copy_aside(node: &Node, target: &RepositoryPath, corruption: Corruption) {
    let (target, bounds) = (target.clone(), node.kept.clone());
    let Ok(scratch) = Temporary::new(node, &target.storage, "kept-") else {
        tracing::warn!(path = %target.path.display(), "a corrupt replica is not kept: no place to copy it to");
        return;
    };
    let storage = target.storage.clone();
    let copied = blocking(move || {
        let copy = scratch.path().join(FILES);
        let kept = prepare(&target, &corruption, &bounds).and_then(|place| {
            link_tree(&target.path, &copy, false)?;
            fs::rename(&copy, place.join(FILES))?;
            Ok(place)
        });
        tell(&target, &corruption, &kept);
        Ok::<(), Status>(())
    });
    if let Err(status) = copied.await {
        tracing::warn!(error = status.message(), "a corrupt replica is not kept");
    }
    prune(node, &storage).await;
}

fn tell(target: &RepositoryPath, corruption: &Corruption, kept: &Result<PathBuf, NotKept>) {
    let (path, reason) = (target.path.display(), &corruption.reason);
    match kept {
        Ok(place) => {
            tracing::error!(%path, kept = %place.display(), reason, "a corrupt replica is kept aside");
        }
        Err(error) => tracing::error!(%path, %error, reason, "a corrupt replica is not kept aside"),
    }
}

/// Copies a directory; files below `objects` are linked.
fn link_tree(from: &Path, to: &Path, link: bool) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, copy) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        let done = if kind.is_dir() {
            link_tree(&source, &copy, link || entry.file_name() == "objects")
        } else if !kind.is_file() {
            Ok(())
        } else if link {
            fs::hard_link(&source, &copy)
        } else {
            fs::copy(&source, &copy).map(drop)
        };
        match done {
            // Somebody is at work there: a quarantine has gone, or a lock.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => done?,
        }
    }
    Ok(())
}

/// One of those that are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    id: String,
    note: Note,
    /// Its files are there.
    complete: bool,
}

fn entries(storage: &Storage) -> io::Result<Vec<Entry>> {
    let listed = match fs::read_dir(directory(storage)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let mut entries = Vec::new();
    for entry in listed {
        let entry = entry?;
        let Ok(id) = entry.file_name().into_string() else { continue };
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let note = read_note(&entry.path()).unwrap_or_else(|error| {
            let kept_at = entry.metadata().and_then(|metadata| metadata.modified()).map_or(0, seconds);
            Note { reason: format!("the note cannot be read: {error}"), kept_at, ..Note::default() }
        });
        entries.push(Entry { id, note, complete: entry.path().join(FILES).is_dir() });
    }
    entries.sort_by(|one, other| (one.note.kept_at, &one.id).cmp(&(other.note.kept_at, &other.id)));
    Ok(entries)
}

fn read_note(place: &Path) -> io::Result<Note> {
    let mut text = String::new();
    let file = fs::File::open(place.join(NOTE))?;
    io::Read::read_to_string(&mut io::Read::take(file, MAX_NOTE_BYTES), &mut text)?;
    Ok(serde_json::from_str(&text)?)
}

/// Which of them are to go, the oldest first. For the sake of space one at a time: what it frees is seen the next time.
fn excess(entries: &[Entry], now: i64, free: u64, bounds: &KeptConfig) -> Vec<String> {
    let age =
        |entry: &Entry| Duration::from_secs(now.saturating_sub(entry.note.kept_at).max(0).unsigned_abs());
    let mut going: Vec<&Entry> = entries
        .iter()
        .filter(|entry| age(entry) >= if entry.complete { bounds.longest.0 } else { ABANDONED_AFTER })
        .collect();
    let staying: Vec<&Entry> =
        entries.iter().filter(|entry| entry.complete && !going.contains(entry)).collect();
    let surplus = staying.len().saturating_sub(bounds.most);
    let short = going.is_empty() && surplus == 0 && free < bounds.minimum_free_bytes();
    going.extend(staying.into_iter().take(surplus + usize::from(short)));
    going.into_iter().map(|entry| entry.id.clone()).collect()
}

/// Removes what is beyond the bounds.
pub(crate) async fn prune(node: &Node, storage: &Storage) {
    let (looked_at, bounds) = (storage.clone(), node.kept.clone());
    let found = blocking(move || {
        let looked = || Ok((entries(&looked_at)?, free_bytes(&looked_at)?));
        let (entries, free) = looked().map_err(internal_io("looking at what is kept"))?;
        Ok(excess(&entries, seconds(SystemTime::now()), free, &bounds))
    });
    let going = found.await.unwrap_or_else(|status: Status| {
        tracing::warn!(storage = storage.name, error = status.message(), "kept replicas are not looked at");
        Vec::new()
    });
    for id in going {
        match discard(node, storage, &id) {
            Ok(()) => {
                tracing::info!(storage = storage.name, kept = id, "a corrupt replica is not kept any longer");
            }
            Err(status) => {
                tracing::warn!(
                    storage = storage.name,
                    kept = id,
                    error = status.message(),
                    "a kept replica stays"
                );
            }
        }
    }
}

/// Looks after all storages until the node stops.
pub(crate) fn start(node: &Arc<Node>) {
    let (node, stopping) = (Arc::clone(node), node.tasks.stopping());
    node.tasks.clone().spawn("kept replicas", async move {
        loop {
            for storage in node.storages.iter() {
                prune(&node, storage).await;
            }
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = stopping.cancelled() => return,
            }
        }
    });
}

/// Moves one out of sight at once, and deletes it in the background.
fn discard(node: &Node, storage: &Storage, id: &str) -> Result<(), Status> {
    let grave = Temporary::new(node, storage, "unkept-")?;
    match fs::rename(directory(storage).join(id), grave.path().join(DIRECTORY)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Status::not_found("there is no such kept replica"))
        }
        moved => moved.map_err(internal_io("removing a kept replica")),
    }
}

/// Removes one of a storage's.
pub(crate) fn remove(node: &Node, storage: &Storage, id: &str) -> Result<(), Status> {
    let names_one = Path::new(id).components().eq([std::path::Component::Normal(id.as_ref())]);
    if !names_one {
        return Err(Status::invalid_argument("kept_id is not the name of a kept replica"));
    }
    discard(node, storage, id)
}

/// All of a storage's, the oldest first.
pub(crate) async fn list(storage: &Storage) -> Result<Vec<wire::KeptReplica>, Status> {
    let storage = storage.clone();
    let listed = move || -> io::Result<Vec<wire::KeptReplica>> {
        let complete = entries(&storage)?.into_iter().filter(|entry| entry.complete);
        complete.map(|entry| kept_replica(&storage, entry)).collect()
    };
    blocking(move || listed().map_err(internal_io("listing what is kept"))).await
}

fn kept_replica(storage: &Storage, entry: Entry) -> io::Result<wire::KeptReplica> {
    let path = directory(storage).join(&entry.id).join(FILES);
    let mut sizes = BTreeMap::new();
    measure(&path, &mut sizes)?;
    let Note { replica_path, repository_id, virtual_storage, relative_path, reason, found_at, kept_at } =
        entry.note;
    Ok(wire::KeptReplica {
        kept_id: entry.id,
        replica_path,
        repository_id,
        virtual_storage,
        relative_path,
        reason,
        found_at,
        kept_at,
        path: path.display().to_string(),
        bytes: sizes.into_values().sum(),
    })
}

/// Sizes by inode: a file of several names counts once.
fn measure(directory: &Path, sizes: &mut BTreeMap<u64, u64>) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let listed = match fs::read_dir(directory) {
        // It is being removed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listed => listed?,
    };
    for entry in listed {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            measure(&entry.path(), sizes)?;
        } else if let Ok(metadata) = entry.metadata() {
            sizes.insert(metadata.ino(), metadata.len());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tabularium_common::config::ConfigDuration;

    use super::*;

    fn entry(id: &str, kept_at: i64) -> Entry {
        Entry { id: id.into(), note: Note { kept_at, ..Note::default() }, complete: true }
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many_or_they_are_too_old_or_space_is_short() {
        let bounds =
            KeptConfig { most: 2, longest: ConfigDuration::from_secs(100), minimum_free_mebibytes: 1 };
        let much = 1 << 20;
        let all = [entry("a", 900), entry("b", 950), entry("c", 960)];
        assert_eq!(excess(&all, 970, much, &bounds), ["a"], "one too many");
        assert_eq!(excess(&all, 1_000, much, &bounds), ["a"], "too old");
        assert_eq!(excess(&all, 1_055, much, &bounds), ["a", "b"]);
        assert!(excess(&all[1..], 970, much, &bounds).is_empty());
        assert_eq!(excess(&all[1..], 970, much - 1, &bounds), ["b"], "one at a time");
        let begun = [Entry { complete: false, ..entry("x", 0) }];
        assert!(excess(&begun, 3_599, much, &bounds).is_empty());
        assert_eq!(excess(&begun, 3_600, much, &bounds), ["x"]);
    }
}
