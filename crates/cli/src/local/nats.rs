//! A NATS server of our own, with JetStream.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use tokio::net::TcpStream;

use super::{
    LocalError, find_on_path, io_error,
    process::{Guarded, Launch, describe, private_directory, tail},
    transport::TlsFiles,
};

/// How long the server may take to listen.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long an orderly stop may take.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What the server writes into `--ports_file_dir`.
#[derive(Deserialize)]
struct PortsFile {
    nats: Vec<String>,
}

/// A running (or stopped) server. Dropping it kills the process; the directory stays.
#[derive(Debug)]
pub struct NatsServer {
    program: PathBuf,
    directory: PathBuf,
    port: u16,
    tls: Option<TlsFiles>,
    remove: Option<PathBuf>,
    process: Option<Guarded>,
}

impl NatsServer {
    /// Starts a server with its data, log and port file below `directory`. Without a `port` the kernel chooses one.
    /// `throw_away`: the directory goes too if this process is killed.
    pub async fn start(directory: &Path, port: Option<u16>, throw_away: bool) -> Result<Self, LocalError> {
        Self::start_with(directory, port, throw_away, None).await
    }

    /// As [`NatsServer::start`], with TLS when there are files for it.
    pub async fn start_with(
        directory: &Path,
        port: Option<u16>,
        throw_away: bool,
        tls: Option<&TlsFiles>,
    ) -> Result<Self, LocalError> {
        let program = find_on_path("nats-server").ok_or_else(|| LocalError::MissingProgram {
            program: "nats-server".into(),
            hint: "install it: apt-get install nats-server".into(),
        })?;
        private_directory(directory).map_err(io_error(format!("cannot create {}", directory.display())))?;
        let mut server = Self {
            program,
            directory: directory.to_owned(),
            port: port.unwrap_or(0),
            tls: tls.cloned(),
            remove: throw_away.then(|| directory.to_owned()),
            process: None,
        };
        server.launch().await?;
        Ok(server)
    }

    /// `nats://127.0.0.1:port`, or the same with `tls://`.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "tls" } else { "nats" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.directory.join("nats.log")
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Guarded::pid)
    }

    /// How it ended, if it did so by itself.
    pub fn ended(&mut self) -> Option<String> {
        self.process.as_mut()?.try_wait().ok().flatten().map(describe)
    }

    /// Stops it in an orderly way. What it stored stays.
    pub async fn stop(&mut self) -> Result<(), LocalError> {
        if let Some(mut process) = self.process.take() {
            process.stop(STOP_PATIENCE).await.map_err(io_error("cannot stop nats-server"))?;
        }
        Ok(())
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) -> Result<(), LocalError> {
        if let Some(mut process) = self.process.take() {
            process.kill().map_err(io_error("cannot kill nats-server"))?;
        }
        Ok(())
    }

    /// Stops it if it runs and starts it again on the same port with what it stored.
    pub async fn restart(&mut self) -> Result<(), LocalError> {
        self.stop().await?;
        self.launch().await
    }

    /// As [`NatsServer::restart`], having lost all it stored.
    pub async fn restart_empty(&mut self) -> Result<(), LocalError> {
        self.stop().await?;
        let data = self.data();
        fs::remove_dir_all(&data).map_err(io_error(format!("cannot remove {}", data.display())))?;
        self.launch().await
    }

    fn data(&self) -> PathBuf {
        self.directory.join("jetstream")
    }

    async fn launch(&mut self) -> Result<(), LocalError> {
        let data = self.data();
        private_directory(&data).map_err(io_error(format!("cannot create {}", data.display())))?;
        let port = if self.port == 0 { "-1".to_owned() } else { self.port.to_string() };
        let mut launch = Launch::new(&self.program, self.log())
            .args(["--addr", "127.0.0.1", "--port", &port, "--jetstream"])
            .arg("--store_dir")
            .arg(&data)
            .arg("--ports_file_dir")
            .arg(&self.directory);
        if let Some(files) = &self.tls {
            launch = launch.arg("--tls");
            launch = launch.arg("--tlscert").arg(&files.certificate_path);
            launch = launch.arg("--tlskey").arg(&files.key_path);
        }
        launch.remove.clone_from(&self.remove);
        let process = launch.start().map_err(io_error("cannot start nats-server"))?;
        let ports_file = self.directory.join(format!("nats-server_{}.ports", process.pid()));
        let process = self.process.insert(process);
        let deadline = tokio::time::Instant::now() + START_DEADLINE;
        loop {
            let ended = process.try_wait().map_err(io_error("cannot wait for nats-server"))?;
            // Absent, or half written: looked at again.
            let port =
                fs::read(&ports_file).ok().and_then(|bytes| serde_json::from_slice::<PortsFile>(&bytes).ok());
            if let Some(port) = port.and_then(|ports| port_of(&ports))
                && TcpStream::connect(("127.0.0.1", port)).await.is_ok()
            {
                self.port = port;
                return Ok(());
            }
            if ended.is_some() || tokio::time::Instant::now() > deadline {
                let problem = ended.map_or_else(|| "does not listen".to_owned(), describe);
                let log = self.log();
                self.process = None;
                return Err(LocalError::Process {
                    process: "nats-server".into(),
                    problem,
                    tail: tail(&log),
                    log,
                });
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

fn port_of(ports: &PortsFile) -> Option<u16> {
    ports.nats.iter().find_map(|url| url.rsplit(':').next()?.parse().ok())
}
