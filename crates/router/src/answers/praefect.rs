//! `gitaly.PraefectInfoService`: where the replicas of a repository are, whether they are alike, and what an operator
//! decides about them. A coordinator answers, as it answers the operator's own tools; here its words become Praefect's.

use std::{future::Future, sync::Arc};

use futures::{StreamExt as _, TryStreamExt as _, future::join_all, stream};
use http::HeaderValue;
use tabularium_common::telemetry::CorrelationId;
use tabularium_proto::{
    coordinator::{
        AcceptDataLossRequest, DataLossRequest, GetReplicasRequest, MarkUnverifiedRequest as MarkRequest,
        ReplicaDetails, RepositoryName, RepositoryReplicas, Route,
        SetReplicationFactorRequest as FactorRequest, StorageName,
        get_replicas_request::Repository as Wanted, repair_service_client::RepairServiceClient,
    },
    gitaly::{
        CalculateChecksumRequest, DatalossRequest, DatalossResponse, GetRepositoryMetadataRequest,
        GetRepositoryMetadataResponse, MarkUnverifiedRequest, MarkUnverifiedResponse, Repository,
        RepositoryReplicasRequest, RepositoryReplicasResponse, SetAuthoritativeStorageRequest,
        SetAuthoritativeStorageResponse, SetReplicationFactorRequest, SetReplicationFactorResponse,
        dataloss_response, get_repository_metadata_request::Query, get_repository_metadata_response::Replica,
        mark_unverified_request::Selector, praefect_info_service_server::PraefectInfoService,
        repository_replicas_response::RepositoryDetails, repository_service_client::RepositoryServiceClient,
    },
};
use tonic::{Code, Request, Response, Status, codegen::BoxStream, metadata::MetadataMap};

use super::asked;
use crate::{
    coordinator::{Coordinators, Link},
    limits::COMMIT_CALL_TIMEOUT,
    nodes::{Node, Nodes, Storages, named},
    refusal::Refusal,
    routes::{Routes, not_found},
};

/// The service.
#[derive(Clone)]
pub(crate) struct PraefectInfo {
    /// Who is asked for checksums.
    pub(crate) nodes: Arc<Nodes>,
    /// Where repositories are.
    pub(crate) routes: Arc<Routes>,
    /// Who knows all about their replicas.
    pub(crate) coordinators: Coordinators,
}

type Repair = RepairServiceClient<Link>;

fn correlation(metadata: &MetadataMap) -> Option<HeaderValue> {
    CorrelationId::of(metadata.as_ref()).header()
}

fn is_valid_primary(replica: &ReplicaDetails) -> bool {
    replica.up_to_date && replica.healthy && replica.assigned
}

impl PraefectInfo {
    /// The storages of a virtual storage; `None`: there is no such virtual storage.
    fn storages(&self, virtual_storage: &str) -> Result<Option<Storages>, Refusal> {
        let directory = self.nodes.directory();
        if directory.known() {
            Ok(directory.storages(virtual_storage).cloned())
        } else {
            Err(Refusal::NoTopology)
        }
    }

    async fn route(
        &self,
        repository: &Repository,
        correlation: Option<HeaderValue>,
    ) -> Result<(Arc<Route>, Storages), Refusal> {
        let storages = self.storages(&repository.storage_name)?.ok_or(Refusal::StorageNotFound)?;
        let (virtual_storage, path) = (&repository.storage_name, &repository.relative_path);
        let route =
            self.routes.resolve(virtual_storage, path, correlation.as_ref()).await.map_err(not_found)?;
        Ok((route, storages))
    }

    /// Asks a coordinator what its operators ask.
    async fn operate<Q, A, F>(
        &self,
        correlation: Option<&HeaderValue>,
        message: Q,
        rpc: impl Fn(Repair, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let rpc = |link, request| rpc(RepairServiceClient::new(link), request);
        self.coordinators.call_other(correlation, COMMIT_CALL_TIMEOUT, message, rpc).await
    }

    async fn placement(
        &self,
        correlation: Option<&HeaderValue>,
        wanted: Wanted,
    ) -> Result<RepositoryReplicas, Status> {
        let request = GetReplicasRequest { repository: Some(wanted) };
        let answer =
            self.operate(correlation, request, |mut client, request| async move {
                client.get_replicas(request).await
            })
            .await?;
        answer.repository.ok_or_else(|| Status::internal("the coordinator answered without a repository"))
    }

    /// Has replicas compared again; 0 when there is nothing of that name.
    async fn mark(&self, correlation: Option<&HeaderValue>, request: MarkRequest) -> Result<i64, Status> {
        let marked = self
            .operate(correlation, request, |mut client, request| async move {
                client.mark_unverified(request).await
            })
            .await;
        match marked {
            Ok(answer) => Ok(answer.replicas),
            Err(status) if status.code() == Code::NotFound => Ok(0),
            Err(status) => Err(status),
        }
    }
}

fn lost(repository: RepositoryReplicas) -> dataloss_response::Repository {
    let storages = repository.replicas.iter().map(|replica| dataloss_response::repository::Storage {
        name: replica.storage.clone(),
        behind_by: repository.generation - replica.generation,
        assigned: replica.assigned,
        healthy: replica.healthy,
        valid_primary: is_valid_primary(replica),
    });
    let storages = storages.collect();
    dataloss_response::Repository {
        storages,
        unavailable: repository.unavailable,
        primary: repository.primary,
        relative_path: repository.name.unwrap_or_default().relative_path,
    }
}

async fn checksum(
    node: &Node,
    replica_path: &str,
    client_side: &Repository,
) -> Result<RepositoryDetails, Status> {
    let mut client = RepositoryServiceClient::new(node.channel());
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

#[tonic::async_trait]
impl PraefectInfoService for PraefectInfo {
    async fn repository_replicas(
        &self,
        request: Request<RepositoryReplicasRequest>,
    ) -> Result<Response<RepositoryReplicasResponse>, Status> {
        let correlation = correlation(request.metadata());
        let client_side = request.into_inner().repository.ok_or(Refusal::RepositoryNotSet)?;
        let (route, storages) = self.route(&client_side, correlation).await?;
        let questions =
            route.replicas.iter().filter(|replica| replica.generation >= 0).map(|replica| async {
                let node = named(&storages, &replica.storage)
                    .ok_or_else(|| Refusal::Unreachable(replica.storage.clone()).status())?;
                let details = checksum(node, &route.replica_path, &client_side).await?;
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
        let wanted = match request.into_inner().query {
            None => return Err(Status::internal("unknown query type: <nil>")),
            Some(Query::RepositoryId(id)) => Wanted::RepositoryId(id),
            Some(Query::Path(path)) => {
                if self.storages(&path.virtual_storage)?.is_none() || path.relative_path.is_empty() {
                    return Err(Refusal::RepositoryNotFound.status());
                }
                Wanted::Name(RepositoryName {
                    virtual_storage: path.virtual_storage,
                    relative_path: path.relative_path,
                })
            }
        };
        let placed = self.placement(correlation.as_ref(), wanted).await?;
        let replicas = placed.replicas.iter().map(|replica| Replica {
            storage: replica.storage.clone(),
            assigned: replica.assigned,
            generation: replica.generation,
            healthy: replica.healthy,
            valid_primary: is_valid_primary(replica),
            verified_at: replica.verified_at,
        });
        let replicas = replicas.collect();
        let name = placed.name.unwrap_or_default();
        Ok(Response::new(GetRepositoryMetadataResponse {
            repository_id: placed.repository_id,
            virtual_storage: name.virtual_storage,
            relative_path: name.relative_path,
            replica_path: placed.replica_path,
            primary: placed.primary,
            generation: placed.generation,
            replicas,
        }))
    }

    async fn dataloss(
        &self,
        request: Request<DatalossRequest>,
    ) -> Result<Response<BoxStream<DatalossResponse>>, Status> {
        let correlation = correlation(request.metadata());
        let DatalossRequest { virtual_storage, include_partially_replicated } = request.into_inner();
        if self.storages(&virtual_storage)?.is_none() {
            return Err(Status::internal(format!("unknown virtual storage: {virtual_storage:?}")));
        }
        let first = DataLossRequest {
            virtual_storage,
            only_unavailable: !include_partially_replicated,
            ..DataLossRequest::default()
        };
        let this = self.clone();
        let pages = stream::try_unfold(Some(first), move |request| {
            let (this, correlation) = (this.clone(), correlation.clone());
            async move {
                let Some(request) = request else { return Ok(None) };
                let page = this
                    .operate(correlation.as_ref(), request.clone(), |mut client, request| async move {
                        client.data_loss(request).await
                    })
                    .await?;
                let token = page.next_page_token;
                let next = (!token.is_empty()).then_some(DataLossRequest { page_token: token, ..request });
                let repositories: Vec<_> = page.repositories.into_iter().map(lost).collect();
                Ok::<_, Status>(Some((DatalossResponse { repositories }, next)))
            }
        });
        let told = pages.try_filter(|page| std::future::ready(!page.repositories.is_empty()));
        Ok(Response::new(told.boxed()))
    }

    async fn set_authoritative_storage(
        &self,
        request: Request<SetAuthoritativeStorageRequest>,
    ) -> Result<Response<SetAuthoritativeStorageResponse>, Status> {
        let correlation = correlation(request.metadata());
        let request = request.into_inner();
        let (virtual_storage, storage) = (request.virtual_storage, request.authoritative_storage);
        let storages = self.storages(&virtual_storage)?.ok_or_else(|| {
            Status::invalid_argument(format!("unknown virtual storage: {virtual_storage:?}"))
        })?;
        if named(&storages, &storage).is_none() {
            return Err(Status::invalid_argument(format!("unknown authoritative storage: {storage:?}")));
        }
        let request = AcceptDataLossRequest {
            name: Some(RepositoryName { virtual_storage, relative_path: request.relative_path }),
            authoritative_storage: storage,
        };
        let accepted = self
            .operate(correlation.as_ref(), request, |mut client, request| async move {
                client.accept_data_loss(request).await
            })
            .await;
        match accepted {
            Ok(_) => Ok(Response::new(SetAuthoritativeStorageResponse {})),
            Err(status) if status.code() == Code::NotFound => {
                Err(Status::invalid_argument("repository does not exist on virtual storage"))
            }
            Err(status) => Err(status),
        }
    }

    async fn mark_unverified(
        &self,
        request: Request<MarkUnverifiedRequest>,
    ) -> Result<Response<MarkUnverifiedResponse>, Status> {
        let correlation = correlation(request.metadata());
        let (virtual_storage, storage) = match request.into_inner().selector {
            None => return Err(Status::internal("unknown selector: <nil>")),
            Some(Selector::RepositoryId(id)) => {
                let replicas_marked =
                    match self.placement(correlation.as_ref(), Wanted::RepositoryId(id)).await {
                        Ok(placed) => {
                            let request = MarkRequest { name: placed.name, ..MarkRequest::default() };
                            self.mark(correlation.as_ref(), request).await?
                        }
                        Err(status) if status.code() == Code::NotFound => 0,
                        Err(status) => return Err(status),
                    };
                return Ok(Response::new(MarkUnverifiedResponse { replicas_marked }));
            }
            Some(Selector::VirtualStorage(name)) => (name, String::new()),
            Some(Selector::Storage(place)) => (place.virtual_storage, place.storage),
        };
        let request = MarkRequest {
            storage: Some(StorageName { virtual_storage: virtual_storage.clone(), storage }),
            ..MarkRequest::default()
        };
        let replicas_marked = match self.storages(&virtual_storage)? {
            Some(_) => self.mark(correlation.as_ref(), request).await?,
            None => 0,
        };
        Ok(Response::new(MarkUnverifiedResponse { replicas_marked }))
    }

    async fn set_replication_factor(
        &self,
        request: Request<SetReplicationFactorRequest>,
    ) -> Result<Response<SetReplicationFactorResponse>, Status> {
        let correlation = correlation(request.metadata());
        let request = request.into_inner();
        let (virtual_storage, path) = (request.virtual_storage, request.relative_path);
        let refused = |why: String| Status::invalid_argument(format!("set replication factor: {why}"));
        let storages = self
            .storages(&virtual_storage)?
            .ok_or_else(|| refused(format!("virtual storage {virtual_storage:?} not found")))?;
        let (wanted, most) = (request.replication_factor, storages.len());
        let attempted = format!("attempted to set replication factor {wanted}");
        let factor = match u32::try_from(wanted) {
            Err(_) | Ok(0) => return Err(refused(format!("{attempted} but minimum is 1"))),
            Ok(factor) if factor as usize > most => {
                let most = format!("virtual storage only contains {most} storages");
                return Err(refused(format!("{attempted} but {most}")));
            }
            Ok(factor) => factor,
        };
        let not_found = refused(format!("repository {virtual_storage:?}/{path:?} not found"));
        let request = FactorRequest {
            name: Some(RepositoryName { virtual_storage, relative_path: path }),
            replication_factor: factor,
            default: false,
        };
        let set = self
            .operate(correlation.as_ref(), request, |mut client, request| async move {
                client.set_replication_factor(request).await
            })
            .await;
        let placed = match set {
            Ok(answer) => answer.repository.unwrap_or_default(),
            Err(status) if status.code() == Code::NotFound => return Err(not_found),
            Err(status) => return Err(status),
        };
        let assigned = placed.replicas.into_iter().filter(|replica| replica.assigned);
        let mut storages: Vec<String> = assigned.map(|replica| replica.storage).collect();
        storages.sort();
        Ok(Response::new(SetReplicationFactorResponse { storages }))
    }
}
