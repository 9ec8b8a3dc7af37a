//! BlobService: contents of files, in pieces.

mod all;
mod lfs;

use std::sync::Arc;

use bytes::Bytes;
use tabularium_proto::gitaly::{
    GetBlobRequest, GetBlobResponse, GetBlobsRequest, GetBlobsResponse, GetLfsPointersRequest,
    GetLfsPointersResponse, ListAllBlobsRequest, ListAllBlobsResponse, ListAllLfsPointersRequest,
    ListAllLfsPointersResponse, ListBlobsRequest, ListBlobsResponse, ListLfsPointersRequest,
    ListLfsPointersResponse, ObjectType, blob_service_server::BlobService, get_blobs_request::RevisionPath,
};
use tonic::{Request, Response, Status};

pub(crate) use lfs::parse_pointer;

use super::{
    listing::{self, Messages},
    streams::ResponseStream,
};
use crate::{
    git::{
        catfile::{CatFile, ObjectKind},
        objects::ItemKind,
        revision,
    },
    node::Node,
};

/// The service.
pub(crate) struct BlobServer(Arc<Node>);

impl BlobServer {
    /// On this node.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

/// How much of a blob is sent: a negative limit means all of it.
fn wanted(limit: i64, size: u64) -> u64 {
    u64::try_from(limit).map_or(size, |limit| limit.min(size))
}

/// The next piece of the open object, cut to what is still wanted.
async fn next_piece(objects: &mut CatFile, left: &mut u64) -> Result<Option<Bytes>, Status> {
    if *left == 0 {
        return Ok(None);
    }
    let Some(piece) = objects.chunk().await? else { return Ok(None) };
    let length = usize::try_from(*left).map_or(piece.len(), |left| left.min(piece.len()));
    *left = left.saturating_sub(u64::try_from(length).unwrap_or(u64::MAX));
    Ok(Some(piece.slice(..length)))
}

#[tonic::async_trait]
impl BlobService for BlobServer {
    async fn get_blob(
        &self,
        request: Request<GetBlobRequest>,
    ) -> Result<Response<ResponseStream<GetBlobResponse>>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        if request.oid.is_empty() {
            return Err(Status::invalid_argument("empty Oid"));
        }
        revision::check_path_scoped(request.oid.as_bytes())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let node = Arc::clone(&self.0);
        Ok(listing::stream(&self.0.tasks, "GetBlob", |messages| async move {
            let mut objects = CatFile::start(&node.git, &repository).await?;
            let found = objects.open(request.oid.as_bytes()).await?;
            let Some(info) = found.filter(|info| info.kind == ObjectKind::Blob) else {
                objects.close().await?;
                return messages.send(GetBlobResponse::default()).await;
            };
            let mut left = wanted(request.limit, info.size);
            let mut first = Some(GetBlobResponse {
                size: i64::try_from(info.size).unwrap_or(i64::MAX),
                oid: info.id,
                data: Bytes::new(),
            });
            while let Some(data) = next_piece(&mut objects, &mut left).await? {
                messages.send(GetBlobResponse { data, ..first.take().unwrap_or_default() }).await?;
            }
            objects.close().await?;
            match first {
                Some(metadata) => messages.send(metadata).await,
                None => Ok(()),
            }
        }))
    }

    async fn get_blobs(
        &self,
        request: Request<GetBlobsRequest>,
    ) -> Result<Response<ResponseStream<GetBlobsResponse>>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        if request.revision_paths.is_empty() {
            return Err(Status::invalid_argument("empty RevisionPaths"));
        }
        for pair in &request.revision_paths {
            revision::check(pair.revision.as_bytes())
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
        }
        let node = Arc::clone(&self.0);
        Ok(listing::stream(&self.0.tasks, "GetBlobs", |messages| async move {
            let mut objects = CatFile::start(&node.git, &repository).await?;
            for pair in request.revision_paths {
                send_blob(&mut objects, pair, request.limit, &messages).await?;
            }
            objects.close().await.map_err(Status::from)
        }))
    }

    async fn list_blobs(
        &self,
        request: Request<ListBlobsRequest>,
    ) -> Result<Response<ResponseStream<ListBlobsResponse>>, Status> {
        all::list_blobs(&self.0, request.into_inner())
    }

    async fn list_all_blobs(
        &self,
        request: Request<ListAllBlobsRequest>,
    ) -> Result<Response<ResponseStream<ListAllBlobsResponse>>, Status> {
        all::list_all_blobs(&self.0, &request.into_inner())
    }

    async fn get_lfs_pointers(
        &self,
        request: Request<GetLfsPointersRequest>,
    ) -> Result<Response<ResponseStream<GetLfsPointersResponse>>, Status> {
        lfs::get_lfs_pointers(&self.0, request.into_inner())
    }

    async fn list_lfs_pointers(
        &self,
        request: Request<ListLfsPointersRequest>,
    ) -> Result<Response<ResponseStream<ListLfsPointersResponse>>, Status> {
        lfs::list_lfs_pointers(&self.0, request.into_inner())
    }

    async fn list_all_lfs_pointers(
        &self,
        request: Request<ListAllLfsPointersRequest>,
    ) -> Result<Response<ResponseStream<ListAllLfsPointersResponse>>, Status> {
        lfs::list_all_lfs_pointers(&self.0, &request.into_inner())
    }
}

/// Revisions that lead to blobs.
fn check_revisions(revisions: &[String]) -> Result<(), Status> {
    if revisions.is_empty() {
        return Err(Status::invalid_argument("missing revisions"));
    }
    revisions.iter().try_for_each(|name| {
        revision::check_pseudo_or_path_scoped(name.as_bytes())
            .map_err(|error| Status::invalid_argument(format!("invalid revision: {error}")))
    })
}

async fn send_blob(
    objects: &mut CatFile,
    pair: RevisionPath,
    limit: i64,
    messages: &Messages<GetBlobsResponse>,
) -> Result<(), Status> {
    let RevisionPath { revision, path } = pair;
    let entry = objects.entry(revision.as_bytes(), &path).await?;
    let mut first = GetBlobsResponse { revision, path, ..GetBlobsResponse::default() };
    let Some(entry) = entry else { return messages.send(first).await };
    first.mode = i32::try_from(entry.mode).unwrap_or_default();
    first.oid.clone_from(&entry.id);
    if ItemKind::of_mode(entry.mode) == ItemKind::Commit {
        first.is_submodule = true;
        first.set_type(ObjectType::Commit);
        return messages.send(first).await;
    }
    let missing = || Status::internal(format!("object {} is missing", entry.id));
    let info = objects.open(entry.id.as_bytes()).await?.ok_or_else(missing)?;
    first.size = i64::try_from(info.size).unwrap_or(i64::MAX);
    first.set_type(info.kind.into());
    let mut left = if info.kind == ObjectKind::Blob { wanted(limit, info.size) } else { 0 };
    let mut first = Some(first);
    while let Some(data) = next_piece(objects, &mut left).await? {
        messages.send(GetBlobsResponse { data: data.to_vec(), ..first.take().unwrap_or_default() }).await?;
    }
    match first {
        Some(metadata) => messages.send(metadata).await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits() {
        assert_eq!(wanted(-1, 10), 10);
        assert_eq!(wanted(0, 10), 0);
        assert_eq!(wanted(4, 10), 4);
        assert_eq!(wanted(40, 10), 10);
    }
}
