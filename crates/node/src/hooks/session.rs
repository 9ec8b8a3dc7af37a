//! One request's hooks: who is asked, the votes they cast, and which custom hooks run (wire reference, section i.2).

use std::{
    io,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use sha1::{Digest as _, Sha1};
use tokio::{io::AsyncReadExt as _, net::UnixStream, sync::Notify};
use tonic::Status;

use super::{Shared, read_frame, told::Told, wire, wire::Frame, write_frame};
use crate::{
    access::{ChangeRequest, CheckError, Denied, RequestError, Requester},
    git::{
        GitCommand,
        durable::{self, Moment},
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
    /// A custom hook refused; its words have been seen.
    #[error("exit code {0}")]
    Refused(u8),
    /// Custom hooks cannot be looked for.
    #[error("looking for custom hooks: {0}")]
    CustomHooks(io::Error),
    /// GitLab refused.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// GitLab could not be asked or told.
    #[error(transparent)]
    Request(#[from] RequestError),
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

impl From<CheckError> for HookError {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::Denied(denied) => denied.into(),
            CheckError::Request(error) => error.into(),
        }
    }
}

impl HookError {
    /// Somebody who has a say decided, and it is for the other replicas too. Not so when git has just gone away.
    fn decides_for_all(&self) -> bool {
        !matches!(self, Self::Gone(_) | Self::Over)
    }
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
    /// Whoever pushes; nobody does in a fetch.
    requester: Option<Requester>,
    began: Moment,
    progress: Mutex<Progress>,
    applied: Notify,
}

impl Session {
    pub(super) fn new(
        shared: Arc<Shared>,
        voter: Voter,
        repository: RepositoryPath,
        requester: Option<Requester>,
    ) -> Self {
        let token = uuid::Uuid::new_v4().simple().to_string();
        let (began, progress, applied) = (Moment::now(), Mutex::default(), Notify::new());
        Self { shared, token, voter, repository, requester, began, progress, applied }
    }

    pub(super) fn token(&self) -> &str {
        &self.token
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The command, with these hooks instead of all others, and with what custom hooks are told of whoever pushes.
    pub(crate) fn attend(self: &Arc<Self>, command: GitCommand) -> GitCommand {
        let mut setting = std::ffi::OsString::from("core.hooksPath=");
        setting.push(self.shared.programs(self.voter.takes_part()));
        let mut command = command
            .config(setting)
            .env(wire::SOCKET, self.shared.socket())
            .env(wire::TOKEN, &self.token)
            .attended_by(Arc::clone(self));
        for (name, value) in self.requester.iter().flat_map(super::environment) {
            command = command.env(name, value);
        }
        command
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
            (b"pre-receive", _) => self.pre_receive(connection).await,
            (b"update", _) => self.update(connection).await,
            (b"reference-transaction", b"prepared") => self.prepared(connection).await,
            (b"reference-transaction", b"committed") => self.committed(connection).await,
            (b"post-receive", _) => self.post_receive(connection).await,
            _ => Err(HookError::Unknown),
        };
        match answer {
            Ok(()) => (Frame::Exit, vec![0]),
            Err(HookError::Refused(code)) => (Frame::Exit, vec![code]),
            Err(error) => {
                tracing::info!(%error, hook = %String::from_utf8_lossy(hook), "a hook fails");
                (Frame::Exit, [b"\x01", error.to_string().as_bytes()].concat())
            }
        }
    }

    /// Whether anybody outside of the cluster is asked about this push, and told of it.
    fn asks(&self) -> bool {
        self.requester.is_some() && self.voter.runs_hooks() && self.shared.judges.access.asks()
    }

    /// Whoever has a say decides on the primary; the others wait until it is done.
    async fn pre_receive(&self, connection: &mut UnixStream) -> Result<(), HookError> {
        let told = Told::read(connection, self.asks()).await?;
        if self.voter.runs_hooks() {
            let decided = self.decide(&told, connection).await;
            self.stopping(decided).await?;
        }
        self.synchronize("pre-receive", connection).await
    }

    async fn decide(&self, told: &Told, connection: &mut UnixStream) -> Result<(), HookError> {
        let Some(requester) = self.requester.as_ref().filter(|_| self.asks()) else {
            return self.run_custom_hooks("pre-receive", connection).await;
        };
        // Git says where objects are without symbolic links.
        let directory = tokio::fs::canonicalize(&self.repository.path).await?;
        let push_options = told.push_options();
        let change = ChangeRequest {
            repository: &self.repository,
            requester,
            changes: &told.changes,
            objects: told.objects(&directory),
            push_options: &push_options,
        };
        let access = &self.shared.judges.access;
        unless_gone(connection, access.check(&change)).await?;
        self.run_custom_hooks("pre-receive", connection).await?;
        unless_gone(connection, access.announce(&change)).await
    }

    async fn update(&self, connection: &mut UnixStream) -> Result<(), HookError> {
        if self.voter.runs_hooks() {
            let decided = self.run_custom_hooks("update", connection).await;
            self.stopping(decided).await?;
        }
        self.synchronize("update", connection).await
    }

    async fn post_receive(&self, connection: &mut UnixStream) -> Result<(), HookError> {
        let told = Told::read(connection, self.asks()).await?;
        // The router has recorded the change when it answers, and whoever is told now may look for it.
        self.synchronize("post-receive", connection).await?;
        if !self.voter.runs_hooks() {
            return Ok(());
        }
        if let Some(requester) = self.requester.as_ref().filter(|_| self.asks()) {
            let push_options = told.push_options();
            let change = ChangeRequest {
                repository: &self.repository,
                requester,
                changes: &told.changes,
                objects: None,
                push_options: &push_options,
            };
            // GitLab is told even if git goes away meanwhile: the change has been made.
            let (text, told) = self.shared.judges.access.report(&change).await;
            for piece in text.as_bytes().chunks(wire::MAX_PAYLOAD_BYTES) {
                write_frame(connection, Frame::Say, piece).await?;
            }
            told?;
        }
        self.run_custom_hooks("post-receive", connection).await
    }

    /// One after the other, by the hook that asks, so that what they say reaches the user at once. The first that fails
    /// ends it.
    async fn run_custom_hooks(
        &self,
        name: &'static str,
        connection: &mut UnixStream,
    ) -> Result<(), HookError> {
        let found = self.shared.judges.custom_hooks.find(&self.repository.path, name).await;
        for program in found.map_err(HookError::CustomHooks)? {
            write_frame(connection, Frame::Run, program.as_os_str().as_bytes()).await?;
            match read_frame(connection).await? {
                (Frame::Ran, code) if code == [0] => {}
                (Frame::Ran, code) if code.len() == 1 => return Err(HookError::Refused(code[0])),
                _ => return Err(HookError::Gone(io::ErrorKind::InvalidData.into())),
            }
        }
        Ok(())
    }

    /// Ends the transaction for all replicas if this says so.
    async fn stopping(&self, decided: Result<(), HookError>) -> Result<(), HookError> {
        if decided.as_ref().is_err_and(HookError::decides_for_all) {
            self.voter.stop().await;
        }
        decided
    }

    async fn synchronize(&self, name: &str, connection: &mut UnixStream) -> Result<(), HookError> {
        let point = synchronization_point(name);
        self.noting(unless_gone(connection, self.voter.synchronize(&point)).await)
    }

    async fn prepared(&self, connection: &mut UnixStream) -> Result<(), HookError> {
        let Some(ballot) = read_updates(connection).await? else { return Ok(()) };
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
        Ok(())
    }

    async fn committed(&self, connection: &mut UnixStream) -> Result<(), HookError> {
        let Some(ballot) = read_updates(connection).await? else { return Ok(()) };
        self.leave();
        self.sync(durable::sync_references).await?;
        self.progress().durable = true;
        // What has been done is reported even if git is being killed meanwhile.
        let told = self.voter.committed(&self.repository.path, ballot).await;
        self.noting(told.map_err(HookError::from))
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
async fn unless_gone<T, E>(
    connection: &mut UnixStream,
    asking: impl Future<Output = Result<T, E>>,
) -> Result<T, HookError>
where
    HookError: From<E>,
{
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
        let judges = Arc::new(super::super::Judges::nobody());
        let program = Path::new("/bin/true");
        let hooks = super::super::Hooks::start(&place, program, judges, Arc::clone(&sections), &tasks);
        let storage = crate::storage::Storage {
            name: "a".into(),
            root: directory.path().to_owned(),
            filesystem_id: "id".into(),
        };
        let path = directory.path().join("a.git");
        let repository =
            RepositoryPath { storage, relative_path: "a.git".into(), path: path.clone(), quarantine: None };
        let shared = Arc::clone(&hooks.unwrap().0);
        let session = || Arc::new(Session::new(Arc::clone(&shared), Voter::none(), repository.clone(), None));
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
