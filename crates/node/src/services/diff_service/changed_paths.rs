//! FindChangedPaths: the files that commits changed, and the files by which trees differ.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    ChangedPaths, FindChangedPathsRequest, FindChangedPathsResponse, changed_paths,
    find_changed_paths_request::{
        DiffStatus, MergeCommitDiffMode, Request,
        request::{CommitRequest, TreeRequest, Type},
    },
};
use tonic::{Response, Status};

use super::refused;
use crate::{
    git::{
        GitCommand,
        catfile::CatFile,
        diff::{
            Malformed,
            raw::{self, Change, Record},
        },
        lines::Lines,
    },
    node::Node,
    services::{
        listing::{self, Batch},
        streams::ResponseStream,
    },
};

/// What git shows when nobody asks for less.
const ALL_LETTERS: &str = "AMDTCR";

fn letters(filters: &[i32]) -> Result<String, Status> {
    let mut letters = String::new();
    for filter in filters {
        let letter = match DiffStatus::try_from(*filter) {
            Ok(DiffStatus::Added) => 'A',
            Ok(DiffStatus::Modified) => 'M',
            Ok(DiffStatus::Deleted) => 'D',
            Ok(DiffStatus::TypeChange) => 'T',
            Ok(DiffStatus::Copied) => 'C',
            Ok(DiffStatus::Renamed) => 'R',
            Ok(DiffStatus::Unspecified) | Err(_) => {
                return Err(Status::invalid_argument("invalid diff filter requested"));
            }
        };
        if !letters.contains(letter) {
            letters.push(letter);
        }
    }
    Ok(if letters.is_empty() { ALL_LETTERS.to_owned() } else { letters })
}

/// The requests, also those in the older form.
fn requests(request: &mut FindChangedPathsRequest) -> Result<Vec<Request>, Status> {
    if request.commits.is_empty() {
        return Ok(std::mem::take(&mut request.requests));
    }
    if !request.requests.is_empty() {
        return Err(Status::invalid_argument("cannot specify both commits and requests"));
    }
    let commits = std::mem::take(&mut request.commits).into_iter();
    let wrap = |commit_revision| {
        let parent_commit_revisions = Vec::new();
        Request {
            r#type: Some(Type::CommitRequest(CommitRequest { commit_revision, parent_commit_revisions })),
        }
    };
    Ok(commits.map(wrap).collect())
}

async fn resolve(objects: &mut CatFile, doing: &str, revision: &str, kind: &str) -> Result<String, Status> {
    if revision.is_empty() {
        return Err(Status::invalid_argument(format!("{doing}: revision cannot be empty")));
    }
    let found = objects.info(format!("{revision}^{{{kind}}}").as_bytes()).await?;
    let missing = || Status::not_found(format!("{doing}: revision can not be found: {revision:?}"));
    found.map(|info| info.id).ok_or_else(missing)
}

/// A line for `git diff-tree --stdin`.
async fn line(objects: &mut CatFile, request: Request) -> Result<String, Status> {
    match request.r#type {
        Some(Type::CommitRequest(CommitRequest { commit_revision, parent_commit_revisions })) => {
            let mut line = resolve(objects, "resolving commit", &commit_revision, "commit").await?;
            for parent in parent_commit_revisions {
                let parent = resolve(objects, "resolving commit parent", &parent, "commit").await?;
                line.extend([" ", &parent]);
            }
            Ok(line + "\n")
        }
        Some(Type::TreeRequest(TreeRequest { left_tree_revision, right_tree_revision })) => {
            let left = resolve(objects, "resolving left tree", &left_tree_revision, "tree").await?;
            let right = resolve(objects, "resolving right tree", &right_tree_revision, "tree").await?;
            Ok(format!("{left} {right}\n"))
        }
        None => Err(Status::internal("unknown FindChangedPathsRequest type")),
    }
}

fn options(
    command: GitCommand,
    request: &FindChangedPathsRequest,
    letters: &str,
    of_commits: bool,
) -> GitCommand {
    let mut command = command.args(["-z", "--stdin", "-r", "--root"]).arg(format!("--diff-filter={letters}"));
    if !of_commits {
        command = command.arg("--no-commit-id");
    }
    command = command.arg(if request.find_renames { "--find-renames=30%" } else { "--no-renames" });
    command.arg(match request.merge_commit_diff_mode() {
        MergeCommitDiffMode::Unspecified | MergeCommitDiffMode::IncludeMerges => "-m",
        MergeCommitDiffMode::AllParents => "-c",
    })
}

pub(super) fn find(
    node: &Arc<Node>,
    mut request: FindChangedPathsRequest,
) -> Result<Response<ResponseStream<FindChangedPathsResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let requests = requests(&mut request)?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "FindChangedPaths", |messages| async move {
        let of_commits =
            requests.iter().all(|request| matches!(request.r#type, Some(Type::CommitRequest(_))));
        let mut objects = CatFile::start(&node.git, &repository).await?;
        let mut input = String::new();
        for request in requests {
            input.push_str(&line(&mut objects, request).await?);
        }
        objects.close().await?;
        let letters = letters(&request.diff_filters)?;
        if input.is_empty() {
            return Ok(());
        }
        let command = options(node.git.command(&repository, "diff-tree"), &request, &letters, of_commits);
        let mut records = Lines::start_with(command, "diff-tree", 0, input).await?;
        let malformed = |error: Malformed| Status::internal(format!("parsing err: {error}"));
        let (mut parser, mut batch, mut commit) = (raw::Parser::default(), Batch::default(), String::new());
        while let Some(record) = records.next().await? {
            match parser.record(&record).map_err(malformed)? {
                None => {}
                Some(Record::Commit(id)) => commit = id,
                Some(Record::Change(change)) => {
                    for changed in messages_of(change, &commit)? {
                        if let Some(paths) = batch.push(changed) {
                            messages.send(FindChangedPathsResponse { paths }).await?;
                        }
                    }
                }
            }
        }
        parser.finish().map_err(malformed)?;
        let (exit, _) = records.finish().await?;
        if !exit.success() {
            return Err(refused("cmd wait err: ", exit));
        }
        match batch.rest() {
            Some(paths) => messages.send(FindChangedPathsResponse { paths }).await,
            None => Ok(()),
        }
    }))
}

/// One for each parent that the file differs from.
fn messages_of(change: Change, commit: &str) -> Result<Vec<ChangedPaths>, Status> {
    let Change { old, new, old_path, path } = change;
    let message = |(old, status): (raw::Side, raw::Status)| {
        let status = match status {
            raw::Status::Added => changed_paths::Status::Added,
            raw::Status::Copied => changed_paths::Status::Copied,
            raw::Status::Deleted => changed_paths::Status::Deleted,
            raw::Status::Modified => changed_paths::Status::Modified,
            raw::Status::Renamed => changed_paths::Status::Renamed,
            raw::Status::TypeChanged => changed_paths::Status::TypeChange,
            raw::Status::Other => return Err(Status::internal("unknown changed paths returned")),
        };
        Ok(ChangedPaths {
            path: path.clone(),
            status: status.into(),
            old_mode: old.mode,
            new_mode: new.mode,
            old_blob_id: old.id,
            new_blob_id: new.id.clone(),
            old_path: old_path.clone().unwrap_or_default(),
            commit_id: commit.to_owned(),
            ..ChangedPaths::default()
        })
    };
    old.into_iter().map(message).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters() {
        assert_eq!(letters(&[]).unwrap(), ALL_LETTERS);
        let asked = [DiffStatus::Deleted, DiffStatus::Added, DiffStatus::Deleted].map(i32::from);
        assert_eq!(letters(&asked).unwrap(), "DA");
        assert!(letters(&[0]).is_err() && letters(&[77]).is_err());
    }
}
