//! A node in this process on a kernel-chosen port, with a storage of its own, and git clients to put against it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::SecretString;
use tabularium_common::{
    auth::SendToken,
    config::SecretFile,
    grpc::{self, Address},
    telemetry::TelemetryConfig,
    tls::TlsConfig,
};
use tabularium_node::{
    config::{
        BackupConfig, BackupLayout, Config, FollowingConfig, HooksConfig, KeptConfig, StorageConfig,
        StorageHealthConfig, Surroundings,
    },
    server::{self, Running},
};
use tabularium_proto::gitaly::{
    self, CreateRepositoryRequest, Repository, repository_service_client::RepositoryServiceClient,
};
use tempfile::TempDir;
use tonic::{
    metadata::AsciiMetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

pub(crate) const TOKEN: &str = "node secret";
/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) type Client = InterceptedService<Channel, Caller>;

/// Signs calls, and says which transaction they belong to.
#[derive(Clone)]
pub(crate) struct Caller {
    token: SendToken,
    transaction: Option<AsciiMetadataValue>,
}

impl Caller {
    /// One whom no node knows.
    pub(crate) fn nobody() -> Self {
        Self { token: SendToken(None), transaction: None }
    }

    /// One with the nodes' secret.
    pub(crate) fn known() -> Self {
        Self { token: SendToken(Some(SecretString::from(TOKEN.to_owned()))), transaction: None }
    }

    /// Whose calls a node votes on.
    pub(crate) fn in_transaction(self, id: u64, node: &str, primary: bool) -> Self {
        let json = format!(r#"{{"id":{id},"node":"{node}","primary":{primary}}}"#);
        Self { transaction: Some(STANDARD.encode(json).parse().unwrap()), ..self }
    }
}

impl Interceptor for Caller {
    fn call(&mut self, request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        let mut request = self.token.call(request)?;
        if let Some(transaction) = &self.transaction {
            request.metadata_mut().insert("gitaly-reference-transaction", transaction.clone());
        }
        Ok(request)
    }
}

pub(crate) struct TestNode {
    running: Option<Running>,
    pub(crate) address: Address,
    pub(crate) admin: std::net::SocketAddr,
    pub(crate) storage: String,
    directory: TempDir,
}

impl TestNode {
    pub(crate) async fn start() -> Self {
        Self::start_named("default").await
    }

    pub(crate) async fn start_named(storage: &str) -> Self {
        Self::start_draining(storage, 10).await
    }

    /// A node whose calls have `drain_seconds` to end when it stops.
    pub(crate) async fn start_draining(storage: &str, drain_seconds: u64) -> Self {
        Self::start_configured(storage, |config| config.drain_seconds = drain_seconds).await
    }

    /// A node that is configured differently.
    pub(crate) async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_configured("default", change).await
    }

    /// Or why it did not start.
    pub(crate) async fn try_start_with(
        change: impl FnOnce(&mut Config),
    ) -> Result<Self, server::ServerError> {
        Self::try_start("default", change).await
    }

    /// A node with backups in [`TestNode::backups`].
    pub(crate) async fn start_with_backups(storage: &str) -> Self {
        let with_backups = |config: &mut Config| {
            let directory = config.storage[0].path.with_file_name("backups");
            std::fs::create_dir(&directory).unwrap();
            let go_cloud_url = directory.to_str().unwrap().to_owned();
            config.backup = Some(BackupConfig { go_cloud_url, layout: BackupLayout::Manifest });
        };
        Self::start_configured(storage, with_backups).await
    }

    /// Where it has its backups, if it has any.
    pub(crate) fn backups(&self) -> PathBuf {
        self.directory.path().join("backups")
    }

    async fn start_configured(storage: &str, change: impl FnOnce(&mut Config)) -> Self {
        Self::try_start(storage, change).await.unwrap()
    }

    async fn try_start(storage: &str, change: impl FnOnce(&mut Config)) -> Result<Self, server::ServerError> {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("storage");
        std::fs::create_dir(&root).unwrap();
        let token_file = directory.path().join("token");
        std::fs::write(&token_file, TOKEN).unwrap();
        let mut config = Config {
            listen: "127.0.0.1:0".parse().map(grpc::ListenAddress::Tcp).unwrap().into(),
            admin_listen: "127.0.0.1:0".parse().unwrap(),
            token_file: Some(SecretFile(token_file)),
            token_transitioning: false,
            git: std::env::var_os("TEST_GIT").map_or_else(|| "git".into(), PathBuf::from),
            max_git_processes: 16,
            hook_program: None,
            drain_seconds: 10,
            storage: vec![StorageConfig { name: storage.parse().unwrap(), path: root }],
            storage_health: StorageHealthConfig::default(),
            gitlab: None,
            backup: None,
            signing: None,
            hooks: HooksConfig::default(),
            following: FollowingConfig::default(),
            kept: KeptConfig { minimum_free_mebibytes: 0, ..KeptConfig::default() },
            tls: TlsConfig::NONE,
            telemetry: TelemetryConfig::default(),
        };
        change(&mut config);
        let surroundings = Surroundings {
            fetch_proxy: env!("CARGO_BIN_EXE_tabularium-node").into(),
            hook_program: env!("CARGO_BIN_EXE_tabularium-hook").into(),
            search_path: std::env::var_os("PATH").unwrap(),
        };
        let running = server::start(config, surroundings).await?;
        running.ready();
        Ok(Self {
            address: running.address().clone(),
            admin: running.admin(),
            running: Some(running),
            storage: storage.to_owned(),
            directory,
        })
    }

    pub(crate) async fn stop(mut self) {
        self.running.take().unwrap().stop().await.unwrap();
    }

    /// Stops, and answers how, with what keeps the files there.
    pub(crate) async fn stop_keeping_files(mut self) -> Stopped {
        let result = self.running.take().unwrap().stop().await;
        Stopped { result, _directory: self.directory }
    }

    pub(crate) fn channel(&self) -> Client {
        InterceptedService::new(grpc::channel(&self.address), Caller::known())
    }

    /// Calls in a transaction over a connection on which nobody can be asked.
    pub(crate) fn in_transaction(&self) -> Client {
        let caller = Caller::known().in_transaction(1, &self.storage, true);
        InterceptedService::new(grpc::channel(&self.address), caller)
    }

    pub(crate) fn repositories(&self) -> RepositoryServiceClient<Client> {
        RepositoryServiceClient::new(self.channel())
    }

    /// A `gitaly.Repository` of this node's storage.
    pub(crate) fn named(&self, relative_path: &str) -> Repository {
        Repository {
            storage_name: self.storage.clone(),
            relative_path: relative_path.to_owned(),
            ..Repository::default()
        }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("storage")
    }

    pub(crate) fn path(&self, relative_path: &str) -> PathBuf {
        self.root().join(relative_path)
    }

    /// Creates an empty repository.
    pub(crate) async fn create(&self, relative_path: &str) -> Repository {
        let repository = self.named(relative_path);
        let request = CreateRepositoryRequest {
            repository: Some(repository.clone()),
            ..CreateRepositoryRequest::default()
        };
        self.repositories().create_repository(request).await.unwrap();
        repository
    }

    /// Creates a repository with two commits on `main`, a branch, and a tag. Written by git on the disk.
    pub(crate) async fn create_with_commits(&self, relative_path: &str) -> Repository {
        let repository = self.create(relative_path).await;
        let path = self.path(relative_path);
        let first = commit(&path, None, "first");
        let second = commit(&path, Some(&first), "second");
        for (name, id) in
            [("refs/heads/main", &second), ("refs/heads/side", &first), ("refs/tags/v1", &first)]
        {
            git(&path, &["update-ref", name, id]);
        }
        repository
    }

    pub(crate) async fn checksum(&self, repository: &Repository) -> String {
        let request = gitaly::CalculateChecksumRequest { repository: Some(repository.clone()) };
        self.repositories().calculate_checksum(request).await.unwrap().into_inner().checksum
    }

    /// All metrics, as they are scraped.
    pub(crate) async fn metrics(&self) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(self.admin).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    /// The value of a metric without labels.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let text = self.metrics().await;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
    }
}

/// A node that has stopped.
pub(crate) struct Stopped {
    pub(crate) result: Result<(), server::ServerError>,
    _directory: TempDir,
}

/// The `gitaly-servers` metadata that says how to reach these nodes.
pub(crate) fn servers(nodes: &[&TestNode]) -> String {
    let entries: Vec<String> = nodes
        .iter()
        .map(|node| format!(r#""{}":{{"address":"{}","token":"{TOKEN}"}}"#, node.storage, node.address))
        .collect();
    STANDARD.encode(format!("{{{}}}", entries.join(",")))
}

/// A request that carries [`servers`].
pub(crate) fn with_servers<T>(message: T, nodes: &[&TestNode]) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("gitaly-servers", servers(nodes).parse().unwrap());
    request
}

/// A git command of the client's side: nothing of this machine's configuration takes part.
pub(crate) fn git_command(directory: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(directory)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("HOME", "/nonexistent");
    for who in ["AUTHOR", "COMMITTER"] {
        command
            .env(format!("GIT_{who}_NAME"), "A U Thor")
            .env(format!("GIT_{who}_EMAIL"), "author@example.com")
            .env(format!("GIT_{who}_DATE"), "1700000000 +0000");
    }
    command
}

/// Runs git, which must succeed, and answers what it prints.
pub(crate) fn git(directory: &Path, arguments: &[&str]) -> String {
    let output = git_command(directory).args(arguments).output().unwrap();
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// The same, from within a runtime whose workers must go on serving.
pub(crate) async fn git_async(directory: &Path, arguments: &[&str]) -> String {
    let directory = directory.to_owned();
    let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    let run = move || git(&directory, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    tokio::task::spawn_blocking(run).await.unwrap()
}

/// Writes a commit with an empty tree into a bare repository.
pub(crate) fn commit(repository: &Path, parent: Option<&str>, message: &str) -> String {
    let tree = git(repository, &["hash-object", "-t", "tree", "-w", "/dev/null"]);
    let mut arguments = vec!["commit-tree", "-m", message, &tree];
    if let Some(parent) = parent {
        arguments.extend(["-p", parent]);
    }
    git(repository, &arguments)
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
