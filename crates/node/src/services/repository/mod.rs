//! `gitaly.RepositoryService`: repositories as a whole (wire reference, section b.1). What is not here answers
//! `UNIMPLEMENTED`.

mod archive;
mod attributes;
mod bundle;
mod changes;
mod copy;
mod create;
mod facts;
mod fetch_remote;
mod files;
mod indexes;
mod optimize;
mod revisions;
mod search;
mod snapshot;
mod write_ref;

use std::sync::Arc;

use tabularium_proto::gitaly::{
    CalculateChecksumRequest, CalculateChecksumResponse, CreateBundleRequest, CreateBundleResponse,
    CreateBundleFromRefListRequest, CreateBundleFromRefListResponse, FastExportRequest, FastExportResponse,
    FindMergeBaseRequest, FindMergeBaseResponse, GetFileAttributesRequest, GetFileAttributesResponse,
    GetInfoAttributesRequest, GetInfoAttributesResponse, GetRawChangesRequest, GetRawChangesResponse,
    ObjectsSizeRequest, ObjectsSizeResponse, SearchFilesByContentRequest, SearchFilesByContentResponse,
    SearchFilesByNameRequest, SearchFilesByNameResponse,
    CreateForkRequest, CreateForkResponse, CreateRepositoryFromSnapshotRequest,
    CreateRepositoryFromSnapshotResponse, CreateRepositoryRequest, CreateRepositoryResponse,
    FetchBundleRequest, FetchBundleResponse, FetchRemoteRequest, FetchRemoteResponse, FsckRequest,
    FsckResponse, GetArchiveRequest, GetArchiveResponse, GetConfigRequest, GetConfigResponse,
    GetCustomHooksRequest, GetCustomHooksResponse, GetObjectDirectorySizeRequest,
    GetObjectDirectorySizeResponse, GetSnapshotRequest, GetSnapshotResponse, HasLocalBranchesRequest,
    HasLocalBranchesResponse, ObjectFormatRequest, ObjectFormatResponse, OptimizeRepositoryRequest,
    OptimizeRepositoryResponse, RemoveRepositoryRequest, RemoveRepositoryResponse,
    ReplicateRepositoryRequest, ReplicateRepositoryResponse, RepositoryExistsRequest,
    RepositoryExistsResponse, RepositoryInfoRequest, RepositoryInfoResponse, RepositorySizeRequest,
    RepositorySizeResponse, WriteRefRequest, WriteRefResponse, repository_service_server::RepositoryService,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{node::Node, services::streams::ResponseStream, votes::Voter};

pub(super) use copy::fence;

pub(crate) struct RepositoryServer(Arc<Node>);

impl RepositoryServer {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

#[tonic::async_trait]
impl RepositoryService for RepositoryServer {
    async fn repository_exists(
        &self,
        request: Request<RepositoryExistsRequest>,
    ) -> Result<Response<RepositoryExistsResponse>, Status> {
        create::exists(&self.0, &request.into_inner()).map(Response::new)
    }

    async fn create_repository(
        &self,
        request: Request<CreateRepositoryRequest>,
    ) -> Result<Response<CreateRepositoryResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        create::create(&self.0, request.into_inner(), &voter).await.map(Response::new)
    }

    async fn remove_repository(
        &self,
        request: Request<RemoveRepositoryRequest>,
    ) -> Result<Response<RemoveRepositoryResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        create::remove(&self.0, &request.into_inner(), &voter).await.map(Response::new)
    }

    async fn replicate_repository(
        &self,
        request: Request<ReplicateRepositoryRequest>,
    ) -> Result<Response<ReplicateRepositoryResponse>, Status> {
        copy::replicate(&self.0, request).await.map(Response::new)
    }

    async fn create_fork(
        &self,
        request: Request<CreateForkRequest>,
    ) -> Result<Response<CreateForkResponse>, Status> {
        copy::fork(&self.0, request).await.map(Response::new)
    }

    async fn fetch_remote(
        &self,
        request: Request<FetchRemoteRequest>,
    ) -> Result<Response<FetchRemoteResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        fetch_remote::fetch(&self.0, request.into_inner(), &voter).await.map(Response::new)
    }

    async fn create_bundle(
        &self,
        request: Request<CreateBundleRequest>,
    ) -> Result<Response<ResponseStream<CreateBundleResponse>>, Status> {
        bundle::create(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn create_bundle_from_ref_list(
        &self,
        request: Request<Streaming<CreateBundleFromRefListRequest>>,
    ) -> Result<Response<ResponseStream<CreateBundleFromRefListResponse>>, Status> {
        bundle::create_from_list(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn fast_export(
        &self,
        request: Request<FastExportRequest>,
    ) -> Result<Response<ResponseStream<FastExportResponse>>, Status> {
        bundle::fast_export(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn find_merge_base(
        &self,
        request: Request<FindMergeBaseRequest>,
    ) -> Result<Response<FindMergeBaseResponse>, Status> {
        revisions::merge_base(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn objects_size(
        &self,
        request: Request<Streaming<ObjectsSizeRequest>>,
    ) -> Result<Response<ObjectsSizeResponse>, Status> {
        revisions::objects_size(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn get_raw_changes(
        &self,
        request: Request<GetRawChangesRequest>,
    ) -> Result<Response<ResponseStream<GetRawChangesResponse>>, Status> {
        changes::get(&self.0, request.into_inner())
    }

    async fn search_files_by_content(
        &self,
        request: Request<SearchFilesByContentRequest>,
    ) -> Result<Response<ResponseStream<SearchFilesByContentResponse>>, Status> {
        search::by_content(&self.0, request.into_inner())
    }

    async fn search_files_by_name(
        &self,
        request: Request<SearchFilesByNameRequest>,
    ) -> Result<Response<ResponseStream<SearchFilesByNameResponse>>, Status> {
        search::by_name(&self.0, request.into_inner())
    }

    async fn get_file_attributes(
        &self,
        request: Request<GetFileAttributesRequest>,
    ) -> Result<Response<GetFileAttributesResponse>, Status> {
        attributes::of_files(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn get_info_attributes(
        &self,
        request: Request<GetInfoAttributesRequest>,
    ) -> Result<Response<ResponseStream<GetInfoAttributesResponse>>, Status> {
        attributes::of_head(&self.0, &request.into_inner())
    }

    async fn fetch_bundle(
        &self,
        request: Request<Streaming<FetchBundleRequest>>,
    ) -> Result<Response<FetchBundleResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        bundle::fetch(&self.0, request.into_inner(), &voter).await.map(Response::new)
    }

    async fn get_snapshot(
        &self,
        request: Request<GetSnapshotRequest>,
    ) -> Result<Response<ResponseStream<GetSnapshotResponse>>, Status> {
        snapshot::get(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn create_repository_from_snapshot(
        &self,
        request: Request<CreateRepositoryFromSnapshotRequest>,
    ) -> Result<Response<CreateRepositoryFromSnapshotResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        snapshot::create_from(&self.0, request.into_inner(), &voter).await.map(Response::new)
    }

    async fn repository_size(
        &self,
        request: Request<RepositorySizeRequest>,
    ) -> Result<Response<RepositorySizeResponse>, Status> {
        facts::size(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn get_object_directory_size(
        &self,
        request: Request<GetObjectDirectorySizeRequest>,
    ) -> Result<Response<GetObjectDirectorySizeResponse>, Status> {
        facts::object_directory_size(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn repository_info(
        &self,
        request: Request<RepositoryInfoRequest>,
    ) -> Result<Response<RepositoryInfoResponse>, Status> {
        facts::info(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn object_format(
        &self,
        request: Request<ObjectFormatRequest>,
    ) -> Result<Response<ObjectFormatResponse>, Status> {
        facts::object_format(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn has_local_branches(
        &self,
        request: Request<HasLocalBranchesRequest>,
    ) -> Result<Response<HasLocalBranchesResponse>, Status> {
        facts::has_local_branches(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn calculate_checksum(
        &self,
        request: Request<CalculateChecksumRequest>,
    ) -> Result<Response<CalculateChecksumResponse>, Status> {
        facts::calculate_checksum(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn fsck(&self, request: Request<FsckRequest>) -> Result<Response<FsckResponse>, Status> {
        facts::fsck(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn write_ref(
        &self,
        request: Request<WriteRefRequest>,
    ) -> Result<Response<WriteRefResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        write_ref::write(&self.0, request.into_inner(), &voter).await.map(Response::new)
    }

    async fn optimize_repository(
        &self,
        request: Request<OptimizeRepositoryRequest>,
    ) -> Result<Response<OptimizeRepositoryResponse>, Status> {
        optimize::optimize(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn get_archive(
        &self,
        request: Request<GetArchiveRequest>,
    ) -> Result<Response<ResponseStream<GetArchiveResponse>>, Status> {
        archive::get(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn get_config(
        &self,
        request: Request<GetConfigRequest>,
    ) -> Result<Response<ResponseStream<GetConfigResponse>>, Status> {
        files::config(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn get_custom_hooks(
        &self,
        request: Request<GetCustomHooksRequest>,
    ) -> Result<Response<ResponseStream<GetCustomHooksResponse>>, Status> {
        files::custom_hooks(&self.0, &request.into_inner()).map(Response::new)
    }
}
