//! Custom hooks: programs in a repository's `custom_hooks` that may refuse a change (wire reference, section i.2). Which
//! they are and in what order they run is decided by the script that git runs for a push, and here too.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tabularium_proto::gitaly::{CustomHookError, Repository, User, custom_hook_error::HookType};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
    time::timeout,
};

use crate::{
    error::GitError,
    git::{Git, transport::CUSTOM_HOOKS},
    hooks::synchronization_point,
    storage::RepositoryPath,
};

/// How much of the hooks' output is kept; the rest is read and dropped.
const MAX_OUTPUT_BYTES: usize = 64 * 1024;
/// How long the hooks of a kind may run together.
const DEADLINE: Duration = Duration::from_secs(300);

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    /// Before anything, with all changes on its input.
    PreReceive,
    /// Before each reference, with the change as arguments.
    Update,
    /// Afterwards.
    PostReceive,
}

impl Hook {
    fn name(self) -> &'static str {
        match self {
            Self::PreReceive => "pre-receive",
            Self::Update => "update",
            Self::PostReceive => "post-receive",
        }
    }

    /// What is voted on when it has agreed.
    pub(super) fn synchronization_point(self) -> String {
        synchronization_point(self.name())
    }

    fn kind(self) -> HookType {
        match self {
            Self::PreReceive => HookType::Prereceive,
            Self::Update => HookType::Update,
            Self::PostReceive => HookType::Postreceive,
        }
    }
}

/// A hook that did not agree.
#[derive(Debug)]
pub(super) struct Refusal {
    hook: Hook,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: String,
}

impl Refusal {
    /// What users are shown: standard error, else standard output, else how the hook ended.
    pub(super) fn message(&self) -> String {
        let blank = |text: &[u8]| text.trim_ascii().is_empty();
        match (blank(&self.stderr), blank(&self.stdout)) {
            (false, _) => String::from_utf8_lossy(&self.stderr).into_owned(),
            (true, false) => String::from_utf8_lossy(&self.stdout).into_owned(),
            (true, true) => format!("{} hook: {}", self.hook.name(), self.end),
        }
    }

    /// For the status details.
    pub(super) fn detail(&self) -> CustomHookError {
        CustomHookError {
            stdout: self.stdout.clone(),
            stderr: self.stderr.clone(),
            hook_type: self.hook.kind() as i32,
        }
    }
}

/// Why hooks did not all succeed.
#[derive(Debug)]
pub(super) enum HookError {
    /// One refused.
    Refused(Refusal),
    /// They could not be run.
    Io(io::Error),
    /// Too many processes ran for too long.
    Busy(GitError),
}

/// What hooks are told about a change.
pub(super) struct Surroundings {
    git: Git,
    environment: Vec<(&'static str, OsString)>,
    /// The repository.
    directory: PathBuf,
    /// Where the node's own scripts are, by the names of hooks.
    scripts: PathBuf,
}

impl Surroundings {
    /// Of a change by `user`; `repository` is seen with the change's new objects.
    pub(super) fn new(git: &Git, repository: &RepositoryPath, sent: &Repository, user: &User) -> Self {
        let mut environment: Vec<(&'static str, OsString)> = vec![
            ("PATH", git.search_path().to_owned()),
            ("HOME", "/nonexistent".into()),
            ("LANG", "C".into()),
            ("GIT_DIR", repository.path.clone().into()),
            ("GL_REPOSITORY", sent.gl_repository.clone().into()),
            ("GL_PROJECT_PATH", sent.gl_project_path.clone().into()),
            ("GL_ID", user.gl_id.clone().into()),
            ("GL_USERNAME", user.gl_username.clone().into()),
            ("GL_PROTOCOL", "web".into()),
        ];
        if let Some(quarantine) = &repository.quarantine {
            if let Some(objects) = &quarantine.object_directory {
                environment.push(("GIT_OBJECT_DIRECTORY", objects.clone().into()));
            }
            if let Some(first) = quarantine.alternates.first() {
                environment.push(("GIT_ALTERNATE_OBJECT_DIRECTORIES", first.clone().into()));
            }
        }
        // A NUL cannot be in an environment, and nothing above needs one.
        environment.retain(|(_, value)| !value.as_bytes().contains(&0));
        let (directory, scripts) = (repository.path.clone(), repository.storage.hooks());
        Self { git: git.clone(), environment, directory, scripts }
    }

    /// Runs all hooks of a kind; the first that fails ends it.
    pub(super) async fn run(&self, hook: Hook, arguments: &[&[u8]], input: &[u8]) -> Result<(), HookError> {
        match tokio::fs::metadata(self.directory.join(CUSTOM_HOOKS)).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(HookError::Io(error)),
        }
        let _slot = self.git.slot().await.map_err(HookError::Busy)?;
        let mut command = Command::new(self.scripts.join(hook.name()));
        command
            .args(arguments.iter().map(|argument| OsStr::from_bytes(argument)))
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.directory)
            .process_group(0)
            .kill_on_drop(true)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut group = Group(command.spawn().map_err(HookError::Io)?);
        let (stdin, stdout, stderr) = (group.0.stdin.take(), group.0.stdout.take(), group.0.stderr.take());
        let feed = async move {
            if let Some(mut stdin) = stdin {
                // A hook need not read what it is told.
                let _ = stdin.write_all(input).await;
            }
        };
        let run = async {
            let ((), stdout, stderr, end) =
                tokio::join!(feed, keep_beginning(stdout), keep_beginning(stderr), group.0.wait());
            (stdout, stderr, end)
        };
        let Ok((stdout, stderr, end)) = timeout(DEADLINE, run).await else {
            let end = format!("still running after {} s", DEADLINE.as_secs());
            return Err(HookError::Refused(Refusal { hook, stdout: Vec::new(), stderr: Vec::new(), end }));
        };
        let end = end.map_err(HookError::Io)?;
        if end.success() {
            return Ok(());
        }
        Err(HookError::Refused(Refusal { hook, stdout, stderr, end: end.to_string() }))
    }
}

/// Hooks and everything they started; all of it ends when this is dropped.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let group = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(group) = group
            && let Err(error) = kill_process_group(group, Signal::KILL)
        {
            tracing::debug!(%error, "a hook's process group could not be killed");
        }
    }
}

async fn keep_beginning(pipe: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let Some(mut pipe) = pipe else { return Vec::new() };
    let mut kept = Vec::new();
    let mut piece = vec![0; 8 * 1024];
    loop {
        match pipe.read(&mut piece).await {
            Ok(0) | Err(_) => return kept,
            Ok(length) => {
                let room = MAX_OUTPUT_BYTES.saturating_sub(kept.len()).min(length);
                kept.extend_from_slice(piece.get(..room).unwrap_or_default());
            }
        }
    }
}
