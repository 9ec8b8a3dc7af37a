//! How a secondary takes part in a push.
//!
//! What a push does is decided on the primary: it runs the repository's hooks, checks the objects and says no. A
//! secondary has to end with the same objects and the same reference, and to say so when it is asked. For a push that
//! moves one reference that takes none of the ten or so processes of `git receive-pack` and its hooks. There are three
//! steps, and each is done here if it is an ordinary one, else by a process of git:
//!
//! 1. The objects are taken in, durably, in a quarantine: [`in_process`] takes a small [`pack`] apart and has its objects
//!    written ([`store`]); `git unpack-objects` or `git index-pack` takes in any other ([`by_git`]).
//! 2. It is seen that nothing is missing from what they lead to: [`connectivity`], else `git rev-list`.
//! 3. The reference is locked, voted on and moved: [`moving`], with [`references`] read from their files, else a
//!    transaction of `git update-ref`.
//!
//! [`ordinary`] says whether a repository is one of which all is known here. Nothing is refused here: what is out of the
//! ordinary is left to git, so that its rules and words decide. The votes are those that `git receive-pack` with its
//! hooks casts, in the same order and about the same bytes, so primaries cannot tell the difference, and a secondary that
//! goes the other way may stand beside one that follows.
//!
//! Not followed, but run like on the primary, is what git decides about by rules that differ between its versions:
//! several references, deletions, symbolic references, push options, shallow and signed pushes.

#[cfg(test)]
mod agreement;
mod by_git;
mod connectivity;
mod head;
mod in_process;
mod moving;
mod opening;
mod ordinary;
mod pack;
#[cfg(test)]
mod power;
mod references;
mod store;

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, path::Path, sync::Arc};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tonic::Status;

use crate::{
    error::internal_io,
    git::{
        Slot,
        quarantine::Quarantine,
        update_ref::{Expected, Subject, Transaction, UpdateRefError},
    },
    hooks::synchronization_point,
    metrics::SecondaryPush,
    node::Node,
    storage::RepositoryPath,
    votes::{Voter, agreed},
};
pub(crate) use head::HeadListing;
use in_process::{Objects, Refused, TakenIn};
use moving::Locked;
use opening::{Command, Opening};

/// From so many objects on they are kept as the pack that they came in, as `git receive-pack` does (`transfer.unpackLimit`).
const UNPACK_LIMIT: u32 = 100;

/// What is out of the ordinary, and so for git to judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
struct LeftToGit(&'static str);

/// A push that can be followed.
pub(crate) struct Push {
    command: Command,
    /// What has been read behind the command.
    objects: Bytes,
}

/// What a secondary is to do about a push.
pub(crate) enum Part {
    /// This.
    Follow(Push),
    /// Run it, with these bytes at its front.
    Run(Bytes),
}

/// Reads as much of the push as it takes to know.
pub(crate) async fn part<S>(node: &Node, repository: &RepositoryPath, data: &mut S) -> Result<Part, Status>
where
    S: Stream<Item = Result<Bytes, Status>> + Unpin,
{
    let part = choose(node, repository, data).await?;
    if matches!(part, Part::Run(_)) {
        node.metrics.secondary_push(SecondaryPush::Run);
    }
    Ok(part)
}

async fn choose<S>(node: &Node, repository: &RepositoryPath, data: &mut S) -> Result<Part, Status>
where
    S: Stream<Item = Result<Bytes, Status>> + Unpin,
{
    let mut front = Bytes::new();
    loop {
        match opening::read(&front) {
            Opening::Other => return Ok(Part::Run(front)),
            Opening::Single(command, objects) => {
                let known = node.head_listing != HeadListing::Unknown;
                return Ok(if known && is_plain(&repository.path, &command.reference) {
                    Part::Follow(Push { command, objects })
                } else {
                    Part::Run(front)
                });
            }
            Opening::Incomplete => match data.next().await.transpose()? {
                Some(more) if front.is_empty() => front = more,
                Some(more) => front = [front, more].concat().into(),
                None => return Ok(Part::Run(front)),
            },
        }
    }
}

/// The reference has a value of its own, if any.
fn is_plain(repository: &Path, reference: &[u8]) -> bool {
    !repository.join("reftable").exists() && symbolic_target(repository, reference).is_none()
}

/// What a symbolic reference stands for.
fn symbolic_target(repository: &Path, reference: &[u8]) -> Option<Vec<u8>> {
    let content = std::fs::read(repository.join(OsStr::from_bytes(reference))).ok()?;
    let target = content.strip_prefix(b"ref:")?;
    Some(target.trim_ascii().to_vec())
}

impl Push {
    /// Takes part in it to its end, and answers like git.
    pub(crate) async fn follow<S>(
        self,
        node: Arc<Node>,
        repository: RepositoryPath,
        voter: Voter,
        data: S,
    ) -> Result<Bytes, Status>
    where
        S: Stream<Item = Result<Bytes, Status>> + Unpin,
    {
        let Self { command, objects } = self;
        let report = command.report().map_err(|error| Status::internal(error.to_string()))?;
        let quarantine = Quarantine::create(&node, &repository)?;
        // For all of it: whoever has voted must not wait for room behind those that wait for the vote.
        let slot = node.git.slot().await?;
        let taken_in = take_in(&node, &quarantine, &slot, &command, objects, data).await?;
        voter.synchronize(&synchronization_point("pre-receive")).await?;
        // From here on the router decides, whether or not its client, or the router itself, goes away.
        let owner = Arc::clone(&node);
        let accepted = owner.tasks.spawn("followed push", async move {
            let moving = Moving { node: &node, repository: &repository, slot: &slot, command: &command };
            let preparing = async { moving.prepare(taken_in.nameable).await.map_err(refused) };
            let migrating =
                async { quarantine.migrate().await.map_err(internal_io("migrating quarantined objects")) };
            let agreeing = async { Ok(voter.synchronize(&synchronization_point("update")).await?) };
            let (prepared, (), ()) = tokio::try_join!(preparing, migrating, agreeing)?;
            let alone = taken_in.connected && matches!(prepared, Prepared::Locked(_));
            moving.make(prepared, &voter).await?;
            voter.synchronize(&synchronization_point("post-receive")).await?;
            voter.last_word().await?;
            node.metrics.secondary_push(if alone {
                SecondaryPush::FollowedInProcess
            } else {
                SecondaryPush::FollowedWithGit
            });
            Ok(())
        });
        let end = accepted.await;
        end.unwrap_or_else(|error| Err(Status::internal(format!("following a push: {error}"))))?;
        Ok(report)
    }
}

fn refused(error: UpdateRefError) -> Status {
    match error {
        UpdateRefError::Vote(error) => error.into(),
        UpdateRefError::Git(error) => error.into(),
        other => Status::failed_precondition(format!("following a push: {other}")),
    }
}

/// Takes the objects in, and sees that nothing is missing from what they lead to.
async fn take_in<S>(
    node: &Node,
    quarantine: &Quarantine,
    slot: &Slot,
    command: &Command,
    front: Bytes,
    data: S,
) -> Result<TakenIn, Status>
where
    S: Stream<Item = Result<Bytes, Status>> + Unpin,
{
    let seen = quarantine.repository();
    let mut data = data.fuse();
    let front = match in_process::gather(front, &mut data, node.following.largest_pack_bytes()).await? {
        Objects::Front(front) => front,
        Objects::Small(pack) => {
            let (path, into) = (seen.path.clone(), quarantine.directory());
            let (asked, small) = (command.clone(), pack.clone());
            let work = move || {
                let head = symbolic_target(&path, b"HEAD");
                in_process::take_in(&path, &into, &asked, head, &small)
            };
            let taken_in = tokio::task::spawn_blocking(work).await;
            match taken_in.map_err(|error| Status::internal(format!("taking objects in: {error}")))? {
                Ok(taken_in) => {
                    if !taken_in.connected {
                        by_git::check_connected(node, seen, slot, &command.new).await?;
                    }
                    return Ok(taken_in);
                }
                Err(Refused::Io(error)) => return Err(internal_io("writing objects")(error)),
                Err(Refused::LeftToGit(reason)) => {
                    tracing::debug!(%reason, "git takes the objects of a push in");
                    pack
                }
            }
        }
    };
    by_git::take_in(node, seen, slot, front, data).await?;
    by_git::check_connected(node, seen, slot, &command.new).await?;
    Ok(TakenIn { connected: false, nameable: false })
}

/// One reference that is to be created or moved.
struct Moving<'a> {
    node: &'a Node,
    repository: &'a RepositoryPath,
    slot: &'a Slot,
    command: &'a Command,
}

/// What will move it.
enum Prepared {
    Locked(Locked),
    ByGit(Box<Transaction>),
}

impl Moving<'_> {
    /// Locks the reference, or starts git, which does so later.
    async fn prepare(&self, nameable: bool) -> Result<Prepared, UpdateRefError> {
        if nameable {
            match self.lock().await {
                Ok(locked) => return Ok(Prepared::Locked(locked)),
                Err(reason) => tracing::debug!(%reason, "git moves the reference of a push"),
            }
        }
        let transaction = Transaction::start_in(&self.node.git, self.repository, true, self.slot);
        Ok(Prepared::ByGit(Box::new(transaction.await?)))
    }

    async fn lock(&self) -> Result<Locked, LeftToGit> {
        let writer = self.node.git.writer(self.repository).await;
        let (path, command) = (self.repository.path.clone(), self.command.clone());
        let locking = tokio::task::spawn_blocking(move || moving::lock(&path, &command, writer));
        locking.await.unwrap_or(Err(LeftToGit("nobody to lock it")))
    }

    /// Votes on it and moves it.
    async fn make(&self, prepared: Prepared, voter: &Voter) -> Result<(), Status> {
        let Command { old, new, reference, .. } = self.command;
        let expected = Expected::Value(old.clone());
        let speaks_of_head = self.node.head_listing == HeadListing::BranchAndHead
            && symbolic_target(&self.repository.path, b"HEAD").is_some_and(|branch| branch == *reference);
        match prepared {
            Prepared::ByGit(mut transaction) => {
                transaction.update(reference, new, &expected).await.map_err(refused)?;
                if speaks_of_head {
                    transaction.speaks_of(b"HEAD", new, &expected);
                }
                transaction.commit(self.node, voter).await.map_err(refused)
            }
            Prepared::Locked(locked) => {
                let mut subject = Subject::default();
                subject.add(reference, new, &expected);
                if speaks_of_head {
                    subject.add(b"HEAD", new, &expected);
                }
                let moving = async {
                    let moved = tokio::task::spawn_blocking(move || locked.apply()).await;
                    let moved = moved.map_err(std::io::Error::other).flatten();
                    moved.map_err(internal_io("moving a reference"))
                };
                let ballots = subject.ballot().into();
                agreed(&self.node.sections, voter, &self.repository.path, ballots, moving).await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbolic_references_are_left_to_git() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("refs/heads")).unwrap();
        std::fs::write(directory.path().join("refs/heads/a"), "1".repeat(40)).unwrap();
        std::fs::write(directory.path().join("refs/heads/s"), "ref: refs/heads/a\n").unwrap();
        let plain = |name: &str| is_plain(directory.path(), name.as_bytes());
        assert!(plain("refs/heads/a") && plain("refs/heads/new") && !plain("refs/heads/s"));
        assert_eq!(symbolic_target(directory.path(), b"refs/heads/s").unwrap(), b"refs/heads/a");
    }
}
