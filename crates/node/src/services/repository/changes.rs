//! GetRawChanges: which files differ between two revisions, and how large they are now.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    GetRawChangesRequest, GetRawChangesResponse,
    get_raw_changes_response::{RawChange, raw_change::Operation},
};
use tonic::{Response, Status};

use crate::{
    git::{
        catfile::CatFile,
        diff::{
            Malformed,
            raw::{Change, Parser, Record, Status as ChangeStatus},
        },
        lines::Lines,
        objects::ItemKind,
        revision::{self, is_zero},
    },
    node::Node,
    services::{
        listing::{self, Batch},
        streams::ResponseStream,
    },
};

pub(super) fn get(
    node: &Arc<Node>,
    request: GetRawChangesRequest,
) -> Result<Response<ResponseStream<GetRawChangesResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "GetRawChanges", |messages| async move {
        let (reading, listing) = node.git.two_slots().await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let hash = objects.hash();
        let (from, to) = (request.from_revision.as_str(), request.to_revision.as_str());
        let nothing = |revision: &str| revision.len() == 2 * hash.bytes() && is_zero(revision);
        for (revision, side) in [(from, "from"), (to, "to")] {
            if !nothing(revision) && objects.info(revision.as_bytes()).await?.is_none() {
                return Err(Status::invalid_argument(format!("invalid '{side}' revision: {revision:?}")));
            }
        }
        if nothing(to) {
            return objects.close().await.map_err(Status::from);
        }
        for revision in [from, to] {
            revision::check_argument(revision.as_bytes())
                .map_err(|error| Status::internal(format!("start git diff: {error}")))?;
        }
        let from = if nothing(from) { hash.empty_tree() } else { from };
        let command = node.git.command(&repository, "diff").slot(&listing);
        let command = command.args(["--raw", "-z", "--no-abbrev", "--end-of-options", from, to, "--"]);
        let mut records = Lines::start(command, "diff", 0).await?;
        let malformed = |error: Malformed| Status::internal(format!("read diff: {error}"));
        let (mut parser, mut batch) = (Parser::default(), Batch::default());
        while let Some(record) = records.next().await? {
            if let Some(Record::Change(change)) = parser.record(&record).map_err(malformed)? {
                let change = raw_change(&mut objects, change).await?;
                if let Some(raw_changes) = batch.push(change) {
                    messages.send(GetRawChangesResponse { raw_changes }).await?;
                }
            }
        }
        parser.finish().map_err(malformed)?;
        let (exit, _) = records.finish().await?;
        if !exit.success() {
            return Err(Status::internal(format!("wait git diff: {exit}")));
        }
        objects.close().await?;
        match batch.rest() {
            Some(raw_changes) => messages.send(GetRawChangesResponse { raw_changes }).await,
            None => Ok(()),
        }
    }))
}

async fn raw_change(objects: &mut CatFile, change: Change) -> Result<RawChange, Status> {
    let Change { old, new, old_path, path } = change;
    let Some((old, status)) = old.into_iter().next() else {
        return Err(Status::internal("read diff: a change without an old side"));
    };
    let (operation, old_path, new_path) = match status {
        ChangeStatus::Added => (Operation::Added, Vec::new(), path),
        ChangeStatus::Copied => (Operation::Copied, old_path.unwrap_or_default(), path),
        ChangeStatus::Deleted => (Operation::Deleted, path, Vec::new()),
        ChangeStatus::Modified => (Operation::Modified, path.clone(), path),
        ChangeStatus::Renamed => (Operation::Renamed, old_path.unwrap_or_default(), path),
        ChangeStatus::TypeChanged => (Operation::TypeChanged, path.clone(), path),
        ChangeStatus::Other => (Operation::Unknown, path.clone(), path),
    };
    let mut raw = RawChange {
        operation: operation.into(),
        old_mode: old.mode,
        new_mode: new.mode,
        old_path_bytes: old_path,
        new_path_bytes: new_path,
        ..RawChange::default()
    };
    // What was deleted is told of as it was.
    let side = if is_zero(&new.id) { old } else { new };
    if ItemKind::of_mode(u32::try_from(side.mode).unwrap_or_default()) != ItemKind::Commit {
        let missing = || {
            let text = format!("build change from diff line: find {:?}: object not found", side.id);
            Status::internal(text)
        };
        let info = objects.info(side.id.as_bytes()).await?.ok_or_else(missing)?;
        raw.size = i64::try_from(info.size).unwrap_or(i64::MAX);
        raw.blob_id = info.id;
    }
    Ok(raw)
}
