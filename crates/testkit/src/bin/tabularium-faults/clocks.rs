//! Clocks of single processes that jump, which nobody can make a clock of the kernel do.
//!
//! Debian's libfaketime answers in the kernel's place when a process, or git below it, asks for the time of day; how far it
//! is off is read from a file, each time. The monotonic clock and the time stamps of files stay the kernel's. So what
//! jumps is what a service, or Postgres, takes for the time, while it runs and while all others have the right one.

use std::{
    ffi::OsString,
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use tabularium_testkit::cluster::local_cluster::Environment;
use tempfile::{NamedTempFile, TempDir};

/// Where Debian keeps libraries of each architecture.
const LIBRARIES: &str = "/usr/lib";
const LIBRARY: &str = "faketime/libfaketimeMT.so.1";

/// How far a clock is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Jump {
    /// Within what tokens bear, and further than every lease.
    Near,
    /// Out of everybody's reach: no token that one side signs is taken by the other.
    Far,
}

impl Jump {
    pub(crate) fn seconds(self) -> i64 {
        match self {
            Self::Near => 20,
            Self::Far => 3600,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Near => "20s",
            Self::Far => "1h",
        }
    }
}

/// What the library shares among the processes below one of ours, and leaves there when that is killed.
const SHARED: &str = "/dev/shm";
const SHARED_NAMES: [&str; 2] = ["faketime_shm_", "sem.faketime_sem_"];

/// The clocks of all processes of a cluster.
#[derive(Clone)]
pub(crate) struct Clocks {
    library: PathBuf,
    /// A file for each process.
    directory: Arc<TempDir>,
}

impl Clocks {
    /// All are right. Nothing where the library is not installed.
    pub(crate) fn find() -> Result<Option<Self>> {
        let architectures = fs::read_dir(LIBRARIES)?.flatten();
        let Some(library) = architectures.map(|entry| entry.path().join(LIBRARY)).find(|path| path.is_file())
        else {
            return Ok(None);
        };
        let directory = tempfile::Builder::new().prefix("tabularium-faults-clocks-").tempdir_in("/tmp")?;
        // Postgres runs as another user.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        Ok(Some(Self { library, directory: Arc::new(directory) }))
    }

    /// What a process needs to have a clock of its own.
    pub(crate) fn environment(&self) -> Environment {
        let clocks = self.clone();
        Environment::new(move |process| clocks.variables(process))
    }

    fn variables(&self, process: &str) -> Vec<(OsString, OsString)> {
        if let Err(error) = self.set(process, 0) {
            tracing::warn!(process, "its clock cannot be moved: {error:#}");
            return Vec::new();
        }
        let variables: [(&str, &Path); 5] = [
            ("LD_PRELOAD", &self.library),
            ("FAKETIME_TIMESTAMP_FILE", &self.file(process)),
            ("FAKETIME_NO_CACHE", Path::new("1")),
            ("FAKETIME_DONT_FAKE_MONOTONIC", Path::new("1")),
            ("NO_FAKE_STAT", Path::new("1")),
        ];
        variables.map(|(name, value)| (name.into(), value.into())).into()
    }

    /// Puts a clock so many seconds forward, or back, of the right time.
    pub(crate) fn set(&self, process: &str, seconds: i64) -> Result<()> {
        let context = || format!("the clock of {process}");
        // Replaced as a whole: somebody reads it at any time.
        let mut file = NamedTempFile::new_in(self.directory.path()).with_context(context)?;
        writeln!(file, "{seconds:+}").with_context(context)?;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).with_context(context)?;
        file.persist(self.file(process)).with_context(context)?;
        Ok(())
    }

    /// `node-1` of `home/node-1`.
    fn file(&self, process: &str) -> PathBuf {
        self.directory.path().join(process.rsplit('/').next().unwrap_or(process))
    }
}

/// Removes what processes that have ended left.
pub(crate) fn clear() {
    for entry in fs::read_dir(SHARED).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let process = SHARED_NAMES.iter().find_map(|prefix| name.strip_prefix(prefix));
        let ended = |process: &str| !Path::new("/proc").join(process).exists();
        if process.is_some_and(ended)
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn seconds(clocks: &Clocks, process: &str) -> i64 {
        let output = Command::new("date").arg("+%s").envs(clocks.variables(process)).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().parse().unwrap()
    }

    fn right() -> i64 {
        tabularium_common::auth::unix_now()
    }

    #[test]
    fn a_clock_jumps_while_its_process_runs() {
        let Some(clocks) = Clocks::find().unwrap() else {
            eprintln!("SKIPPED: clocks do not jump without libfaketime (apt-get install libfaketime)");
            return;
        };
        assert!((seconds(&clocks, "home/node-1") - right()).abs() <= 1);
        let script = "date +%s; read -r line; date +%s";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .envs(clocks.variables("home/node-1"))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        clocks.set("home/node-1", -3600).unwrap();
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        let last: i64 = told.lines().last().unwrap().parse().unwrap();
        assert!((right() - 3600 - last).abs() <= 2, "{told}");
    }
}
