//! `gitaly.RepositoryService`: repositories as a whole (wire reference, section b.1). What is not here answers
//! `UNIMPLEMENTED`.

mod archive;
mod attributes;
mod backup;
mod bundle;
mod changes;
mod copy;
mod create;
mod create_from;
mod custom_hooks;
mod facts;
mod fetch_remote;
mod fetch_source_branch;
mod files;
mod indexes;
mod info;
mod license;
mod optimize;
mod reference_backend;
mod revisions;
mod search;
mod settings;
mod snapshot;
mod write_ref;

use std::sync::Arc;

use bytes::Bytes;
use tabularium_proto::gitaly::{
    ApplyGitattributesRequest, ApplyGitattributesResponse, BackupCustomHooksRequest,
    BackupCustomHooksResponse, BackupRepositoryRequest, BackupRepositoryResponse, CalculateChecksumRequest,
    CalculateChecksumResponse, CreateBundleFromRefListRequest, CreateBundleFromRefListResponse,
    CreateBundleRequest, CreateBundleResponse, CreateForkRequest, CreateForkResponse,
    CreateRepositoryFromBundleRequest, CreateRepositoryFromBundleResponse,
    CreateRepositoryFromSnapshotRequest, CreateRepositoryFromSnapshotResponse,
    CreateRepositoryFromUrlRequest, CreateRepositoryFromUrlResponse, CreateRepositoryRequest,
    CreateRepositoryResponse, FastExportRequest, FastExportResponse, FetchBundleRequest, FetchBundleResponse,
    FetchRemoteRequest, FetchRemoteResponse, FetchSourceBranchRequest, FetchSourceBranchResponse,
    FindLicenseRequest, FindLicenseResponse, FindMergeBaseRequest, FindMergeBaseResponse, FsckRequest,
    FsckResponse, FullPathRequest, FullPathResponse, GenerateBundleUriRequest, GenerateBundleUriResponse,
    GetArchiveRequest, GetArchiveResponse, GetConfigRequest, GetConfigResponse, GetCustomHooksRequest,
    GetCustomHooksResponse, GetFileAttributesRequest, GetFileAttributesResponse, GetInfoAttributesRequest,
    GetInfoAttributesResponse, GetObjectDirectorySizeRequest, GetObjectDirectorySizeResponse,
    GetRawChangesRequest, GetRawChangesResponse, GetSnapshotRequest, GetSnapshotResponse,
    HasLocalBranchesRequest, HasLocalBranchesResponse, MigrateReferenceBackendRequest,
    MigrateReferenceBackendResponse, ObjectFormatRequest, ObjectFormatResponse, ObjectsSizeRequest,
    ObjectsSizeResponse, OptimizeRepositoryRequest, OptimizeRepositoryResponse,
    PruneUnreachableObjectsRequest, PruneUnreachableObjectsResponse, RemoveRepositoryRequest,
    RemoveRepositoryResponse, ReplicateRepositoryRequest, ReplicateRepositoryResponse,
    RepositoryExistsRequest, RepositoryExistsResponse, RepositoryInfoRequest, RepositoryInfoResponse,
    RepositorySizeRequest, RepositorySizeResponse, RestoreCustomHooksRequest, RestoreCustomHooksResponse,
    RestoreRepositoryRequest, RestoreRepositoryResponse, SearchFilesByContentRequest,
    SearchFilesByContentResponse, SearchFilesByNameRequest, SearchFilesByNameResponse, SetCustomHooksRequest,
    SetCustomHooksResponse, SetFullPathRequest, SetFullPathResponse, WriteRefRequest, WriteRefResponse,
    repository_service_server::RepositoryService,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{node::Node, peer::Peers, services::streams::ResponseStream, votes::Voter};

pub(super) use copy::fence;
pub(crate) use custom_hooks::unpack as unpack_custom_hooks;
pub(super) use optimize::optimize;

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

    async fn find_license(
        &self,
        request: Request<FindLicenseRequest>,
    ) -> Result<Response<FindLicenseResponse>, Status> {
        license::find(&self.0, &request.into_inner()).await.map(Response::new)
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
        info::get(&self.0, request.into_inner()).await.map(Response::new)
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

    async fn migrate_reference_backend(
        &self,
        request: Request<MigrateReferenceBackendRequest>,
    ) -> Result<Response<MigrateReferenceBackendResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        reference_backend::migrate(&self.0, &request.into_inner(), &voter).await.map(Response::new)
    }

    /// As on a Gitaly node that has no place for bundles that clients fetch from.
    async fn generate_bundle_uri(
        &self,
        _: Request<GenerateBundleUriRequest>,
    ) -> Result<Response<GenerateBundleUriResponse>, Status> {
        Err(Status::failed_precondition("no bundle-generation manager available"))
    }

    async fn optimize_repository(
        &self,
        request: Request<OptimizeRepositoryRequest>,
    ) -> Result<Response<OptimizeRepositoryResponse>, Status> {
        optimize(&self.0, &request.into_inner()).await.map(Response::new)
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
        let wrap = |data: Bytes| GetCustomHooksResponse { data: data.into() };
        custom_hooks::get(&self.0, request.into_inner().repository.as_ref(), wrap).map(Response::new)
    }

    async fn backup_custom_hooks(
        &self,
        request: Request<BackupCustomHooksRequest>,
    ) -> Result<Response<ResponseStream<BackupCustomHooksResponse>>, Status> {
        let wrap = |data: Bytes| BackupCustomHooksResponse { data: data.into() };
        custom_hooks::get(&self.0, request.into_inner().repository.as_ref(), wrap).map(Response::new)
    }

    async fn set_custom_hooks(
        &self,
        request: Request<Streaming<SetCustomHooksRequest>>,
    ) -> Result<Response<SetCustomHooksResponse>, Status> {
        let parts = |message: SetCustomHooksRequest| (message.repository, message.data);
        custom_hooks::receive(&self.0, request, parts).await?;
        Ok(Response::new(SetCustomHooksResponse {}))
    }

    async fn restore_custom_hooks(
        &self,
        request: Request<Streaming<RestoreCustomHooksRequest>>,
    ) -> Result<Response<RestoreCustomHooksResponse>, Status> {
        let parts = |message: RestoreCustomHooksRequest| (message.repository, message.data);
        custom_hooks::receive(&self.0, request, parts).await?;
        Ok(Response::new(RestoreCustomHooksResponse {}))
    }

    async fn fetch_source_branch(
        &self,
        request: Request<FetchSourceBranchRequest>,
    ) -> Result<Response<FetchSourceBranchResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        let (metadata, extensions, message) = request.into_parts();
        let peers = Peers::of(metadata, extensions);
        fetch_source_branch::fetch(&self.0, message, &peers, &voter).await.map(Response::new)
    }

    async fn create_repository_from_url(
        &self,
        request: Request<CreateRepositoryFromUrlRequest>,
    ) -> Result<Response<CreateRepositoryFromUrlResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        create_from::url(&self.0, &request.into_inner(), &voter).await.map(Response::new)
    }

    async fn create_repository_from_bundle(
        &self,
        request: Request<Streaming<CreateRepositoryFromBundleRequest>>,
    ) -> Result<Response<CreateRepositoryFromBundleResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        create_from::bundle(&self.0, request.into_inner(), &voter).await.map(Response::new)
    }

    async fn backup_repository(
        &self,
        request: Request<BackupRepositoryRequest>,
    ) -> Result<Response<BackupRepositoryResponse>, Status> {
        backup::back_up(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn restore_repository(
        &self,
        request: Request<RestoreRepositoryRequest>,
    ) -> Result<Response<RestoreRepositoryResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        backup::restore(&self.0, &request.into_inner(), &voter).await.map(Response::new)
    }

    async fn prune_unreachable_objects(
        &self,
        request: Request<PruneUnreachableObjectsRequest>,
    ) -> Result<Response<PruneUnreachableObjectsResponse>, Status> {
        optimize::prune_unreachable(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn set_full_path(
        &self,
        request: Request<SetFullPathRequest>,
    ) -> Result<Response<SetFullPathResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        settings::set_full_path(&self.0, &request.into_inner(), &voter).await.map(Response::new)
    }

    async fn full_path(
        &self,
        request: Request<FullPathRequest>,
    ) -> Result<Response<FullPathResponse>, Status> {
        settings::full_path(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn apply_gitattributes(
        &self,
        request: Request<ApplyGitattributesRequest>,
    ) -> Result<Response<ApplyGitattributesResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        settings::apply_attributes(&self.0, &request.into_inner(), &voter).await.map(Response::new)
    }
}
