//! Who has a say in a change that a user makes through a web interface: GitLab, and custom hooks (wire reference,
//! section i.2). It is what a push's hooks do, without git.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tabularium_proto::gitaly::{AccessCheckError, CustomHookError, custom_hook_error::HookType};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
    time::timeout,
};

use crate::{
    access::{ChangeRequest, CheckError, Denied, ObjectDirectories, RequestError, Requester},
    error::GitError,
    git::Git,
    hooks::{Judges, environment, synchronization_point},
    node::Node,
    storage::{Quarantine, RepositoryPath},
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

/// Somebody who has a say did not agree.
#[derive(Debug)]
pub(super) struct Refusal {
    hook: Hook,
    by: By,
}

#[derive(Debug)]
enum By {
    Gitlab(Denied),
    CustomHook { stdout: Vec<u8>, stderr: Vec<u8>, end: String },
}

impl Refusal {
    /// What users are shown: of a custom hook standard error, else standard output, else how it ended.
    pub(super) fn message(&self) -> String {
        let blank = |text: &[u8]| text.trim_ascii().is_empty();
        match &self.by {
            By::Gitlab(denied) => denied.to_string(),
            By::CustomHook { stderr, .. } if !blank(stderr) => String::from_utf8_lossy(stderr).into_owned(),
            By::CustomHook { stdout, .. } if !blank(stdout) => String::from_utf8_lossy(stdout).into_owned(),
            By::CustomHook { end, .. } => format!("executing custom hooks: {end}"),
        }
    }

    /// The same, and when it was said.
    pub(super) fn full_message(&self) -> String {
        format!("running {} hooks: {}", self.hook.name(), self.message())
    }

    /// Whether GitLab was asked too often to say anything else.
    pub(super) fn is_rate_limited(&self) -> bool {
        matches!(&self.by, By::Gitlab(denied) if denied.is_rate_limited())
    }

    /// For the status details of RPCs that tell GitLab's refusals from others.
    pub(super) fn denied(&self) -> Option<AccessCheckError> {
        match &self.by {
            By::Gitlab(denied) => Some(denied.detail()),
            By::CustomHook { .. } => None,
        }
    }

    /// For the status details.
    pub(super) fn detail(&self) -> CustomHookError {
        let (stdout, stderr) = match &self.by {
            By::Gitlab(denied) => (Vec::new(), denied.to_string().into_bytes()),
            By::CustomHook { stdout, stderr, .. } => (stdout.clone(), stderr.clone()),
        };
        CustomHookError { stdout, stderr, hook_type: self.hook.kind() as i32 }
    }
}

/// Why there is no agreement.
#[derive(Debug, thiserror::Error)]
pub(super) enum HookError {
    /// Somebody refused.
    #[error("{}", .0.full_message())]
    Refused(Refusal),
    /// GitLab could not be asked or told.
    #[error("running {} hooks: {}", .0.name(), .1)]
    Request(Hook, RequestError),
    /// Hooks could not be run.
    #[error("running custom hooks: {0}")]
    Io(#[from] io::Error),
    /// Too many processes ran for too long.
    #[error(transparent)]
    Busy(#[from] GitError),
}

/// What hooks are told about a change.
pub(super) struct Surroundings {
    git: Git,
    judges: Arc<Judges>,
    requester: Requester,
    repository: RepositoryPath,
    push_options: Vec<String>,
}

impl Surroundings {
    /// Of a change by `requester`; `repository` is seen with the change's new objects. `push_options` are told as those of
    /// a push.
    pub(super) fn new(
        node: &Node,
        repository: &RepositoryPath,
        requester: Requester,
        push_options: &[String],
    ) -> Self {
        let (git, judges) = (node.git.clone(), Arc::clone(&node.judges));
        let (repository, push_options) = (repository.clone(), push_options.to_vec());
        Self { git, judges, requester, repository, push_options }
    }

    fn request<'a>(&'a self, changes: &'a [u8]) -> ChangeRequest<'a> {
        ChangeRequest {
            repository: &self.repository,
            requester: &self.requester,
            changes,
            objects: self.repository.quarantine.as_ref().and_then(|quarantine| {
                let directory = quarantine.object_directory.as_ref()?;
                let repository = &self.repository.path;
                Some(ObjectDirectories::relative_to(repository, directory, &quarantine.alternates))
            }),
            push_options: &self.push_options,
        }
    }

    /// Asks whether the change may be made.
    pub(super) async fn ask(&self, changes: &[u8]) -> Result<(), HookError> {
        let (hook, change) = (Hook::PreReceive, self.request(changes));
        self.judges.access.check(&change).await.map_err(|error| match error {
            CheckError::Denied(denied) => HookError::Refused(Refusal { hook, by: By::Gitlab(denied) }),
            CheckError::Request(error) => HookError::Request(hook, error),
        })?;
        self.run(hook, &[], changes).await?;
        let announced = self.judges.access.announce(&change).await;
        announced.map_err(|error| HookError::Request(hook, error))
    }

    /// Says that it has been made. There is nobody who could read what GitLab says about it.
    pub(super) async fn tell(&self, changes: &[u8]) -> Result<(), HookError> {
        let (_, told) = self.judges.access.report(&self.request(changes)).await;
        told.map_err(|error| HookError::Request(Hook::PostReceive, error))?;
        self.run(Hook::PostReceive, &[], changes).await
    }

    /// Runs all custom hooks of a kind; the first that fails ends it.
    pub(super) async fn run(&self, hook: Hook, arguments: &[&[u8]], input: &[u8]) -> Result<(), HookError> {
        let programs = self.judges.custom_hooks.find(&self.repository.path, hook.name()).await?;
        if programs.is_empty() {
            return Ok(());
        }
        let _slot = self.git.slot().await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let run = async {
            for program in &programs {
                let end = self.run_one(hook, program, arguments, input, (&mut stdout, &mut stderr)).await?;
                if let Some(end) = end {
                    return Ok(Some(format!("error executing {:?}: {end}", program.display().to_string())));
                }
            }
            Ok::<_, io::Error>(None)
        };
        let end = match timeout(DEADLINE, run).await {
            Ok(end) => end?,
            Err(_) => Some(format!("still running after {} s", DEADLINE.as_secs())),
        };
        match end {
            None => Ok(()),
            Some(end) => {
                Err(HookError::Refused(Refusal { hook, by: By::CustomHook { stdout, stderr, end } }))
            }
        }
    }

    /// How it ended, if not well.
    async fn run_one(
        &self,
        hook: Hook,
        program: &Path,
        arguments: &[&[u8]],
        input: &[u8],
        (stdout, stderr): (&mut Vec<u8>, &mut Vec<u8>),
    ) -> io::Result<Option<String>> {
        let mut command = Command::new(program);
        command
            .args(arguments.iter().map(|argument| OsStr::from_bytes(argument)))
            .env_clear()
            .envs(self.environment())
            .envs(self.options_for(hook))
            .current_dir(&self.repository.path)
            .process_group(0)
            .kill_on_drop(true)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut group = Group(command.spawn()?);
        let pipes = (group.0.stdin.take(), group.0.stdout.take(), group.0.stderr.take());
        let feed = async move {
            if let Some(mut stdin) = pipes.0 {
                // A hook need not read what it is told.
                let _ = stdin.write_all(input).await;
            }
        };
        let (keep_stdout, keep_stderr) = (keep_beginning(pipes.1, stdout), keep_beginning(pipes.2, stderr));
        let ((), (), (), end) = tokio::join!(feed, keep_stdout, keep_stderr, group.0.wait());
        let end = end?;
        Ok(match end.code() {
            Some(0) => None,
            Some(code) => Some(format!("exit status {code}")),
            None => Some(end.to_string()),
        })
    }

    /// Push options as git tells its hooks of them; `update` hears nothing of them.
    fn options_for(&self, hook: Hook) -> Vec<(String, String)> {
        if self.push_options.is_empty() || hook == Hook::Update {
            return Vec::new();
        }
        // A NUL cannot be in an environment, and git takes no option with one.
        let options: Vec<&str> =
            self.push_options.iter().map(String::as_str).filter(|option| !option.contains('\0')).collect();
        let count = ("GIT_PUSH_OPTION_COUNT".to_owned(), options.len().to_string());
        let named =
            |(number, option): (usize, &&str)| (format!("GIT_PUSH_OPTION_{number}"), (*option).to_owned());
        std::iter::once(count).chain(options.iter().enumerate().map(named)).collect()
    }

    fn environment(&self) -> Vec<(&'static str, OsString)> {
        let directory = self.repository.path.clone().into_os_string();
        let mut environment: Vec<(&'static str, OsString)> = vec![
            ("PATH", self.git.search_path()),
            ("HOME", "/nonexistent".into()),
            ("LANG", "C".into()),
            ("GIT_DIR", directory),
        ];
        environment.extend(environment_of(&self.requester));
        if let Some(Quarantine { object_directory, alternates }) = &self.repository.quarantine {
            if let Some(objects) = object_directory {
                environment.push(("GIT_OBJECT_DIRECTORY", objects.clone().into()));
            }
            if !alternates.is_empty() {
                let joined: Vec<&OsStr> = alternates.iter().map(AsRef::as_ref).collect();
                let joined = joined.join(OsStr::new(":"));
                environment.push(("GIT_ALTERNATE_OBJECT_DIRECTORIES", joined));
            }
        }
        // A NUL cannot be in an environment, and nothing above needs one.
        environment.retain(|(_, value)| !value.as_bytes().contains(&0));
        environment
    }
}

fn environment_of(requester: &Requester) -> impl Iterator<Item = (&'static str, OsString)> {
    environment(requester).into_iter().map(|(name, value)| (name, value.into()))
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

async fn keep_beginning(pipe: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) {
    let Some(mut pipe) = pipe else { return };
    let mut piece = vec![0; 8 * 1024];
    loop {
        match pipe.read(&mut piece).await {
            Ok(0) | Err(_) => return,
            Ok(length) => {
                let room = MAX_OUTPUT_BYTES.saturating_sub(kept.len()).min(length);
                kept.extend_from_slice(piece.get(..room).unwrap_or_default());
            }
        }
    }
}
