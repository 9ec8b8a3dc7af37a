//! Child processes that never outlive this one.
//!
//! A child runs in a process group of its own, and beside it runs a tiny shell, its watcher, that holds the read end of
//! a pipe. When this process ends, even by SIGKILL, the kernel closes the write end; the watcher then kills the group.
//! There is no moment without a guard: the child's program starts only after its watcher runs.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};

/// Waits for the word, then becomes the program. Without the word (the starter is gone) it ends.
const LAUNCHER: &str = r#"read -r go || exit 125; exec "$@" </dev/null"#;

/// Waits for the end of its input, then stops the group `$1`: signal `$2`, five seconds later SIGKILL; then removes the
/// directory `$3`, if one is named.
const WATCHER: &str = r#"
while read -r line; do :; done
kill -s "$2" -- "-$1" 2>/dev/null
tries=0
while [ "$tries" -lt 50 ] && kill -s 0 -- "-$1" 2>/dev/null; do sleep 0.1; tries=$((tries + 1)); done
kill -s KILL -- "-$1" 2>/dev/null
if [ -n "$3" ]; then rm -rf -- "$3"; fi
"#;

/// How often an ending process is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How many bytes from the end of a log are shown.
const TAIL_BYTES: u64 = 4096;

/// How a process is started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Its environment beside what is inherited.
    pub environment: Vec<(OsString, OsString)>,
    /// Whether it inherits nothing but `PATH`.
    pub clear_environment: bool,
    /// Standard output and error are appended to this file.
    pub log: PathBuf,
    /// User and group, when not ours.
    pub user: Option<(u32, u32)>,
    /// Asks it to end in an orderly way: `TERM`, `QUIT` ...
    pub stop_signal: Signal,
    /// Removed by the watcher when this process ends without stopping the child.
    pub remove: Option<PathBuf>,
}

impl Launch {
    /// `program`, logging to `log`, stopped by SIGTERM.
    pub fn new(program: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            clear_environment: false,
            log: log.into(),
            user: None,
            stop_signal: Signal::TERM,
            remove: None,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Starts it.
    pub fn start(&self) -> io::Result<Guarded> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = Command::new("/bin/sh");
        if self.clear_environment {
            command.env_clear();
            command.env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()));
        }
        command
            .args(["-c", LAUNCHER, "launch"])
            .arg(&self.program)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log);
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
        let mut child = command.spawn()?;
        let pid = group_of(&child)?;
        let watcher = match self.start_watcher(pid) {
            Ok(watcher) => watcher,
            Err(error) => {
                // Without its word the launcher ends by itself once its input is closed.
                drop(child.stdin.take());
                let _status = child.wait()?;
                return Err(error);
            }
        };
        let guarded = Guarded { child, watcher, pid, stop_signal: self.stop_signal, status: None };
        guarded.say_go()
    }

    fn start_watcher(&self, group: Pid) -> io::Result<Child> {
        Command::new("/bin/sh")
            .args(["-c", WATCHER, "watch"])
            .arg(group.as_raw_nonzero().to_string())
            .arg(signal_name(self.stop_signal))
            .arg(self.remove.as_deref().unwrap_or(Path::new("")))
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    }
}

fn group_of(child: &Child) -> io::Result<Pid> {
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("unusable process id"))
}

fn signal_name(signal: Signal) -> &'static str {
    match signal {
        Signal::INT => "INT",
        Signal::QUIT => "QUIT",
        Signal::KILL => "KILL",
        _ => "TERM",
    }
}

/// A running child with its watcher. Dropping it kills the whole process group.
#[derive(Debug)]
pub struct Guarded {
    child: Child,
    watcher: Child,
    pid: Pid,
    stop_signal: Signal,
    status: Option<ExitStatus>,
}

impl Guarded {
    fn say_go(mut self) -> io::Result<Self> {
        if let Some(mut stdin) = self.child.stdin.take() {
            stdin.write_all(b"go\n")?;
        }
        Ok(self)
    }

    /// The process id; also that of its group.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
            if self.status.is_some() {
                self.dismiss_watcher();
            }
        }
        Ok(self.status)
    }

    /// Sends a signal to the group. Nothing happens to a process that has ended.
    pub fn signal(&mut self, signal: Signal) -> io::Result<()> {
        // Looked at first: a reaped child's id may already be another's.
        if self.try_wait()?.is_some() {
            return Ok(());
        }
        match kill_process_group(self.pid, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            result => result.map_err(Into::into),
        }
    }

    /// Kills it at once, and waits until it is gone.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        self.signal(Signal::KILL)?;
        let status = self.child.wait()?;
        self.status = Some(status);
        self.dismiss_watcher();
        Ok(status)
    }

    /// Waits until it ends by itself.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Asks it to end, waits at most `patience`, then kills it.
    pub async fn stop(&mut self, patience: Duration) -> io::Result<ExitStatus> {
        self.signal(self.stop_signal)?;
        // One that is stopped (SIGSTOP) could not obey.
        self.signal(Signal::CONT)?;
        match tokio::time::timeout(patience, self.wait()).await {
            Ok(status) => status,
            Err(_) => self.kill(),
        }
    }

    /// As [`Guarded::stop`], for destructors.
    #[expect(clippy::disallowed_methods, reason = "destructors cannot be asynchronous; the wait is bounded")]
    pub fn stop_blocking(&mut self, patience: Duration) -> io::Result<ExitStatus> {
        self.signal(self.stop_signal)?;
        self.signal(Signal::CONT)?;
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        self.kill()
    }

    fn dismiss_watcher(&mut self) {
        // Killed rather than told: its end of the pipe closing is the very thing it acts on. That it may be gone
        // already is the only way either call fails.
        let _gone = self.watcher.kill();
        let _reaped = self.watcher.wait();
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if self.kill().is_err() {
            // The watcher sees its pipe close and does what could not be done here.
            drop(self.watcher.stdin.take());
        }
    }
}

/// How a process ended, in words.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// The last lines of a log, or why it cannot be read.
pub fn tail(log: &Path) -> String {
    tail_since(log, 0)
}

/// As [`tail`], of what was written after the first `before` bytes: by this run and not by an earlier one.
pub(crate) fn tail_since(log: &Path, before: u64) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES).max(before)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    };
    match read() {
        Ok(text) if text.is_empty() => "(empty)".to_owned(),
        Ok(text) => text,
        Err(error) => format!("(cannot be read: {error})"),
    }
}

/// Creates a directory, with its parents, that only its owner reads.
pub(crate) fn private_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alive(pid: u32) -> bool {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
    }

    fn sleeper(directory: &Path) -> Launch {
        Launch::new("/bin/sleep", directory.join("log")).arg("600")
    }

    #[test]
    fn a_dropped_child_is_gone_with_its_watcher() {
        let directory = tempfile::tempdir().unwrap();
        let guarded = sleeper(directory.path()).start().unwrap();
        let (child, watcher) = (guarded.pid(), guarded.watcher.id());
        assert!(alive(child) && alive(watcher));
        drop(guarded);
        assert!(!alive(child) && !alive(watcher));
    }

    #[test]
    fn a_child_whose_starter_is_killed_is_stopped_and_its_directory_removed() {
        let directory = tempfile::tempdir().unwrap();
        let doomed = directory.path().join("doomed");
        fs::create_dir(&doomed).unwrap();
        let mut launch = sleeper(directory.path());
        launch.remove = Some(doomed.clone());
        let mut guarded = launch.start().unwrap();
        // What the kernel does when this process dies: the write end closes.
        drop(guarded.watcher.stdin.take());
        assert_eq!(guarded.child.wait().unwrap().signal(), Some(15));
        assert!(guarded.watcher.wait().unwrap().code().is_some());
        assert!(!doomed.exists());
    }

    #[tokio::test]
    async fn a_stopped_child_that_ignores_the_signal_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let mut guarded = Launch::new("/bin/sh", directory.path().join("log"))
            .args(["-c", "trap '' TERM; echo on; while :; do sleep 0.05; done"])
            .start()
            .unwrap();
        while fs::read_to_string(directory.path().join("log")).unwrap_or_default().is_empty() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        assert_eq!(guarded.stop(Duration::from_millis(200)).await.unwrap().signal(), Some(9));
        let log = directory.path().join("log");
        assert_eq!(tail(&log), "on");
        assert_eq!(tail_since(&log, 1), "n");
        assert_eq!(tail_since(&log, 3), "(empty)");
    }
}
