//! The fence of copies: each attempt to copy onto a replica has a number, and once a number was seen, copies with lower
//! ones are refused. A copy that comes late can therefore not undo what a later one brought, nor what was written since.
//!
//! Numbers are remembered in the replica itself, so that also the node's next process knows them. A copy that is under
//! way is cut off when one with a higher number arrives, and has ended before that one begins.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;
use tonic::{Status, metadata::MetadataMap};

use crate::{
    error::internal_io,
    place::{blocking, replace_file},
    storage::RepositoryPath,
};

/// Metadata key of a copy's number.
const METADATA_KEY: &str = "tabularium-copy-attempt";
/// File in the replica that holds the highest number that began.
const FILE: &str = "tabularium-copy-attempt";

/// The number of an attempt to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CopyAttempt(i64);

impl fmt::Display for CopyAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl CopyAttempt {
    /// What the caller says; `None` for one that numbers nothing, as Gitaly's own callers.
    pub(crate) fn of(metadata: &MetadataMap) -> Result<Option<Self>, Status> {
        let Some(value) = metadata.get(METADATA_KEY) else { return Ok(None) };
        let number = value.to_str().ok().and_then(|text| text.parse().ok()).filter(|number| *number > 0);
        let refused = || Status::invalid_argument(format!("{METADATA_KEY} metadata: not a positive number"));
        number.map(|number| Some(Self(number))).ok_or_else(refused)
    }

    fn refused(self, seen: Self) -> Status {
        Status::failed_precondition(format!("copy attempt {self} is overtaken by attempt {seen}"))
    }

    /// Fails when the replica has seen this number, or a higher one.
    pub(crate) async fn check(self, replica: &RepositoryPath) -> Result<(), Status> {
        let path = replica.path.join(FILE);
        let reading = internal_io("reading the number of the last copy");
        match blocking(move || remembered(&path).map_err(reading)).await? {
            Some(seen) if seen >= self => Err(self.refused(seen)),
            _ => Ok(()),
        }
    }

    /// A number that somebody names.
    pub(crate) fn numbered(number: i64) -> Self {
        Self(number)
    }

    /// Whether this is the last copy that began.
    pub(crate) fn is_last(self, replica: &Path) -> io::Result<bool> {
        Ok(remembered(&replica.join(FILE))? == Some(self))
    }

    /// Writes the number into the replica, durably.
    pub(crate) async fn remember(self, replica: &RepositoryPath) -> Result<(), Status> {
        let replica = replica.clone();
        let writing = internal_io("remembering the number of a copy");
        blocking(move || replace_file(&replica, FILE, self.0.to_string().as_bytes()).map_err(writing)).await
    }
}

/// What a replica remembers. A replica that is not there remembers nothing.
fn remembered(path: &Path) -> io::Result<Option<CopyAttempt>> {
    match std::fs::read_to_string(path) {
        Ok(text) => text
            .trim()
            .parse()
            .map(|number| Some(CopyAttempt(number)))
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("`{FILE}` holds no number"))),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

struct Newest {
    attempt: CopyAttempt,
    overtaken: CancellationToken,
    /// How many copies to the replica run or wait.
    present: usize,
}

/// Copies that run or wait on this node, by the replica they go to.
#[derive(Default, Clone)]
pub(crate) struct CopyAttempts(Arc<Mutex<HashMap<PathBuf, Newest>>>);

/// One copy, from its arrival to its end.
pub(crate) struct Arrived {
    attempts: CopyAttempts,
    replica: PathBuf,
    attempt: CopyAttempt,
    overtaken: CancellationToken,
}

impl CopyAttempts {
    /// Notes a copy that has arrived, and cuts off those with lower numbers. Refuses one that is not above all others here.
    pub(crate) fn arrive(&self, replica: &RepositoryPath, attempt: CopyAttempt) -> Result<Arrived, Status> {
        let overtaken = CancellationToken::new();
        let mut present = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match present.entry(replica.path.clone()) {
            Entry::Occupied(entry) if entry.get().attempt >= attempt => {
                return Err(attempt.refused(entry.get().attempt));
            }
            Entry::Occupied(mut entry) => {
                let newest = entry.get_mut();
                newest.overtaken.cancel();
                newest.attempt = attempt;
                newest.overtaken = overtaken.clone();
                newest.present += 1;
            }
            Entry::Vacant(entry) => {
                entry.insert(Newest { attempt, overtaken: overtaken.clone(), present: 1 });
            }
        }
        Ok(Arrived { attempts: self.clone(), replica: replica.path.clone(), attempt, overtaken })
    }
}

impl Arrived {
    /// Runs `work` unless, and until, a later attempt arrives.
    pub(crate) async fn unless_overtaken<T>(
        &self,
        work: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        tokio::select! {
            biased;
            () = self.overtaken.cancelled() => {
                Err(Status::failed_precondition(format!("copy attempt {} is overtaken by a later one", self.attempt)))
            }
            done = work => done,
        }
    }
}

impl Drop for Arrived {
    fn drop(&mut self) {
        let mut present = self.attempts.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(newest) = present.get_mut(&self.replica) {
            newest.present -= 1;
            if newest.present == 0 {
                present.remove(&self.replica);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(value: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert(METADATA_KEY, value.parse().unwrap());
        metadata
    }

    #[test]
    fn a_number_is_positive_or_absent() {
        assert_eq!(CopyAttempt::of(&MetadataMap::new()).unwrap(), None);
        assert_eq!(CopyAttempt::of(&metadata("7")).unwrap(), Some(CopyAttempt(7)));
        for bad in ["", "0", "-1", "x", "99999999999999999999"] {
            assert_eq!(
                CopyAttempt::of(&metadata(bad)).unwrap_err().code(),
                tonic::Code::InvalidArgument,
                "{bad}"
            );
        }
    }

    #[test]
    fn a_replica_remembers_until_it_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        assert_eq!(remembered(&file).unwrap(), None);
        std::fs::write(&file, "12\n").unwrap();
        assert_eq!(remembered(&file).unwrap(), Some(CopyAttempt(12)));
        std::fs::write(&file, "x").unwrap();
        assert_eq!(remembered(&file).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
