//! A cluster with a relay between routers and nodes, and what is asked of it.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tabularium_cli::local::{
    cluster::{Cluster, ClusterOptions, Detour, Gateways, HOME, SiteSize},
    postgres::Durability,
    record::SiteRecord,
    service::Kind,
};
use tabularium_proto::{
    coordinator::{
        GetRepositoryRequest, RepositoryName, Route, operator_service_client::OperatorServiceClient,
    },
    gitaly::{
        CreateRepositoryRequest, Repository, WriteRefRequest,
        repository_service_client::RepositoryServiceClient,
    },
};
use tabularium_testkit::{
    cluster::{VIRTUAL_STORAGE, signed},
    proxy::{Fault, FaultProxy},
};

const LEVEL_TIMEOUT: Duration = Duration::from_secs(120);
const LEVEL_POLL: Duration = Duration::from_millis(20);
const LOG_TAIL_LINES: usize = 20;

/// How large a cluster is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) nodes: u16,
    pub(super) routers: u16,
}

type Relays = Arc<Mutex<BTreeMap<(String, String), FaultProxy>>>;

/// The cluster.
pub(super) struct Stage {
    pub(super) cluster: Cluster,
    pub(super) site: SiteRecord,
    relays: Relays,
}

fn short(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

impl Stage {
    /// Starts it; Postgres and nodes sync as in production.
    pub(super) async fn start(state: PathBuf, size: Size) -> Result<Self> {
        let relays = Relays::default();
        let told = Arc::clone(&relays);
        let mut options = ClusterOptions::new(state);
        options.home = SiteSize { nodes: size.nodes, coordinators: 1, routers: size.routers, replicators: 1 };
        options.mirror = None;
        options.gateways = Gateways::PerRouter;
        options.durability = Durability::Full;
        "warn".clone_into(&mut options.log_filter);
        options.detour = Some(Detour::new(move |user, owner, address| {
            if !short(user).starts_with("router") || !short(owner).starts_with("node") {
                return address.to_owned();
            }
            let mut relays = told.lock().unwrap_or_else(PoisonError::into_inner);
            let between = (short(user).to_owned(), short(owner).to_owned());
            let relay = relays.entry(between).or_insert_with(|| FaultProxy::start_now(address));
            relay.address().to_string()
        }));
        let cluster = Cluster::start(options, &|what| eprintln!("starting {what}")).await?;
        let site = cluster.record().site(HOME).context("no home site")?.clone();
        Ok(Self { cluster, site, relays })
    }

    /// What every answer of a node to every router meets.
    pub(super) fn hinder(&self, node: &str, fault: Fault) {
        let relays = self.relays.lock().unwrap_or_else(PoisonError::into_inner);
        for ((_, to), relay) in relays.iter() {
            if to == node {
                relay.set_one_way(tabularium_testkit::proxy::Direction::Down, fault);
            }
        }
    }

    /// The gateway in front of a router, from 0.
    pub(super) fn url(&self, router: usize, relative_path: &str) -> String {
        format!("{}/{relative_path}", self.site.urls(Kind::Gateway)[router])
    }

    pub(super) fn repositories(&self) -> RepositoryServiceClient<tabularium_testkit::cluster::Signed> {
        RepositoryServiceClient::new(signed(&self.site.grpc(Kind::Router)[0], &self.site.router_token_file))
    }

    pub(super) async fn create(&self, relative_path: &str) -> Result<()> {
        let request = CreateRepositoryRequest {
            repository: Some(repository(relative_path)),
            default_branch: b"main".to_vec(),
            ..CreateRepositoryRequest::default()
        };
        self.repositories().create_repository(request).await?;
        Ok(())
    }

    /// The smallest write there is: a new branch at a commit that is there.
    pub(super) async fn write_ref(&self, relative_path: &str, name: &str, commit: &str) -> Result<()> {
        let request = WriteRefRequest {
            repository: Some(repository(relative_path)),
            r#ref: format!("refs/heads/{name}").into_bytes(),
            revision: commit.as_bytes().to_vec(),
            ..WriteRefRequest::default()
        };
        self.repositories().write_ref(request).await?;
        Ok(())
    }

    pub(super) async fn route(&self, relative_path: &str) -> Result<Route> {
        let channel = signed(&self.site.grpc(Kind::Coordinator)[0], &self.site.coordinator_token_file);
        let name = RepositoryName {
            virtual_storage: VIRTUAL_STORAGE.to_owned(),
            relative_path: relative_path.to_owned(),
        };
        let request = GetRepositoryRequest { name: Some(name) };
        let answer = OperatorServiceClient::new(channel).get_repository(request).await?.into_inner();
        answer.repository.and_then(|repository| repository.route).context("no route")
    }

    /// Every replica has the newest generation.
    pub(super) async fn is_level(&self, relative_path: &str) -> Result<bool> {
        let route = self.route(relative_path).await?;
        Ok(route.replicas.iter().all(|replica| replica.generation == route.generation))
    }

    /// Waits until it is so.
    pub(super) async fn level(&self, relative_path: &str) -> Result<()> {
        let begun = Instant::now();
        while !self.is_level(relative_path).await? {
            ensure!(begun.elapsed() < LEVEL_TIMEOUT, "the replicas of {relative_path} did not become level");
            tokio::time::sleep(LEVEL_POLL).await;
        }
        Ok(())
    }

    /// A storage that is not the primary.
    pub(super) async fn secondary(&self, relative_path: &str) -> Result<String> {
        let route = self.route(relative_path).await?;
        let other = route.replicas.iter().find(|replica| replica.storage != route.primary);
        Ok(other.context("no secondary")?.storage.clone())
    }

    /// The last lines that every service logged, for a measurement that failed.
    pub(super) fn log_tails(&self) -> String {
        let mut text = String::new();
        for process in &self.site.processes {
            let log = std::fs::read_to_string(&process.log).unwrap_or_else(|error| error.to_string());
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n");
            text.extend(["== ", &process.name, "\n", &tail, "\n"]);
        }
        text
    }
}

fn repository(relative_path: &str) -> Repository {
    Repository {
        storage_name: VIRTUAL_STORAGE.to_owned(),
        relative_path: relative_path.to_owned(),
        gl_repository: "project-1".to_owned(),
        ..Repository::default()
    }
}
