//! A storage node that is played: it says that it is well, and what it holds of every repository.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

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
        CheckObjectsRequest, CheckObjectsResponse, FenceCopiesRequest, FenceCopiesResponse, KeptReplica,
        ListKeptRequest, ListKeptResponse, MarkCorruptRequest, MarkCorruptResponse, QuiesceRequest,
        QuiesceResponse, RemoveKeptRequest, RemoveKeptResponse,
        replica_service_server::{ReplicaService, ReplicaServiceServer},
    },
};
use tokio::{
    sync::{OwnedRwLockWriteGuard, RwLock},
    task::JoinHandle,
};
use tonic::{Request, Response, Status, codegen::BoxStream};

/// What a node says of a replica that is older than it was.
pub(crate) const OLDER: &str = "replica is of generation 1, and was of 2 before";

/// What a node answers when it is asked what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holding {
    State(&'static str),
    Nothing,
    /// It is one of Gitaly's, which has another way to say it.
    Gitaly(&'static str),
    /// It cannot read it.
    Broken,
    /// Its disk is older than it was.
    Older,
    /// What is there is no repository any more.
    Invalid,
    /// It never answers.
    Silent,
    /// Nobody is there.
    Gone,
}

/// What git finds in the objects of all repositories of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Objects {
    Whole,
    Damaged(&'static str),
    /// There is no repository.
    Absent,
    /// The node is one of Gitaly's.
    Unknown,
}

#[derive(Clone)]
struct Played {
    storage: String,
    holding: Arc<Mutex<Holding>>,
    /// Numbers below which it refuses copies, as they came.
    fences: Arc<Mutex<Vec<i64>>>,
    /// It says nothing of them while somebody holds this.
    fence_gate: Arc<RwLock<()>>,
    /// It does not say what it has looked up while somebody holds this.
    answer_gate: Arc<RwLock<()>>,
    /// How often somebody asked what it holds.
    asked: Arc<AtomicUsize>,
    filesystem_id: Arc<Mutex<String>>,
    /// What a walk of its storage finds beside anything else.
    found: Arc<Mutex<Vec<String>>>,
    objects: Arc<Mutex<Objects>>,
    /// How often somebody had objects looked through.
    looks: Arc<AtomicUsize>,
    /// What was said of its replicas, and whether they are to be made from nothing.
    marks: Arc<Mutex<Vec<(String, bool)>>>,
    kept: Arc<Mutex<Vec<String>>>,
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
        self.asked.fetch_add(1, Ordering::Relaxed);
        let _open = self.answer_gate.read().await;
        match holding {
            Holding::State(state) => {
                Ok(Response::new(QuiesceResponse { exists: true, digest: state.to_owned().into() }))
            }
            Holding::Nothing => Ok(Response::new(QuiesceResponse::default())),
            Holding::Broken => Err(Status::internal("git for-each-ref: exit code 128")),
            Holding::Older => Err(Status::data_loss(OLDER)),
            Holding::Invalid => {
                Err(Status::failed_precondition("repository not valid: \"objects\" does not exist"))
            }
            Holding::Gitaly(_) => Err(Status::unimplemented("unknown service")),
            Holding::Silent => std::future::pending().await,
            Holding::Gone => Err(Status::unavailable("the node is gone")),
        }
    }

    async fn check_objects(
        &self,
        request: Request<CheckObjectsRequest>,
    ) -> Result<Response<CheckObjectsResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.repository.unwrap().storage_name, self.storage);
        assert!(request.patience_milliseconds > 0 && request.limit_milliseconds > 0);
        self.look().map(Response::new)
    }

    async fn mark_corrupt(
        &self,
        request: Request<MarkCorruptRequest>,
    ) -> Result<Response<MarkCorruptResponse>, Status> {
        let request = request.into_inner();
        assert!(request.repository.unwrap().relative_path.starts_with("@cluster/"));
        self.marks.lock().unwrap().push((request.reason, request.rebuild));
        Ok(Response::new(MarkCorruptResponse {}))
    }

    async fn list_kept(
        &self,
        request: Request<ListKeptRequest>,
    ) -> Result<Response<ListKeptResponse>, Status> {
        assert_eq!(request.into_inner().storage_name, self.storage);
        if *self.holding.lock().unwrap() == Holding::Gone {
            return Err(Status::unavailable("the node is gone"));
        }
        let kept = self.kept.lock().unwrap().clone().into_iter();
        let kept = kept.map(|kept_id| KeptReplica { kept_id, kept_at: 7, ..KeptReplica::default() });
        Ok(Response::new(ListKeptResponse { kept: kept.collect() }))
    }

    async fn remove_kept(
        &self,
        request: Request<RemoveKeptRequest>,
    ) -> Result<Response<RemoveKeptResponse>, Status> {
        let id = request.into_inner().kept_id;
        let mut kept = self.kept.lock().unwrap();
        let there = kept.iter().position(|kept| *kept == id);
        kept.remove(there.ok_or_else(|| Status::not_found("there is no such kept replica"))?);
        Ok(Response::new(RemoveKeptResponse {}))
    }
}

impl Played {
    fn look(&self) -> Result<CheckObjectsResponse, Status> {
        self.looks.fetch_add(1, Ordering::SeqCst);
        let objects = *self.objects.lock().unwrap();
        let (sound, findings) = match objects {
            Objects::Whole => (true, String::new()),
            Objects::Damaged(damage) => (false, damage.to_owned()),
            Objects::Absent => return Ok(CheckObjectsResponse::default()),
            Objects::Unknown => return Err(Status::unimplemented("unknown service")),
        };
        Ok(CheckObjectsResponse { exists: true, sound, findings })
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
            Holding::Broken | Holding::Older => Err(Status::internal("git show-ref: exit code 128")),
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
            answer_gate: Arc::default(),
            asked: Arc::default(),
            filesystem_id: Arc::new(Mutex::new(format!("disk of {storage}"))),
            found: Arc::default(),
            objects: Arc::new(Mutex::new(Objects::Whole)),
            looks: Arc::default(),
            marks: Arc::default(),
            kept: Arc::default(),
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
            router.serve_with_incoming(listener.connections()).await.unwrap();
        });
        Self { address, played, serving }
    }

    pub(crate) fn holds(&self, holding: Holding) {
        *self.played.holding.lock().unwrap() = holding;
    }

    /// From now on git finds this.
    pub(crate) fn finds(&self, objects: Objects) {
        *self.played.objects.lock().unwrap() = objects;
    }

    /// How often somebody had objects looked through.
    pub(crate) fn looks(&self) -> usize {
        self.played.looks.load(Ordering::SeqCst)
    }

    /// What was said of its replicas, and whether they are to be made from nothing.
    pub(crate) fn marks(&self) -> Vec<(String, bool)> {
        self.played.marks.lock().unwrap().clone()
    }

    /// It has kept this.
    pub(crate) fn keeps(&self, kept_id: &str) {
        self.played.kept.lock().unwrap().push(kept_id.to_owned());
    }

    /// The numbers below which it refuses copies, as they came.
    pub(crate) fn fences(&self) -> Vec<i64> {
        self.played.fences.lock().unwrap().clone()
    }

    /// It leaves whoever fences copies without an answer while this is held.
    pub(crate) async fn close_fence_gate(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.played.fence_gate).write_owned().await
    }

    /// It tells nobody what it holds while this is held; what it tells then is what it held when it was asked.
    pub(crate) async fn close_answer_gate(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.played.answer_gate).write_owned().await
    }

    /// How often it was asked what it holds.
    pub(crate) fn asked(&self) -> usize {
        self.played.asked.load(Ordering::Relaxed)
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
