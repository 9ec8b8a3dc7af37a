//! The same clone over a sidechannel from the node directly, over a sidechannel through the router, and through the router
//! as messages of an RPC.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost::Message as _;
use tabularium_cli::local::process::Launch;
use tabularium_common::{grpc::Address, lifecycle::Tasks};
use tabularium_proto::gitaly::Repository;
use tokio::process::Command;

use crate::{
    figures::{Bar, Figures, median},
    generated::{self, Content},
    process,
    relay::{Started, start, start_coordinator},
    relay_backend::{REPLICA_PATH, STORAGE, VIRTUAL_STORAGE},
};

const GIBIBYTE: f64 = 1024.0 * 1024.0 * 1024.0;

/// One way to clone.
struct Way<'a> {
    /// What git runs in the place of `ssh`.
    program: &'a Path,
    address: &'a Address,
    repository: Repository,
    messages: bool,
}

impl Way<'_> {
    /// Seconds that a bare clone takes.
    async fn seconds(&self, directory: &Path) -> Result<f64> {
        let target = directory.join("clone.git");
        let begun = Instant::now();
        let mut git = Command::new("git");
        git.args(["clone", "--quiet", "--bare", "ssh://node/bench.git"])
            .arg(&target)
            .current_dir(directory)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_SSH_VARIANT", "simple")
            .env("GIT_SSH_COMMAND", format!("'{}' fetch-proxy", self.program.display()))
            .env("TABULARIUM_FETCH_ADDRESS", self.address.to_string())
            .env("TABULARIUM_FETCH_REPOSITORY", STANDARD.encode(self.repository.encode_to_vec()))
            .env("TABULARIUM_FETCH_TRANSPORT", if self.messages { "messages" } else { "sidechannel" })
            .kill_on_drop(true);
        let output = git.output().await?;
        if !output.status.success() {
            bail!("git clone: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        let seconds = begun.elapsed().as_secs_f64();
        tokio::fs::remove_dir_all(&target).await?;
        Ok(seconds)
    }

    /// The same, and the CPU seconds that a process took meanwhile.
    async fn cost(&self, directory: &Path, router: u32) -> Result<(f64, f64)> {
        let before = process::exact_cpu_time(router)?;
        let seconds = self.seconds(directory).await?;
        Ok((seconds, process::exact_cpu_time(router)?.saturating_sub(before).as_secs_f64()))
    }
}

fn named(storage: &str, path: &str) -> Repository {
    Repository {
        storage_name: storage.to_owned(),
        relative_path: path.to_owned(),
        gl_repository: "project-1".to_owned(),
        ..Repository::default()
    }
}

/// A storage node with the one repository, packed.
async fn start_node(program: &Path, directory: &Path, mebibytes: u64) -> Result<(Started, u64)> {
    let storage = directory.join("storage");
    std::fs::create_dir_all(&storage)?;
    let config = directory.join("node.toml");
    std::fs::write(
        &config,
        format!(
            "listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n\
             [[storage]]\nname = \"{STORAGE}\"\npath = \"{}\"\n[telemetry]\nlog_filter = \"warn\"\n",
            storage.display()
        ),
    )?;
    let announce = directory.join("node.json");
    let launch = Launch::new(program, directory.join("node.log"));
    let launch = launch.arg("--config").arg(&config).arg("--announce").arg(&announce);
    // A storage that is not empty has to say whose it is; this one is new.
    let node = start(launch, announce).await?;
    let repository = storage.join(REPLICA_PATH);
    std::fs::create_dir_all(repository.parent().context("no parent directory")?)?;
    // What does not compress is what passes fastest.
    generated::repository(&repository, mebibytes, Content::Noise).await?;
    generated::git(&repository, &["repack", "-adq"]).await?;
    let packs = std::fs::read_dir(repository.join("objects/pack"))?;
    let bytes = packs.map(|entry| Ok(entry?.metadata()?.len())).sum::<Result<u64, std::io::Error>>()?;
    Ok((node, bytes))
}

async fn start_router(program: PathBuf, directory: &Path, coordinator: &Address) -> Result<Started> {
    let config = directory.join("router.toml");
    std::fs::write(
        &config,
        format!(
            "listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\ncoordinators = [\"{coordinator}\"]\n\
             [telemetry]\nlog_filter = \"warn\"\n"
        ),
    )?;
    let announce = directory.join("router.json");
    let launch = Launch::new(program, directory.join("router.log"));
    start(launch.arg("--config").arg(&config).arg("--announce").arg(&announce), announce).await
}

/// Measures and prints.
pub(crate) async fn run(rounds: usize, mebibytes: u64) -> Result<Figures> {
    let directory = tempfile::Builder::new().prefix("tabularium-bench-").tempdir_in("/tmp")?;
    let tasks = Tasks::new();
    let this = std::env::current_exe()?;
    let program = this.with_file_name("tabularium-node");
    let (node, bytes) = start_node(&program, directory.path(), mebibytes).await?;
    let coordinator = start_coordinator(&node.address, directory.path(), &tasks).await?;
    let router =
        start_router(this.with_file_name("tabularium-router"), directory.path(), &coordinator).await?;

    let name = || named(VIRTUAL_STORAGE, "bench/sidechannel.git");
    let direct = Way {
        program: &program,
        address: &node.address,
        repository: named(STORAGE, REPLICA_PATH),
        messages: false,
    };
    let relayed = Way { program: &program, address: &router.address, repository: name(), messages: false };
    let messages = Way { program: &program, address: &router.address, repository: name(), messages: true };
    for way in [&direct, &relayed, &messages] {
        way.seconds(directory.path()).await?;
    }
    let (mut samples, gibibytes): ([Vec<f64>; 6], _) = (Default::default(), bytes as f64 / GIBIBYTE);
    for round in 0..rounds {
        // Whoever comes second finds warmer caches.
        let (alone, (wall, cpu)) = if round % 2 == 0 {
            let alone = direct.seconds(directory.path()).await?;
            (alone, relayed.cost(directory.path(), router.pid).await?)
        } else {
            let through = relayed.cost(directory.path(), router.pid).await?;
            (direct.seconds(directory.path()).await?, through)
        };
        let (wall_of_messages, cpu_of_messages) = messages.cost(directory.path(), router.pid).await?;
        eprintln!("clone through the router takes {:.3} of a direct one's time", wall / alone);
        for (list, value) in samples.iter_mut().zip([
            alone,
            wall,
            wall / alone,
            cpu / gibibytes,
            cpu_of_messages / gibibytes,
            wall_of_messages / alone,
        ]) {
            list.push(value);
        }
    }
    let [direct_seconds, seconds, ratios, cpu, cpu_of_messages, ratios_of_messages] = samples.map(median);
    let mut figures = Figures::new();
    figures.print("sidechannel.pack_mib", bytes as f64 / (1024.0 * 1024.0), Bar::Told);
    figures.print("sidechannel.direct_seconds", direct_seconds, Bar::Told);
    figures.print("sidechannel.router_seconds", seconds, Bar::Told);
    figures.print("sidechannel.wall_ratio", ratios, Bar::AtMost(1.10));
    figures.print("sidechannel.messages.wall_ratio", ratios_of_messages, Bar::Told);
    figures.print("sidechannel.router_cpu_s_per_gib", cpu, Bar::Told);
    figures.print("sidechannel.messages.router_cpu_s_per_gib", cpu_of_messages, Bar::Told);
    figures.print("sidechannel.cpu_ratio", cpu / cpu_of_messages, Bar::AtMost(0.5));
    drop((router, node));
    tasks.drain(std::time::Duration::from_secs(5)).await?;
    Ok(figures)
}
