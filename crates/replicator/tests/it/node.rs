//! A stand-in for a storage node, and for a router: repositories as maps of refs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tabularium_proto::gitaly::{
    CalculateChecksumRequest, CalculateChecksumResponse, CreateRepositoryRequest, CreateRepositoryResponse,
    FetchRemoteRequest, FetchRemoteResponse, FindDefaultBranchNameRequest, FindDefaultBranchNameResponse,
    FsckRequest, FsckResponse, ListRefsRequest, ListRefsResponse, RemoveRepositoryRequest,
    RemoveRepositoryResponse, ReplicateRepositoryRequest, ReplicateRepositoryResponse, Repository,
    WriteRefRequest, WriteRefResponse, list_refs_response::Reference, ref_service_server::RefService,
    repository_service_server::RepositoryService,
};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use crate::support::serve_node;

pub(crate) type Refs = BTreeMap<String, String>;

#[derive(Debug, Clone, Default)]
pub(crate) struct Repo {
    pub(crate) head: String,
    pub(crate) refs: Refs,
}

#[derive(Default)]
pub(crate) struct State {
    /// By storage and path.
    pub(crate) repositories: BTreeMap<(String, String), Repo>,
    /// A copy answers OK and does nothing.
    pub(crate) lie: bool,
    /// What a copy finds the source has become when it is over.
    pub(crate) source_moves_to: Option<Refs>,
    /// What is fetched, whatever the URL.
    pub(crate) remote: Refs,
    /// Method and metadata of every write.
    pub(crate) writes: Vec<(&'static str, MetadataMap)>,
    pub(crate) replications: Vec<ReplicateRepositoryRequest>,
    /// Checksums asked for.
    pub(crate) checksums: usize,
    /// What every copy answers instead of copying.
    pub(crate) copy_failure: Option<Status>,
    /// What looking through a repository brings to light.
    pub(crate) fsck: String,
    pub(crate) fetches: Vec<FetchRemoteRequest>,
}

#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) address: String,
    pub(crate) state: Arc<Mutex<State>>,
    /// One permit for each copy that may go on.
    pub(crate) copy_gate: Arc<Semaphore>,
    /// One permit for each checksum that may be answered.
    pub(crate) checksum_gate: Arc<Semaphore>,
}

impl Node {
    pub(crate) async fn start() -> Self {
        let mut node = Self {
            address: String::new(),
            state: Arc::default(),
            copy_gate: Arc::new(Semaphore::new(1000)),
            checksum_gate: Arc::new(Semaphore::new(1000)),
        };
        node.address = serve_node(node.clone()).await;
        node
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock().unwrap())
    }

    pub(crate) fn put(&self, storage: &str, path: &str, refs: &[(&str, &str)]) {
        let refs = refs.iter().map(|(name, id)| ((*name).to_owned(), (*id).to_owned())).collect();
        let repo = Repo { head: "refs/heads/main".into(), refs };
        self.with(|state| state.repositories.insert((storage.to_owned(), path.to_owned()), repo));
    }

    pub(crate) fn get(&self, storage: &str, path: &str) -> Option<Repo> {
        self.with(|state| state.repositories.get(&(storage.to_owned(), path.to_owned())).cloned())
    }

    pub(crate) fn methods(&self) -> Vec<&'static str> {
        self.with(|state| state.writes.iter().map(|(method, _)| *method).collect())
    }

    fn note<T>(&self, method: &'static str, request: &Request<T>) {
        self.with(|state| state.writes.push((method, request.metadata().clone())));
    }
}

fn key(repository: Option<&Repository>) -> (String, String) {
    let repository = repository.unwrap();
    (repository.storage_name.clone(), repository.relative_path.clone())
}

fn missing() -> Status {
    Status::not_found("repository not found")
}

#[tonic::async_trait]
impl RepositoryService for Node {
    async fn calculate_checksum(
        &self,
        request: Request<CalculateChecksumRequest>,
    ) -> Result<Response<CalculateChecksumResponse>, Status> {
        self.with(|state| state.checksums += 1);
        self.checksum_gate.acquire().await.unwrap().forget();
        let key = key(request.get_ref().repository.as_ref());
        let repo = self.with(|state| state.repositories.get(&key).cloned()).ok_or_else(missing)?;
        Ok(Response::new(CalculateChecksumResponse { checksum: format!("{:?}", repo.refs) }))
    }

    async fn replicate_repository(
        &self,
        request: Request<ReplicateRepositoryRequest>,
    ) -> Result<Response<ReplicateRepositoryResponse>, Status> {
        self.note("replicate", &request);
        self.with(|state| state.replications.push(request.get_ref().clone()));
        self.copy_gate.acquire().await.unwrap().forget();
        let request = request.into_inner();
        let (source, target) = (key(request.source.as_ref()), key(request.repository.as_ref()));
        self.with(|state| {
            if let Some(failure) = state.copy_failure.clone() {
                return Err(failure);
            }
            if let Some(refs) = state.source_moves_to.take() {
                state.repositories.get_mut(&source).unwrap().refs = refs;
            }
            if !state.lie {
                let copy = state.repositories.get(&source).cloned().ok_or_else(missing)?;
                state.repositories.insert(target, copy);
            }
            Ok(Response::new(ReplicateRepositoryResponse {}))
        })
    }

    async fn fsck(&self, request: Request<FsckRequest>) -> Result<Response<FsckResponse>, Status> {
        self.note("fsck", &request);
        Ok(Response::new(FsckResponse { error: self.with(|state| state.fsck.clone()).into_bytes() }))
    }

    async fn remove_repository(
        &self,
        request: Request<RemoveRepositoryRequest>,
    ) -> Result<Response<RemoveRepositoryResponse>, Status> {
        self.note("remove", &request);
        let key = key(request.get_ref().repository.as_ref());
        self.with(|state| state.repositories.remove(&key)).ok_or_else(missing)?;
        Ok(Response::new(RemoveRepositoryResponse {}))
    }

    async fn create_repository(
        &self,
        request: Request<CreateRepositoryRequest>,
    ) -> Result<Response<CreateRepositoryResponse>, Status> {
        self.note("create", &request);
        let request = request.into_inner();
        let head = format!("refs/heads/{}", String::from_utf8(request.default_branch).unwrap());
        let repo = Repo { head, refs: Refs::new() };
        self.with(|state| state.repositories.insert(key(request.repository.as_ref()), repo));
        Ok(Response::new(CreateRepositoryResponse {}))
    }

    async fn fetch_remote(
        &self,
        request: Request<FetchRemoteRequest>,
    ) -> Result<Response<FetchRemoteResponse>, Status> {
        self.note("fetch", &request);
        let request = request.into_inner();
        let key = key(request.repository.as_ref());
        self.with(|state| {
            state.fetches.push(request);
            let remote = state.remote.clone();
            state.repositories.get_mut(&key).ok_or_else(missing)?.refs = remote;
            Ok(Response::new(FetchRemoteResponse::default()))
        })
    }

    async fn write_ref(
        &self,
        request: Request<WriteRefRequest>,
    ) -> Result<Response<WriteRefResponse>, Status> {
        self.note("write_ref", &request);
        let request = request.into_inner();
        assert_eq!(request.r#ref, b"HEAD");
        let key = key(request.repository.as_ref());
        self.with(|state| {
            state.repositories.get_mut(&key).ok_or_else(missing)?.head =
                String::from_utf8(request.revision).unwrap();
            Ok(Response::new(WriteRefResponse {}))
        })
    }
}

#[tonic::async_trait]
impl RefService for Node {
    async fn list_refs(
        &self,
        request: Request<ListRefsRequest>,
    ) -> Result<Response<tonic::codegen::BoxStream<ListRefsResponse>>, Status> {
        assert_eq!(request.get_ref().patterns, [b"refs/".to_vec()]);
        let key = key(request.get_ref().repository.as_ref());
        let repo = self.with(|state| state.repositories.get(&key).cloned()).ok_or_else(missing)?;
        let references: Vec<_> = repo
            .refs
            .into_iter()
            .map(|(name, target)| Reference { name: name.into_bytes(), target, peeled_target: String::new() })
            .collect();
        // In messages of one ref, as a stream would bring a long list.
        let messages: Vec<_> = references
            .into_iter()
            .map(|reference| {
                Ok(ListRefsResponse { references: vec![reference], ..ListRefsResponse::default() })
            })
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(messages))))
    }

    async fn find_default_branch_name(
        &self,
        request: Request<FindDefaultBranchNameRequest>,
    ) -> Result<Response<FindDefaultBranchNameResponse>, Status> {
        assert!(request.get_ref().head_only);
        let key = key(request.get_ref().repository.as_ref());
        let repo = self.with(|state| state.repositories.get(&key).cloned()).ok_or_else(missing)?;
        Ok(Response::new(FindDefaultBranchNameResponse { name: repo.head.into_bytes() }))
    }
}
