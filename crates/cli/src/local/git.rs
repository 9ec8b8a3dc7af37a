//! The system `git` as a client, blind to the configuration of whoever runs it.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use tokio::process::Command;

/// How long one command may take: a push of a large history on a slow machine.
const DEADLINE: Duration = Duration::from_secs(1800);

/// Identity, protocol and safety settings; nothing of the machine's or the user's.
const CONFIG: &str = "\
[user]
\tname = Tabularium
\temail = tabularium@example.invalid
[init]
\tdefaultBranch = main
[safe]
\tdirectory = *
[advice]
\tdetachedHead = false
[gc]
\tauto = 0
";

/// Why git did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// It could not be started or waited for.
    #[error("git cannot be run: {0}")]
    Run(#[from] io::Error),
    /// It took longer than half an hour.
    #[error("git {0} took too long")]
    Deadline(String),
    /// It said no.
    #[error("git {command} failed: {stderr}")]
    Failed {
        /// The subcommand.
        command: String,
        /// What it wrote to standard error.
        stderr: String,
    },
}

/// A client with a home directory of its own.
#[derive(Debug, Clone)]
pub struct Git {
    home: PathBuf,
    environment: Vec<(String, String)>,
}

impl Git {
    /// Makes the home directory.
    pub fn new(home: &Path) -> io::Result<Self> {
        fs::create_dir_all(home)?;
        fs::write(home.join("gitconfig"), CONFIG)?;
        Ok(Self { home: home.to_owned(), environment: Vec::new() })
    }

    /// Adds a variable to the environment of every command, such as `GIT_TRACE_PACKET`.
    #[must_use]
    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.environment.push((key.to_owned(), value.to_owned()));
        self
    }

    /// The command, for callers that want its pipes. It is killed when dropped.
    pub fn command<A: AsRef<OsStr>>(
        &self,
        directory: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Command {
        let mut command = Command::new("git");
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()))
            .env("HOME", &self.home)
            .env("GIT_CONFIG_GLOBAL", self.home.join("gitconfig"))
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("LC_ALL", "C")
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .current_dir(directory)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Runs it in `directory`, whatever it answers.
    pub async fn output<A: AsRef<OsStr>>(
        &self,
        directory: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Output, GitError> {
        let mut command = self.command(directory, arguments);
        let name = subcommand(&command);
        match tokio::time::timeout(DEADLINE, command.output()).await {
            Ok(output) => Ok(output?),
            Err(_) => Err(GitError::Deadline(name)),
        }
    }

    /// Runs it in `directory` and answers what it wrote to standard output, without the last line end.
    pub async fn run<A: AsRef<OsStr>>(
        &self,
        directory: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<String, GitError> {
        let arguments: Vec<A> = arguments.into_iter().collect();
        let command = subcommand(&self.command(directory, &arguments));
        let output = self.output(directory, arguments).await?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(GitError::Failed { command, stderr });
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    /// Branches and tags with what they point at, a line each, sorted: equal texts mean equal refs.
    pub async fn refs(&self, repository: &Path) -> Result<String, GitError> {
        self.run(repository, ["for-each-ref", "--format=%(objectname) %(refname)", "refs/heads", "refs/tags"])
            .await
    }
}

fn subcommand(command: &Command) -> String {
    command.as_std().get_args().next().unwrap_or_default().to_string_lossy().into_owned()
}
