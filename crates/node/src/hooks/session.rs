//! One request's hooks: the votes they cast, and whether the repository's own hooks run (wire reference, section i.2).

use std::{
    io,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use sha1::{Digest as _, Sha1};
use tokio::{io::AsyncReadExt as _, net::UnixStream, sync::Notify};
use tonic::Status;

use super::{Shared, read_frame, wire, wire::Frame, write_frame};
use crate::{
    git::{
        GitCommand,
        durable::{self, Moment},
        transport::CUSTOM_HOOKS,
    },
    storage::RepositoryPath,
    votes::{Section, VoteError, Voter},
};

/// Why a hook ends with another exit code than 0.
#[derive(Debug, thiserror::Error)]
enum HookError {
    /// The word of the router.
    #[error(transparent)]
    Vote(#[from] VoteError),
    /// A hook of the repository refused; its words have been seen.
    #[error("exit code {0}")]
    Refused(u8),
    /// The hook is gone, and git with it.
    #[error("the hook went away: {0}")]
    Gone(#[from] io::Error),
    /// The disk does not take what git has written.
    #[error("syncing the repository: {0}")]
    Unsynced(io::Error),
    /// Git is being killed.
    #[error("the request is over")]
    Over,
    /// Not one of ours.
    #[error("no such hook")]
    Unknown,
}

/// What a hook is told, unless it fails.
enum Answer {
    /// All is well.
    Succeed,
    /// Become the repository's own hook of this name.
    Become(&'static str),
}

/// How far the change of references has come.
#[derive(Default)]
struct Progress {
    /// Present from the word to go ahead until git says that it has.
    applying: Option<Section>,
    /// The last change that git said it has made is on disk.
    durable: bool,
    /// Git has been or is being killed: it must not go ahead.
    over: bool,
    failure: Option<VoteError>,
}

/// The hooks of one request's git processes. While it lives its token is good.
pub(crate) struct Session {
    shared: Arc<Shared>,
    token: String,
    voter: Voter,
    repository: RepositoryPath,
    began: Moment,
    progress: Mutex<Progress>,
    applied: Notify,
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>, voter: Voter, repository: RepositoryPath) -> Self {
        let token = uuid::Uuid::new_v4().simple().to_string();
        let (began, progress, applied) = (Moment::now(), Mutex::default(), Notify::new());
        Self { shared, token, voter, repository, began, progress, applied }
    }

    pub(super) fn token(&self) -> &str {
        &self.token
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The command, with these hooks instead of all others.
    pub(crate) fn attend(self: &Arc<Self>, command: GitCommand) -> GitCommand {
        let mut setting = std::ffi::OsString::from("core.hooksPath=");
        setting.push(self.shared.programs());
        command
            .config(setting)
            .env(wire::SOCKET, self.shared.socket())
            .env(wire::TOKEN, &self.token)
            .attended_by(Arc::clone(self))
    }

    /// The first vote that did not allow going on.
    pub(crate) fn failure(&self) -> Option<VoteError> {
        self.progress().failure.clone()
    }

    /// Git has ended well: casts the vote that ends a push.
    pub(crate) async fn last_word(&self) -> Result<(), Status> {
        match self.failure() {
            None => self.voter.last_word().await,
            // It was refused, and git has told so.
            Some(VoteError::Stopped) => Ok(()),
            Some(error) => Err(error.into()),
        }
    }

    /// Whether git may be killed. It may not while it moves references that it was told to move; once it may, it is not
    /// told any more.
    pub(crate) fn may_be_killed(&self) -> bool {
        let mut progress = self.progress();
        progress.over |= progress.applying.is_none();
        progress.over
    }

    /// Waits until it may be.
    pub(crate) async fn until_it_may_be_killed(&self) {
        let applied = self.applied.notified();
        tokio::pin!(applied);
        applied.as_mut().enable();
        if !self.may_be_killed() {
            applied.await;
            self.may_be_killed();
        }
    }

    /// What a hook is told.
    pub(super) async fn answer(
        &self,
        hook: &[u8],
        state: &[u8],
        connection: &mut UnixStream,
    ) -> (Frame, Vec<u8>) {
        let answer = match (hook, state) {
            (b"pre-receive", _) => self.before("pre-receive", connection).await,
            (b"update", _) => self.before("update", connection).await,
            (b"reference-transaction", b"prepared") => self.prepared(connection).await,
            (b"reference-transaction", b"committed") => self.committed(connection).await,
            (b"post-receive", _) => self.after("post-receive", connection).await,
            _ => Err(HookError::Unknown),
        };
        match answer {
            Ok(Answer::Succeed) => (Frame::Exit, vec![0]),
            Ok(Answer::Become(name)) => (Frame::Run, self.own_hook(name)),
            Err(HookError::Refused(code)) => (Frame::Exit, vec![code]),
            Err(error) => {
                tracing::info!(%error, hook = %String::from_utf8_lossy(hook), "a hook fails");
                (Frame::Exit, [b"\x01", error.to_string().as_bytes()].concat())
            }
        }
    }

    /// The program that runs the repository's own hooks of a name.
    fn own_hook(&self, name: &str) -> Vec<u8> {
        self.repository.storage.hooks().join(name).into_os_string().as_bytes().to_vec()
    }

    /// Whether there are own hooks that are to run here.
    async fn runs_own_hooks(&self) -> bool {
        self.voter.runs_hooks()
            && tokio::fs::metadata(self.repository.path.join(CUSTOM_HOOKS))
                .await
                .is_ok_and(|found| found.is_dir())
    }

    async fn before(&self, name: &'static str, connection: &mut UnixStream) -> Result<Answer, HookError> {
        if self.runs_own_hooks().await {
            write_frame(connection, Frame::Run, &self.own_hook(name)).await?;
            let (kind, payload) = read_frame(connection).await?;
            match (kind, payload.as_slice()) {
                (Frame::Ran, [0]) => {}
                (Frame::Ran, [code]) => {
                    self.voter.stop().await;
                    return Err(HookError::Refused(*code));
                }
                _ => return Err(HookError::Gone(io::ErrorKind::InvalidData.into())),
            }
        }
        self.synchronize(name, connection).await?;
        Ok(Answer::Succeed)
    }

    async fn after(&self, name: &'static str, connection: &mut UnixStream) -> Result<Answer, HookError> {
        // The router has recorded the change when it answers, and what these hooks start may look for it.
        self.synchronize(name, connection).await?;
        Ok(if self.runs_own_hooks().await { Answer::Become(name) } else { Answer::Succeed })
    }

    async fn synchronize(&self, name: &str, connection: &mut UnixStream) -> Result<(), HookError> {
        let point = synchronization_point(name);
        self.noting(unless_gone(connection, self.voter.synchronize(&point)).await)
    }

    async fn prepared(&self, connection: &mut UnixStream) -> Result<Answer, HookError> {
        let Some(ballot) = read_updates(connection).await? else { return Ok(Answer::Succeed) };
        // Of an earlier transaction of the same git, which it gave up without a word.
        self.leave();
        let deciding = async {
            let section = self.shared.sections.enter(&self.repository.path).await;
            self.voter.prepared(&self.repository.path, ballot).await.map(|()| section)
        };
        // The objects are in their place, and syncing them takes no longer than the others take to vote.
        let syncing = self.sync(durable::sync_objects);
        let (section, synced) = tokio::join!(unless_gone(connection, deciding), syncing);
        let section = self.noting(section)?;
        synced?;
        let mut progress = self.progress();
        if progress.over {
            return Err(HookError::Over);
        }
        (progress.applying, progress.durable) = (Some(section), false);
        Ok(Answer::Succeed)
    }

    async fn committed(&self, connection: &mut UnixStream) -> Result<Answer, HookError> {
        let Some(ballot) = read_updates(connection).await? else { return Ok(Answer::Succeed) };
        self.leave();
        self.sync(durable::sync_references).await?;
        self.progress().durable = true;
        // What has been done is reported even if git is being killed meanwhile.
        let told = self.voter.committed(&self.repository.path, ballot).await;
        self.noting(told.map_err(HookError::from))?;
        Ok(Answer::Succeed)
    }

    /// Git syncs files and not the directories it renames them into.
    async fn sync(&self, sync: fn(&Path, Moment) -> io::Result<()>) -> Result<(), HookError> {
        let (repository, since) = (self.repository.path.clone(), self.began);
        let synced = tokio::task::spawn_blocking(move || sync(&repository, since)).await;
        synced.map_err(io::Error::other).and_then(|synced| synced).map_err(HookError::Unsynced)
    }

    /// Whether all that git has changed is on disk already.
    pub(crate) fn is_durable(&self) -> bool {
        self.progress().durable
    }

    fn leave(&self) {
        self.progress().applying = None;
        self.applied.notify_waiters();
    }

    fn noting<T>(&self, result: Result<T, HookError>) -> Result<T, HookError> {
        if let Err(HookError::Vote(error)) = &result {
            self.progress().failure.get_or_insert_with(|| error.clone());
        }
        result
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.forget(&self.token);
    }
}

/// What the vote of a hook that all replicas wait in is about.
pub(crate) fn synchronization_point(hook: &str) -> String {
    format!("synchronize {hook} hook")
}

/// Gives up when the hook goes away; that is how a killed git is noticed.
async fn unless_gone<T>(
    connection: &mut UnixStream,
    asking: impl Future<Output = Result<T, VoteError>>,
) -> Result<T, HookError> {
    let mut nothing = [0];
    tokio::select! {
        biased;
        answer = asking => Ok(answer?),
        read = connection.read(&mut nothing) => Err(HookError::Gone(match read {
            Err(error) => error,
            Ok(0) => io::ErrorKind::UnexpectedEof.into(),
            Ok(_) => io::ErrorKind::InvalidData.into(),
        })),
    }
}

/// The vote on the updates that git lists; `None` if there is nothing to vote on.
async fn read_updates(connection: &mut UnixStream) -> io::Result<Option<[u8; 20]>> {
    let mut updates = Updates::default();
    loop {
        match read_frame(connection).await? {
            (Frame::Input, piece) => updates.feed(&piece),
            (Frame::End, _) => return Ok(updates.finish()),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Lines of `<old> <new> <reference>`, as they come in pieces.
#[derive(Default)]
struct Updates {
    digest: Sha1,
    counts: bool,
    spaces: usize,
    something: bool,
    within_line: bool,
}

impl Updates {
    fn feed(&mut self, piece: &[u8]) {
        self.digest.update(piece);
        for byte in piece {
            match byte {
                b'\n' => self.end_line(),
                b' ' if self.spaces < 2 => self.spaces += 1,
                byte => {
                    self.within_line = true;
                    self.something |= self.spaces < 2 && *byte != b'0';
                }
            }
        }
    }

    /// From nothing to nothing is how git tells that it takes a reference out of `packed-refs` as well.
    fn end_line(&mut self) {
        self.counts |= self.within_line && self.something;
        (self.spaces, self.something, self.within_line) = (0, false, false);
    }

    fn finish(mut self) -> Option<[u8; 20]> {
        self.end_line();
        self.counts.then(|| self.digest.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vote(input: &str, piece: usize) -> Option<[u8; 20]> {
        let mut updates = Updates::default();
        input.as_bytes().chunks(piece).for_each(|piece| updates.feed(piece));
        updates.finish()
    }

    #[test]
    fn only_deletions_from_packed_refs_do_not_count() {
        let zero = "0".repeat(40);
        let (one, forced) = ("1".repeat(40), format!("{zero} {zero} refs/heads/a\n"));
        let created = format!("{zero} {one} refs/heads/000\n");
        let both = format!("{forced}{created}");
        for piece in [1, 3, 7, 1000] {
            assert_eq!(vote("", piece), None);
            assert_eq!(vote(&forced.repeat(2), piece), None);
            assert_eq!(vote(&created, piece), Some(Sha1::digest(&created).into()));
            assert_eq!(vote(&both, piece), Some(Sha1::digest(&both).into()), "with all lines");
        }
    }

    const UPDATE: &[u8] = b"00 11 refs/heads/a\n";

    /// A hook of the session says this, and is told that.
    async fn ask(session: &Arc<Session>, state: &'static [u8]) -> Vec<u8> {
        let (mut hook, mut node) = UnixStream::pair().unwrap();
        write_frame(&mut hook, Frame::Input, UPDATE).await.unwrap();
        write_frame(&mut hook, Frame::End, b"").await.unwrap();
        let (kind, payload) = session.answer(b"reference-transaction", state, &mut node).await;
        assert_eq!(kind, Frame::Exit);
        payload
    }

    #[tokio::test]
    async fn git_is_not_killed_between_the_word_and_the_deed() {
        let directory = tempfile::tempdir().unwrap();
        let tasks = tabularium_common::lifecycle::Tasks::new();
        let sections = Arc::<crate::votes::Sections>::default();
        let place = directory.path().join("run");
        let hooks = super::super::Hooks::start(&place, Path::new("/bin/true"), Arc::clone(&sections), &tasks);
        let storage = crate::storage::Storage {
            name: "a".into(),
            root: directory.path().to_owned(),
            filesystem_id: "id".into(),
        };
        let path = directory.path().join("a.git");
        let repository =
            RepositoryPath { storage, relative_path: "a.git".into(), path: path.clone(), quarantine: None };
        let shared = Arc::clone(&hooks.unwrap().0);
        let session = || Arc::new(Session::new(Arc::clone(&shared), Voter::none(), repository.clone()));
        let still = || tokio::time::timeout(std::time::Duration::from_millis(20), sections.still(&path));

        let told = session();
        assert_eq!(ask(&told, b"prepared").await, [0]);
        assert!(!told.may_be_killed() && still().await.is_err());
        let waiting = told.until_it_may_be_killed();
        tokio::pin!(waiting);
        assert!(futures::poll!(waiting.as_mut()).is_pending());
        assert_eq!(ask(&told, b"committed").await, [0]);
        waiting.await;
        assert!(told.may_be_killed() && still().await.is_ok());

        let killed = session();
        assert!(killed.may_be_killed());
        assert_eq!(ask(&killed, b"prepared").await, b"\x01the request is over");
        assert!(still().await.is_ok());

        let gone = session();
        assert_eq!(ask(&gone, b"prepared").await, [0]);
        drop(gone);
        assert!(still().await.is_ok(), "git ended without a word");
        tasks.drain(std::time::Duration::from_secs(5)).await.unwrap();
    }
}
