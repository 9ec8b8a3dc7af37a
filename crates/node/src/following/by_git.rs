//! What is not done here git does: it takes objects in, and sees that nothing is missing from what they lead to.

use bytes::Bytes;
use futures::Stream;
use tonic::Status;

use super::{UNPACK_LIMIT, pack};
use crate::{
    git::{Exit, Slot},
    node::Node,
    services::streams,
    storage::RepositoryPath,
};

/// Takes in the objects of a pack. What the primary finds wrong with their content ends the push there.
pub(super) async fn take_in<S>(
    node: &Node,
    seen: &RepositoryPath,
    slot: &Slot,
    front: Bytes,
    rest: S,
) -> Result<(), Status>
where
    S: Stream<Item = Result<Bytes, Status>> + Unpin,
{
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
    tokio::try_join!(streams::feed(rest, front, |data| data, stdin), listening)?;
    let (exit, stderr) = process.finish().await?;
    succeeded("unpacking objects", exit, &stderr)
}

/// Of a pack of another kind git finds out what is wrong with it.
pub(super) fn is_large(front: &[u8]) -> bool {
    pack::count(front).is_some_and(|count| count >= UNPACK_LIMIT)
}

/// Sees that everything that the object leads to is here.
pub(super) async fn check_connected(
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
        assert!(!is_large(b"PACK"));
    }
}
