//! The fence of copies: each attempt to copy onto a replica has a number, and once a number was seen, copies with lower
//! ones are refused. A copy that comes late can therefore not undo what a later one brought, nor what was written since.
//!
//! Numbers are remembered in the replica itself, so that also the node's next process knows them. A copy that is under
//! way is cut off when one with a higher number arrives, and has replaced its last file before that one begins.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use tabularium_common::lifecycle::Tasks;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Status, metadata::MetadataMap};

use crate::{
    error::internal_io,
    git::Git,
    keyed_locks::{KeyedLock, KeyedLocks},
    place::{blocking, replace_file},
    storage::RepositoryPath,
};

/// Metadata key of a copy's number.
const METADATA_KEY: &str = "tabularium-copy-attempt";
/// File in the replica that holds the highest number that began.
pub(crate) const FILE: &str = "tabularium-copy-attempt";

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

/// The turn of one copy to change a replica. It is over when this is dropped, except for the step that is just being done.
pub(crate) struct Turn {
    lock: Arc<KeyedLock>,
    over: CancellationToken,
    _over: DropGuard,
    tasks: Tasks,
}

impl Turn {
    /// Waits until no other copy onto the replica changes it any more; the caller's own deadline bounds the wait.
    pub(crate) async fn wait(copying: &KeyedLocks, tasks: &Tasks, replica: &Path) -> Self {
        let lock = Arc::new(copying.lock(replica).await);
        let over = CancellationToken::new();
        Self { lock, _over: over.clone().drop_guard(), over, tasks: tasks.clone() }
    }

    /// Git for the copy: the turn is not over before its processes are gone, which takes a moment when it is cut off.
    pub(crate) fn git(&self, git: &Git) -> Git {
        git.holding(Arc::clone(&self.lock))
    }

    /// Does a step that cannot be cut off: begun, it goes on when the copy is given up, and nobody else's turn comes before
    /// its end; not begun, it is not done any more.
    pub(crate) async fn to_its_end<T: Send + 'static>(
        &self,
        step: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let (lock, over) = (Arc::clone(&self.lock), self.over.clone());
        let done = self.tasks.spawn("step of a copy", async move {
            let _lock = lock;
            if over.is_cancelled() {
                return Err(Status::cancelled("the copy was given up"));
            }
            step.await
        });
        done.await.unwrap_or_else(|error| Err(Status::internal(format!("step of a copy: {error}"))))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        time::Duration,
    };

    use futures::FutureExt as _;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_copy_that_was_cut_off_ends_its_step_before_the_next_one_begins() {
        let (copying, tasks, replica) = (KeyedLocks::default(), Tasks::new(), Path::new("a"));
        let (go_on, wait) = tokio::sync::oneshot::channel::<()>();
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let replaced = Arc::new(AtomicBool::new(false));
        let effect = Arc::clone(&replaced);
        let first = Turn::wait(&copying, &tasks, replica).await;
        let copy = async move {
            let step = async move {
                begun.send(()).unwrap();
                wait.await.unwrap();
                effect.store(true, Ordering::SeqCst);
                Ok(())
            };
            first.to_its_end(step).await
        };
        tokio::select! {
            _ = copy => panic!("nobody has let it go on"),
            _ = has_begun => {}
        }
        let mut next = Box::pin(Turn::wait(&copying, &tasks, replica));
        assert!(timeout(Duration::from_secs(60), &mut next).await.is_err(), "the step is being done");
        go_on.send(()).unwrap();
        let next = timeout(Duration::from_secs(1), next).await.expect("its turn");
        assert!(replaced.load(Ordering::SeqCst));
        next.to_its_end(async { Ok(()) }).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_copy_that_was_cut_off_begins_no_step_any_more() {
        let (copying, tasks, replica) = (KeyedLocks::default(), Tasks::new(), Path::new("a"));
        let replaced = Arc::new(AtomicBool::new(false));
        let effect = Arc::clone(&replaced);
        let first = Turn::wait(&copying, &tasks, replica).await;
        let copy = async move {
            let step = async move {
                effect.store(true, Ordering::SeqCst);
                Ok(())
            };
            first.to_its_end(step).await
        };
        assert!(
            copy.now_or_never().is_none(),
            "the step waits for a thread, and nobody for the step any more"
        );
        drop(Turn::wait(&copying, &tasks, replica).await);
        assert_eq!(tasks.running(), [""; 0], "it has been taken up");
        assert!(!replaced.load(Ordering::SeqCst));
    }

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
