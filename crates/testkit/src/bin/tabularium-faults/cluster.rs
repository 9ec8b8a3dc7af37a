//! The cluster under test, with everything in place that a fault needs: a relay on every call between services, disks
//! that can be filled, directories where crash points are armed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tabularium_common::faults::{CrashPoint, SafetyStep};
use tabularium_proto::gitaly::{CreateRepositoryRequest, RemoveRepositoryRequest, Repository};
use tabularium_testkit::{
    cluster::{
        TestCluster, VIRTUAL_STORAGE,
        local_cluster::{ClusterOptions, Detour, Gateways, HOME},
        service::{Kind, State},
    },
    proxy::{Fault, FaultProxy},
};
use tempfile::TempDir;
use tokio::time::sleep;
use tonic::{Request, Status};

use crate::clocks::{self, Clocks};

/// Room of a disk that can be filled; plenty for a session.
const DISK_MEBIBYTES: u64 = 768;
const BALLAST: &str = "ballast";
/// Gateways, each over all routers.
const GATEWAYS: u16 = 2;
/// How long a router may take to answer the harness.
const CALL_WITHIN: Duration = Duration::from_secs(10);
/// How long processes may take to end once they are killed: a system call of theirs may be under way.
const CUT_WITHIN: Duration = Duration::from_secs(10);

/// Who calls, and who is called: `router-1`, `node-2`.
type Between = (String, String);

/// The relays between services.
#[derive(Clone, Default)]
pub(crate) struct Links(Arc<Mutex<BTreeMap<Between, FaultProxy>>>);

impl Links {
    fn detour(&self) -> Detour {
        let links = self.clone();
        Detour::new(move |user, owner, address| {
            let between = (short(user).to_owned(), short(owner).to_owned());
            let mut links = links.0.lock().unwrap_or_else(PoisonError::into_inner);
            let proxy = links.entry(between).or_insert_with(|| FaultProxy::start_now(address));
            proxy.address().to_string()
        })
    }

    /// Does something to every relay between such callers and such called. A prefix chooses: `router` is every router.
    pub(crate) fn each(&self, user: &str, owner: &str, mut act: impl FnMut(&FaultProxy)) {
        let links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen = links.iter().filter(|((from, to), _)| from.starts_with(user) && to.starts_with(owner));
        chosen.for_each(|(_, proxy)| act(proxy));
    }

    pub(crate) fn heal(&self) {
        self.each("", "", |proxy| proxy.set(Fault::None));
    }
}

/// `node-1` of `home/node-1`.
fn short(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// How large it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) nodes: u16,
    pub(crate) routers: u16,
    pub(crate) coordinators: u16,
}

/// The cluster.
pub(crate) struct Site {
    /// Dropped before the directory that they are in.
    mounts: Mounts,
    pub(crate) test: TestCluster,
    pub(crate) links: Links,
    /// Whether nodes have disks of their own, which can be filled.
    pub(crate) own_disks: bool,
    /// Where clocks can be moved.
    pub(crate) clocks: Option<Clocks>,
}

impl Site {
    /// Starts it. Panics when it does not start, as all of the test kit does.
    pub(crate) async fn start(size: Size, timing: &[(String, String)], clocks: Option<Clocks>) -> Self {
        let links = Links::default();
        let mut mounts = Mounts::default();
        let test = TestCluster::start(|options: &mut ClusterOptions| {
            options.mirror = None;
            options.gateways = Gateways::Several(GATEWAYS);
            options.home.nodes = size.nodes;
            options.home.routers = size.routers;
            options.home.coordinators = size.coordinators;
            options.detour = Some(links.detour());
            options.faults = true;
            options.timing = timing.to_vec();
            options.environment = clocks.as_ref().map(Clocks::environment);
            for node in 1..=size.nodes {
                mounts.add(options.state.join(HOME).join(format!("node-{node}/storage")));
            }
        })
        .await;
        let own_disks = mounts.0.len() == usize::from(size.nodes);
        Self { mounts, test, links, own_disks, clocks }
    }

    /// Names of the processes of one kind: `node-1`.
    pub(crate) fn names(&self, kind: Kind) -> Vec<String> {
        self.test.home().of(kind).map(|process| short(&process.name).to_owned()).collect()
    }

    /// The storage that takes the writes of a repository now.
    pub(crate) async fn primary(&self, relative_path: &str) -> Result<String> {
        let details = self.test.details(relative_path).await.context("details")?;
        Ok(details.route.context("no route")?.primary)
    }

    /// Who has what of a repository, in a line.
    pub(crate) async fn standing(&self, relative_path: &str) -> String {
        match self.test.details(relative_path).await {
            Err(status) => format!("{relative_path}: {status}"),
            Ok(details) => {
                let route = details.route.unwrap_or_default();
                let replicas = route
                    .replicas
                    .iter()
                    .map(|replica| format!("{} {}", replica.storage, replica.generation));
                let replicas = replicas.collect::<Vec<_>>().join(", ");
                format!(
                    "{relative_path}: {} of epoch {} on {}; {replicas}",
                    route.generation, route.epoch, route.primary
                )
            }
        }
    }

    /// SIGKILL to the process alone: what it started lives on until it notices.
    pub(crate) fn kill_alone(&self, name: &str) -> Result<()> {
        let home = self.test.home();
        let process = home.processes.iter().find(|process| short(&process.name) == name);
        signal(process.with_context(|| format!("no process {name}"))?.pid, Signal::KILL)
    }

    /// SIGKILL to the process and its group.
    pub(crate) fn kill(&mut self, name: &str) -> Result<()> {
        Ok(self.test.cluster.kill(&full(name))?)
    }

    /// SIGKILL to the process and all that it started, wherever that is: nobody writes to its disk any more.
    pub(crate) async fn cut_power(&mut self, name: &str) -> Result<()> {
        let home = self.test.home();
        let process = home.processes.iter().find(|process| short(&process.name) == name);
        let root = process.with_context(|| format!("no process {name}"))?.pid;
        // What is stopped starts nothing more.
        let mut stopped = BTreeSet::new();
        loop {
            let found =
                descendants(root).into_iter().filter(|pid| !stopped.contains(pid)).collect::<Vec<_>>();
            if found.is_empty() {
                break;
            }
            for pid in found {
                signal(pid, Signal::STOP)?;
                stopped.insert(pid);
            }
        }
        self.kill(name)?;
        stopped.remove(&root);
        stopped.iter().try_for_each(|pid| signal(*pid, Signal::KILL))?;
        let until = Instant::now() + CUT_WITHIN;
        while stopped.iter().any(|pid| runs(*pid)) {
            ensure!(Instant::now() < until, "{name} left processes that cannot be killed");
            sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    pub(crate) fn pause(&mut self, name: &str) -> Result<()> {
        Ok(self.test.cluster.pause(&full(name))?)
    }

    pub(crate) fn resume(&mut self, name: &str) -> Result<()> {
        Ok(self.test.cluster.resume(&full(name))?)
    }

    /// Starts whatever does not run, what others need first, and resumes what is paused.
    pub(crate) async fn run_all(&mut self) -> Result<()> {
        const ORDER: [&str; 7] =
            ["postgres", "nats", "node", "coordinator", "router", "gateway", "replicator"];
        let mut states = self.test.cluster.states();
        let rank = |name: &str| ORDER.iter().position(|kind| short(name).starts_with(kind));
        states.sort_by_key(|(name, _)| rank(name));
        for (name, state) in states {
            match state {
                State::Running => {}
                State::Paused => self.test.cluster.resume(&name)?,
                State::Stopped | State::Ended { .. } => self.restart(&name).await?,
            }
        }
        Ok(())
    }

    /// A process that starts while others are away may need a second try.
    async fn restart(&mut self, name: &str) -> Result<()> {
        const TRIES: u32 = 3;
        let mut last = Ok(());
        for _ in 0..TRIES {
            last = self.test.cluster.restart(name).await;
            match &last {
                Ok(()) => return Ok(()),
                Err(error) => tracing::warn!(name, %error, "not started again; once more"),
            }
        }
        Ok(last?)
    }

    /// SIGSTOP to the server and all its children, which are in groups of their own.
    pub(crate) fn pause_postgres(&self) -> Result<()> {
        self.signal_postgres(Signal::STOP)
    }

    pub(crate) fn resume_postgres(&self) -> Result<()> {
        self.signal_postgres(Signal::CONT)
    }

    fn signal_postgres(&self, signal: Signal) -> Result<()> {
        let root = self.test.cluster.postgres_pid().context("Postgres does not run")?;
        descendants(root).into_iter().try_for_each(|pid| self::signal(pid, signal))
    }

    /// What is on a node's disk now. The node must not run.
    pub(crate) fn copy_disk(&self, node: &str) -> Result<TempDir> {
        let copy = tempfile::Builder::new().prefix("tabularium-faults-disk-").tempdir_in("/tmp")?;
        copy_all(&self.storage(node), copy.path())?;
        Ok(copy)
    }

    /// Makes a node's disk what it was. The node must not run.
    pub(crate) fn put_disk_back(&self, node: &str, copy: &TempDir) -> Result<()> {
        let storage = self.storage(node);
        for entry in fs::read_dir(&storage)? {
            let path = entry?.path();
            let is_directory = path.is_dir() && !path.is_symlink();
            if is_directory { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
        }
        copy_all(copy.path(), &storage)
    }

    /// Deletes a repository through one of the routers.
    pub(crate) async fn remove(&self, index: usize, relative_path: &str) -> Result<(), Status> {
        let mut router = self.test.router(index % self.names(Kind::Router).len());
        let repository = Some(repository(relative_path));
        let mut request = Request::new(RemoveRepositoryRequest { repository });
        request.set_timeout(CALL_WITHIN);
        router.remove_repository(request).await.map(|_| ())
    }

    /// Creates a repository through one of the routers.
    pub(crate) async fn create(&self, index: usize, relative_path: &str) -> Result<(), Status> {
        let mut router = self.test.router(index % self.names(Kind::Router).len());
        let repository = Some(repository(relative_path));
        let default_branch = b"main".to_vec();
        let mut request =
            Request::new(CreateRepositoryRequest { repository, default_branch, ..Default::default() });
        request.set_timeout(CALL_WITHIN);
        router.create_repository(request).await.map(|_| ())
    }

    /// Gives a repository a hook of its own, on every disk.
    pub(crate) async fn hook(&self, relative_path: &str, name: &str, program: &str) -> Result<()> {
        let details = self.test.details(relative_path).await.context("details")?;
        let replica_path = details.route.context("no route")?.replica_path;
        for (_, replica) in self.replicas(&replica_path) {
            let directory = replica.join("custom_hooks");
            fs::create_dir_all(&directory)?;
            let path = directory.join(name);
            fs::write(&path, program)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(())
    }

    /// Whether a process ended by itself.
    pub(crate) fn ended(&mut self, name: &str) -> bool {
        let mut states = self.test.cluster.states().into_iter();
        states.any(|(found, state)| short(&found) == name && matches!(state, State::Ended { .. }))
    }

    pub(crate) async fn restart_nats_empty(&mut self) -> Result<()> {
        Ok(self.test.cluster.restart_nats_empty(HOME).await?)
    }

    /// Arms a crash point in one process.
    pub(crate) fn arm(&self, name: &str, point: CrashPoint) -> Result<()> {
        Ok(fs::write(self.faults(name).join(point.name()), "")?)
    }

    /// Answers whether it was still armed.
    pub(crate) fn disarm(&self, name: &str, point: CrashPoint) -> Result<bool> {
        match fs::remove_file(self.faults(name).join(point.name())) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Leaves a safety step out in every process that has it.
    pub(crate) fn switch_off(&self, step: SafetyStep) -> Result<()> {
        // Routers' count of votes is made a second time by coordinators, so that alone it would not be missed.
        let has = |kind: &Kind| {
            kind.name() == step.service() || (step == SafetyStep::RouterQuorum && *kind == Kind::Coordinator)
        };
        for kind in Kind::ALL.into_iter().filter(has) {
            for name in self.names(kind) {
                fs::write(self.faults(&name).join(step.name()), "")?;
            }
        }
        Ok(())
    }

    fn faults(&self, name: &str) -> PathBuf {
        self.test.cluster.state_directory().join(full(name)).join("faults")
    }

    fn storage(&self, node: &str) -> PathBuf {
        self.test.cluster.state_directory().join(full(node)).join("storage")
    }

    /// Where every replica of a repository is.
    pub(crate) fn replicas(&self, replica_path: &str) -> Vec<(String, PathBuf)> {
        let nodes = self.names(Kind::Node).into_iter();
        nodes.map(|node| (node.clone(), self.storage(&node).join(replica_path))).collect()
    }

    /// The storage roots.
    pub(crate) fn storages(&self) -> Vec<PathBuf> {
        self.names(Kind::Node).iter().map(|node| self.storage(node)).collect()
    }

    /// Takes all the room on a node's disk.
    pub(crate) fn fill(&self, node: &str) -> Result<()> {
        let block = vec![0; 1 << 20];
        let mut ballast = File::create(self.storage(node).join(BALLAST))?;
        for part in [&block[..], &block[..4096]] {
            // Ends when the disk says that it is full: that is what is wanted.
            while ballast.write_all(part).is_ok() {}
        }
        Ok(())
    }

    /// Gives it back.
    pub(crate) fn empty(&self, node: &str) -> Result<()> {
        Ok(fs::remove_file(self.storage(node).join(BALLAST))?)
    }

    /// Moves the clock of a process.
    pub(crate) fn move_clock(&self, name: &str, seconds: i64) -> Result<()> {
        self.clocks.as_ref().context("clocks cannot be moved")?.set(name, seconds)
    }

    /// All clocks are right.
    pub(crate) fn right_clocks(&self) -> Result<()> {
        let Some(clocks) = &self.clocks else { return Ok(()) };
        let services = self.test.home().processes.into_iter().map(|process| process.name);
        services.chain(["postgres".to_owned()]).try_for_each(|name| clocks.set(&name, 0))
    }

    /// Copies every log into a directory.
    pub(crate) fn keep_logs(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        let state = self.test.cluster.state_directory();
        for process in &self.test.home().processes {
            let name = format!("{}.log", short(&process.name));
            fs::copy(&process.log, directory.join(name)).with_context(|| process.name.clone())?;
        }
        for (file, name) in [("postgres/postgres.log", "postgres.log"), ("home/nats/nats.log", "nats.log")] {
            fs::copy(state.join(file), directory.join(name)).with_context(|| file.to_owned())?;
        }
        Ok(())
    }

    /// Stops everything in an orderly way.
    pub(crate) async fn stop(self) -> Result<()> {
        let Self { test, mounts, links, clocks, .. } = self;
        let directory = test.stop().await?;
        // What is mounted in it cannot be removed.
        drop(mounts);
        drop((directory, links));
        if clocks.is_some() {
            clocks::clear();
        }
        Ok(())
    }
}

fn repository(relative_path: &str) -> Repository {
    Repository {
        storage_name: VIRTUAL_STORAGE.into(),
        relative_path: relative_path.into(),
        ..Default::default()
    }
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    let output = Command::new("cp").arg("-a").arg(from.join(".")).arg(to).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// To one that is gone it is as well done.
fn signal(pid: u32, signal: Signal) -> Result<()> {
    match kill_process(Pid::from_raw(i32::try_from(pid)?).context("no process")?, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name stands in parentheses and may hold anything; after it comes the state.
    stat.rsplit(')')
        .next()
        .and_then(|rest| rest.trim_start().chars().next())
        .is_some_and(|state| state != 'Z')
}

/// A process and all that it started, by the process table.
fn descendants(root: u32) -> Vec<u32> {
    let parent = |pid: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name stands in parentheses and may hold anything.
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes: Vec<(u32, u32)> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, parent(pid)?)))
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(processes.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found
}

fn full(name: &str) -> String {
    if name == "postgres" { name.to_owned() } else { format!("{HOME}/{name}") }
}

/// File systems in memory, for root only; `script/faults` sees to it that they vanish with this process.
#[derive(Default)]
struct Mounts(Vec<PathBuf>);

impl Mounts {
    fn add(&mut self, place: PathBuf) {
        match mount(&place) {
            Ok(()) => self.0.push(place),
            Err(error) => tracing::warn!(place = %place.display(), "no disk of its own: {error:#}"),
        }
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for place in &self.0 {
            let status = Command::new("umount").arg("--lazy").arg(place).status();
            if !status.is_ok_and(|status| status.success()) {
                tracing::warn!(place = %place.display(), "cannot be unmounted");
            }
        }
    }
}

fn mount(place: &Path) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "only root may mount");
    fs::create_dir_all(place)?;
    let options = format!("size={DISK_MEBIBYTES}m,mode=0700");
    let output = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(place).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
