//! One process of one of our services: its configuration file, its log, its announcement.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tabularium_common::{announce::Announcement, faults};
use tokio::time::Instant;

use super::{
    LocalError, http, io_error,
    process::{Guarded, Launch, describe, private_directory, tail_since},
};

/// How long a process may take to answer that it is ready.
const READY_DEADLINE: Duration = Duration::from_secs(60);
/// How long an orderly stop may take before it is killed; a little longer than services drain by default.
const STOP_PATIENCE: Duration = Duration::from_secs(35);
/// While a port it had before is still taken by a dying connection, a restart is tried again.
const ADDRESS_IN_USE_PATIENCE: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Which service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Storage node.
    Node,
    /// Coordinator.
    Coordinator,
    /// Router.
    Router,
    /// Gateway.
    Gateway,
    /// Replicator.
    Replicator,
    /// Geo-receiver.
    GeoReceiver,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Node, Self::Coordinator, Self::Router, Self::Gateway, Self::Replicator, Self::GeoReceiver];

    /// Its name in file and process names.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Coordinator => "coordinator",
            Self::Router => "router",
            Self::Gateway => "gateway",
            Self::Replicator => "replicator",
            Self::GeoReceiver => "geo-receiver",
        }
    }

    /// Its program.
    pub fn binary(self) -> String {
        format!("tabularium-{}", self.name())
    }
}

/// How a process is at the moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum State {
    /// Runs.
    Running,
    /// Was told to halt (SIGSTOP).
    Paused,
    /// Was stopped or killed by us.
    Stopped,
    /// Ended by itself.
    Ended {
        /// How.
        how: String,
    },
}

/// A process of a service, running or not.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) kind: Kind,
    /// `home/node-1`.
    pub(crate) name: String,
    directory: PathBuf,
    program: PathBuf,
    config: toml::Table,
    announcement: Announcement,
    process: Option<Guarded>,
    paused: bool,
    /// Length of the log when it was started last.
    log_before: u64,
    /// Whether it may be struck at crash points.
    faults: bool,
    /// Beside what is inherited.
    environment: Vec<(OsString, OsString)>,
}

impl Service {
    /// Not started yet. Its files are kept in `directory`.
    pub(crate) fn new(
        kind: Kind,
        name: String,
        directory: PathBuf,
        program: PathBuf,
        config: toml::Table,
    ) -> Self {
        let announcement = Announcement { pid: 0, grpc: None, http: None, admin: None };
        Self {
            kind,
            name,
            directory,
            program,
            config,
            announcement,
            process: None,
            paused: false,
            log_before: 0,
            faults: false,
            environment: Vec::new(),
        }
    }

    /// Lets tests strike at its crash points, armed in the directory `faults` beside its log.
    pub(crate) fn with_faults(self) -> Self {
        Self { faults: true, ..self }
    }

    /// Gives it variables of its own.
    pub(crate) fn with_environment(self, environment: Vec<(OsString, OsString)>) -> Self {
        Self { environment, ..self }
    }

    pub(crate) fn config_path(&self) -> PathBuf {
        self.directory.join("config.toml")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Guarded::pid)
    }

    /// `tcp://host:port`, `tls://host:port` or `unix:/path`, once it has been started.
    pub(crate) fn grpc(&self) -> Option<&str> {
        self.announcement.grpc.as_deref()
    }

    /// `host:port` or `https://host:port`, once it has been started.
    pub(crate) fn http(&self) -> Option<&str> {
        self.announcement.http.as_deref()
    }

    /// Where `/ready` is answered, `host:port` or `https://host:port`.
    pub(crate) fn admin(&self) -> Option<&str> {
        self.announcement.admin.as_deref().or(self.announcement.http.as_deref())
    }

    pub(crate) fn state(&mut self) -> State {
        let paused = self.paused;
        match self.process.as_mut().map(Guarded::try_wait) {
            None => State::Stopped,
            Some(Ok(None)) if paused => State::Paused,
            Some(Ok(None)) => State::Running,
            Some(Ok(Some(status))) => State::Ended { how: describe(status) },
            Some(Err(error)) => State::Ended { how: error.to_string() },
        }
    }

    /// Starts it and waits until it is ready. A second start uses the addresses of the first.
    pub(crate) async fn start(&mut self) -> Result<(), LocalError> {
        let patience = Instant::now() + ADDRESS_IN_USE_PATIENCE;
        loop {
            self.log_before = fs::metadata(self.log()).map_or(0, |metadata| metadata.len());
            match self.start_once().await {
                Err(error) if Instant::now() < patience && self.address_was_in_use() => {
                    tracing::debug!(%error, "starting again");
                    tokio::time::sleep(POLL_INTERVAL * 5).await;
                }
                result => return result,
            }
        }
    }

    fn address_was_in_use(&self) -> bool {
        self.announcement.pid != 0 && tail_since(&self.log(), self.log_before).contains("in use")
    }

    async fn start_once(&mut self) -> Result<(), LocalError> {
        let announce = self.directory.join("announce.json");
        self.write_config().map_err(io_error(format!("cannot configure {}", self.name)))?;
        match fs::remove_file(&announce) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io_error(format!("cannot remove {}", announce.display()))(error));
            }
            _ => {}
        }
        let mut launch = Launch::new(&self.program, self.log())
            .arg("--config")
            .arg(self.config_path())
            .arg("--announce")
            .arg(&announce);
        launch.environment.clone_from(&self.environment);
        if self.faults {
            let directory = self.directory.join("faults");
            private_directory(&directory)
                .map_err(io_error(format!("cannot create {}", directory.display())))?;
            launch.environment.push((faults::VARIABLE.into(), directory.into()));
        }
        let process = launch.start().map_err(io_error(format!("cannot start {}", self.name)))?;
        self.paused = false;
        let pid = process.pid();
        self.process = Some(process);
        let deadline = Instant::now() + READY_DEADLINE;
        let mut missing = "has not told its addresses";
        loop {
            if let State::Ended { how } = self.state() {
                return Err(self.failure(how));
            }
            let announced = Announcement::read(&announce)
                .map_err(io_error(format!("cannot read {}", announce.display())))?
                .filter(|announcement| announcement.pid == pid);
            if let Some(announcement) = announced {
                self.announcement = announcement;
                missing = "has told its addresses but is not ready";
                if self.is_ready().await {
                    self.keep_addresses();
                    return Ok(());
                }
            }
            if Instant::now() > deadline {
                let error = self.failure(format!("{missing} after {} s", READY_DEADLINE.as_secs()));
                self.process = None;
                return Err(error);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Whether it answers that it takes work.
    pub(crate) async fn is_ready(&self) -> bool {
        match self.admin() {
            Some(address) => matches!(http::get(address, "/ready").await, Ok((200, _))),
            None => false,
        }
    }

    fn failure(&self, problem: String) -> LocalError {
        let log = self.log();
        LocalError::Process {
            process: self.name.clone(),
            problem,
            tail: tail_since(&log, self.log_before),
            log,
        }
    }

    /// The kernel's choices become the configuration, so that others find a restarted process where it was.
    fn keep_addresses(&mut self) {
        let main = self.announcement.grpc.clone();
        let http = self.announcement.http.as_ref().map(|address| address.replace("https://", "tls://"));
        let admin = self.announcement.admin.clone();
        let values = match self.kind {
            Kind::Node | Kind::Router => [("listen", main), ("admin_listen", admin)],
            Kind::Coordinator => [("listen", main), ("http_listen", http.or(admin))],
            Kind::Gateway | Kind::GeoReceiver => [("listen", http), ("admin_listen", admin)],
            Kind::Replicator => [("admin_listen", admin), ("admin_listen", None)],
        };
        for (key, value) in values {
            if let Some(value) = value {
                self.config.insert(key.to_owned(), value.into());
            }
        }
    }

    fn write_config(&self) -> std::io::Result<()> {
        private_directory(&self.directory)?;
        let text = toml::to_string(&self.config).map_err(std::io::Error::other)?;
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(self.config_path())?;
        file.write_all(text.as_bytes())
    }

    /// SIGKILL, as a crash would.
    pub(crate) fn kill(&mut self) -> Result<(), LocalError> {
        if let Some(mut process) = self.process.take() {
            process.kill().map_err(io_error(format!("cannot kill {}", self.name)))?;
        }
        Ok(())
    }

    /// SIGSTOP: it keeps its connections and answers nothing.
    pub(crate) fn pause(&mut self) -> Result<(), LocalError> {
        self.paused = true;
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    pub(crate) fn resume(&mut self) -> Result<(), LocalError> {
        self.paused = false;
        self.signal(Signal::CONT)
    }

    fn signal(&mut self, signal: Signal) -> Result<(), LocalError> {
        let name = &self.name;
        match &mut self.process {
            Some(process) => process.signal(signal).map_err(io_error(format!("cannot signal {name}"))),
            None => Err(LocalError::Refused(format!("{name} does not run"))),
        }
    }

    /// SIGTERM, and SIGKILL when it does not end in time.
    pub(crate) async fn stop(&mut self) -> Result<(), LocalError> {
        if let Some(mut process) = self.process.take() {
            process.stop(STOP_PATIENCE).await.map_err(io_error(format!("cannot stop {}", self.name)))?;
        }
        Ok(())
    }
}
