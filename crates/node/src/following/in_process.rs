//! What git would do about a small push, done here: no process is started.
//!
//! [`take_in`] takes the pack apart ([`super::pack`]), sees that nothing is missing from what its objects lead to
//! ([`super::connectivity`]) and writes them into the quarantine ([`super::store`]). What is out of the ordinary is left to
//! git from that step on; that is a matter of time only, and never decides whether a push is taken.

use std::{io, path::Path};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tonic::Status;

use super::{
    LeftToGit, UNPACK_LIMIT,
    connectivity::{self, Present as _},
    opening::Command,
    ordinary, pack,
    store::{self, Old},
};

/// What the objects of a small pack may have of bytes together.
const MOST_BYTES: usize = 16 * 1024 * 1024;

/// What is behind the command of a push, or its beginning.
pub(super) enum Objects {
    /// All of it: a pack that is small enough.
    Small(Bytes),
    /// The beginning.
    Front(Bytes),
}

/// Reads a pack to its end, unless it is larger than that or has too many objects.
pub(super) async fn gather<S>(front: Bytes, data: &mut S, most: u64) -> Result<Objects, Status>
where
    S: Stream<Item = Result<Bytes, Status>> + Unpin,
{
    let mut length = front.len();
    let mut pieces = vec![front];
    let mut few = false;
    loop {
        if !few && length >= pack::HEADER_BYTES {
            let front = whole(pieces);
            few = pack::count(&front).is_some_and(|count| count < UNPACK_LIMIT);
            if !few {
                return Ok(Objects::Front(front));
            }
            pieces = vec![front];
        }
        if few && u64::try_from(length).unwrap_or(u64::MAX) > most {
            return Ok(Objects::Front(whole(pieces)));
        }
        match data.next().await.transpose()? {
            None => return Ok(Objects::Small(whole(pieces))),
            Some(more) => {
                length += more.len();
                pieces.push(more);
            }
        }
    }
}

fn whole(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() == 1 { pieces.remove(0) } else { pieces.concat().into() }
}

/// How far a push has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TakenIn {
    /// Nothing is missing from what the objects lead to. Else git has to be asked.
    pub(super) connected: bool,
    /// The reference may name the object, as far as git's rules for branches go.
    pub(super) nameable: bool,
}

/// Why objects have not been taken in.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error(transparent)]
    LeftToGit(#[from] LeftToGit),
    #[error("writing objects: {0}")]
    Io(#[from] io::Error),
}

/// Takes the objects of a pack in, durably, into an empty object directory beside the repository.
pub(super) fn take_in(
    repository: &Path,
    quarantine: &Path,
    command: &Command,
    head: Option<Vec<u8>>,
    pack: &[u8],
) -> Result<TakenIn, Refused> {
    ordinary::check(repository)?;
    let new = connectivity::id(command.new.as_bytes()).ok_or(LeftToGit("ids of another kind"))?;
    let likely = [Some(command.reference.clone()), head].into_iter().flatten().collect();
    let mut old = Old::open(repository, likely)?;
    let objects = pack::read(pack, MOST_BYTES, |id| old.object(id))?;
    let connected = connectivity::check(new, &objects, &mut old);
    if let Err(reason) = &connected {
        tracing::debug!(%reason, "git looks whether anything is missing");
    }
    store::write(quarantine, &objects)?;
    let is_branch = command.reference.starts_with(b"refs/heads/");
    let nameable = connected.is_ok_and(|kind| kind == gix_object::Kind::Commit || !is_branch);
    Ok(TakenIn { connected: connected.is_ok(), nameable })
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    async fn gathered(pieces: &[&[u8]], most: u64) -> (bool, Vec<u8>, usize) {
        let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let mut data = stream::iter(pieces);
        let front = data.next().await.unwrap().unwrap();
        let objects = gather(front, &mut data, most).await.unwrap();
        let left = data.count().await;
        match objects {
            Objects::Small(pack) => (true, pack.to_vec(), left),
            Objects::Front(front) => (false, front.to_vec(), left),
        }
    }

    #[tokio::test]
    async fn only_a_small_pack_is_read_to_its_end() {
        let (few, many) = (b"PACK\0\0\0\x02\0\0\0\x03", b"PACK\0\0\0\x02\0\0\0\x64");
        let all = [few.as_slice(), b"abc"].concat();
        assert_eq!(gathered(&[b"", &few[..5], &few[5..], b"a", b"bc"], 15).await, (true, all.clone(), 0));
        assert_eq!(gathered(&[few, b"a", b"bc", b"d"], 14).await, (false, all, 1));
        assert_eq!(gathered(&[many, b"abc"], 100).await, (false, many.to_vec(), 1));
        assert_eq!(gathered(&[b"JUNK", &[0; 20], b"abc"], 100).await.2, 1);
        assert_eq!(gathered(&[b"PACK"], 100).await, (true, b"PACK".to_vec(), 0), "git says what is wrong");
        assert_eq!(gathered(&[few], 0).await, (false, few.to_vec(), 0));
    }

    #[tokio::test]
    async fn a_stream_that_breaks_is_no_end() {
        let mut data = stream::iter([Err(Status::cancelled("gone"))]);
        let broken = gather(Bytes::from_static(b"PACK\0\0\0\x02\0\0\0\x03"), &mut data, 100).await;
        assert!(broken.is_err());
    }
}
