//! ListBlobs and ListAllBlobs: blobs that revisions lead to, and all that there are.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    ListAllBlobsRequest, ListAllBlobsResponse, ListBlobsRequest, ListBlobsResponse, list_all_blobs_response,
    list_blobs_response,
};
use tonic::{Response, Status};

use super::{check_revisions, next_piece, wanted};
use crate::{
    git::{
        catfile::{CatFile, ObjectInfo, ObjectKind},
        object_listing::{AllObjects, ReachableObjects},
    },
    node::Node,
    services::{
        listing::{self, Batch, Messages},
        streams::ResponseStream,
    },
};

/// A blob's piece: what it is comes with the first.
struct Piece {
    oid: String,
    size: i64,
    data: Vec<u8>,
}

/// Sends pieces of blobs in messages of a good size.
struct Sender<T, Item> {
    messages: Messages<T>,
    batch: Batch<Item>,
    wrap: fn(Vec<Item>) -> T,
}

impl<T, Item: prost::Message> Sender<T, Item> {
    fn new(messages: Messages<T>, wrap: fn(Vec<Item>) -> T) -> Self {
        Self { messages, batch: Batch::default(), wrap }
    }

    async fn send(&mut self, item: Item) -> Result<(), Status> {
        match self.batch.push(item) {
            Some(items) => self.messages.send((self.wrap)(items)).await,
            None => Ok(()),
        }
    }

    async fn finish(self) -> Result<(), Status> {
        match self.batch.rest() {
            Some(items) => self.messages.send((self.wrap)(items)).await,
            None => Ok(()),
        }
    }

    /// What is known of the blob, and so much of its content.
    async fn blob(
        &mut self,
        objects: &mut CatFile,
        info: ObjectInfo,
        limit: i64,
        item: impl Fn(Piece) -> Item,
    ) -> Result<(), Status> {
        let missing = || Status::internal("processing blobs: object not found");
        let size = i64::try_from(info.size).unwrap_or(i64::MAX);
        let mut left = wanted(limit, info.size);
        if left > 0 {
            objects.open(info.id.as_bytes()).await?.ok_or_else(missing)?;
        }
        let mut first = Some((info.id, size));
        while let Some(data) = next_piece(objects, &mut left).await? {
            let (oid, size) = first.take().unwrap_or_default();
            self.send(item(Piece { oid, size, data: data.to_vec() })).await?;
        }
        match first {
            Some((oid, size)) => self.send(item(Piece { oid, size, data: Vec::new() })).await,
            None => Ok(()),
        }
    }
}

/// No limit is none.
fn blob_limit(limit: u32) -> u64 {
    if limit == 0 { u64::MAX } else { limit.into() }
}

pub(super) fn list_blobs(
    node: &Arc<Node>,
    request: ListBlobsRequest,
) -> Result<Response<ResponseStream<ListBlobsResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    check_revisions(&request.revisions)?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListBlobs", |messages| async move {
        let (reading, listing) = node.git.two_slots().await?;
        let revisions = &request.revisions;
        let mut reachable =
            ReachableObjects::start(&node.git, &repository, &listing, revisions, ObjectKind::Blob, None)
                .await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let mut sender = Sender::new(messages, |blobs| ListBlobsResponse { blobs });
        let mut left = blob_limit(request.limit);
        let mut listed_all = false;
        while left > 0 {
            let Some((id, path)) = reachable.next().await? else {
                listed_all = true;
                break;
            };
            left -= 1;
            let missing = || Status::internal("processing blobs: object not found");
            let info = objects.info(&id).await?.ok_or_else(missing)?;
            let path = if request.with_paths { path } else { Vec::new() };
            let item =
                |Piece { oid, size, data }| list_blobs_response::Blob { oid, size, data, path: path.clone() };
            sender.blob(&mut objects, info, request.bytes_limit, item).await?;
        }
        if listed_all {
            let end = reachable.finish().await?.checked();
            end.map_err(|error| Status::internal(format!("processing blobs: {error}")))?;
        }
        objects.close().await?;
        sender.finish().await
    }))
}

pub(super) fn list_all_blobs(
    node: &Arc<Node>,
    request: &ListAllBlobsRequest,
) -> Result<Response<ResponseStream<ListAllBlobsResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let (mut left, bytes_limit) = (blob_limit(request.limit), request.bytes_limit);
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListAllBlobs", |messages| async move {
        let (reading, listing) = node.git.two_slots().await?;
        let mut all = AllObjects::start(&node.git, &repository, &listing).await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let mut sender = Sender::new(messages, |blobs| ListAllBlobsResponse { blobs });
        let mut listed_all = false;
        while left > 0 {
            let Some(info) = all.next().await? else {
                listed_all = true;
                break;
            };
            if info.kind != ObjectKind::Blob {
                continue;
            }
            left -= 1;
            let item = |Piece { oid, size, data }| list_all_blobs_response::Blob { oid, size, data };
            sender.blob(&mut objects, info, bytes_limit, item).await?;
        }
        if listed_all {
            all.checked().await?;
        }
        objects.close().await?;
        sender.finish().await
    }))
}
