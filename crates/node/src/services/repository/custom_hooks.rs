//! GetCustomHooks and SetCustomHooks, and the older names of both, BackupCustomHooks and RestoreCustomHooks: a repository's
//! `custom_hooks` as a tar archive.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Component, Path, PathBuf},
    pin::pin,
    sync::Arc,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use sha1::{Digest as _, Sha1};
use tabularium_proto::gitaly::Repository;
use tokio::io::AsyncWriteExt as _;
use tonic::{Request, Status, Streaming};

use crate::{
    error::internal_io,
    hooks::CUSTOM_HOOKS,
    node::Node,
    place::{self, Temporary, blocking},
    services::streams::{self, ResponseStream},
    votes::{Ballot, Voter, agreed},
};

/// Largest archive that is taken, from a client or from another node.
pub(super) const MAX_ARCHIVE_BYTES: usize = 64 * 1024 * 1024;
/// How often hooks are put where somebody else has just put theirs.
const REPLACE_ATTEMPTS: usize = 8;
/// What an archive may not let others than the owner do. Gitaly's nodes unpack with this mask, and vote on the outcome.
const MASK: u32 = 0o022;
/// Marks directories in the modes that are voted on, which are those of Go.
const DIRECTORY: u32 = 1 << 31;

/// The archive; nothing at all when there is no such directory.
pub(super) fn get<T: Send + 'static>(
    node: &Node,
    repository: Option<&Repository>,
    wrap: fn(Bytes) -> T,
) -> Result<ResponseStream<T>, Status> {
    let hooks = node.storages.open(repository)?.path.join(CUSTOM_HOOKS);
    if !hooks.is_dir() {
        return Ok(Box::pin(tokio_stream::empty()));
    }
    Ok(streams::produce(wrap, move |writer| {
        let mut archive = tar::Builder::new(writer);
        archive.follow_symlinks(false);
        archive
            .append_dir_all(CUSTOM_HOOKS, &hooks)
            .and_then(|()| archive.finish())
            .map_err(internal_io("reading custom hooks"))
    }))
}

/// SetCustomHooks under either of its names, whose messages `parts` takes apart.
pub(super) async fn receive<M>(
    node: &Node,
    request: Request<Streaming<M>>,
    parts: fn(M) -> (Option<Repository>, Vec<u8>),
) -> Result<(), Status>
where
    M: Default + Send + 'static,
{
    let voter = Voter::of(request.metadata(), request.extensions())?;
    let mut messages = request.into_inner();
    let (repository, front) = parts(messages.message().await?.unwrap_or_default());
    let rest = messages.map_ok(move |message| parts(message).1);
    let archive = stream::once(async { Ok(front) }).chain(rest);
    set(node, &voter, repository.as_ref(), pin!(archive)).await
}

/// Has the hooks of an archive in the place of those that are there; of an empty archive, none.
async fn set(
    node: &Node,
    voter: &Voter,
    repository: Option<&Repository>,
    archive: impl Stream<Item = Result<Vec<u8>, Status>> + Unpin,
) -> Result<(), Status> {
    let repository = node.storages.open(repository)?;
    let scratch = Temporary::new(node, &repository.storage, "hooks-")?;
    let file = scratch.path().join("archive");
    let length = keep(archive, &file).await?;
    let replacement = scratch.path().join(CUSTOM_HOOKS);
    let (ballot, replacement) = blocking(move || {
        let unpacked = || {
            if length > 0 {
                unpack(File::open(&file)?, parent(&replacement)?)?;
            }
            match fs::create_dir(&replacement) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            place::sync_tree(&replacement)?;
            ballot(&replacement)
        };
        Ok::<_, Status>((
            unpacked().map_err(internal_io("setting custom hooks: extracting hooks"))?,
            replacement,
        ))
    })
    .await?;
    let (sections, voter) = (Arc::clone(&node.sections), voter.clone());
    let setting = node.tasks.spawn("custom hooks", async move {
        let path = repository.path;
        let target = path.clone();
        let change = blocking(move || {
            let aside = scratch.path().join("previous");
            replace(&target, &replacement, &aside).map_err(internal_io("setting custom hooks"))
        });
        agreed(&sections, &voter, &path, ballot.into(), change).await
    });
    setting.await.unwrap_or_else(|error| Err(Status::internal(format!("setting custom hooks: {error}"))))
}

/// Keeps the archive in a file and answers its length.
async fn keep(
    mut archive: impl Stream<Item = Result<Vec<u8>, Status>> + Unpin,
    path: &Path,
) -> Result<usize, Status> {
    let keeping = || internal_io("setting custom hooks: keeping the archive");
    let mut file = tokio::fs::File::create(path).await.map_err(keeping())?;
    let mut length = 0;
    while let Some(piece) = archive.next().await.transpose()? {
        length += piece.len();
        if length > MAX_ARCHIVE_BYTES {
            let text = format!("setting custom hooks: more than {MAX_ARCHIVE_BYTES} bytes");
            return Err(Status::invalid_argument(text));
        }
        file.write_all(&piece).await.map_err(keeping())?;
    }
    file.flush().await.map_err(keeping())?;
    Ok(length)
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Unpacks an archive of custom hooks below `directory`: only files and directories under `custom_hooks`.
pub(crate) fn unpack(archive: impl io::Read, directory: &Path) -> io::Result<()> {
    let mut archive = tar::Archive::new(archive);
    archive.set_mask(MASK);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            continue;
        }
        let path = entry.path()?.into_owned();
        let inside = path.starts_with(CUSTOM_HOOKS)
            && path.components().all(|part| matches!(part, Component::Normal(_)));
        if !inside || !(kind.is_file() || kind.is_dir()) {
            return Err(io::Error::other(format!("unexpected entry {}", path.display())));
        }
        entry.unpack_in(directory)?;
    }
    Ok(())
}

/// Puts `replacement` where a repository's hooks are, in one durable step; what was there goes away with it or to `aside`.
pub(super) fn replace(repository: &Path, replacement: &Path, aside: &Path) -> io::Result<()> {
    let present = repository.join(CUSTOM_HOOKS);
    for _ in 0..REPLACE_ATTEMPTS {
        match place::exchange(replacement, &present, aside) {
            // There are none yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            exchanged => return exchanged,
        }
        match fs::rename(replacement, &present) {
            // Somebody else was faster; now there is something to exchange.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            moved => return moved.and_then(|()| place::sync_parent(&present)),
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// Moves a repository's hooks to `aside`, if there are any.
pub(super) fn remove(repository: &Path, aside: &Path) -> io::Result<()> {
    let present = repository.join(CUSTOM_HOOKS);
    match fs::rename(&present, aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        moved => moved.and_then(|()| place::sync_parent(&present)),
    }
}

/// The vote on a directory of hooks (wire reference, section g.4): of everything in it, in the order of names, its path, its
/// mode, and what is in it.
fn ballot(hooks: &Path) -> io::Result<Ballot> {
    let mut digest = Sha1::new();
    cast(hooks, Path::new("."), &mut digest)?;
    Ok(digest.finalize().into())
}

fn cast(hooks: &Path, relative: &Path, digest: &mut Sha1) -> io::Result<()> {
    let path = hooks.join(relative);
    let found = fs::symlink_metadata(&path)?;
    let directory = if found.is_dir() { DIRECTORY } else { 0 };
    digest.update(relative.as_os_str().as_encoded_bytes());
    digest.update(((found.permissions().mode() & 0o777) | directory).to_be_bytes());
    if !found.is_dir() {
        return io::copy(&mut File::open(path)?, &mut Feed(digest)).map(|_| ());
    }
    let names = fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.file_name()));
    let mut names = names.collect::<io::Result<Vec<_>>>()?;
    names.sort();
    let below = |name| if relative == Path::new(".") { PathBuf::from(name) } else { relative.join(name) };
    names.into_iter().map(below).try_for_each(|relative| cast(hooks, &relative, digest))
}

struct Feed<'a>(&'a mut Sha1);

impl io::Write for Feed<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.update(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(name: &str, mode: u32) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.set_mode(mode);
        builder.append_data(&mut header, name, &b"x"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn hooks_cannot_be_unpacked_elsewhere() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["hooks/x", "custom_hooks_too/x"] {
            assert!(unpack(archive(name, 0o644).as_slice(), directory.path()).is_err(), "{name}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        unpack(archive("custom_hooks/x", 0o6777).as_slice(), directory.path()).unwrap();
        let mode = fs::metadata(directory.path().join("custom_hooks/x")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755);
    }

    #[test]
    fn a_vote_is_gitalys() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, mode: u32| {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, name).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        write("update", 0o755);
        write("pre-receive.d/b", 0o644);
        write("pre-receive.d/a", 0o700);
        for name in ["", "pre-receive.d"] {
            let path = directory.path().join(name);
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        // Of Go's `fs.ModeDir | 0o755` and so on.
        let expected = [
            &b".\x80\x00\x01\xed"[..],
            b"pre-receive.d\x80\x00\x01\xed",
            b"pre-receive.d/a\x00\x00\x01\xc0pre-receive.d/a",
            b"pre-receive.d/b\x00\x00\x01\xa4pre-receive.d/b",
            b"update\x00\x00\x01\xedupdate",
        ];
        assert_eq!(ballot(directory.path()).unwrap(), Ballot::from(Sha1::digest(expected.concat())));
    }

    #[test]
    fn hooks_are_replaced_whatever_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let repository = directory.path().join("a.git");
        fs::create_dir(&repository).unwrap();
        let seen = || fs::read_to_string(repository.join("custom_hooks/x")).ok();
        for content in ["one", "two"] {
            let replacement = directory.path().join(content);
            fs::create_dir(&replacement).unwrap();
            fs::write(replacement.join("x"), content).unwrap();
            replace(&repository, &replacement, &directory.path().join("aside")).unwrap();
            assert_eq!(seen().as_deref(), Some(content));
        }
        for _ in 0..2 {
            remove(&repository, &directory.path().join("removed")).unwrap();
            assert_eq!(seen(), None);
        }
    }
}
