//! Whole clusters of real processes. The programs have to be built before: `cargo build --bins`.

use std::time::Duration;

use tabularium_cli::local::{
    LocalError,
    cluster::{Cluster, ClusterOptions, HOME},
    postgres::Durability,
    record::SiteRecord,
    service::Kind,
};
use tabularium_common::{
    auth::SendToken,
    config::SecretFile,
    grpc::{Address, channel},
};
use tabularium_proto::{
    coordinator::{
        GetRepositoryRequest, RepositoryDetails, RepositoryName,
        operator_service_client::OperatorServiceClient,
    },
    gitaly::{
        CalculateChecksumRequest, CreateRepositoryRequest, Repository,
        repository_service_client::RepositoryServiceClient,
    },
};
use tempfile::TempDir;
use tonic::{Status, service::interceptor::InterceptedService, transport::Channel};

pub use tabularium_cli::local::{cluster as local_cluster, ports, record, service, transport};

/// The virtual storage of local clusters.
pub use tabularium_cli::local::recipe::VIRTUAL_STORAGE;

/// A signed channel.
pub type Signed = InterceptedService<Channel, SendToken>;

/// A cluster in a directory that is thrown away.
pub struct TestCluster {
    /// Steers the processes.
    pub cluster: Cluster,
    directory: TempDir,
}

impl TestCluster {
    /// Starts a cluster; `adjust` changes the options, which are those of `tabularium up` with ports of the kernel's
    /// choice and a Postgres that syncs nothing.
    pub async fn start(adjust: impl FnOnce(&mut ClusterOptions)) -> Self {
        let directory =
            tempfile::Builder::new().prefix("tabularium-test-cluster-").tempdir_in("/tmp").unwrap();
        let mut options = ClusterOptions::new(directory.path().join("state"));
        options.durability = Durability::ThrowAway;
        adjust(&mut options);
        let cluster = Cluster::start(options, &|_| {}).await.unwrap_or_else(|error| panic!("{error}"));
        Self { cluster, directory }
    }

    /// Stops everything in an orderly way. The directory goes when the answer is dropped.
    pub async fn stop(self) -> Result<TempDir, LocalError> {
        self.cluster.stop().await.map(|()| self.directory)
    }

    /// Where everything of the home site is.
    pub fn home(&self) -> SiteRecord {
        self.site(HOME)
    }

    /// Where everything of a site is.
    pub fn site(&self, name: &str) -> SiteRecord {
        self.cluster.record().site(name).unwrap_or_else(|| panic!("no site {name}")).clone()
    }

    /// URL of a repository at the `index`th (from 0) gateway of a site.
    pub fn url(&self, site: &str, index: usize, relative_path: &str) -> String {
        format!("{}/{relative_path}", self.site(site).urls(Kind::Gateway)[index])
    }

    /// Creates a repository through the first router of the home site.
    pub async fn create(&self, relative_path: &str) {
        let create = CreateRepositoryRequest {
            repository: Some(repository(VIRTUAL_STORAGE, relative_path)),
            default_branch: b"main".to_vec(),
            ..Default::default()
        };
        self.router(0).create_repository(create).await.unwrap_or_else(|status| panic!("{status}"));
    }

    /// A client of the `index`th router of the home site.
    pub fn router(&self, index: usize) -> RepositoryServiceClient<Signed> {
        let home = self.home();
        let address = &home.grpc(Kind::Router)[index];
        RepositoryServiceClient::new(signed(address, &home.router_token_file))
    }

    /// What the coordinators of the home site know about a repository. Asks the first that answers.
    pub async fn details(&self, relative_path: &str) -> Result<RepositoryDetails, Status> {
        let home = self.home();
        let mut last = Status::unavailable("no coordinator");
        for address in home.grpc(Kind::Coordinator) {
            let mut operator = OperatorServiceClient::new(signed(&address, &home.coordinator_token_file));
            let name = RepositoryName {
                virtual_storage: VIRTUAL_STORAGE.into(),
                relative_path: relative_path.into(),
            };
            let mut request = tonic::Request::new(GetRepositoryRequest { name: Some(name) });
            request.set_timeout(Duration::from_secs(10));
            match operator.get_repository(request).await {
                Ok(answer) => return Ok(answer.into_inner().repository.unwrap_or_default()),
                Err(status) => last = status,
            }
        }
        Err(last)
    }

    /// The checksum of each replica, asked of the nodes themselves, once all replicas are up to date; else why not.
    pub async fn checksums(&self, relative_path: &str) -> Result<Vec<String>, String> {
        let details = self.details(relative_path).await.map_err(|status| status.to_string())?;
        let route = details.route.unwrap_or_default();
        if let Some(behind) = route.replicas.iter().find(|replica| replica.generation != route.generation) {
            return Err(format!("{} has {} of {}", behind.storage, behind.generation, route.generation));
        }
        let home = self.home();
        let mut checksums = Vec::new();
        for replica in &route.replicas {
            let node = home.of(Kind::Node).find(|node| node.name.ends_with(&format!("/{}", replica.storage)));
            let address = node.and_then(|node| node.grpc.clone()).ok_or("unknown storage")?;
            let mut client = RepositoryServiceClient::new(signed(&address, &home.node_token_file));
            let request = CalculateChecksumRequest {
                repository: Some(repository(&replica.storage, &route.replica_path)),
            };
            let answer = client.calculate_checksum(request).await.map_err(|status| status.to_string())?;
            checksums.push(answer.into_inner().checksum);
        }
        Ok(checksums)
    }

    /// As [`TestCluster::checksums`], once there are `count` and all are equal.
    pub async fn equal_checksums(&self, relative_path: &str, count: usize) -> Result<String, String> {
        let checksums = self.checksums(relative_path).await?;
        if checksums.len() == count && checksums.iter().all(|checksum| *checksum == checksums[0]) {
            Ok(checksums[0].clone())
        } else {
            Err(format!("{checksums:?}"))
        }
    }
}

fn repository(storage: &str, relative_path: &str) -> Repository {
    Repository { storage_name: storage.into(), relative_path: relative_path.into(), ..Default::default() }
}

/// A channel to an address such as `tcp://host:port` that signs its calls with the secret in the file.
pub fn signed(address: &str, token_file: &std::path::Path) -> Signed {
    let address: Address = address.parse().expect("an address");
    let token = SecretFile(token_file.to_owned()).read().expect("a secret");
    InterceptedService::new(channel(&address), SendToken(Some(token)))
}
