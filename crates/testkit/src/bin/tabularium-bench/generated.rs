//! Repositories made up for a measurement, and the cluster they are pushed to.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::StdRng};
use secrecy::SecretString;
use tabularium_cli::local::{
    cluster::{Cluster, ClusterOptions, HOME, SiteSize},
    postgres::Durability,
    record::SiteRecord,
    service::Kind,
};
use tabularium_common::{auth::SendToken, grpc};
use tabularium_proto::{
    coordinator::{
        GetRepositoryRequest, RepositoryDetails, RepositoryName,
        operator_service_client::OperatorServiceClient,
    },
    gitaly::{
        CreateRepositoryRequest, OptimizeRepositoryRequest, Repository,
        optimize_repository_request::Strategy, repository_service_client::RepositoryServiceClient,
    },
};
use tokio::process::Command;
use tonic::{service::interceptor::InterceptedService, transport::Channel};

const VIRTUAL_STORAGE: &str = "default";
const LOG_TAIL_LINES: usize = 20;
const CONVERGE_TIMEOUT: Duration = Duration::from_secs(600);

/// What the generated files hold.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Content {
    /// Files of 64 KiB of text, several versions of each: packs with deltas.
    Text,
    /// Files of 8 MiB that do not compress.
    Noise,
}

/// Makes a bare repository of about `mebibytes` MiB of content. The same arguments make the same repository.
pub(crate) async fn repository(path: &Path, mebibytes: u64, content: Content) -> Result<()> {
    git(
        path.parent().context("no parent directory")?,
        &["init", "--quiet", "--bare", &path.to_string_lossy()],
    )
    .await?;
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || import(&path, mebibytes, content)).await??;
    Ok(())
}

fn import(path: &Path, mebibytes: u64, content: Content) -> Result<()> {
    let mut child = std::process::Command::new("git")
        .args(["-c", "core.bigFileThreshold=1m", "fast-import", "--quiet"])
        .current_dir(path)
        .stdin(Stdio::piped())
        .spawn()?;
    let mut out = std::io::BufWriter::new(child.stdin.take().context("no standard input")?);
    let mut random = StdRng::seed_from_u64(1);
    let (file_bytes, files_a_commit) = match content {
        Content::Text => (64 * 1024, 64),
        Content::Noise => (8 * 1024 * 1024, 8),
    };
    let files = mebibytes * 1024 * 1024 / file_bytes;
    for number in 0..files {
        if number % files_a_commit == 0 {
            let commit = number / files_a_commit;
            write!(
                out,
                "commit refs/heads/main\ncommitter Bench <bench@example.org> {} +0000\n",
                1_700_000_000 + commit
            )?;
            writeln!(out, "data 7\ncommit\n")?;
        }
        writeln!(out, "M 100644 inline d{}/f{}", number % 97, number % 1009)?;
        writeln!(out, "data {file_bytes}")?;
        match content {
            Content::Text => write_text(&mut out, file_bytes as usize, &mut random)?,
            Content::Noise => {
                let mut bytes = vec![0; file_bytes as usize];
                random.fill_bytes(&mut bytes);
                out.write_all(&bytes)?;
            }
        }
        writeln!(out)?;
    }
    drop(out);
    let status = child.wait()?;
    ensure!(status.success(), "git fast-import: {status}");
    Ok(())
}

fn write_text(out: &mut impl std::io::Write, bytes: usize, random: &mut StdRng) -> Result<()> {
    use std::fmt::Write as _;
    let mut line = String::with_capacity(80);
    let mut left = bytes;
    while left > 0 {
        line.clear();
        for _ in 0..9 {
            write!(line, "{:x} ", random.random::<u32>() >> random.random_range(0..16))?;
        }
        line.push('\n');
        let take = line.len().min(left);
        out.write_all(&line.as_bytes()[..take])?;
        left -= take;
    }
    Ok(())
}

/// Runs git with nothing of the user's configuration.
pub(crate) async fn git(directory: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new("git")
        .args(arguments)
        .current_dir(directory)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env_remove("GIT_DIR")
        .kill_on_drop(true)
        .output()
        .await?;
    if !output.status.success() {
        bail!("git {}: {}\n{}", arguments.join(" "), output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Seconds that a bare clone of `url` takes.
pub(crate) async fn clone_seconds(directory: &Path, url: &str) -> Result<f64> {
    let target = directory.join("clone.git");
    let begun = Instant::now();
    git(directory, &["clone", "--quiet", "--bare", url, &target.to_string_lossy()]).await?;
    let elapsed = begun.elapsed().as_secs_f64();
    tokio::fs::remove_dir_all(&target).await?;
    Ok(elapsed)
}

/// A cluster to measure: one of each service, three nodes, no mirror.
pub(crate) struct Measured {
    pub(crate) cluster: Cluster,
    pub(crate) site: SiteRecord,
    router: RepositoryServiceClient<InterceptedService<Channel, SendToken>>,
    operator: OperatorServiceClient<InterceptedService<Channel, SendToken>>,
}

impl Measured {
    /// Starts it below `state`.
    pub(crate) async fn start(state: PathBuf) -> Result<Self> {
        let mut options = ClusterOptions::new(state);
        options.home = SiteSize { nodes: 3, coordinators: 1, routers: 1, replicators: 1 };
        options.mirror = None;
        options.durability = Durability::ThrowAway;
        "warn".clone_into(&mut options.log_filter);
        let cluster = Cluster::start(options, &|what| eprintln!("starting {what}")).await?;
        let record = cluster.record();
        let site = record.sites.into_iter().find(|site| site.name == HOME).context("no home site")?;
        let router = channel(&site, Kind::Router, &site.router_token_file)?;
        let operator = channel(&site, Kind::Coordinator, &site.coordinator_token_file)?;
        Ok(Self {
            cluster,
            site,
            router: RepositoryServiceClient::new(router),
            operator: OperatorServiceClient::new(operator),
        })
    }

    /// The last lines that every service logged, for a measurement that failed.
    pub(crate) fn log_tails(&self) -> String {
        let mut text = String::new();
        for process in &self.site.processes {
            let log = std::fs::read_to_string(&process.log).unwrap_or_else(|error| error.to_string());
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n");
            text.extend(["== ", &process.name, "\n", &tail, "\n"]);
        }
        text
    }

    /// Base URL of the gateway.
    pub(crate) fn gateway(&self) -> Result<String> {
        let process = self.site.processes.iter().find(|process| process.kind == Kind::Gateway);
        let address = process.and_then(|process| process.http.as_deref()).context("no gateway")?;
        Ok(format!("http://{address}"))
    }

    /// Creates a repository and pushes all of `source` to it. Answers its URL.
    pub(crate) async fn create_and_push(&self, relative_path: &str, source: &Path) -> Result<String> {
        let request = CreateRepositoryRequest {
            repository: Some(repository_message(relative_path)),
            default_branch: b"main".to_vec(),
            ..CreateRepositoryRequest::default()
        };
        self.router.clone().create_repository(request).await?;
        let url = format!("{}/{relative_path}", self.gateway()?);
        git(source, &["push", "--quiet", "--mirror", &url]).await?;
        Ok(url)
    }

    /// Waits until every replica has the newest generation.
    pub(crate) async fn converged(&self, relative_path: &str) -> Result<RepositoryDetails> {
        let begun = Instant::now();
        loop {
            let name = RepositoryName {
                virtual_storage: VIRTUAL_STORAGE.to_owned(),
                relative_path: relative_path.to_owned(),
            };
            let request = GetRepositoryRequest { name: Some(name) };
            let answer = self.operator.clone().get_repository(request).await?.into_inner();
            let details = answer.repository.context("no repository in the answer")?;
            let route = details.route.as_ref().context("no route in the answer")?;
            if route.replicas.len() == 3
                && route.replicas.iter().all(|replica| replica.generation == route.generation)
            {
                return Ok(details);
            }
            ensure!(begun.elapsed() < CONVERGE_TIMEOUT, "the replicas did not converge: {route:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Repacks every replica, so that all have the same packs and bitmaps.
    pub(crate) async fn optimize(&self, relative_path: &str) -> Result<()> {
        let request = OptimizeRepositoryRequest {
            repository: Some(repository_message(relative_path)),
            strategy: Strategy::Eager.into(),
        };
        self.router.clone().optimize_repository(request).await?;
        Ok(())
    }
}

fn repository_message(relative_path: &str) -> Repository {
    Repository {
        storage_name: VIRTUAL_STORAGE.to_owned(),
        relative_path: relative_path.to_owned(),
        gl_repository: "project-1".to_owned(),
        ..Repository::default()
    }
}

fn channel(
    site: &SiteRecord,
    kind: Kind,
    token_file: &Path,
) -> Result<InterceptedService<Channel, SendToken>> {
    let process = site.processes.iter().find(|process| process.kind == kind);
    let address =
        process.and_then(|process| process.grpc.as_deref()).with_context(|| format!("no {kind:?}"))?;
    let token = SecretString::from(std::fs::read_to_string(token_file)?.trim().to_owned());
    Ok(InterceptedService::new(grpc::channel(&address.parse()?), SendToken(Some(token))))
}
