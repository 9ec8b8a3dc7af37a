//! A storage node that is played: it says that it is well, and what it holds of every repository.

use std::sync::{Arc, Mutex};

use tabularium_common::{
    grpc::{self, Address, Listener},
    lifecycle::Tasks,
};
use tabularium_proto::{
    gitaly::{
        CalculateChecksumRequest, CalculateChecksumResponse, FindDefaultBranchNameRequest,
        FindDefaultBranchNameResponse, RepositoryExistsRequest, RepositoryExistsResponse, ServerInfoRequest,
        ServerInfoResponse, WalkReposRequest, WalkReposResponse,
        internal_gitaly_server::{InternalGitaly, InternalGitalyServer},
        ref_service_server::{RefService, RefServiceServer},
        repository_service_server::{RepositoryService, RepositoryServiceServer},
        server_info_response::StorageStatus,
        server_service_server::{ServerService, ServerServiceServer},
    },
    node::{
        FenceCopiesRequest, FenceCopiesResponse, QuiesceRequest, QuiesceResponse,
        replica_service_server::{ReplicaService, ReplicaServiceServer},
    },
};
use tokio::{
    sync::{OwnedRwLockWriteGuard, RwLock},
    task::JoinHandle,
};
use tonic::{Request, Response, Status, codegen::BoxStream};

/// What a node answers when it is asked what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holding {
    State(&'static str),
    Nothing,
    /// It is one of Gitaly's, which has another way to say it.
    Gitaly(&'static str),
    /// It cannot read it.
    Broken,
    /// What is there is no repository any more.
    Invalid,
    /// It never answers.
    Silent,
    /// Nobody is there.
    Gone,
}

#[derive(Clone)]
struct Played {
    storage: String,
    holding: Arc<Mutex<Holding>>,
    /// Numbers below which it refuses copies, as they came.
    fences: Arc<Mutex<Vec<i64>>>,
    /// It says nothing of them while somebody holds this.
    fence_gate: Arc<RwLock<()>>,
    filesystem_id: Arc<Mutex<String>>,
    /// What a walk of its storage finds beside anything else.
    found: Arc<Mutex<Vec<String>>>,
}

#[tonic::async_trait]
impl ServerService for Played {
    async fn server_info(
        &self,
        _request: Request<ServerInfoRequest>,
    ) -> Result<Response<ServerInfoResponse>, Status> {
        Ok(Response::new(ServerInfoResponse {
            server_version: "19.0".into(),
            git_version: "2.50".into(),
            storage_statuses: vec![StorageStatus {
                storage_name: self.storage.clone(),
                readable: true,
                writeable: true,
                filesystem_id: self.filesystem_id.lock().unwrap().clone(),
                ..StorageStatus::default()
            }],
        }))
    }
}

#[tonic::async_trait]
impl ReplicaService for Played {
    async fn fence_copies(
        &self,
        request: Request<FenceCopiesRequest>,
    ) -> Result<Response<FenceCopiesResponse>, Status> {
        self.fences.lock().unwrap().push(request.into_inner().copy_attempt);
        let _open = self.fence_gate.read().await;
        Ok(Response::new(FenceCopiesResponse {}))
    }

    async fn quiesce(&self, request: Request<QuiesceRequest>) -> Result<Response<QuiesceResponse>, Status> {
        let repository = request.into_inner().repository.unwrap();
        assert_eq!(repository.storage_name, self.storage);
        assert!(repository.relative_path.starts_with("@cluster/"), "{}", repository.relative_path);
        let holding = *self.holding.lock().unwrap();
        match holding {
            Holding::State(state) => {
                Ok(Response::new(QuiesceResponse { exists: true, digest: state.to_owned().into() }))
            }
            Holding::Nothing => Ok(Response::new(QuiesceResponse::default())),
            Holding::Broken => Err(Status::internal("git for-each-ref: exit code 128")),
            Holding::Invalid => {
                Err(Status::failed_precondition("repository not valid: \"objects\" does not exist"))
            }
            Holding::Gitaly(_) => Err(Status::unimplemented("unknown service")),
            Holding::Silent => std::future::pending().await,
            Holding::Gone => Err(Status::unavailable("the node is gone")),
        }
    }
}

#[tonic::async_trait]
impl InternalGitaly for Played {
    async fn walk_repos(
        &self,
        request: Request<WalkReposRequest>,
    ) -> Result<Response<BoxStream<WalkReposResponse>>, Status> {
        assert_eq!(request.into_inner().storage_name, self.storage);
        let found = self.found.lock().unwrap().clone();
        let found = found.into_iter().map(|relative_path| {
            Ok(WalkReposResponse { relative_path, modification_time: Some(std::time::UNIX_EPOCH.into()) })
        });
        Ok(Response::new(Box::pin(futures::stream::iter(found.collect::<Vec<_>>()))))
    }
}

#[tonic::async_trait]
impl RepositoryService for Played {
    async fn repository_exists(
        &self,
        _request: Request<RepositoryExistsRequest>,
    ) -> Result<Response<RepositoryExistsResponse>, Status> {
        let exists = *self.holding.lock().unwrap() != Holding::Nothing;
        Ok(Response::new(RepositoryExistsResponse { exists }))
    }

    async fn calculate_checksum(
        &self,
        _request: Request<CalculateChecksumRequest>,
    ) -> Result<Response<CalculateChecksumResponse>, Status> {
        let holding = *self.holding.lock().unwrap();
        match holding {
            Holding::State(state) | Holding::Gitaly(state) => {
                Ok(Response::new(CalculateChecksumResponse { checksum: state.into() }))
            }
            Holding::Nothing => Err(Status::not_found("repository not found")),
            Holding::Silent => std::future::pending().await,
            Holding::Broken => Err(Status::internal("git show-ref: exit code 128")),
            Holding::Invalid => {
                Err(Status::failed_precondition("repository not valid: \"objects\" does not exist"))
            }
            Holding::Gone => Err(Status::unavailable("the node is gone")),
        }
    }
}

#[tonic::async_trait]
impl RefService for Played {
    async fn find_default_branch_name(
        &self,
        _request: Request<FindDefaultBranchNameRequest>,
    ) -> Result<Response<FindDefaultBranchNameResponse>, Status> {
        Ok(Response::new(FindDefaultBranchNameResponse { name: "refs/heads/main".into() }))
    }
}

pub(crate) struct Node {
    pub(crate) address: Address,
    played: Played,
    serving: JoinHandle<()>,
}

impl Node {
    /// Holds what all nodes hold at first.
    pub(crate) async fn start(storage: &str) -> Self {
        let listener = Listener::bind(&grpc::ListenAddress::Tcp(([127, 0, 0, 1], 0).into())).await.unwrap();
        let address = listener.address().unwrap();
        let played = Played {
            storage: storage.into(),
            holding: Arc::new(Mutex::new(Holding::State("old"))),
            fences: Arc::default(),
            fence_gate: Arc::default(),
            filesystem_id: Arc::new(Mutex::new(format!("disk of {storage}"))),
            found: Arc::default(),
        };
        let (_, health) = tonic_health::server::health_reporter();
        let router = grpc::server()
            .add_service(health)
            .add_service(ServerServiceServer::new(played.clone()))
            .add_service(ReplicaServiceServer::new(played.clone()))
            .add_service(RepositoryServiceServer::new(played.clone()))
            .add_service(InternalGitalyServer::new(played.clone()))
            .add_service(RefServiceServer::new(played.clone()));
        let serving = Tasks::new().spawn("node", async move {
            router.serve_with_incoming(listener).await.unwrap();
        });
        Self { address, played, serving }
    }

    pub(crate) fn holds(&self, holding: Holding) {
        *self.played.holding.lock().unwrap() = holding;
    }

    /// The numbers below which it refuses copies, as they came.
    pub(crate) fn fences(&self) -> Vec<i64> {
        self.played.fences.lock().unwrap().clone()
    }

    /// It leaves whoever fences copies without an answer while this is held.
    pub(crate) async fn close_fence_gate(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.played.fence_gate).write_owned().await
    }

    /// Its disk is another one from now on.
    pub(crate) fn exchange_disk(&self, filesystem_id: &str) {
        filesystem_id.clone_into(&mut self.played.filesystem_id.lock().unwrap());
    }

    /// A walk of its storage finds this too.
    pub(crate) fn has_on_disk(&self, path: &str) {
        self.played.found.lock().unwrap().push(path.to_owned());
    }

    /// Nobody listens any more, nor answers on connections that stand.
    pub(crate) fn kill(&self) {
        self.holds(Holding::Gone);
        self.serving.abort();
    }
}
