//! `GetObjectPool`: a node knows the pool of a repository by its replica path, which no client has heard of.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tabularium_common::telemetry::{CORRELATION_ID, CorrelationId};
use tabularium_proto::{
    coordinator::{GetReplicasRequest, get_replicas_request, repair_service_client::RepairServiceClient},
    gitaly::{
        GetObjectPoolRequest, GetObjectPoolResponse, ObjectPool, Repository,
        object_pool_service_client::ObjectPoolServiceClient, object_pool_service_server::ObjectPoolService,
    },
};
use tonic::{Request, Response, Status};

use super::asked;
use crate::{
    coordinator::Coordinators,
    limits::RESOLVE_TIMEOUT,
    nodes::{Nodes, is_healthy, named},
    refusal::Refusal,
    routes::{Routes, not_found},
    routing::{
        self, Reader,
        judgement::{Judgement, judge},
    },
};

/// Where pools are kept that have no name of their own on disk.
const POOLS: &str = "@cluster/pools/";

/// The service, as far as it is answered here.
pub(crate) struct ObjectPools {
    /// Who is asked.
    pub(crate) nodes: Arc<Nodes>,
    /// Where repositories are.
    pub(crate) routes: Arc<Routes>,
    /// Who knows the pool's name.
    pub(crate) coordinators: Coordinators,
    /// Spreads questions over replicas.
    pub(crate) spread: AtomicUsize,
}

/// The id in a pool's replica path; `None`: the path is the pool's name as well.
fn pool_id(replica_path: &str) -> Option<Result<i64, Status>> {
    let rest = replica_path.strip_prefix(POOLS)?;
    let id = rest.rsplit('/').next().unwrap_or_default();
    Some(id.parse().map_err(|_| Status::internal(format!("parsing repository ID: {replica_path:?}"))))
}

impl ObjectPools {
    /// What the first replica says that can say anything.
    async fn of(
        &self,
        repository: &Repository,
        correlation: &CorrelationId,
    ) -> Result<Option<ObjectPool>, Status> {
        let directory = self.nodes.directory();
        let storages = match directory.storages(&repository.storage_name) {
            Some(storages) => storages,
            None if directory.known() => return Err(Refusal::StorageNotFound.status()),
            None => return Err(Refusal::NoTopology.status()),
        };
        let header = correlation.header();
        let (virtual_storage, path) = (&repository.storage_name, &repository.relative_path);
        let route = self.routes.resolve(virtual_storage, path, header.as_ref()).await.map_err(not_found)?;
        let spread = self.spread.fetch_add(1, Ordering::Relaxed);
        let mut tried = Vec::new();
        let mut last = None;
        loop {
            let healthy = |storage: &str| is_healthy(storages, storage);
            let storage = match routing::reader(&route, Reader::Any, healthy, &tried, spread) {
                Ok(storage) => storage,
                Err(refusal) => return Err(last.unwrap_or_else(|| refusal.status())),
            };
            tried.push(storage.to_owned());
            let node = named(storages, storage).ok_or(Refusal::NoSuitableNode)?;
            let mut client = ObjectPoolServiceClient::new(node.channel());
            let there = Repository {
                storage_name: storage.to_owned(),
                relative_path: route.replica_path.clone(),
                ..Repository::default()
            };
            let mut request = Request::new(GetObjectPoolRequest { repository: Some(there) });
            if let Ok(id) = correlation.as_str().parse() {
                request.metadata_mut().insert(CORRELATION_ID, id);
            }
            match asked(client.get_object_pool(request)).await {
                Ok(answer) => return Ok(answer.object_pool),
                Err(status) => match judge(status.code(), status.message()) {
                    Judgement::Answered => return Err(status),
                    Judgement::Unavailable | Judgement::Suspicious => last = Some(status),
                },
            }
        }
    }

    /// By which path clients know a pool.
    async fn name(&self, replica_path: String, correlation: &CorrelationId) -> Result<String, Status> {
        let Some(id) = pool_id(&replica_path) else { return Ok(replica_path) };
        let wanted = get_replicas_request::Repository::RepositoryId(id?);
        let request = GetReplicasRequest { repository: Some(wanted) };
        let ask = |link, request| async move { RepairServiceClient::new(link).get_replicas(request).await };
        let header = correlation.header();
        let found = self.coordinators.call_other(header.as_ref(), RESOLVE_TIMEOUT, request, ask).await?;
        let name = found.repository.and_then(|repository| repository.name);
        name.map(|name| name.relative_path)
            .ok_or_else(|| Status::internal("the coordinator answered without a repository"))
    }
}

#[tonic::async_trait]
impl ObjectPoolService for ObjectPools {
    async fn get_object_pool(
        &self,
        request: Request<GetObjectPoolRequest>,
    ) -> Result<Response<GetObjectPoolResponse>, Status> {
        let correlation = CorrelationId::of(request.metadata().as_ref());
        let repository = request.into_inner().repository.unwrap_or_default();
        if repository.storage_name.is_empty() || repository.relative_path.is_empty() {
            return Err(Refusal::RepositoryNotSet.status());
        }
        let pool = self.of(&repository, &correlation).await?.and_then(|pool| pool.repository);
        let Some(pool) = pool else { return Ok(Response::new(GetObjectPoolResponse::default())) };
        let named = Repository {
            storage_name: repository.storage_name,
            relative_path: self.name(pool.relative_path, &correlation).await?,
            ..Repository::default()
        };
        let object_pool = Some(ObjectPool { repository: Some(named) });
        Ok(Response::new(GetObjectPoolResponse { object_pool }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_known_by_the_number_in_its_path() {
        assert_eq!(pool_id("@cluster/pools/6b/86/17").unwrap().unwrap(), 17);
        assert!(pool_id("@cluster/pools/6b/86/x.git").unwrap().is_err());
        assert!(
            pool_id("@pools/6b/86/6b86b2.git").is_none(),
            "one that was taken in as it is keeps its name"
        );
    }
}
