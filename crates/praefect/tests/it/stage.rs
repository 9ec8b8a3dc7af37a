//! A directory with nodes, a configuration file, and the program.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use secrecy::SecretString;
use tabularium_cli::local::{
    cluster::find_binaries,
    process::{Guarded, Launch, tail},
};
use tabularium_common::{
    auth::SendToken,
    grpc::{Address, channel},
};
use tabularium_proto::gitaly::{
    CreateRepositoryRequest, Repository, RepositoryExistsRequest,
    repository_service_client::RepositoryServiceClient,
};
use tabularium_testkit::{postgres::Postgres, wait::wait_until};
use tokio::process::{Child, Command};
use tonic::{Status, service::interceptor::InterceptedService, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_tabularium-praefect");
/// Longest any condition is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

pub(crate) type Signed = InterceptedService<Channel, SendToken>;

/// Everything around the program.
pub(crate) struct Stage {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) database: String,
    /// Whom commands believe when they speak TLS.
    pub(crate) authorities: Option<PathBuf>,
    nodes: Vec<Guarded>,
    processes: Vec<Child>,
    _postgres: Postgres,
}

impl Stage {
    /// With so many nodes, `gitaly-1` and so on, of which a new repository gets `factor`; 0: all.
    pub(crate) async fn new(nodes: usize, factor: usize) -> Self {
        let postgres = Postgres::start().await;
        let database = postgres.database().await;
        let directory = tempfile::Builder::new().prefix("tabularium-praefect-it-").tempdir().unwrap();
        let mut stage = Self {
            directory,
            database,
            authorities: None,
            nodes: Vec::new(),
            processes: Vec::new(),
            _postgres: postgres,
        };
        for index in 1..=nodes {
            stage.start_node(index);
        }
        stage.write_config(nodes, factor, "");
        for index in 1..=nodes {
            wait_until("the node listens", PATIENCE, async || {
                let address = Address::Unix(self_socket(stage.directory.path(), index));
                address.connect().await.map(drop).map_err(|error| error.to_string())
            })
            .await;
        }
        stage
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start_node(&mut self, index: usize) {
        let storage = self.storage(index);
        fs::create_dir_all(&storage).unwrap();
        let token = self.path(&format!("node-{index}.token"));
        fs::write(&token, node_secret(index)).unwrap();
        let config = self.path(&format!("node-{index}.toml"));
        let socket = self_socket(self.directory.path(), index);
        let text = format!(
            "listen = 'unix:{}'\nadmin_listen = '127.0.0.1:0'\ntoken_file = '{}'\n[[storage]]\nname = 'gitaly-{index}'\npath = '{}'\n",
            socket.display(),
            token.display(),
            storage.display()
        );
        fs::write(&config, text).unwrap();
        let program = find_binaries().unwrap().join("tabularium-node");
        let launch =
            Launch::new(program, self.path(&format!("node-{index}.log"))).arg("--config").arg(&config);
        self.nodes.push(launch.start().unwrap());
    }

    /// Where a node's storage is.
    pub(crate) fn storage(&self, index: usize) -> PathBuf {
        self.path(&format!("storage-{index}"))
    }

    /// Writes the file, with more at its beginning.
    pub(crate) fn write_config(&self, nodes: usize, factor: usize, more: &str) {
        let url = self.database.strip_prefix("postgres://").unwrap();
        let (place, query) = url.split_once('?').unwrap_or((url, ""));
        let (who_and_where, name) = place.split_once('/').unwrap();
        let (user, host) = who_and_where.split_once('@').unwrap();
        let host = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("host="))
            .unwrap_or_else(|| host.split(':').next().unwrap());
        let port = query.split('&').find_map(|pair| pair.strip_prefix("port=")).unwrap_or("0");
        let mut text = format!(
            "socket_path = '{}'\ngraceful_stop_timeout = '20s'\n{more}\n[auth]\ntoken = \"clients' secret\"\n\
             [database]\nhost = '{host}'\nport = {port}\nuser = '{user}'\ndbname = '{name}'\nsslmode = 'disable'\n\
             [[virtual_storage]]\nname = 'default'\ndefault_replication_factor = {factor}\n",
            self.path("praefect.sock").display(),
        );
        for index in 1..=nodes {
            let socket = self_socket(self.directory.path(), index);
            let node = format!(
                "[[virtual_storage.node]]\nstorage = 'gitaly-{index}'\naddress = 'unix:{}'\ntoken = '{}'\n",
                socket.display(),
                node_secret(index)
            );
            text.push_str(&node);
        }
        fs::write(self.path("praefect.toml"), text).unwrap();
    }

    /// Starts the program; answers how long it took until it served.
    pub(crate) async fn serve(&mut self) -> Duration {
        let log = fs::File::options().create(true).append(true).open(self.path("praefect.log")).unwrap();
        let began = Instant::now();
        let child = Command::new(PROGRAM)
            .arg("-config")
            .arg(self.path("praefect.toml"))
            .env("GITALY_PID_FILE", self.path("praefect.pid"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        self.processes.push(child);
        while self.health().await.is_err() {
            assert!(began.elapsed() < PATIENCE, "does not serve:\n{}", tail(&self.path("praefect.log")));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        began.elapsed()
    }

    /// What it says of itself.
    pub(crate) async fn health(&self) -> Result<(), String> {
        let address = Address::Unix(self.path("praefect.sock"));
        address.connect().await.map_err(|error| error.to_string())?;
        let mut client = HealthClient::new(self.signed());
        let answer =
            client.check(HealthCheckRequest::default()).await.map_err(|status| status.to_string())?;
        match answer.into_inner().status {
            1 => Ok(()),
            other => Err(format!("status {other}")),
        }
    }

    /// A connection of a client.
    pub(crate) fn signed(&self) -> Signed {
        connect(&self.path("praefect.sock"))
    }

    /// The process that serves now.
    pub(crate) fn pid(&self) -> i32 {
        fs::read_to_string(self.path("praefect.pid")).unwrap().parse().unwrap()
    }

    /// How the last process that was started here ended.
    pub(crate) async fn ended(&mut self) -> std::process::ExitStatus {
        let child = self.processes.last_mut().unwrap();
        tokio::time::timeout(PATIENCE, child.wait()).await.expect("it ends").unwrap()
    }

    /// Runs a command of Praefect's; answers exit code, standard output and standard error.
    pub(crate) async fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let config = self.path("praefect.toml");
        let mut command = Command::new(PROGRAM);
        command.arg("-config").arg(config).args(arguments);
        if let Some(authorities) = &self.authorities {
            command.env("SSL_CERT_FILE", authorities);
        }
        told(&command.output().await.unwrap())
    }

    /// The same, of a command that works.
    pub(crate) async fn ok(&self, arguments: &[&str]) -> String {
        let (code, out, err) = self.run(arguments).await;
        assert_eq!(code, 0, "{arguments:?}: {out}{err}{}", tail(&self.path("praefect.log")));
        out
    }

    pub(crate) async fn create(&self, relative_path: &str) {
        let request = CreateRepositoryRequest {
            repository: Some(repository(relative_path)),
            ..CreateRepositoryRequest::default()
        };
        RepositoryServiceClient::new(self.signed()).create_repository(request).await.unwrap();
    }

    pub(crate) async fn exists(&self, relative_path: &str) -> Result<bool, Status> {
        let request = RepositoryExistsRequest { repository: Some(repository(relative_path)) };
        let answer = RepositoryServiceClient::new(self.signed()).repository_exists(request).await?;
        Ok(answer.into_inner().exists)
    }

    /// A bare repository on a node's disk that nobody knows.
    pub(crate) async fn on_disk(&self, index: usize, replica_path: &str) -> PathBuf {
        let path = self.storage(index).join(replica_path);
        let made = Command::new("git").args(["init", "--quiet", "--bare"]).arg(&path).output().await.unwrap();
        assert!(made.status.success());
        path
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // One that took over is nobody's child here.
        let pid = fs::read_to_string(self.path("praefect.pid")).ok().and_then(|text| text.parse().ok());
        let Some(pid) = pid.and_then(Pid::from_raw) else { return };
        if test_kill_process(pid).is_ok() && runs_here(pid, self.directory.path()) {
            // It may have ended by itself just now.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

pub(crate) fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// Whether a process was started with a file of this directory.
fn runs_here(pid: Pid, directory: &Path) -> bool {
    let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    String::from_utf8_lossy(&line).contains(&directory.display().to_string())
}

fn self_socket(directory: &Path, index: usize) -> PathBuf {
    directory.join(format!("node-{index}.sock"))
}

fn told(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

pub(crate) fn repository(relative_path: &str) -> Repository {
    Repository {
        storage_name: "default".to_owned(),
        relative_path: relative_path.to_owned(),
        ..Repository::default()
    }
}

/// A connection of a client.
pub(crate) fn connect(socket: &Path) -> Signed {
    connect_to(&Address::Unix(socket.to_owned()))
}

/// The same, to any address.
pub(crate) fn connect_to(address: &Address) -> Signed {
    let token = SendToken(Some(SecretString::from("clients' secret".to_owned())));
    InterceptedService::new(channel(address), token)
}

/// Every node has its own.
pub(crate) fn node_secret(index: usize) -> String {
    format!("the secret of node {index}")
}

/// What an HTTP address answers, head and all.
pub(crate) async fn get(address: std::net::SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}
