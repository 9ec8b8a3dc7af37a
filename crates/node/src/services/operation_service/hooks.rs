//! Custom hooks: programs in a repository's `custom_hooks` that may refuse a change (wire reference, section i.2).

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
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

use crate::{git::Git, storage::RepositoryPath};

/// How much of a hook's output is kept; the rest is read and dropped.
const MAX_OUTPUT_BYTES: usize = 64 * 1024;
/// How long one hook may run.
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
    /// One could not be run.
    Io(io::Error),
}

/// What hooks are told about a change.
pub(super) struct Surroundings {
    environment: Vec<(&'static str, OsString)>,
    directory: PathBuf,
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
        Self { environment, directory: repository.path.clone() }
    }

    /// Runs all hooks of a kind; the first that fails ends it.
    pub(super) async fn run(&self, hook: Hook, arguments: &[&[u8]], input: &[u8]) -> Result<(), HookError> {
        let directory = self.directory.join("custom_hooks");
        for program in programs(&directory, hook.name()).await.map_err(HookError::Io)? {
            self.run_one(hook, &program, arguments, input).await?;
        }
        Ok(())
    }

    async fn run_one(
        &self,
        hook: Hook,
        program: &Path,
        arguments: &[&[u8]],
        input: &[u8],
    ) -> Result<(), HookError> {
        let mut command = Command::new(program);
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

/// A hook and everything it started; all of it ends when this is dropped.
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

/// `<name>`, then `<name>.d/*` in order of their names; only what can be executed.
async fn programs(directory: &Path, name: &str) -> io::Result<Vec<PathBuf>> {
    let mut programs = Vec::new();
    let single = directory.join(name);
    if executable(&single).await? {
        programs.push(single);
    }
    let mut entries = match tokio::fs::read_dir(directory.join(format!("{name}.d"))).await {
        Ok(entries) => entries,
        Err(error) if absent(&error) => return Ok(programs),
        Err(error) => return Err(error),
    };
    let mut several = Vec::new();
    while let Some(entry) = entries.next_entry().await? {
        if !entry.file_name().as_bytes().ends_with(b"~") && executable(&entry.path()).await? {
            several.push(entry.path());
        }
    }
    several.sort();
    programs.extend(several);
    Ok(programs)
}

fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

async fn executable(path: &Path) -> io::Result<bool> {
    match tokio::fs::metadata(path).await {
        Ok(metadata) => Ok(metadata.is_file() && metadata.permissions().mode() & 0o111 != 0),
        Err(error) if absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}
