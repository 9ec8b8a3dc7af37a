//! What the node keeps beside a replica's files: which repository it is of and how far it has come, in the database's
//! words. When the database cannot be asked it tells which replica is the newest; when it is lost, it is made anew from this.
//!
//! A record is written before the node says that it has made a change. Only a newer one takes the place of another, so that
//! what comes late changes nothing. It is no part of what replicas have in common, and no copy brings it along: it is this
//! replica's own.

use std::{
    fs::{self, File},
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
    io::{self, Write as _},
    path::Path,
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use tabularium_common::records::standing;
use tabularium_proto::node::ReplicaRecord;

use crate::copy_attempts::CopyAttempt;

/// Name of the file in the replica.
pub(crate) const FILE: &str = "tabularium-record";
/// The next one, until it is on disk. One that a crash left is written over.
const NEXT: &str = "tabularium-record.next";
/// Largest record that is read: paths are short.
const MAX_BYTES: u64 = 64 * 1024;

/// Whoever replaces a record holds its replica's; several replicas share one.
static REPLACING: [Mutex<()>; 64] = [const { Mutex::new(()) }; 64];

/// A record on disk. A key that is not known belongs to a later version.
#[derive(Serialize, Deserialize)]
struct Written {
    repository_id: i64,
    virtual_storage: String,
    relative_path: String,
    generation: i64,
    epoch: i64,
    write_id: String,
    #[serde(default)]
    settlement: u64,
    #[serde(default)]
    changes: u32,
    complete: bool,
}

impl From<ReplicaRecord> for Written {
    fn from(record: ReplicaRecord) -> Self {
        Self {
            repository_id: record.repository_id,
            virtual_storage: record.virtual_storage,
            relative_path: record.relative_path,
            generation: record.generation,
            epoch: record.epoch,
            write_id: record.write_id,
            settlement: record.settlement,
            changes: record.changes,
            complete: record.complete,
        }
    }
}

impl From<Written> for ReplicaRecord {
    fn from(written: Written) -> Self {
        Self {
            repository_id: written.repository_id,
            virtual_storage: written.virtual_storage,
            relative_path: written.relative_path,
            generation: written.generation,
            epoch: written.epoch,
            write_id: written.write_id,
            settlement: written.settlement,
            changes: written.changes,
            complete: written.complete,
        }
    }
}

/// What became of a record that was to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// It is on disk.
    Written,
    /// The replica has a newer one.
    Overtaken,
    /// It is of a copy, and another one began since.
    OtherCopy,
    /// The replica is gone.
    Gone,
}

/// The record of the replica in this directory; `None`: there is none.
pub(crate) fn read(replica: &Path) -> io::Result<Option<ReplicaRecord>> {
    let file = match File::open(replica.join(FILE)) {
        Err(error) if is_absent(&error) => return Ok(None),
        opened => opened?,
    };
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(file, MAX_BYTES), &mut text)?;
    let written: Written = serde_json::from_str(&text)?;
    Ok(Some(written.into()))
}

/// The same for whoever can go on without: one that cannot be read says nothing, and the log says so.
fn read_if_sound(replica: &Path) -> Option<ReplicaRecord> {
    read(replica).unwrap_or_else(|error| {
        tracing::warn!(%error, path = %replica.display(), "a record cannot be read and says nothing");
        None
    })
}

/// What is known of the replica in this directory by its record.
pub(crate) async fn known(replica: &Path) -> Option<ReplicaRecord> {
    let replica = replica.to_owned();
    let reading = tokio::task::spawn_blocking(move || read_if_sound(&replica)).await;
    reading.unwrap_or_else(|error| {
        tracing::warn!(%error, "a record is not read");
        None
    })
}

/// Writes the record durably, unless the replica has a newer one of the same repository. One that is about a copy is
/// written only if no other has begun since: that one suspends what it finds, once it has its number on disk.
pub(crate) fn write(replica: &Path, record: ReplicaRecord, copy: Option<CopyAttempt>) -> io::Result<Kept> {
    let _alone = alone(replica);
    if let Some(copy) = copy
        && !copy.is_last(replica)?
    {
        return Ok(Kept::OtherCopy);
    }
    if let Some(present) =
        read_if_sound(replica).filter(|present| present.repository_id == record.repository_id)
    {
        let overtaken = match (present.complete, copy) {
            (true, _) => standing(&present) > standing(&record),
            // Only the copy itself says that it is good, or a write to what came of it.
            (false, None) => standing(&present) >= standing(&record),
            (false, Some(_)) => false,
        };
        if overtaken {
            return Ok(Kept::Overtaken);
        }
    }
    replace(replica, record)
}

/// Notes that what is there is no generation's any more: a copy begins.
pub(crate) fn suspend(replica: &Path) -> io::Result<()> {
    let _alone = alone(replica);
    match read_if_sound(replica) {
        Some(present) if present.complete => {
            replace(replica, ReplicaRecord { complete: false, ..present }).map(drop)
        }
        _ => Ok(()),
    }
}

fn alone(replica: &Path) -> impl Drop {
    let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(replica);
    #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
    let place = hash as usize % REPLACING.len();
    REPLACING[place].lock().unwrap_or_else(PoisonError::into_inner)
}

fn replace(replica: &Path, record: ReplicaRecord) -> io::Result<Kept> {
    let mut text = serde_json::to_vec(&Written::from(record))?;
    text.push(b'\n');
    let next = replica.join(NEXT);
    let mut file = match File::create(&next) {
        Err(error) if is_absent(&error) => return Ok(Kept::Gone),
        created => created?,
    };
    file.write_all(&text)?;
    file.sync_all()?;
    match fs::rename(next, replica.join(FILE)) {
        Err(error) if is_absent(&error) => return Ok(Kept::Gone),
        renamed => renamed?,
    }
    File::open(replica)?.sync_all()?;
    Ok(Kept::Written)
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(repository_id: i64, generation: i64, changes: u32) -> ReplicaRecord {
        ReplicaRecord {
            repository_id,
            generation,
            changes,
            relative_path: "group/ä.git".into(),
            complete: true,
            ..ReplicaRecord::default()
        }
    }

    #[test]
    fn only_a_newer_record_takes_the_place_of_another() {
        let directory = tempfile::tempdir().unwrap();
        let replica = directory.path();
        assert_eq!(read(replica).unwrap(), None);
        for (next, expected) in [
            (record(1, 4, 1), Kept::Written),
            (record(1, 4, 2), Kept::Written),
            (record(1, 4, 1), Kept::Overtaken),
            (record(1, 3, 9), Kept::Overtaken),
            (ReplicaRecord { settlement: 7, ..record(1, 4, 0) }, Kept::Written),
            (record(1, 4, 3), Kept::Overtaken),
            (record(2, 1, 0), Kept::Written),
        ] {
            let before = read(replica).unwrap();
            assert_eq!(write(replica, next.clone(), None).unwrap(), expected, "{next:?}");
            let after = read(replica).unwrap();
            assert_eq!(after, if expected == Kept::Written { Some(next) } else { before });
        }
        assert_eq!(fs::read_dir(replica).unwrap().count(), 1);
        assert_eq!(write(&replica.join("gone"), record(1, 1, 1), None).unwrap(), Kept::Gone);
    }

    #[test]
    fn what_a_copy_is_changing_is_no_generations_until_somebody_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let replica = directory.path();
        suspend(replica).unwrap();
        assert_eq!(read(replica).unwrap(), None);
        write(replica, record(1, 4, 1), None).unwrap();
        suspend(replica).unwrap();
        assert_eq!(read(replica).unwrap(), Some(ReplicaRecord { complete: false, ..record(1, 4, 1) }));
        assert_eq!(
            write(replica, record(1, 4, 1), None).unwrap(),
            Kept::Overtaken,
            "nor what was said before it"
        );
        fs::write(replica.join("tabularium-copy-attempt"), "7").unwrap();
        let of_copy = |number| write(replica, record(1, 3, 0), Some(CopyAttempt::numbered(number))).unwrap();
        assert_eq!((of_copy(6), of_copy(8)), (Kept::OtherCopy, Kept::OtherCopy));
        assert_eq!(of_copy(7), Kept::Written);
        assert_eq!(read(replica).unwrap(), Some(record(1, 3, 0)), "a copy may also make it older");
    }

    #[test]
    fn what_is_no_record_is_not_taken_for_one() {
        let directory = tempfile::tempdir().unwrap();
        let replica = directory.path();
        fs::write(replica.join(FILE), "{\"repository_id\":1").unwrap();
        assert_eq!(read(replica).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        suspend(replica).unwrap();
        assert_eq!(write(replica, record(1, 1, 1), None).unwrap(), Kept::Written);
        assert_eq!(read(replica).unwrap(), Some(record(1, 1, 1)));
    }
}
