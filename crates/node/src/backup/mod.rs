//! Backups of single repositories, which the node itself writes to a sink and restores from there: Gitaly's server-side
//! backups, in Gitaly's layout, so that either can restore what the other has written.
//!
//! A backup is a manifest ([`manifest`]) that names the files of its steps in the sink ([`sink`]): first a full one, then any
//! number that build on the one before. The files of a step are the references ([`references`]), a bundle of the objects that
//! the steps before lack, and the custom hooks.
//!
//! * [`mod@take`] writes one. References and objects are those of one moment: what is bundled is a copy of the references
//!   ([`frozen`]), whatever becomes of the repository meanwhile. The manifest comes last, when all that it names is on disk.
//! * [`mod@restore`] builds a repository from one beside its place. Of the steps' bundles only objects are taken ([`bundle`]), of
//!   the last step the references, and when nothing is missing the repository moves into place as any that is made
//!   ([`crate::place`]), with a vote, also over one that is there.
//!
//! All replicas of a repository have to see the same sink: whichever of them is asked writes a backup, and all of them restore.

mod bundle;
mod frozen;
mod manifest;
mod references;
mod restore;
mod sink;
mod take;

use std::{fs::File, io, path::PathBuf, time::Duration};

use tokio::time::{sleep, timeout};
use tonic::Status;

use crate::{error::internal_io, keyed_locks::KeyedLocks, place::blocking};

pub(crate) use manifest::{BackupId, Place};
pub(crate) use restore::{Wanted, restore};
pub(crate) use take::{Basis, take};

use sink::{Key, Sink};

/// How long whoever places files may be waited for: a few files are renamed and synced.
const TURN: Duration = Duration::from_secs(60);
/// Between two looks whether it is done.
const LOOK: Duration = Duration::from_millis(20);

/// Where this node writes backups, and restores from.
pub(crate) struct Backups {
    sink: Sink,
    /// One backup of a repository at a time: the next one builds on it.
    taking: KeyedLocks,
}

impl Backups {
    /// In a directory, which is there.
    pub(crate) fn open(directory: PathBuf) -> io::Result<Self> {
        Ok(Self { sink: Sink::open(directory)?, taking: KeyedLocks::default() })
    }

    /// Waits until no other node places files of this place's backups, and keeps them from it until the answer is dropped.
    async fn alone(&self, place: &Place) -> Result<File, Status> {
        let looking = async {
            loop {
                let place = place.clone();
                let held = self.with_sink("locking", move |sink| sink.try_alone(place.as_str())).await?;
                match held {
                    Some(held) => return Ok(held),
                    None => sleep(LOOK).await,
                }
            }
        };
        let late = |_| Err(Status::aborted("another node does not end writing a backup"));
        timeout(TURN, looking).await.unwrap_or_else(late)
    }

    /// What stands under a key, if anything does.
    async fn open_file(
        &self,
        key: io::Result<Key>,
        doing: &'static str,
    ) -> Result<Option<tokio::fs::File>, Status> {
        let key = key.map_err(internal_io(doing))?;
        let file = self.with_sink(doing, move |sink| sink.read(&key)).await?;
        Ok(file.map(tokio::fs::File::from_std))
    }

    /// Works on the sink where blocking is allowed.
    async fn with_sink<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&Sink) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Status> {
        let sink = self.sink.clone();
        blocking(move || work(&sink).map_err(internal_io(doing))).await
    }
}

/// Why there is no backup, or no repository.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackupError {
    /// There is nothing to do; the rest of the sentence, which is Gitaly's where it has one.
    #[error("{0}")]
    Skipped(&'static str),
    /// It failed.
    #[error("{}", .0.message())]
    Failed(#[from] Status),
}

impl From<crate::error::GitError> for BackupError {
    fn from(error: crate::error::GitError) -> Self {
        Self::Failed(error.into())
    }
}
