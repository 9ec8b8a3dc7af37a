//! What stands in annotated tags: GetTagMessages, GetTagSignatures.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    GetTagMessagesRequest, GetTagMessagesResponse, GetTagSignaturesRequest, GetTagSignaturesResponse,
    get_tag_signatures_response::TagSignature,
};
use tonic::{Response, Status};

use crate::{
    git::{
        CHUNK_BYTES,
        catfile::{CatFile, ObjectKind},
        object_listing::ReachableObjects,
        objects, revision,
    },
    node::Node,
    services::{
        listing::{self, Batch},
        streams::ResponseStream,
    },
};

pub(super) fn get_tag_messages(
    node: &Arc<Node>,
    request: GetTagMessagesRequest,
) -> Result<Response<ResponseStream<GetTagMessagesResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "GetTagMessages", |messages| async move {
        let mut objects = CatFile::start(&node.git, &repository).await?;
        for tag_id in request.tag_ids {
            let found = objects.whole(tag_id.as_bytes()).await?;
            let (info, raw) = found.ok_or_else(|| Status::internal("getting tag: object not found"))?;
            if info.kind != ObjectKind::Tag {
                let text = format!("getting tag: expected tag, got {}", info.kind.name());
                return Err(Status::internal(text));
            }
            messages.send(GetTagMessagesResponse { tag_id, message: Vec::new() }).await?;
            for piece in objects::message(&raw).chunks(CHUNK_BYTES) {
                let tag_id = String::new();
                messages.send(GetTagMessagesResponse { tag_id, message: piece.to_vec() }).await?;
            }
        }
        objects.close().await.map_err(Status::from)
    }))
}

pub(super) fn get_tag_signatures(
    node: &Arc<Node>,
    request: GetTagSignaturesRequest,
) -> Result<Response<ResponseStream<GetTagSignaturesResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.tag_revisions.is_empty() {
        return Err(Status::invalid_argument("missing revisions"));
    }
    for name in &request.tag_revisions {
        revision::check_pseudo(name.as_bytes())
            .map_err(|error| Status::invalid_argument(format!("invalid revision: {error}")))?;
    }
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "GetTagSignatures", |messages| async move {
        let (reading, listing) = node.git.two_slots().await?;
        let (revisions, kind) = (&request.tag_revisions, ObjectKind::Tag);
        let mut reachable =
            ReachableObjects::start(&node.git, &repository, &listing, revisions, kind, None).await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let mut batch = Batch::default();
        while let Some((id, _)) = reachable.next().await? {
            let missing = || Status::internal("cat-file iterator stop: object not found");
            let (info, raw) = objects.whole(&id).await?.ok_or_else(missing)?;
            let (signature, content) = split_signature(&raw);
            if let Some(signatures) = batch.push(TagSignature { tag_id: info.id, signature, content }) {
                messages.send(GetTagSignaturesResponse { signatures }).await?;
            }
        }
        let end = reachable.finish().await?.checked();
        end.map_err(|error| Status::internal(format!("cat-file iterator stop: {error}")))?;
        objects.close().await?;
        match batch.rest() {
            Some(signatures) => messages.send(GetTagSignaturesResponse { signatures }).await,
            None => Ok(()),
        }
    }))
}

/// The signature at the end of a tag, and what it signs.
fn split_signature(raw: &[u8]) -> (Vec<u8>, Vec<u8>) {
    const BEGINNING: &[u8] = b"-----BEGIN";
    let at = raw.windows(BEGINNING.len()).position(|window| window == BEGINNING).filter(|at| *at > 0);
    let Some((content, signature)) = at.map(|at| raw.split_at(at)) else {
        return (Vec::new(), raw.to_vec());
    };
    (signature.strip_suffix(b"\n").unwrap_or(signature).to_vec(), content.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_of_tags() {
        let raw =
            b"object aa\ntag v1\n\nText\n-----BEGIN PGP SIGNATURE-----\n\nx\n-----END PGP SIGNATURE-----\n";
        let (signature, content) = split_signature(raw);
        assert_eq!(signature, b"-----BEGIN PGP SIGNATURE-----\n\nx\n-----END PGP SIGNATURE-----");
        assert_eq!(content, b"object aa\ntag v1\n\nText\n");
        assert_eq!(split_signature(b"object aa\n\nText\n"), (Vec::new(), b"object aa\n\nText\n".to_vec()));
    }
}
