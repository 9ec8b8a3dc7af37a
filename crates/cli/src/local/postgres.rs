//! A Postgres server of our own, reached over a socket file only.
//!
//! Postgres refuses to run as root. Started by root it runs as the user `postgres` where there is one, else as the
//! traditional `nobody`; its directories are given to that user, and lie where that user can reach them.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::{Signal, geteuid};

use super::{
    LocalError, find_on_path, io_error, is_program,
    process::{Guarded, Launch, describe, private_directory, tail},
};

/// Where Debian keeps each version's programs.
const DEBIAN_VERSIONS: &str = "/usr/lib/postgresql";
/// User and group when there is no `postgres`.
const NOBODY: (u32, u32) = (65534, 65534);
/// The role that owns everything.
const ROLE: &str = "tabularium";
/// Connections: two sites of several coordinators, or the tests of a whole crate at once.
const MAX_CONNECTIONS: u32 = 400;
/// How long `initdb` and the start may take; recovery after a crash is part of it.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long an orderly stop may take.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
/// How long a statement sent through `psql` may take.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(60);
/// A socket's path has at most 107 bytes; `/.s.PGSQL.5432.lock` is one of the files there.
const MAX_SOCKET_DIRECTORY_BYTES: usize = 80;
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The directory that holds `postgres`, `initdb` and `psql`.
pub fn find_programs() -> Result<PathBuf, LocalError> {
    let complete = |directory: &PathBuf| {
        ["postgres", "initdb", "psql"].iter().all(|name| is_program(&directory.join(name)))
    };
    // A link on the path (`/usr/local/bin/postgres`) leads to the directory where its companions are.
    let on_path = find_on_path("postgres")
        .and_then(|file| fs::canonicalize(file).ok())
        .and_then(|file| file.parent().map(Path::to_owned))
        .filter(complete);
    on_path.or_else(|| newest_debian().filter(complete)).ok_or_else(|| LocalError::MissingProgram {
        program: "postgres (with initdb and psql)".into(),
        hint: "install it: apt-get install postgresql".into(),
    })
}

fn newest_debian() -> Option<PathBuf> {
    fs::read_dir(DEBIAN_VERSIONS)
        .ok()?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let version: u32 = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .filter(|(_, directory)| is_program(&directory.join("postgres")))
        .max_by_key(|(version, _)| *version)
        .map(|(_, directory)| directory)
}

/// Who has to run Postgres, when that is not us.
fn other_user() -> Option<(u32, u32)> {
    if !geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    Some(user_named(&passwd, "postgres").unwrap_or(NOBODY))
}

fn user_named(passwd: &str, name: &str) -> Option<(u32, u32)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next()? != name {
            return None;
        }
        let user = fields.nth(1)?.parse().ok()?;
        let group = fields.next()?.parse().ok()?;
        Some((user, group))
    })
}

/// Whether everybody may pass through every parent of `directory`.
fn reachable_by_others(directory: &Path) -> bool {
    directory.ancestors().all(|parent| {
        // What does not exist yet will be made by us.
        parent.metadata().map_or(true, |metadata| metadata.permissions().mode() & 0o001 != 0)
    })
}

/// How durable the server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Survives a power cut.
    Full,
    /// For tests: nothing is synced, and the directory goes when this process ends.
    ThrowAway,
}

/// A running (or stopped) server. Dropping it stops the process; the data stays unless it is throw-away.
#[derive(Debug)]
pub struct PostgresServer {
    programs: PathBuf,
    directory: PathBuf,
    sockets: Sockets,
    durability: Durability,
    user: Option<(u32, u32)>,
    /// Of the server; beside these it has next to nothing.
    environment: Vec<(OsString, OsString)>,
    /// Beside and instead of our own, from the next start on.
    settings: Vec<(String, String)>,
    process: Option<Guarded>,
}

impl PostgresServer {
    /// Starts a server whose data and log lie below `directory`, making the data on first use.
    ///
    /// Under root, a `directory` below one that is closed to other users (`/root`) cannot be used by the user that
    /// Postgres runs as; then the data goes to a directory in `/var/tmp` that belongs to `directory` alone.
    /// [`PostgresServer::directory`] tells.
    pub async fn start(directory: &Path, durability: Durability) -> Result<Self, LocalError> {
        Self::start_with(directory, durability, Vec::new()).await
    }

    /// As [`PostgresServer::start`], with variables in the server's environment.
    pub async fn start_with(
        directory: &Path,
        durability: Durability,
        environment: Vec<(OsString, OsString)>,
    ) -> Result<Self, LocalError> {
        let programs = find_programs()?;
        let user = other_user();
        let directory = place(directory, user)?;
        let sockets =
            Sockets::near(&directory, user).map_err(io_error("cannot create a directory for sockets"))?;
        let settings = Vec::new();
        let mut server =
            Self { programs, directory, sockets, durability, user, environment, settings, process: None };
        if !server.data().join("PG_VERSION").exists() {
            server.initialise().await?;
        }
        server.launch().await?;
        Ok(server)
    }

    /// Where data and log are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.directory.join("postgres.log")
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Guarded::pid)
    }

    /// How it ended, if it did so by itself.
    pub fn ended(&mut self) -> Option<String> {
        self.process.as_mut()?.try_wait().ok().flatten().map(describe)
    }

    /// The URL of a database on this server. It stays valid over [`PostgresServer::restart`].
    pub fn url(&self, database: &str) -> String {
        // `localhost` is only there because the URL's grammar wants a host; the parameter decides.
        format!("postgres://{ROLE}@localhost/{database}?host={}", self.sockets.path().display())
    }

    /// Creates a database unless it exists. The name must be made of letters, digits, `_` and `-`.
    pub async fn create_database(&self, name: &str) -> Result<(), LocalError> {
        check_database_name(name)?;
        let found = self.sql(&format!("select 1 from pg_database where datname = '{name}'")).await?;
        if found.trim().is_empty() {
            self.sql(&format!("create database \"{name}\"")).await?;
        }
        Ok(())
    }

    /// Removes a database, closing its connections.
    pub async fn drop_database(&self, name: &str) -> Result<(), LocalError> {
        check_database_name(name)?;
        self.sql(&format!("drop database if exists \"{name}\" with (force)")).await.map(drop)
    }

    /// Stops it in an orderly way.
    pub async fn stop(&mut self) -> Result<(), LocalError> {
        if let Some(mut process) = self.process.take() {
            process.stop(STOP_PATIENCE).await.map_err(io_error("cannot stop postgres"))?;
        }
        Ok(())
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) -> Result<(), LocalError> {
        if let Some(mut process) = self.process.take() {
            process.kill().map_err(io_error("cannot kill postgres"))?;
        }
        Ok(())
    }

    /// Stops it if it runs, and starts it again on the same data and socket.
    pub async fn restart(&mut self) -> Result<(), LocalError> {
        self.stop().await?;
        self.launch().await
    }

    /// Restarts it with these settings, such as `("ssl", "on")`, beside and instead of our own.
    pub async fn configure(&mut self, settings: Vec<(String, String)>) -> Result<(), LocalError> {
        self.settings = settings;
        self.restart().await
    }

    fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// A command that runs as the server's user and sees none of the caller's `PG*` variables.
    fn command(&self, name: &str) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(self.program(name));
        command.env_clear().env("LC_ALL", "C").env("PATH", "/usr/bin:/bin").current_dir("/");
        command.kill_on_drop(true).stdin(Stdio::null());
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
        command
    }

    async fn initialise(&self) -> Result<(), LocalError> {
        let mut command = self.command("initdb");
        command.args(["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions", "-U", ROLE]);
        if self.durability == Durability::ThrowAway {
            command.arg("--no-sync");
        }
        command.arg("-D").arg(self.data());
        run(command, "initdb", START_DEADLINE).await.map(drop)
    }

    /// Runs one statement against the database every server has.
    async fn sql(&self, statement: &str) -> Result<String, LocalError> {
        let mut command = self.command("psql");
        command.args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "-v", "ON_ERROR_STOP=1"]);
        command.arg(self.url("postgres")).args(["-c", statement]);
        run(command, "psql", STATEMENT_DEADLINE).await
    }

    async fn launch(&mut self) -> Result<(), LocalError> {
        let mut launch = Launch::new(self.program("postgres"), self.log())
            .arg("-D")
            .arg(self.data())
            .arg("-k")
            .arg(self.sockets.path())
            // Whoever may open the socket is let in: it is the owner's (and root's) alone.
            .args(["-c", "listen_addresses=", "-c", "unix_socket_permissions=0700"])
            .args(["-c".to_owned(), format!("max_connections={MAX_CONNECTIONS}")]);
        for (name, value) in &self.settings {
            launch = launch.args(["-c".to_owned(), format!("{name}={value}")]);
        }
        match self.durability {
            Durability::ThrowAway => {
                launch = launch.args([
                    "-c",
                    "fsync=off",
                    "-c",
                    "synchronous_commit=off",
                    "-c",
                    "full_page_writes=off",
                ]);
                launch.remove = Some(self.directory.clone());
                launch.stop_signal = Signal::QUIT;
            }
            Durability::Full => launch.stop_signal = Signal::INT,
        }
        launch.user = self.user;
        launch.clear_environment = true;
        launch.environment = vec![(OsString::from("LC_ALL"), OsString::from("C"))];
        launch.environment.extend(self.environment.iter().cloned());
        let process = launch.start().map_err(io_error("cannot start postgres"))?;
        let pid = process.pid();
        let process = self.process.insert(process);
        let status_file = self.directory.join("data/postmaster.pid");
        let deadline = tokio::time::Instant::now() + START_DEADLINE;
        loop {
            let ended = process.try_wait().map_err(io_error("cannot wait for postgres"))?;
            if ended.is_none() && is_ready(&fs::read_to_string(&status_file).unwrap_or_default(), pid) {
                return Ok(());
            }
            if ended.is_some() || tokio::time::Instant::now() > deadline {
                let problem = ended.map_or_else(|| "does not become ready".to_owned(), describe);
                let log = self.log();
                self.process = None;
                return Err(LocalError::Process {
                    process: "postgres".into(),
                    problem,
                    tail: tail(&log),
                    log,
                });
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        // An orderly stop frees the shared memory that a kill would leave behind.
        if let Some(mut process) = self.process.take()
            && let Err(error) = process.stop_blocking(STOP_PATIENCE)
        {
            tracing::warn!(%error, "postgres could not be stopped");
        }
        if self.durability == Durability::ThrowAway
            && let Err(error) = fs::remove_dir_all(&self.directory)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, directory = %self.directory.display(), "could not be removed");
        }
    }
}

/// Line 1 of `postmaster.pid` is the process, line 8 its state.
fn is_ready(status: &str, pid: u32) -> bool {
    let mut lines = status.lines();
    let of_this_process = lines.next().and_then(|line| line.trim().parse().ok()) == Some(pid);
    of_this_process && lines.nth(6).is_some_and(|line| line.trim() == "ready")
}

fn check_database_name(name: &str) -> Result<(), LocalError> {
    let usable = !name.is_empty()
        && name.len() <= 63
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    if usable { Ok(()) } else { Err(LocalError::Refused(format!("`{name}` is not a database name"))) }
}

async fn run(
    mut command: tokio::process::Command,
    name: &str,
    deadline: Duration,
) -> Result<String, LocalError> {
    let output = tokio::time::timeout(deadline, command.output())
        .await
        .map_err(|_| LocalError::Refused(format!("{name} took longer than {} s", deadline.as_secs())))?
        .map_err(io_error(format!("cannot run {name}")))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(LocalError::Refused(format!("{name} {}: {text}", describe(output.status))));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where the socket file is. Its path is short by law, so a deep state directory cannot hold it.
#[derive(Debug)]
enum Sockets {
    Beside(PathBuf),
    Apart(tempfile::TempDir),
}

impl Sockets {
    fn near(directory: &Path, user: Option<(u32, u32)>) -> io::Result<Self> {
        use std::os::unix::ffi::OsStrExt as _;
        let beside = directory.join("sockets");
        let sockets = if beside.as_os_str().as_bytes().len() <= MAX_SOCKET_DIRECTORY_BYTES {
            private_directory(&beside)?;
            Self::Beside(beside)
        } else {
            Self::Apart(tempfile::Builder::new().prefix("tabularium-pg-").tempdir_in("/tmp")?)
        };
        if let Some((user, group)) = user {
            chown(sockets.path(), Some(user), Some(group))?;
        }
        Ok(sockets)
    }

    fn path(&self) -> &Path {
        match self {
            Self::Beside(path) => path,
            Self::Apart(directory) => directory.path(),
        }
    }
}

/// Makes the directory, owned by the user that Postgres runs as.
fn place(wanted: &Path, user: Option<(u32, u32)>) -> Result<PathBuf, LocalError> {
    let wanted = std::path::absolute(wanted).map_err(io_error(format!("cannot use {}", wanted.display())))?;
    let context = |path: &Path| format!("cannot create {}", path.display());
    let Some((user, group)) = user else {
        private_directory(&wanted).map_err(io_error(context(&wanted)))?;
        return Ok(wanted);
    };
    let parent_reachable = wanted.parent().is_none_or(reachable_by_others);
    let directory = if parent_reachable { wanted } else { substitute(&wanted) };
    let make = || -> io::Result<()> {
        if let Some(parent) = directory.parent() {
            fs::create_dir_all(parent)?;
        }
        private_directory(&directory)?;
        let owner = fs::symlink_metadata(&directory)?;
        // In a directory that everybody writes to, somebody else may have been first.
        if !owner.is_dir() || (owner.uid() != user && owner.uid() != 0) {
            return Err(io::Error::other("it belongs to somebody else"));
        }
        chown(&directory, Some(user), Some(group))
    };
    make().map_err(io_error(context(&directory)))?;
    Ok(directory)
}

fn substitute(wanted: &Path) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    let id = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, wanted.as_os_str().as_bytes());
    PathBuf::from(format!("/var/tmp/tabularium-postgres-{id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_that_of_this_process() {
        let status = "41\n/data\n1700000000\n0\n/sockets\n\n  123  4\nready   \n";
        assert!(is_ready(status, 41));
        assert!(!is_ready(status, 42), "left by an earlier process");
        assert!(!is_ready(&status.replace("ready", "starting"), 41));
        assert!(!is_ready("", 41));
    }

    #[test]
    fn users_are_read_from_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\npostgres:x:101:104:PostgreSQL,,,:/var:/bin/bash\n";
        assert_eq!(user_named(passwd, "postgres"), Some((101, 104)));
        assert_eq!(user_named(passwd, "nats"), None);
    }

    #[test]
    fn closed_parents_are_seen() {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!reachable_by_others(&directory.path().join("a/b")));
        assert!(reachable_by_others(Path::new("/usr/lib")));
    }

    #[test]
    fn names_of_databases_cannot_carry_sql() {
        assert!(check_database_name("site_a-1").is_ok());
        for name in ["", "a\"b", "a b", "a;b"] {
            assert!(check_database_name(name).is_err(), "{name}");
        }
    }
}
