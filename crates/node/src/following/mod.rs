//! How a secondary takes part in a push.
//!
//! What a push does is decided on the primary: it runs the repository's hooks, checks the objects and says no. A
//! secondary has to end with the same objects and the same reference, and to say so when it is asked. For a push that
//! moves one reference that takes three processes instead of the ten or so of `git receive-pack` and its hooks: objects
//! are unpacked in a quarantine, it is checked that nothing is missing from what they lead to, and a reference
//! transaction moves the reference. The votes are those that `git receive-pack` with its hooks casts, in the same order
//! and about the same bytes, so primaries cannot tell the difference, and a secondary that goes the other way may stand
//! beside one that follows.
//!
//! Not followed, but run like on the primary, is what git decides about by rules that differ between its versions:
//! several references, deletions, symbolic references, push options, shallow and signed pushes.

mod head;
mod opening;

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, path::Path, sync::Arc};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tonic::Status;

use crate::{
    error::internal_io,
    git::{
        Exit, Slot,
        quarantine::Quarantine,
        update_ref::{Expected, Transaction, UpdateRefError},
    },
    hooks::synchronization_point,
    node::Node,
    services::streams,
    storage::RepositoryPath,
    votes::Voter,
};
pub(crate) use head::HeadListing;
use opening::{Command, Opening};

/// From so many objects on they are kept as the pack that they came in, as `git receive-pack` does (`transfer.unpackLimit`).
const UNPACK_LIMIT: u32 = 100;
/// `PACK`, version, number of objects.
const PACK_HEADER_BYTES: usize = 12;

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
        take_in(&node, quarantine.repository(), &slot, objects, data).await?;
        check_connected(&node, quarantine.repository(), &slot, &command.new).await?;
        voter.synchronize(&synchronization_point("pre-receive")).await?;
        // From here on the router decides, whether or not its client, or the router itself, goes away.
        let owner = Arc::clone(&node);
        let accepted = owner.tasks.spawn("followed push", async move {
            let moving = Transaction::start_in(&node.git, &repository, true, &slot);
            let migrating =
                async { quarantine.migrate().await.map_err(internal_io("migrating quarantined objects")) };
            let agreeing = async { Ok(voter.synchronize(&synchronization_point("update")).await?) };
            let (mut moving, (), ()) =
                tokio::try_join!(async { moving.await.map_err(refused) }, migrating, agreeing)?;
            let expected = Expected::Value(command.old);
            moving.update(&command.reference, &command.new, &expected).await.map_err(refused)?;
            if node.head_listing == HeadListing::BranchAndHead
                && symbolic_target(&repository.path, b"HEAD")
                    .is_some_and(|branch| branch == command.reference)
            {
                moving.speaks_of(b"HEAD", &command.new, &expected);
            }
            moving.commit(&node, &voter).await.map_err(refused)?;
            voter.synchronize(&synchronization_point("post-receive")).await?;
            voter.last_word().await
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

/// Unpacks the objects. What the primary finds wrong with their content ends the push there.
async fn take_in<S>(
    node: &Node,
    seen: &RepositoryPath,
    slot: &Slot,
    objects: Bytes,
    mut data: S,
) -> Result<(), Status>
where
    S: Stream<Item = Result<Bytes, Status>> + Unpin,
{
    let mut front = objects;
    while front.len() < PACK_HEADER_BYTES {
        let Some(more) = data.next().await.transpose()? else { break };
        front = [front, more].concat().into();
    }
    let command = if is_large(&front) {
        node.git.command(seen, "index-pack").args(["--stdin", "--fix-thin"])
    } else {
        node.git.command(seen, "unpack-objects").arg("-q")
    };
    let mut process = command.slot(slot).spawn(true).await?;
    let stdin = process.take_stdin().ok_or_else(|| Status::internal("no pipe to git"))?;
    let listening = async {
        while process.read_chunk().await?.is_some() {}
        Ok(())
    };
    tokio::try_join!(streams::feed(data, front, |data| data, stdin), listening)?;
    let (exit, stderr) = process.finish().await?;
    succeeded("unpacking objects", exit, &stderr)
}

fn is_large(front: &[u8]) -> bool {
    let count = front.get(8..PACK_HEADER_BYTES).and_then(|count| count.try_into().ok());
    count.is_some_and(|count| u32::from_be_bytes(count) >= UNPACK_LIMIT)
}

/// Sees that everything that the object leads to is here.
async fn check_connected(
    node: &Node,
    seen: &RepositoryPath,
    slot: &Slot,
    object: &str,
) -> Result<(), Status> {
    let command = node.git.command(seen, "rev-list").reads().slot(slot);
    let command = command.args(["--objects", "--stdin", "--not", "--all", "--quiet"]);
    let output = command.output_with(format!("{object}\n")).await?;
    succeeded("checking that nothing is missing", output.exit, &output.stderr)
}

fn succeeded(what: &str, exit: Exit, stderr: &[u8]) -> Result<(), Status> {
    if exit.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(stderr);
    Err(Status::failed_precondition(format!("{what}: {exit}, stderr: {:?}", stderr.trim_end())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_objects_become_files_of_their_own() {
        let header = |count: u32| [b"PACK\0\0\0\x02".as_slice(), &count.to_be_bytes(), b"..."].concat();
        assert!(!is_large(&header(0)) && !is_large(&header(99)) && is_large(&header(100)));
        assert!(!is_large(b"PACK"), "git finds out what is wrong with it");
    }

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
