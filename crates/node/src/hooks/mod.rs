//! Git's hooks of pushes and fetches that are part of a transaction.
//!
//! `git receive-pack` and `git fetch` move references when they see fit, so what has to happen right before and right
//! after is done in their hooks. A git that a [`Session`] attends gets a directory of hooks in which every name is the
//! small program `tabularium-hook`; it connects to a socket that only this node's user can reach, names the session by a
//! token from its environment, and is told how to end ([`wire`]). Which votes are cast and whose own hooks run is decided
//! here, in [`session`].

mod session;
#[path = "wire.rs"]
mod wire;

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, symlink},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tabularium_common::lifecycle::Tasks;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};
use tonic::Status;

use crate::{
    git::GitCommand,
    storage::RepositoryPath,
    votes::{Sections, Voter},
};

pub(crate) use session::{Session, synchronization_point};
use wire::Frame;

/// The names under which git looks for hooks.
const NAMES: [&str; 4] = ["pre-receive", "update", "reference-transaction", "post-receive"];
/// Hooks answered at once. A git process waits for one at a time, so their number bounds it first.
const MAX_CONNECTIONS: usize = 4096;
/// How long a hook may take to say who it is.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// Between two attempts to accept when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest path of a socket on every system.
const MAX_SOCKET_PATH: usize = 100;

/// The socket of this node, and whose hooks may use it.
pub(crate) struct Hooks(Arc<Shared>);

struct Shared {
    /// Holds the socket and the directory of hooks.
    directory: PathBuf,
    sections: Arc<Sections>,
    sessions: Mutex<HashMap<String, Weak<Session>>>,
    _elsewhere: Option<TempDir>,
}

impl Shared {
    fn socket(&self) -> PathBuf {
        self.directory.join("socket")
    }

    fn programs(&self) -> PathBuf {
        self.directory.join("git")
    }

    fn find(&self, token: &[u8]) -> Option<Arc<Session>> {
        let token = std::str::from_utf8(token).ok()?;
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).get(token)?.upgrade()
    }

    fn forget(&self, token: &str) {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(token);
    }
}

impl Hooks {
    /// Serves the hooks of this node until its tasks are told to stop. `place` is a directory that is this process's alone.
    pub(crate) fn start(
        place: &Path,
        program: &Path,
        sections: Arc<Sections>,
        tasks: &Tasks,
    ) -> io::Result<Self> {
        let (directory, elsewhere) = private_directory(place)?;
        let shared =
            Arc::new(Shared { directory, sections, sessions: Mutex::default(), _elsewhere: elsewhere });
        fs::create_dir(shared.programs())?;
        for name in NAMES {
            symlink(program, shared.programs().join(name))?;
        }
        let listener = UnixListener::bind(shared.socket())?;
        let (owner, stopping) = (tasks.clone(), tasks.stopping());
        let accepting = accept(listener, Arc::clone(&shared), owner);
        tasks.spawn("hook socket", async move {
            // What is asked at that moment belongs to requests that have been cut off.
            stopping.run_until_cancelled(accepting).await;
        });
        Ok(Self(shared))
    }

    /// Attends the git processes of one request; `None` if no transaction is about it.
    pub(crate) fn session(&self, voter: &Voter, repository: &RepositoryPath) -> Option<Arc<Session>> {
        if !voter.takes_part() {
            return None;
        }
        let session = Arc::new(Session::new(Arc::clone(&self.0), voter.clone(), repository.clone()));
        let mut sessions = self.0.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.insert(session.token().to_owned(), Arc::downgrade(&session));
        Some(session)
    }
}

/// The command, attended by the session if there is one.
pub(crate) fn attend(session: Option<&Arc<Session>>, command: GitCommand) -> GitCommand {
    match session {
        Some(session) => session.attend(command),
        None => command,
    }
}

/// Why git failed, if a vote was the reason.
pub(crate) fn failure(session: Option<&Arc<Session>>) -> Option<Status> {
    session.and_then(|session| session.failure()).map(Status::from)
}

/// A directory that nobody else can enter. What an earlier process left at its place is removed.
fn private_directory(place: &Path) -> io::Result<(PathBuf, Option<TempDir>)> {
    if place.as_os_str().len() + "/socket".len() > MAX_SOCKET_PATH {
        // Readable by its owner only, as `place` is below.
        let directory = tempfile::Builder::new().prefix("tabularium-node-").tempdir()?;
        return Ok((directory.path().to_owned(), Some(directory)));
    }
    match fs::remove_dir_all(place) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(place)?;
    Ok((place.to_owned(), None))
}

async fn accept(listener: UnixListener, shared: Arc<Shared>, tasks: Tasks) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Never closed.
    while let Ok(permit) = Arc::clone(&room).acquire_owned().await {
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                tracing::warn!(%error, "accepting a hook");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (shared, stopping) = (Arc::clone(&shared), tasks.stopping());
        tasks.spawn("hook", async move {
            let served = stopping.run_until_cancelled(serve(&shared, connection)).await;
            if let Some(Err(error)) = served {
                tracing::debug!(%error, "a hook went away");
            }
            drop(permit);
        });
    }
}

async fn serve(shared: &Shared, mut connection: UnixStream) -> io::Result<()> {
    let (kind, hello) = timeout(HELLO_DEADLINE, read_frame(&mut connection)).await??;
    let mut parts = hello.split(|byte| *byte == 0);
    let (token, hook) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let first = parts.next().unwrap_or_default();
    let session = shared.find(token).filter(|_| kind == Frame::Hello);
    let Some(session) = session else {
        return write_frame(&mut connection, Frame::Exit, b"\x01the request is over").await;
    };
    let (kind, payload) = session.answer(hook, first, &mut connection).await;
    write_frame(&mut connection, kind, &payload).await
}

async fn read_frame(connection: &mut UnixStream) -> io::Result<(Frame, Vec<u8>)> {
    let mut header = [0; wire::HEADER_BYTES];
    connection.read_exact(&mut header).await?;
    let (kind, length) = wire::parse_header(header).ok_or(io::ErrorKind::InvalidData)?;
    let mut payload = vec![0; length];
    connection.read_exact(&mut payload).await?;
    Ok((kind, payload))
}

async fn write_frame(connection: &mut UnixStream, kind: Frame, payload: &[u8]) -> io::Result<()> {
    connection.write_all(&wire::frame(kind, payload)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_bounded_and_read_back() {
        let bytes = wire::frame(Frame::Ran, b"x");
        assert_eq!(bytes, [3, 0, 0, 0, 1, b'x']);
        let header = |bytes: &[u8]| wire::parse_header(bytes[..wire::HEADER_BYTES].try_into().unwrap());
        assert_eq!(header(&bytes), Some((Frame::Ran, 1)));
        assert_eq!(
            header(&wire::frame(Frame::Exit, &vec![0; 1 << 20])),
            Some((Frame::Exit, wire::MAX_PAYLOAD_BYTES))
        );
        assert_eq!(header(&[0, 0xff, 0, 0, 0]), None);
        assert_eq!(header(&[6, 0, 0, 0, 0]), None);
    }

    #[tokio::test]
    async fn whoever_has_no_token_is_turned_away() {
        let directory = tempfile::tempdir().unwrap();
        let tasks = Tasks::new();
        let place = directory.path().join("run");
        let hooks = Hooks::start(&place, Path::new("/bin/true"), Arc::default(), &tasks).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&place).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o700);
        let mut connection = UnixStream::connect(hooks.0.socket()).await.unwrap();
        write_frame(&mut connection, Frame::Hello, b"guess\0pre-receive\0").await.unwrap();
        let (kind, payload) = read_frame(&mut connection).await.unwrap();
        assert_eq!((kind, payload.as_slice()), (Frame::Exit, &b"\x01the request is over"[..]));
        tasks.drain(Duration::from_secs(5)).await.unwrap();
        drop(hooks);
        // A new process finds what the old one left.
        Hooks::start(&place, Path::new("/bin/true"), Arc::default(), &Tasks::new()).unwrap();
    }
}
