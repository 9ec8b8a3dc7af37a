//! The git runner. Every git process of the node starts here, and none outlives the request that wanted it.
//!
//! A process gets a cleared environment plus an allow-list, its own process group, the settings Gitaly runs git with
//! (wire reference, section b.6), and a slot of a bounded number; whoever waits too long for a slot is refused. Dropping
//! a [`GitProcess`] that has not ended sends SIGTERM to its group, so that git takes its locks and its quarantine away,
//! then SIGKILL, and reaps it in the background; the slot is free only when it is gone.

use std::{
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use rustix::process::{Pid, setpriority_pgrp};
use tabularium_common::lifecycle::Tasks;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::GitError,
    git::{
        durable,
        leftovers::{WriterGuard, Writers},
        output::{Exit, Output},
        reaper::Running,
    },
    hooks::Session,
    keyed_locks::KeyedLock,
    metrics::Metrics,
    storage::RepositoryPath,
};

/// Largest piece in which data is read from git and sent to clients (wire reference, section 0.2).
pub(crate) const CHUNK_BYTES: usize = 128 * 1024;
/// How much of the end of a process's standard error is kept.
pub(crate) const STDERR_TAIL_BYTES: usize = 64 * 1024;
/// Most output that [`GitCommand::output`] collects in memory. What may be larger is streamed.
pub(crate) const MAX_CAPTURED_BYTES: usize = 32 * 1024 * 1024;
/// How long a request waits for a process slot.
pub(crate) const QUEUE_WAIT: Duration = Duration::from_secs(10);
/// Nice value of a process that nobody waits for.
const YIELDING: i32 = 15;
/// How long the standard error of an ended process is still read; a stray grandchild may hold it open.
const STDERR_GRACE: Duration = Duration::from_secs(1);
/// Gitaly's settings for every git command.
const SETTINGS: &[&str] = &[
    "gc.auto=0",
    "maintenance.auto=0",
    "core.autocrlf=input",
    "core.useReplaceRefs=false",
    "core.fsync=objects,derived-metadata,reference",
    "core.fsyncMethod=fsync",
    "core.packedRefsTimeout=10000",
    "core.filesRefLockTimeout=1000",
    "core.bigFileThreshold=50m",
    // A hook in a repository that came from elsewhere must never run here.
    "core.hooksPath=/dev/null",
    // Storages are often volumes that belong to another user; which directories are opened is decided by us.
    "safe.directory=*",
];

/// Starts git processes. Clones share slots.
#[derive(Clone)]
pub(crate) struct Git(Arc<Shared>, Option<Arc<KeyedLock>>);

struct Shared {
    binary: PathBuf,
    search_path: OsString,
    slots: Arc<Semaphore>,
    push_slots: Arc<Semaphore>,
    queue_wait: Duration,
    tasks: Tasks,
    metrics: Metrics,
    writers: Arc<Writers>,
}

/// Room for one process at a time. Clones share the room, which is free again when the last of them is gone.
#[derive(Clone)]
pub(crate) struct Slot {
    _permit: Arc<OwnedSemaphorePermit>,
}

impl From<OwnedSemaphorePermit> for Slot {
    fn from(permit: OwnedSemaphorePermit) -> Self {
        Self { _permit: Arc::new(permit) }
    }
}

impl Git {
    /// A runner of `binary` with at most `slots` processes at once, none of which waits longer than `queue_wait`.
    pub(crate) fn new(
        binary: PathBuf,
        search_path: OsString,
        slots: usize,
        queue_wait: Duration,
        tasks: Tasks,
        metrics: Metrics,
    ) -> Self {
        let push_slots = Arc::new(Semaphore::new(slots));
        let slots = Arc::new(Semaphore::new(slots));
        let writers = Arc::new(Writers::default());
        let (waiting, stopping) = (Arc::clone(&writers), tasks.stopping());
        tasks.spawn("abandoned files", async move {
            // Stopping in the middle of it is harmless: the next process of the node begins anew.
            stopping.run_until_cancelled(waiting.clear_waiting()).await;
        });
        let shared = Shared { binary, search_path, slots, push_slots, queue_wait, tasks, metrics, writers };
        Self(Arc::new(shared), None)
    }

    /// The same, whose processes hold a lock each until they are gone, also when nobody waits for them any more.
    pub(crate) fn holding(&self, lock: Arc<KeyedLock>) -> Self {
        Self(Arc::clone(&self.0), Some(lock))
    }

    /// `git <subcommand>` in a repository. It counts as a writer unless [`GitCommand::reads`] says otherwise.
    pub(crate) fn command(&self, repository: &RepositoryPath, subcommand: &'static str) -> GitCommand {
        let mut command = self.bare_command(subcommand);
        command.directory = Some(repository.path.clone());
        command.building = repository.path.starts_with(repository.storage.temporary());
        if let Some(quarantine) = &repository.quarantine {
            command.quarantined = true;
            if let Some(objects) = &quarantine.object_directory {
                command = command.env("GIT_OBJECT_DIRECTORY", objects);
            }
            if !quarantine.alternates.is_empty() {
                let joined = quarantine.alternates.iter().map(|path| path.as_os_str().to_owned());
                command = command.env("GIT_ALTERNATE_OBJECT_DIRECTORIES", join(joined, ":"));
            }
        }
        command
    }

    /// Waits for room for one process.
    pub(crate) async fn slot(&self) -> Result<Slot, GitError> {
        Ok(self.permits(&self.0.slots, 1).await?.into())
    }

    /// Waits for room for a push that somebody is asked about who reads from this node meanwhile. There is as much of it as
    /// for everything else, and reads do not wait for it.
    pub(crate) async fn push_slot(&self) -> Result<Slot, GitError> {
        Ok(self.permits(&self.0.push_slots, 1).await?.into())
    }

    /// Waits for room for two processes that work together. Whoever took one and then waited for the other would
    /// starve, and be starved by, everybody else who does so.
    pub(crate) async fn two_slots(&self) -> Result<(Slot, Slot), GitError> {
        let mut both = self.permits(&self.0.slots, 2).await?;
        let one = both.split(1).ok_or(GitError::QueueTimeout)?;
        Ok((one.into(), both.into()))
    }

    async fn permits(&self, slots: &Arc<Semaphore>, count: u32) -> Result<OwnedSemaphorePermit, GitError> {
        let shared = &self.0;
        let began = Instant::now();
        let queued = timeout(shared.queue_wait, Arc::clone(slots).acquire_many_owned(count)).await;
        let Ok(Ok(permits)) = queued else { return Err(GitError::QueueTimeout) };
        shared.metrics.git_queued(began.elapsed());
        Ok(permits)
    }

    /// The program.
    pub(crate) fn binary(&self) -> &Path {
        &self.0.binary
    }

    /// Where programs are found, for whatever runs beside git: this git before all others.
    pub(crate) fn search_path(&self) -> OsString {
        let own = self.0.binary.parent().filter(|directory| directory.is_absolute());
        let own = own.map(|directory| directory.as_os_str().to_owned());
        join(own.into_iter().chain(Some(self.0.search_path.clone())), ":")
    }

    /// Counts the caller as a writer of the repository, in which nothing of an earlier process of the node is left then.
    pub(crate) async fn writer(&self, repository: &RepositoryPath) -> WriterGuard {
        self.0.writers.clear_stale(&repository.path).await;
        self.0.writers.enter(&repository.path)
    }

    /// `git <subcommand>` outside of any repository.
    pub(crate) fn bare_command(&self, subcommand: &'static str) -> GitCommand {
        GitCommand {
            git: self.clone(),
            subcommand,
            directory: None,
            slot: None,
            session: None,
            building: false,
            quarantined: false,
            writes: true,
            yields: false,
            config: Vec::new(),
            secret_config: Vec::new(),
            environment: Vec::new(),
            arguments: Vec::new(),
        }
    }
}

fn join(parts: impl Iterator<Item = OsString>, separator: &str) -> OsString {
    let mut joined = OsString::new();
    for part in parts {
        if !joined.is_empty() {
            joined.push(separator);
        }
        joined.push(part);
    }
    joined
}

/// A git command being put together. Arguments that come from a request go behind `--end-of-options` or `--`.
#[derive(Clone)]
#[must_use]
pub(crate) struct GitCommand {
    git: Git,
    subcommand: &'static str,
    directory: Option<PathBuf>,
    slot: Option<Slot>,
    session: Option<Arc<Session>>,
    /// The repository is none yet: nobody else knows it, and it goes with the node.
    building: bool,
    /// What it writes is no part of the repository yet.
    quarantined: bool,
    writes: bool,
    /// Others go before it.
    yields: bool,
    config: Vec<OsString>,
    secret_config: Vec<(OsString, OsString)>,
    environment: Vec<(OsString, OsString)>,
    arguments: Vec<OsString>,
}

impl GitCommand {
    /// Appends an argument.
    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Appends arguments.
    pub(crate) fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Adds `-c <setting>`, `key=value`, after the node's own. Visible in the process list: no secrets.
    pub(crate) fn config(mut self, setting: impl AsRef<OsStr>) -> Self {
        self.config.push(setting.as_ref().to_owned());
        self
    }

    /// Adds a setting through the environment, where the process list does not show it.
    pub(crate) fn secret_config(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.secret_config.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Says that the command writes nothing into the repository, so that it does not hold up the clearing of what a
    /// killed writer left.
    pub(crate) fn reads(mut self) -> Self {
        self.writes = false;
        self
    }

    /// Leaves the processor to others: nobody waits for it.
    pub(crate) fn yields(mut self) -> Self {
        self.yields = true;
        self
    }

    /// Runs in room that has been taken before.
    pub(crate) fn slot(mut self, slot: &Slot) -> Self {
        self.slot = Some(slot.clone());
        self
    }

    /// The session lives as long as the process, and says when it may be killed.
    pub(crate) fn attended_by(mut self, session: Arc<Session>) -> Self {
        self.session = Some(session);
        self
    }

    fn build(&self) -> Command {
        let mut command = Command::new(&self.git.0.binary);
        command
            .env_clear()
            .env("PATH", &self.git.0.search_path)
            .env("HOME", "/nonexistent")
            .env("LANG", "C")
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_ALLOW_PROTOCOL", "")
            .env("GIT_ADVICE", "0");
        if !self.secret_config.is_empty() {
            command.env("GIT_CONFIG_COUNT", self.secret_config.len().to_string());
            for (number, (key, value)) in self.secret_config.iter().enumerate() {
                command.env(format!("GIT_CONFIG_KEY_{number}"), key);
                command.env(format!("GIT_CONFIG_VALUE_{number}"), value);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        for setting in SETTINGS {
            command.arg("-c").arg(setting);
        }
        for setting in &self.config {
            command.arg("-c").arg(setting);
        }
        if let Some(directory) = &self.directory {
            command.arg("--git-dir").arg(directory).current_dir(directory);
        } else {
            // Where no repository is that git could find.
            command.current_dir("/");
        }
        command.arg(self.subcommand).args(&self.arguments);
        command.process_group(0).kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts the process; its standard input is a pipe if `stdin`, else empty.
    pub(crate) async fn spawn(self, stdin: bool) -> Result<GitProcess, GitError> {
        let shared = &self.git.0;
        let slot = match &self.slot {
            Some(slot) => slot.clone(),
            None => self.git.slot().await?,
        };
        let writer = match &self.directory {
            Some(directory) if self.writes => {
                if !self.building {
                    shared.writers.clear_stale(directory).await;
                }
                Some(shared.writers.enter(directory))
            }
            _ => None,
        };
        let for_good = self.writes && !self.quarantined && !self.building;
        let directory = self.directory.as_ref().filter(|_| for_good);
        let touches = directory.map(|directory| (directory.clone(), durable::Moment::now()));
        let mut command = self.build();
        command.stdin(if stdin { Stdio::piped() } else { Stdio::null() });
        let subcommand = self.subcommand;
        let mut child = command.spawn().map_err(|source| GitError::Spawn { subcommand, source })?;
        if self.yields {
            lower_priority(&child);
        }
        shared.metrics.git_started(subcommand);
        let stderr = child
            .stderr
            .take()
            .map(|stderr| shared.tasks.spawn("git stderr", async move { tail(stderr).await }));
        Ok(GitProcess {
            subcommand,
            stdin: child.stdin.take(),
            stdout: child.stdout.take(),
            stderr,
            buffer: BytesMut::new(),
            touches,
            running: Some(Running { child, slot, writer, session: self.session, _lock: self.git.1.clone() }),
            stopping: shared.tasks.stopping(),
            git: self.git.clone(),
        })
    }

    /// Runs the command to its end with empty standard input.
    pub(crate) async fn output(self) -> Result<Output, GitError> {
        let process = self.spawn(false).await?;
        process.collect(Bytes::new()).await
    }

    /// Runs the command to its end with `input` on its standard input.
    pub(crate) async fn output_with(self, input: impl Into<Bytes>) -> Result<Output, GitError> {
        let process = self.spawn(true).await?;
        process.collect(input.into()).await
    }

    /// Runs the command and answers its standard output; another exit code than 0 is an error.
    pub(crate) async fn checked(self) -> Result<Vec<u8>, GitError> {
        self.output().await?.checked()
    }
}

/// Of the process and of all that it starts from now on. It runs in any case.
fn lower_priority(child: &Child) {
    let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Err(error) = group.map_or(Ok(()), |group| setpriority_pgrp(Some(group), YIELDING)) {
        tracing::debug!(%error, "git runs as if somebody waited for it");
    }
}

/// Reads to the end and keeps the last [`STDERR_TAIL_BYTES`].
async fn tail(mut stderr: impl tokio::io::AsyncRead + Unpin) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut piece = vec![0; 8 * 1024];
    loop {
        match stderr.read(&mut piece).await {
            Ok(0) | Err(_) => return kept,
            Ok(length) => {
                kept.extend_from_slice(&piece[..length]);
                if kept.len() > 2 * STDERR_TAIL_BYTES {
                    kept.drain(..kept.len() - STDERR_TAIL_BYTES);
                }
            }
        }
    }
}

/// A process that has been started. Dropped before it ended, it is killed with its whole group and reaped.
pub(crate) struct GitProcess {
    subcommand: &'static str,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    buffer: BytesMut,
    /// The repository it writes in, and since when.
    touches: Option<(PathBuf, durable::Moment)>,
    running: Option<Running>,
    stopping: CancellationToken,
    git: Git,
}

impl GitProcess {
    /// The standard input, once. Dropping it ends the input.
    pub(crate) fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.stdin.take()
    }

    /// The standard output, once; [`GitProcess::read_chunk`] then reads nothing.
    pub(crate) fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.stdout.take()
    }

    /// The next piece of standard output, at most [`CHUNK_BYTES`]; `None` at its end. May be cancelled safely, and fails
    /// once the node's drain is over.
    pub(crate) async fn read_chunk(&mut self) -> Result<Option<Bytes>, GitError> {
        let Some(stdout) = &mut self.stdout else { return Ok(None) };
        self.buffer.reserve(CHUNK_BYTES);
        let mut room = (&mut self.buffer).limit(CHUNK_BYTES);
        let read = tokio::select! {
            biased;
            read = stdout.read_buf(&mut room) => read,
            () = self.stopping.cancelled() => return Err(GitError::Stopping),
        };
        let length = read.map_err(|source| GitError::Io { subcommand: self.subcommand, source })?;
        Ok((length > 0).then(|| self.buffer.split().freeze()))
    }

    /// The same, of at most `most` bytes, behind `front` bytes for what is to stand before it.
    pub(crate) async fn read_behind(
        &mut self,
        front: usize,
        most: usize,
    ) -> Result<Option<BytesMut>, GitError> {
        let Some(stdout) = &mut self.stdout else { return Ok(None) };
        let mut buffer = BytesMut::with_capacity(front + most);
        buffer.resize(front, 0);
        let mut room = (&mut buffer).limit(most);
        let read = tokio::select! {
            biased;
            read = stdout.read_buf(&mut room) => read,
            () = self.stopping.cancelled() => return Err(GitError::Stopping),
        };
        let length = read.map_err(|source| GitError::Io { subcommand: self.subcommand, source })?;
        Ok((length > 0).then_some(buffer))
    }

    /// Closes both pipes, waits for the end and answers it with the end of standard error. What the process changed in
    /// its repository is on disk by then.
    pub(crate) async fn finish(mut self) -> Result<(Exit, Vec<u8>), GitError> {
        self.stdin = None;
        self.stdout = None;
        let subcommand = self.subcommand;
        let exit = match &mut self.running {
            None => return Err(GitError::Io { subcommand, source: io::Error::other("has ended already") }),
            Some(running) => running.child.wait().await,
        };
        let exit = exit.map_err(|source| GitError::Io { subcommand, source })?;
        let session = self.running.as_ref().and_then(|running| running.session.as_ref());
        let durable = session.is_some_and(|session| session.is_durable());
        if let Some((directory, since)) = self.touches.take().filter(|_| !durable) {
            let synced = tokio::task::spawn_blocking(move || durable::sync_changed(&directory, since)).await;
            let synced = synced.map_err(io::Error::other).and_then(|synced| synced);
            synced.map_err(|source| GitError::Io { subcommand, source })?;
        }
        self.git.0.metrics.git_ended();
        let exit = Exit { code: exit.code() };
        if let Some(running) = self.running.take().filter(|_| exit.died()) {
            running.died(&self.git.0.tasks);
        }
        let stderr = match self.stderr.take() {
            None => Vec::new(),
            Some(mut reader) => match timeout(STDERR_GRACE, &mut reader).await {
                Ok(Ok(stderr)) => stderr,
                Ok(Err(_)) => Vec::new(),
                Err(_) => {
                    reader.abort();
                    Vec::new()
                }
            },
        };
        Ok((exit, stderr))
    }

    async fn collect(mut self, input: Bytes) -> Result<Output, GitError> {
        let subcommand = self.subcommand;
        let stdin = self.take_stdin();
        let feed = async move {
            if let Some(mut stdin) = stdin {
                // A process that has read enough closes its end; its exit code tells whether that was right.
                let _ = stdin.write_all(&input).await;
            }
            Ok::<(), GitError>(())
        };
        let mut stdout = Vec::new();
        let read = async {
            while let Some(chunk) = self.read_chunk().await? {
                if stdout.len() + chunk.len() > MAX_CAPTURED_BYTES {
                    return Err(GitError::TooMuchOutput { subcommand, limit: MAX_CAPTURED_BYTES });
                }
                stdout.extend_from_slice(&chunk);
            }
            Ok(())
        };
        tokio::try_join!(feed, read)?;
        let (exit, stderr) = self.finish().await?;
        Ok(Output { exit, stdout, stderr, subcommand })
    }
}

impl Drop for GitProcess {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            self.git.0.metrics.git_killed();
            let metrics = self.git.0.metrics.clone();
            running.kill(&self.git.0.tasks, metrics, self.stdout.take(), self.stderr.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;
    use tonic::{Code, Status};

    use super::*;
    use crate::keyed_locks::KeyedLocks;

    fn runner(slots: usize, queue_wait: Duration) -> Git {
        let search_path = std::env::var_os("PATH").unwrap();
        let metrics = Metrics::new(&mut Registry::default());
        Git::new("git".into(), search_path, slots, queue_wait, Tasks::new(), metrics)
    }

    fn alive(id: u32) -> bool {
        Path::new(&format!("/proc/{id}")).exists()
    }

    /// Waits for its standard input.
    async fn waiting(git: &Git) -> GitProcess {
        git.bare_command("hash-object").arg("--stdin").spawn(true).await.unwrap()
    }

    #[tokio::test]
    async fn whoever_waits_too_long_is_refused() {
        let git = runner(1, Duration::from_millis(50));
        let holder = waiting(&git).await;
        let error = git.bare_command("version").output().await.unwrap_err();
        let status = Status::from(error);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.message(), "maximum time in concurrency queue reached");
        let details = String::from_utf8_lossy(status.details()).into_owned();
        assert!(details.contains("type.googleapis.com/gitaly.LimitError"), "{details}");
        drop(holder);
        let shared = Shared {
            binary: "git".into(),
            search_path: git.0.search_path.clone(),
            slots: Arc::clone(&git.0.slots),
            push_slots: Arc::clone(&git.0.push_slots),
            queue_wait: Duration::from_secs(10),
            tasks: git.0.tasks.clone(),
            metrics: git.0.metrics.clone(),
            writers: Arc::default(),
        };
        let git = Git(Arc::new(shared), None);
        assert!(git.bare_command("version").output().await.unwrap().exit.success(), "the slot is free again");
    }

    #[tokio::test]
    async fn a_dropped_process_is_killed_with_its_children_and_reaped() {
        let git = runner(4, Duration::from_secs(1));
        // A leader with a child that ignores SIGTERM.
        let alias = "alias.stubborn=!trap '' TERM; sleep 600 & wait; sleep 600";
        let (locks, key) = (KeyedLocks::default(), Path::new("a"));
        let holding = git.holding(Arc::new(locks.lock(key).await));
        let process = holding.bare_command("stubborn").config(alias).spawn(false).await.unwrap();
        drop(holding);
        let leader = process.running.as_ref().and_then(|running| running.child.id()).unwrap();
        let mut family = vec![leader];
        while family.len() < 3 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            family = in_group(leader);
        }
        drop(process);
        drop(locks.lock(key).await);
        assert!(!alive(leader), "reaped, and only then does it hold the lock no more");
        git.0.tasks.drain(Duration::from_secs(20)).await.unwrap();
        // Orphans are reaped by whoever adopts them; dead they are as soon as the kernel has come to it.
        while !in_group(leader).is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(git.0.slots.available_permits(), 4);
    }

    /// Processes of a group that are not zombies.
    fn in_group(group: u32) -> Vec<u32> {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        ids.filter(|id| {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
            fields.len() > 2 && fields[0] != "Z" && fields[2] == group.to_string()
        })
        .collect()
    }

    #[tokio::test]
    async fn what_a_process_left_that_died_of_itself_goes() {
        let git = runner(1, Duration::from_secs(1));
        let directory = tempfile::tempdir().unwrap();
        git.bare_command("init").arg("--bare").arg(directory.path()).checked().await.unwrap();
        let left = directory.path().join("objects/ab/tmp_obj_x");
        for (code, remains) in [(1, true), (128, false)] {
            let alias = format!("!mkdir -p objects/ab && touch objects/ab/tmp_obj_x && exit {code}");
            let command = git.bare_command("ending").config(format!("alias.ending={alias}"));
            let command =
                GitCommand { directory: Some(directory.path().to_owned()), writes: true, ..command };
            assert_eq!(command.output().await.unwrap().exit.code, Some(code));
            while git.0.tasks.running().contains(&"git sweeper") {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(left.exists(), remains, "exit code {code}");
        }
    }

    #[tokio::test]
    async fn the_environment_is_ours_alone() {
        let git = runner(1, Duration::from_secs(1));
        let output = git.bare_command("envs").config("alias.envs=!env").checked().await.unwrap();
        let text = String::from_utf8_lossy(&output).into_owned();
        assert!(text.contains("HOME=/nonexistent") && !text.contains("CARGO"), "{text}");
    }

    #[tokio::test]
    async fn what_goes_in_comes_out_in_pieces() {
        let git = runner(1, Duration::from_secs(1));
        let id =
            git.bare_command("hash-object").arg("--stdin").output_with(vec![b'x'; 1 << 20]).await.unwrap();
        assert_eq!(id.checked().unwrap().len(), 41);
        let failed = git.bare_command("hash-object").arg("--nonsense").checked().await.unwrap_err();
        assert!(failed.to_string().contains("exit status 129"), "{failed}");
    }
}
