//! What the tests of crashes, bad input and freshness share: deadlines that show the services' logs, packs that take a
//! while, and a look at what is left on the nodes' disks and in the process table.

use std::{
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::Output,
    time::{Duration, SystemTime},
};

use futures::future::join_all;
use sqlx::{Connection as _, PgConnection};
use tabularium_cli::local::process::tail;
use tabularium_proto::gitaly::{
    ListRefsRequest, Repository, WriteRefRequest, ref_service_client::RefServiceClient,
    repository_service_client::RepositoryServiceClient,
};
use tabularium_testkit::{
    cluster::{
        Signed, TestCluster, VIRTUAL_STORAGE,
        local_cluster::{ClusterOptions, Gateways, HOME},
        service::Kind,
        signed,
    },
    git::GitClient,
    wait::wait_until,
};
use tokio::{process::Child, time::Instant};
use tonic::{Request, Status};

/// How long copies may take to follow on a busy machine.
pub(crate) const FOLLOW: Duration = Duration::from_secs(60);
/// How long a small request may take on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// How long a client may wait for the news that what it talked to has died.
pub(crate) const PROMPT: Duration = Duration::from_secs(10);
/// What has to have arrived before a transfer counts as under way; far less than [`PACK_BYTES`].
const UNDER_WAY_BYTES: u64 = 8 << 20;
/// A pack that takes a while.
pub(crate) const PACK_BYTES: usize = 48 << 20;

/// Shows the end of every log when the test fails.
pub(crate) struct Logs(Vec<PathBuf>);

impl Logs {
    pub(crate) fn of(test: &TestCluster) -> Self {
        let sites = test.cluster.record().sites;
        Self(sites.into_iter().flat_map(|site| site.processes).map(|process| process.log).collect())
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in &self.0 {
                eprintln!("--- {}\n{}", log.display(), tail(log));
            }
        }
    }
}

/// Panics when it takes longer.
pub(crate) async fn within<T>(what: &str, deadline: Duration, work: impl Future<Output = T>) -> T {
    let late = |_| panic!("{what}: not within {} s", deadline.as_secs_f32());
    tokio::time::timeout(deadline, work).await.unwrap_or_else(late)
}

/// One site; what enters at gateway 1 goes through router 1.
pub(crate) fn home_only(options: &mut ClusterOptions) {
    options.gateways = Gateways::PerRouter;
    options.mirror = None;
}

pub(crate) async fn start(adjust: impl FnOnce(&mut ClusterOptions)) -> (TestCluster, Logs) {
    let test = within("a cluster", FOLLOW, TestCluster::start(adjust)).await;
    let logs = Logs::of(&test);
    (test, logs)
}

#[expect(clippy::unnecessary_wraps, reason = "as the field of a request")]
pub(crate) fn named(storage: &str, relative_path: &str) -> Option<Repository> {
    Some(Repository {
        storage_name: storage.into(),
        relative_path: relative_path.into(),
        ..Repository::default()
    })
}

/// With a deadline, and under that correlation id.
pub(crate) fn request<T>(message: T, correlation_id: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(SOON);
    request.metadata_mut().insert("x-gitlab-correlation-id", correlation_id.parse().unwrap());
    request
}

/// The operator's command line, on this cluster.
pub(crate) async fn tabularium(test: &TestCluster, arguments: &[&str]) -> Output {
    let binaries = tabularium_cli::local::cluster::find_binaries().unwrap();
    let mut command = tokio::process::Command::new(binaries.join("tabularium"));
    command.arg("--state-dir").arg(test.cluster.state_directory()).args(arguments);
    within("tabularium", FOLLOW, command.output()).await.unwrap()
}

/// The same; its exit code, and what it says in JSON or on standard error.
pub(crate) async fn tabularium_json(
    test: &TestCluster,
    arguments: &[&str],
) -> (Option<i32>, serde_json::Value) {
    let output = tabularium(test, &[&["--json"], arguments].concat()).await;
    let said = serde_json::from_slice(&output.stdout);
    let error = || String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), said.unwrap_or_else(|_| serde_json::Value::String(error())))
}

/// A channel to the `index`th router of the home site.
pub(crate) fn router(test: &TestCluster, index: usize) -> Signed {
    let home = test.home();
    signed(&home.grpc(Kind::Router)[index], &home.router_token_file)
}

/// A channel to a node of the home site.
pub(crate) fn node(test: &TestCluster, storage: &str) -> Signed {
    let home = test.home();
    let address = home.of(Kind::Node).find(|node| node.name == format!("{HOME}/{storage}"));
    signed(address.unwrap().grpc.as_ref().unwrap(), &home.node_token_file)
}

/// What a reference points at, read through a router.
pub(crate) async fn read_ref(
    through: &Signed,
    relative_path: &str,
    reference: &str,
) -> Result<Option<String>, Status> {
    let message = ListRefsRequest {
        repository: named(VIRTUAL_STORAGE, relative_path),
        patterns: vec![reference.into()],
        ..ListRefsRequest::default()
    };
    let read = async {
        let mut client = RefServiceClient::new(through.clone());
        let mut answers = client.list_refs(request(message, "read-ref")).await?.into_inner();
        let mut found = None;
        while let Some(answer) = answers.message().await? {
            found = answer.references.into_iter().map(|reference| reference.target).next().or(found);
        }
        Ok(found)
    };
    within("reading a reference", SOON + PROMPT, read).await
}

/// Points a reference at a commit, through a router.
pub(crate) async fn write_ref(
    through: &Signed,
    relative_path: &str,
    reference: &str,
    commit: &str,
) -> Result<(), Status> {
    let message = WriteRefRequest {
        repository: named(VIRTUAL_STORAGE, relative_path),
        r#ref: reference.into(),
        revision: commit.into(),
        ..WriteRefRequest::default()
    };
    let mut client = RepositoryServiceClient::new(through.clone());
    let write = client.write_ref(request(message, "write-ref"));
    within("writing a reference", SOON + PROMPT, write).await.map(drop)
}

/// A work tree whose pack has `bytes` that do not compress, in enough objects that a receiving git keeps the pack.
pub(crate) async fn incompressible(git: &GitClient, name: &str, bytes: usize) {
    const FILES: usize = 120;
    git.run(".", &["init", "--quiet", name]).await;
    git.run(name, &["config", "core.compression", "0"]).await;
    let path = git.path(name);
    tokio::task::spawn_blocking(move || {
        let mut random = fs::File::open("/dev/urandom").unwrap();
        let mut content = vec![0; bytes / FILES];
        for number in 0..FILES {
            random.read_exact(&mut content).unwrap();
            fs::File::create(path.join(format!("file-{number}"))).unwrap().write_all(&content).unwrap();
        }
    })
    .await
    .unwrap();
    git.run(name, &["add", "."]).await;
    git.run(name, &["commit", "--quiet", "-m", "large"]).await;
}

/// Starts git in a process group of its own.
pub(crate) fn spawn_git(git: &GitClient, name: &str, arguments: &[&str]) -> Child {
    git.git().command(&git.path(name), arguments).process_group(0).spawn().unwrap()
}

/// Kills it and everything it started.
pub(crate) fn kill_group(child: &Child) {
    let pid = i32::try_from(child.id().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process_group(pid, rustix::process::Signal::KILL).unwrap();
}

/// How a started git ended, and how long it took from now.
pub(crate) async fn ended(what: &str, child: Child) -> (Output, Duration) {
    let started = Instant::now();
    let output = within(what, PROMPT, child.wait_with_output()).await.unwrap();
    (output, started.elapsed())
}

/// Runs git; answers whether it said yes, and what it said.
pub(crate) async fn try_git(git: &GitClient, name: &str, arguments: &[&str]) -> (bool, String) {
    within(&format!("git {arguments:?}"), FOLLOW, git.try_run(name, arguments)).await
}

/// Runs git, which has to say yes the first time.
pub(crate) async fn must_git(git: &GitClient, name: &str, arguments: &[&str]) {
    let (well, said) = try_git(git, name, arguments).await;
    assert!(well, "git {arguments:?}: {said}");
}

/// Size of everything below a directory that may change meanwhile.
pub(crate) fn size_below(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => size_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

/// Everything below a directory.
pub(crate) fn files_below(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut files = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            files.append(&mut files_below(&path));
        }
        files.push(path);
    }
    files
}

/// Waits until a good part of what goes into `directory` has arrived.
pub(crate) async fn under_way(what: &str, directory: impl Fn() -> Vec<PathBuf>) {
    let end = Instant::now() + SOON;
    loop {
        let size: u64 = directory().iter().map(|directory| size_below(directory)).sum();
        if size >= UNDER_WAY_BYTES {
            return;
        }
        assert!(Instant::now() < end, "{what}: {size} bytes after {} s", SOON.as_secs());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A repository's directories on the nodes.
pub(crate) struct Disks {
    /// Storage root and replica of every storage.
    places: Vec<(String, PathBuf, PathBuf)>,
}

impl Disks {
    pub(crate) async fn of(test: &TestCluster, relative_path: &str) -> Self {
        let replica_path = within("details", SOON, test.details(relative_path)).await;
        let replica_path = replica_path.unwrap().route.unwrap().replica_path;
        let home = test.home();
        let places = home.of(Kind::Node).map(|node| {
            let root = node.storage.clone().unwrap();
            let storage = node.name.rsplit('/').next().unwrap().to_owned();
            (storage, root.clone(), root.join(&replica_path))
        });
        Self { places: places.collect() }
    }

    pub(crate) fn replica(&self, storage: &str) -> &Path {
        &self.places.iter().find(|place| place.0 == storage).unwrap().2
    }

    /// Where pushes to that storage keep what is not accepted yet.
    pub(crate) fn quarantines(&self, storage: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.replica(storage).join("objects")).into_iter().flatten().flatten();
        let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        entries
            .map(|entry| entry.path())
            .filter(|path| name(path).starts_with("tmp_objdir-") || name(path).starts_with("incoming-"))
            .collect()
    }

    /// Locks, quarantines, half-made packs and temporary files, in the replicas and beside them.
    pub(crate) fn leftovers(&self) -> Vec<PathBuf> {
        let is_leftover = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.ends_with(".lock") || name.starts_with("tmp_") || name.starts_with("incoming-")
        };
        let replicas =
            self.places.iter().flat_map(|(_, _, replica)| files_below(replica)).filter(is_leftover);
        let own = self.places.iter().flat_map(|(_, root, _)| files_below(&root.join("+gitaly/tmp")));
        replicas.chain(own).collect()
    }

    /// Waits until nothing is left over and no git runs on the nodes.
    pub(crate) async fn clean(&self, test: &TestCluster) {
        let state = test.cluster.state_directory();
        wait_until("nothing left on the nodes", SOON, || async {
            let (left, running) = (self.leftovers(), git_processes(state));
            if left.is_empty() && running.is_empty() { Ok(()) } else { Err(format!("{left:?} {running:?}")) }
        })
        .await;
    }

    /// Git itself finds nothing wrong in any replica.
    pub(crate) async fn check_integrity(&self, git: &GitClient) {
        join_all(self.places.iter().map(|(_, _, replica)| async move {
            let checked = git.git().output(replica, ["fsck", "--full", "--strict"]);
            let output = within("fsck", FOLLOW, checked).await.unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}: {said}", replica.display());
        }))
        .await;
    }

    /// Makes what is left over look a minute older than it is.
    pub(crate) fn age_leftovers(&self) {
        let past = SystemTime::now() - Duration::from_secs(60);
        for path in self.leftovers() {
            fs::File::open(&path).unwrap().set_modified(past).unwrap();
        }
    }
}

/// Processes of git that work below a directory, with their command lines.
pub(crate) fn git_processes(below: &Path) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(directory) = fs::read_link(entry.path().join("cwd")) else { continue };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let program = command.split(' ').next().unwrap_or_default();
        if directory.starts_with(below) && program.rsplit('/').next() == Some("git") {
            found.push((pid, command));
        }
    }
    found
}

/// Kills git wherever it works below a directory; answers how many there were.
pub(crate) fn kill_git(below: &Path) -> usize {
    let found = git_processes(below);
    for (pid, _) in &found {
        let pid = rustix::process::Pid::from_raw(*pid).unwrap();
        match rustix::process::kill_process(pid, rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => panic!("{error}"),
        }
    }
    found.len()
}

pub(crate) async fn equal_replicas(test: &TestCluster, relative_path: &str) {
    wait_until(&format!("three equal replicas of {relative_path}"), FOLLOW, || async {
        match within("checksums", FOLLOW, test.equal_checksums(relative_path, 3)).await {
            Ok(_) => Ok(()),
            Err(why) => Err(format!("{why}; owed:\n{}", open_duties(test).await)),
        }
    })
    .await;
}

pub(crate) async fn primary(test: &TestCluster, relative_path: &str) -> String {
    within("details", SOON, test.details(relative_path)).await.unwrap().route.unwrap().primary
}

/// A line for each duty that is not done, as the coordinators' database has them.
async fn open_duties(test: &TestCluster) -> String {
    const OPEN: &str = "SELECT coalesce(string_agg(row_to_json(d)::text, E'\n'), 'nothing')
                        FROM tabularium.duties d WHERE state <> 'done'";
    let url = test.home().database_url;
    let list = async {
        let mut connection = PgConnection::connect(&url).await?;
        sqlx::query_scalar(OPEN).fetch_one(&mut connection).await
    };
    within("listing duties", SOON, list).await.unwrap_or_else(|error: sqlx::Error| error.to_string())
}

/// Writes whose outcome is not recorded, as the coordinators' database has them.
pub(crate) async fn open_writes(test: &TestCluster) -> i64 {
    let url = test.home().database_url;
    let count = async {
        let mut connection = PgConnection::connect(&url).await?;
        sqlx::query_scalar("select count(*) from tabularium.writes").fetch_one(&mut connection).await
    };
    within("counting writes", SOON, count).await.unwrap()
}

pub(crate) async fn no_open_writes(test: &TestCluster, deadline: Duration) {
    wait_until("no write in doubt", deadline, || async {
        match open_writes(test).await {
            0 => Ok(()),
            open => Err(format!("{open} open")),
        }
    })
    .await;
}

/// Waits for a line with that text in the logs of one kind of service; answers it.
pub(crate) async fn logged(test: &TestCluster, kind: Kind, text: &str) -> String {
    wait_until(&format!("{text} in a log of the {kind:?}s"), SOON, || async {
        let home = test.home();
        home.of(kind)
            .filter_map(|process| fs::read_to_string(&process.log).ok())
            .find_map(|log| log.lines().find(|line| line.contains(text)).map(str::to_owned))
            .ok_or_else(|| "no such line".to_owned())
    })
    .await
}
