//! Commits by their ids and names, and what stands in them: all that there are, those of references, their messages and
//! signatures.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    FilterShasWithSignaturesRequest, FilterShasWithSignaturesResponse, GetCommitMessagesRequest,
    GetCommitMessagesResponse, GetCommitSignaturesRequest, GetCommitSignaturesResponse,
    ListAllCommitsRequest, ListAllCommitsResponse, ListCommitsByRefNameRequest, ListCommitsByRefNameResponse,
    SignatureType, get_commit_signatures_response::Signer, list_commits_by_ref_name_response::CommitForRef,
};
use tonic::{Response, Status, Streaming};

use crate::{
    git::{
        CHUNK_BYTES,
        catfile::{CatFile, ObjectKind},
        object_listing::AllObjects,
        objects,
        revision::ObjectHash,
    },
    node::Node,
    services::{
        listing::{self, Batch},
        streams::ResponseStream,
    },
};

pub(super) fn list_all_commits(
    node: &Arc<Node>,
    request: ListAllCommitsRequest,
) -> Result<Response<ResponseStream<ListAllCommitsResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let page = request.pagination_params.unwrap_or_default();
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListAllCommits", |messages| async move {
        let (reading, listing) = node.git.two_slots().await?;
        let mut all = AllObjects::start(&node.git, &repository, &listing).await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        // The token may name an object of any kind.
        let mut waiting = !page.page_token.is_empty();
        let mut left = usize::try_from(page.limit).ok().filter(|limit| *limit > 0);
        let mut batch = Batch::default();
        let mut listed_all = true;
        while let Some(info) = all.next().await? {
            if waiting {
                waiting = info.id != page.page_token;
                continue;
            }
            if info.kind != ObjectKind::Commit {
                continue;
            }
            if left == Some(0) {
                listed_all = false;
                break;
            }
            left = left.map(|left| left - 1);
            let missing = || Status::internal("iterating objects: object not found");
            let commit = objects.commit(info.id.as_bytes()).await?.ok_or_else(missing)?;
            if let Some(commits) = batch.push(commit) {
                messages.send(ListAllCommitsResponse { commits }).await?;
            }
        }
        if listed_all {
            all.checked().await?;
        }
        objects.close().await?;
        match batch.rest() {
            Some(commits) => messages.send(ListAllCommitsResponse { commits }).await,
            None => Ok(()),
        }
    }))
}

pub(super) fn list_commits_by_ref_name(
    node: &Arc<Node>,
    request: ListCommitsByRefNameRequest,
) -> Result<Response<ResponseStream<ListCommitsByRefNameResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListCommitsByRefName", |messages| async move {
        let mut objects = CatFile::start(&node.git, &repository).await?;
        let mut batch = Batch::default();
        for ref_name in request.ref_names {
            let Some(commit) = objects.commit(&ref_name).await? else { continue };
            if let Some(commit_refs) = batch.push(CommitForRef { commit: Some(commit), ref_name }) {
                messages.send(ListCommitsByRefNameResponse { commit_refs }).await?;
            }
        }
        objects.close().await?;
        match batch.rest() {
            Some(commit_refs) => messages.send(ListCommitsByRefNameResponse { commit_refs }).await,
            None => Ok(()),
        }
    }))
}

pub(super) fn get_commit_messages(
    node: &Arc<Node>,
    request: GetCommitMessagesRequest,
) -> Result<Response<ResponseStream<GetCommitMessagesResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "GetCommitMessages", |messages| async move {
        let mut objects = CatFile::start(&node.git, &repository).await?;
        for commit_id in request.commit_ids {
            let found = objects.commit_message(commit_id.as_bytes()).await?;
            let missing = || Status::internal("failed to get commit message: object not found");
            let message = found.ok_or_else(missing)?;
            messages.send(GetCommitMessagesResponse { commit_id, message: Vec::new() }).await?;
            for piece in message.chunks(CHUNK_BYTES) {
                let commit_id = String::new();
                messages.send(GetCommitMessagesResponse { commit_id, message: piece.to_vec() }).await?;
            }
        }
        objects.close().await.map_err(Status::from)
    }))
}

pub(super) async fn get_commit_signatures(
    node: &Arc<Node>,
    request: GetCommitSignaturesRequest,
) -> Result<Response<ResponseStream<GetCommitSignaturesResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.commit_ids.is_empty() {
        return Err(Status::invalid_argument("empty CommitIds"));
    }
    let hash = ObjectHash::of(&repository).await?;
    for id in &request.commit_ids {
        hash.parse(id.as_bytes()).map_err(|error| Status::invalid_argument(error.to_string()))?;
    }
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "GetCommitSignatures", |messages| async move {
        let mut objects = CatFile::start(&node.git, &repository).await?;
        for id in request.commit_ids {
            let Some((info, raw)) = objects.whole(format!("{id}^{{commit}}").as_bytes()).await? else {
                continue;
            };
            let Some((signature, signed_text)) = objects::split_signature(&raw) else { continue };
            let commit = objects::parse_commit(&info.id, &raw, info.size);
            let ours = node.signing.as_ref().is_some_and(|signing| signing.made(&signature, &signed_text));
            let first = GetCommitSignaturesResponse {
                commit_id: commit.id,
                signature,
                signer: if ours { Signer::System } else { Signer::User }.into(),
                author: commit.author,
                committer: commit.committer,
                ..GetCommitSignaturesResponse::default()
            };
            messages.send(first).await?;
            for piece in signed_text.chunks(CHUNK_BYTES) {
                let signed_text = piece.to_vec();
                messages.send(GetCommitSignaturesResponse { signed_text, ..Default::default() }).await?;
            }
        }
        objects.close().await.map_err(Status::from)
    }))
}

pub(super) async fn filter_shas_with_signatures(
    node: &Arc<Node>,
    mut requests: Streaming<FilterShasWithSignaturesRequest>,
) -> Result<Response<ResponseStream<FilterShasWithSignaturesResponse>>, Status> {
    let Some(mut request) = requests.message().await? else {
        return Err(Status::internal("EOF"));
    };
    let repository = node.storages.open(request.repository.as_ref())?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "FilterShasWithSignatures", |messages| async move {
        let mut objects = CatFile::start(&node.git, &repository).await?;
        loop {
            let mut shas = Vec::new();
            for sha in request.shas {
                let commit = objects.commit(&sha).await?;
                if commit.is_some_and(|commit| commit.signature_type() != SignatureType::None) {
                    shas.push(sha);
                }
            }
            messages.send(FilterShasWithSignaturesResponse { shas }).await?;
            match requests.message().await? {
                Some(next) => request = next,
                None => break,
            }
        }
        objects.close().await.map_err(Status::from)
    }))
}
