//! Git's hooks, where somebody has a say in what git does: the other replicas, GitLab, custom hooks.
//!
//! `git receive-pack` and `git fetch` move references when they see fit, so what has to happen right before and right
//! after is done in their hooks. A git that a [`Session`] attends gets a directory of hooks in which every name is the
//! small program `tabularium-hook`; it connects to a socket that only this node's user can reach, names the session by a
//! token from its environment, and is told what to do and how to end ([`wire`]). Who is asked, which votes are cast and
//! whose custom hooks run is decided here, in [`session`]; which custom hooks there are, in [`custom`].

mod custom;
mod session;
mod told;
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
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};
use tonic::Status;

use crate::{
    access::{Access, Requester},
    git::GitCommand,
    node::Node,
    storage::RepositoryPath,
    votes::{Sections, Voter},
};

pub(crate) use custom::{CustomHooks, DIRECTORY as CUSTOM_HOOKS};
pub(crate) use session::{Session, synchronization_point};
use wire::Frame;

/// The names under which git looks for hooks of pushes.
const NAMES: [&str; 3] = ["pre-receive", "update", "post-receive"];
/// And of whatever moves references.
const TRANSACTION_NAME: &str = "reference-transaction";
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

/// Who has a say in changes on this node, beside the other replicas.
pub(crate) struct Judges {
    /// Outside of the cluster.
    pub(crate) access: Access,
    pub(crate) custom_hooks: CustomHooks,
}

impl Judges {
    /// Nobody but repositories' own hooks.
    #[cfg(test)]
    fn nobody() -> Self {
        Self { access: Access::Nobody, custom_hooks: CustomHooks::default() }
    }
}

struct Shared {
    /// Holds the socket and the directories of hooks.
    directory: PathBuf,
    judges: Arc<Judges>,
    sections: Arc<Sections>,
    sessions: Mutex<HashMap<String, Weak<Session>>>,
    _elsewhere: Option<TempDir>,
}

impl Shared {
    fn socket(&self) -> PathBuf {
        self.directory.join("socket")
    }

    /// The hooks of a git in a transaction, or of a push that is in none.
    fn programs(&self, transaction: bool) -> PathBuf {
        self.directory.join(if transaction { "transaction" } else { "push" })
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
        judges: Arc<Judges>,
        sections: Arc<Sections>,
        tasks: &Tasks,
    ) -> io::Result<Self> {
        let (directory, elsewhere) = private_directory(place)?;
        let sessions = Mutex::default();
        let shared = Arc::new(Shared { directory, judges, sections, sessions, _elsewhere: elsewhere });
        for transaction in [false, true] {
            let directory = shared.programs(transaction);
            fs::create_dir(&directory)?;
            for name in NAMES.into_iter().chain(transaction.then_some(TRANSACTION_NAME)) {
                symlink(program, directory.join(name))?;
            }
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
        voter.takes_part().then(|| self.begin(voter, repository, None))
    }

    fn begin(
        &self,
        voter: &Voter,
        repository: &RepositoryPath,
        requester: Option<Requester>,
    ) -> Arc<Session> {
        let session = Session::new(Arc::clone(&self.0), voter.clone(), repository.clone(), requester);
        let session = Arc::new(session);
        let mut sessions = self.0.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.insert(session.token().to_owned(), Arc::downgrade(&session));
        session
    }
}

/// A push by `requester`, attended if anybody has a say in it.
pub(crate) async fn attend_push(
    node: &Node,
    repository: &RepositoryPath,
    voter: &Voter,
    requester: Requester,
    command: GitCommand,
) -> Result<(GitCommand, Option<Arc<Session>>), Status> {
    let Judges { access, custom_hooks } = &*node.judges;
    if !voter.takes_part() && !access.asks() && !custom_hooks.may_exist(&repository.path) {
        return Ok((command, None));
    }
    // Whoever is asked reads the new objects, and must not wait for room behind those that wait for the answer.
    let command = if access.asks() { command.slot(&node.git.push_slot().await?) } else { command };
    let session = node.hooks.begin(voter, repository, Some(requester));
    Ok((session.attend(command), Some(session)))
}

/// What custom hooks find in their environment about whoever made the change.
pub(crate) fn environment(requester: &Requester) -> [(&'static str, &str); 5] {
    [
        ("GL_ID", &requester.gl_id),
        ("GL_USERNAME", &requester.gl_username),
        ("GL_REPOSITORY", &requester.gl_repository),
        ("GL_PROJECT_PATH", &requester.gl_project_path),
        ("GL_PROTOCOL", requester.protocol.name()),
    ]
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

async fn read_frame(connection: &mut (impl AsyncRead + Unpin)) -> io::Result<(Frame, Vec<u8>)> {
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
        assert_eq!(header(&[8, 0, 0, 0, 0]), None);
    }

    #[tokio::test]
    async fn whoever_has_no_token_is_turned_away() {
        let directory = tempfile::tempdir().unwrap();
        let tasks = Tasks::new();
        let place = directory.path().join("run");
        let start = |tasks: &Tasks| {
            let judges = Arc::new(Judges::nobody());
            Hooks::start(&place, Path::new("/bin/true"), judges, Arc::default(), tasks).unwrap()
        };
        let hooks = start(&tasks);
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&place).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o700);
        let mut connection = UnixStream::connect(hooks.0.socket()).await.unwrap();
        write_frame(&mut connection, Frame::Hello, b"guess\0pre-receive\0").await.unwrap();
        let (kind, payload) = read_frame(&mut connection).await.unwrap();
        assert_eq!((kind, payload.as_slice()), (Frame::Exit, &b"\x01the request is over"[..]));
        tasks.drain(Duration::from_secs(5)).await.unwrap();
        drop(hooks);
        // A new process finds what the old one left.
        start(&Tasks::new());
    }
}
