//! `gitaly.PraefectInfoService`: where the replicas of a repository are, and whether they are alike. The rest of the
//! service steers what the operator's own service steers, and is not offered here.

use std::sync::Arc;

use futures::future::join_all;
use http::HeaderValue;
use tabularium_common::{auth::SendToken, telemetry::CorrelationId};
use tabularium_proto::{
    coordinator::Route,
    gitaly::{
        CalculateChecksumRequest, GetRepositoryMetadataRequest, GetRepositoryMetadataResponse, Repository,
        RepositoryReplicasRequest, RepositoryReplicasResponse, get_repository_metadata_request::Query,
        get_repository_metadata_response::Replica, praefect_info_service_server::PraefectInfoService,
        repository_replicas_response::RepositoryDetails, repository_service_client::RepositoryServiceClient,
    },
};
use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::asked;
use crate::{
    nodes::{Node, Nodes, Storages, is_healthy, named},
    refusal::Refusal,
    routes::{Routes, is_unknown},
};

/// The service.
pub(crate) struct PraefectInfo {
    /// Who is asked for checksums.
    pub(crate) nodes: Arc<Nodes>,
    /// Where repositories are.
    pub(crate) routes: Arc<Routes>,
    /// For nodes.
    pub(crate) token: SendToken,
}

fn correlation(metadata: &MetadataMap) -> Option<HeaderValue> {
    CorrelationId::of(metadata.as_ref()).header()
}

impl PraefectInfo {
    async fn route(
        &self,
        virtual_storage: &str,
        relative_path: &str,
        correlation: Option<HeaderValue>,
    ) -> Result<Arc<Route>, Refusal> {
        let directory = self.nodes.directory();
        if directory.storages(virtual_storage).is_none() {
            return Err(if directory.known() { Refusal::VirtualStorage } else { Refusal::NoTopology });
        }
        let resolved = self.routes.resolve(virtual_storage, relative_path, correlation.as_ref()).await;
        resolved.map_err(|refusal| {
            if is_unknown(&refusal) { Refusal::RepositoryNotFound { prefix: "" } } else { refusal }
        })
    }

    async fn checksum(
        &self,
        node: &Node,
        replica_path: &str,
        client_side: &Repository,
    ) -> Result<RepositoryDetails, Status> {
        let mut client = RepositoryServiceClient::with_interceptor(node.channel(), self.token.clone());
        let repository = Repository {
            storage_name: node.storage.to_string(),
            relative_path: replica_path.to_owned(),
            ..client_side.clone()
        };
        let request = CalculateChecksumRequest { repository: Some(repository) };
        let answer = asked(client.calculate_checksum(request)).await?;
        Ok(RepositoryDetails {
            repository: Some(Repository { storage_name: node.storage.to_string(), ..client_side.clone() }),
            checksum: answer.checksum,
        })
    }
}

fn storages_of<'d>(
    directory: &'d crate::nodes::Directory,
    virtual_storage: &str,
) -> Result<&'d Storages, Refusal> {
    directory.storages(virtual_storage).ok_or(Refusal::VirtualStorage)
}

#[tonic::async_trait]
impl PraefectInfoService for PraefectInfo {
    async fn repository_replicas(
        &self,
        request: Request<RepositoryReplicasRequest>,
    ) -> Result<Response<RepositoryReplicasResponse>, Status> {
        let correlation = correlation(request.metadata());
        let client_side = request.into_inner().repository.ok_or(Refusal::RepositoryNotSet)?;
        let route = self.route(&client_side.storage_name, &client_side.relative_path, correlation).await?;
        let directory = self.nodes.directory();
        let storages = storages_of(&directory, &client_side.storage_name)?;
        let questions =
            route.replicas.iter().filter(|replica| replica.generation >= 0).map(|replica| async {
                let node = named(storages, &replica.storage)
                    .ok_or_else(|| Refusal::Unreachable(replica.storage.clone()).status())?;
                let details = self.checksum(node, &route.replica_path, &client_side).await?;
                Ok::<_, Status>((replica.storage == route.primary, details))
            });
        let mut answer = RepositoryReplicasResponse::default();
        for asked in join_all(questions).await {
            match asked? {
                (true, details) => answer.primary = Some(details),
                (false, details) => answer.replicas.push(details),
            }
        }
        Ok(Response::new(answer))
    }

    async fn get_repository_metadata(
        &self,
        request: Request<GetRepositoryMetadataRequest>,
    ) -> Result<Response<GetRepositoryMetadataResponse>, Status> {
        let correlation = correlation(request.metadata());
        let path = match request.into_inner().query {
            None => return Err(Status::invalid_argument("query not set")),
            Some(Query::RepositoryId(_)) => {
                return Err(Status::unimplemented("repositories are looked up by path, not by id"));
            }
            Some(Query::Path(path)) => path,
        };
        let route = self.route(&path.virtual_storage, &path.relative_path, correlation).await?;
        let directory = self.nodes.directory();
        let storages = storages_of(&directory, &path.virtual_storage)?;
        let replicas = route
            .replicas
            .iter()
            .map(|replica| {
                let healthy = is_healthy(storages, &replica.storage);
                Replica {
                    storage: replica.storage.clone(),
                    assigned: true,
                    generation: replica.generation,
                    healthy,
                    valid_primary: healthy && replica.generation == route.generation,
                    verified_at: None,
                }
            })
            .collect();
        let name = route.name.clone().unwrap_or_default();
        Ok(Response::new(GetRepositoryMetadataResponse {
            repository_id: route.repository_id,
            virtual_storage: name.virtual_storage,
            relative_path: name.relative_path,
            replica_path: route.replica_path.clone(),
            primary: route.primary.clone(),
            generation: route.generation,
            replicas,
        }))
    }
}
