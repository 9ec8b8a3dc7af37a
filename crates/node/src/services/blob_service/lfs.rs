//! Blobs that stand for files kept elsewhere: pointers of Git LFS.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    GetLfsPointersRequest, GetLfsPointersResponse, LfsPointer, ListAllLfsPointersRequest,
    ListAllLfsPointersResponse, ListLfsPointersRequest, ListLfsPointersResponse,
};
use tonic::{Response, Status};

use super::check_revisions;
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

/// What is longer is no pointer.
const MAX_POINTER_BYTES: u64 = 200;
const VERSION: &[u8] = b"version https://git-lfs.github.com/spec";

/// Id and size of the file that a pointer stands for; `None` if it is no pointer.
pub(crate) fn parse_pointer(data: &[u8]) -> Option<(Vec<u8>, i64)> {
    if !data.starts_with(VERSION) {
        return None;
    }
    let value = |key: &'static [u8], good: fn(&[u8]) -> bool| {
        let mut lines = data.split(|byte| *byte == b'\n');
        lines.find_map(|line| line.strip_prefix(key).filter(|value| good(value)))
    };
    let is_id = |value: &[u8]| {
        value.len() == 64 && value.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_number = |value: &[u8]| !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let id = value(b"oid sha256:", is_id)?;
    let size = value(b"size ", is_number)?;
    Some((id.to_vec(), std::str::from_utf8(size).ok()?.parse().ok()?))
}

/// Sends those blobs that are pointers, up to a limit.
struct Pointers<T> {
    messages: Messages<T>,
    batch: Batch<LfsPointer>,
    wrap: fn(Vec<LfsPointer>) -> T,
    /// `None` if there is no limit.
    left: Option<usize>,
}

impl<T> Pointers<T> {
    fn new(messages: Messages<T>, wrap: fn(Vec<LfsPointer>) -> T, limit: i32) -> Self {
        let left = usize::try_from(limit).ok().filter(|limit| *limit > 0);
        Self { messages, batch: Batch::default(), wrap, left }
    }

    fn full(&self) -> bool {
        self.left == Some(0)
    }

    async fn look_at(&mut self, objects: &mut CatFile, info: &ObjectInfo) -> Result<(), Status> {
        if info.kind != ObjectKind::Blob || info.size > MAX_POINTER_BYTES {
            return Ok(());
        }
        let Some((info, data)) = objects.whole(info.id.as_bytes()).await? else {
            return Err(Status::internal("object not found"));
        };
        let Some((file_oid, file_size)) = parse_pointer(&data) else { return Ok(()) };
        self.left = self.left.map(|left| left.saturating_sub(1));
        let size = i64::try_from(data.len()).unwrap_or(i64::MAX);
        let pointer = LfsPointer { size, data, oid: info.id, file_size, file_oid };
        match self.batch.push(pointer) {
            Some(pointers) => self.messages.send((self.wrap)(pointers)).await,
            None => Ok(()),
        }
    }

    async fn finish(self) -> Result<(), Status> {
        match self.batch.rest() {
            Some(pointers) => self.messages.send((self.wrap)(pointers)).await,
            None => Ok(()),
        }
    }
}

pub(super) fn get_lfs_pointers(
    node: &Arc<Node>,
    request: GetLfsPointersRequest,
) -> Result<Response<ResponseStream<GetLfsPointersResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.blob_ids.is_empty() {
        return Err(Status::invalid_argument("empty BlobIds"));
    }
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "GetLFSPointers", |messages| async move {
        let mut objects = CatFile::start(&node.git, &repository).await?;
        let wrap = |lfs_pointers| GetLfsPointersResponse { lfs_pointers };
        let mut pointers = Pointers::new(messages, wrap, 0);
        for id in request.blob_ids {
            let missing = || Status::internal(format!("retrieving object info for {id:?}: object not found"));
            let info = objects.info(id.as_bytes()).await?.ok_or_else(missing)?;
            pointers.look_at(&mut objects, &info).await?;
        }
        objects.close().await?;
        pointers.finish().await
    }))
}

pub(super) fn list_lfs_pointers(
    node: &Arc<Node>,
    request: ListLfsPointersRequest,
) -> Result<Response<ResponseStream<ListLfsPointersResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    check_revisions(&request.revisions)?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListLFSPointers", |messages| async move {
        let (reading, listing) = node.git.two_slots().await?;
        let (revisions, limit) = (&request.revisions, Some(MAX_POINTER_BYTES));
        let kind = ObjectKind::Blob;
        let mut reachable =
            ReachableObjects::start(&node.git, &repository, &listing, revisions, kind, limit).await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let wrap = |lfs_pointers| ListLfsPointersResponse { lfs_pointers };
        let mut pointers = Pointers::new(messages, wrap, request.limit);
        let mut listed_all = false;
        while !pointers.full() {
            let Some((id, _)) = reachable.next().await? else {
                listed_all = true;
                break;
            };
            let missing = || Status::internal("object not found");
            let info = objects.info(&id).await?.ok_or_else(missing)?;
            pointers.look_at(&mut objects, &info).await?;
        }
        if listed_all {
            reachable.finish().await?.checked().map_err(Status::internal)?;
        }
        objects.close().await?;
        pointers.finish().await
    }))
}

pub(super) fn list_all_lfs_pointers(
    node: &Arc<Node>,
    request: &ListAllLfsPointersRequest,
) -> Result<Response<ResponseStream<ListAllLfsPointersResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let limit = request.limit;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListAllLFSPointers", |messages| async move {
        let (reading, listing) = node.git.two_slots().await?;
        let mut all = AllObjects::start(&node.git, &repository, &listing).await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let wrap = |lfs_pointers| ListAllLfsPointersResponse { lfs_pointers };
        let mut pointers = Pointers::new(messages, wrap, limit);
        let mut listed_all = false;
        while !pointers.full() {
            let Some(info) = all.next().await? else {
                listed_all = true;
                break;
            };
            pointers.look_at(&mut objects, &info).await?;
        }
        if listed_all {
            all.checked().await?;
        }
        objects.close().await?;
        pointers.finish().await
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_are_told_from_other_files() {
        let id = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393";
        let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{id}\nsize 12345\n");
        assert_eq!(parse_pointer(pointer.as_bytes()), Some((id.into(), 12_345)));
        assert!(parse_pointer(pointer.trim_end().as_bytes()).is_some());
        for (from, to) in [
            ("version", "Version"),
            ("sha256", "sha1"),
            ("size 12345", "size x"),
            ("size 12345", "size "),
            ("size 12345", "size 99999999999999999999"),
            ("2393\n", "239\n"),
            ("4d7a", "4D7A"),
            ("12345\n", "12345\r\n"),
        ] {
            assert_eq!(parse_pointer(pointer.replace(from, to).as_bytes()), None, "{to}");
        }
    }
}
