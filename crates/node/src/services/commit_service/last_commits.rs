//! Which commit changed a path last: LastCommitForPath, ListLastCommitsForTree.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc};

use tabularium_proto::gitaly::{
    GitCommit, GlobalOptions, LastCommitForPathRequest, LastCommitForPathResponse,
    ListLastCommitsForTreeRequest, ListLastCommitsForTreeResponse,
    list_last_commits_for_tree_response::CommitForTree,
};
use tonic::{Response, Status};

use super::{
    history::literal_pathspecs,
    invalid,
    trees::{Line, parse_line},
};
use crate::{
    git::{GitCommand, Slot, catfile::CatFile, lines::Lines, objects::ItemKind, revision},
    node::Node,
    services::{listing, streams::ResponseStream},
    storage::RepositoryPath,
};

/// Entries in one message.
const COMMITS_PER_MESSAGE: usize = 10;
/// Entries of one directory that are kept while the last commits of some of them are looked for.
const MAX_ENTRIES: usize = 1_000_000;

/// Whether a path stays in the tree, going by its words alone.
pub(super) fn is_local(path: &[u8]) -> bool {
    let mut depth = 0_usize;
    if path.is_empty() || path.starts_with(b"/") {
        return false;
    }
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if depth == 0 => return false,
            b".." => depth -= 1,
            _ => depth += 1,
        }
    }
    true
}

/// The root directory goes by three names.
fn from_root(path: &[u8]) -> &[u8] {
    if path.is_empty() || path == b"/" { b"." } else { path }
}

enum LastCommit {
    Found(Vec<u8>),
    /// No commit touches the path.
    Untouched,
    /// There is no such revision.
    NoRevision,
}

/// The last commit of a path, by `git log`; the command has its pathspec options.
async fn last_commit(command: GitCommand, revision: &[u8], path: &[u8]) -> Result<LastCommit, Status> {
    let command = command.reads().args(["--format=%H", "--max-count=1", "--end-of-options"]);
    let output =
        command.arg(OsStr::from_bytes(revision)).arg("--").arg(OsStr::from_bytes(path)).output().await?;
    if !output.exit.success() {
        if output.stderr.starts_with(b"fatal: bad revision '") {
            return Ok(LastCommit::NoRevision);
        }
        return Err(Status::internal(format!("logging last commit for path: {}", output.exit)));
    }
    let id = output.stdout.trim_ascii();
    Ok(if id.is_empty() { LastCommit::Untouched } else { LastCommit::Found(id.to_vec()) })
}

pub(super) async fn last_commit_for_path(
    node: &Node,
    request: LastCommitForPathRequest,
) -> Result<Response<LastCommitForPathResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check(&request.revision).map_err(invalid)?;
    let path = from_root(&request.path);
    if path.starts_with(b"/") {
        return Err(Status::invalid_argument("path is an absolute path"));
    }
    if !is_local(path) {
        return Err(Status::invalid_argument("path escapes repository"));
    }
    let literal = request.literal_pathspec
        || request.global_options.as_ref().is_some_and(|options| options.literal_pathspecs);
    let options = GlobalOptions { literal_pathspecs: literal };
    let command = literal_pathspecs(node.git.command(&repository, "log"), Some(&options));
    let LastCommit::Found(id) = last_commit(command, &request.revision, path).await? else {
        return Ok(Response::new(LastCommitForPathResponse { commit: None }));
    };
    let mut objects = CatFile::start(&node.git, &repository).await?;
    let commit = objects.commit(&id).await?;
    objects.close().await?;
    Ok(Response::new(LastCommitForPathResponse { commit }))
}

/// Directories, then files, then submodules; within each as git lists them.
fn rank(kind: ItemKind) -> u8 {
    match kind {
        ItemKind::Tree => 0,
        ItemKind::Blob => 1,
        ItemKind::Commit => 2,
    }
}

async fn entries(
    node: &Node,
    repository: &RepositoryPath,
    request: &ListLastCommitsForTreeRequest,
    slot: &Slot,
) -> Result<Vec<Line>, Status> {
    let command = node.git.command(repository, "ls-tree").slot(slot);
    let command = literal_pathspecs(command, request.global_options.as_ref());
    let command = command.args(["-z", "--full-name", "--end-of-options", &request.revision, "--"]);
    let command = command.arg(OsStr::from_bytes(from_root(&request.path)));
    let mut lines = Lines::start(command, "ls-tree", 0).await?;
    let mut entries = Vec::new();
    while let Some(line) = lines.next().await? {
        let line = parse_line(&line);
        entries.push(line.ok_or_else(|| Status::internal("failed to parse git ls-tree response"))?);
        if entries.len() > MAX_ENTRIES {
            return Err(Status::internal(format!("more than {MAX_ENTRIES} entries in a directory")));
        }
    }
    let (exit, _) = lines.finish().await?;
    if !exit.success() {
        return Err(Status::internal(exit.to_string()));
    }
    entries.sort_by_key(|entry| rank(entry.kind));
    Ok(entries)
}

/// The entries asked for; none if the offset is behind them all.
fn page(entries: Vec<Line>, offset: i32, limit: i32) -> impl Iterator<Item = Line> {
    let count = |number: i32| usize::try_from(number).unwrap_or_default();
    entries.into_iter().skip(count(offset)).take(count(limit))
}

pub(super) fn list_last_commits_for_tree(
    node: &Arc<Node>,
    request: ListLastCommitsForTreeRequest,
) -> Result<Response<ResponseStream<ListLastCommitsForTreeResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check(request.revision.as_bytes()).map_err(invalid)?;
    for (number, negative) in [(request.offset, "offset negative"), (request.limit, "limit negative")] {
        if number < 0 {
            return Err(Status::invalid_argument(negative));
        }
    }
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListLastCommitsForTree", |messages| async move {
        let (reading, listing) = node.git.two_slots().await?;
        let entries = entries(&node, &repository, &request, &listing).await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let mut commits = Vec::new();
        let mut known: Option<GitCommit> = None;
        for entry in page(entries, request.offset, request.limit) {
            // The paths are those of the tree, whatever is in their names.
            let options = GlobalOptions { literal_pathspecs: true };
            let command = literal_pathspecs(node.git.command(&repository, "log"), Some(&options));
            let found = last_commit(command.slot(&listing), request.revision.as_bytes(), &entry.path).await?;
            let LastCommit::Found(id) = found else {
                let path = String::from_utf8_lossy(&entry.path).into_owned();
                return Err(Status::internal(format!("commit not resolved for {path:?}")));
            };
            // Neighbours often come from the same commit.
            if known.as_ref().is_none_or(|commit| commit.id.as_bytes() != id) {
                known = objects.commit(&id).await?;
            }
            commits.push(CommitForTree { commit: known.clone(), path_bytes: entry.path });
            if commits.len() >= COMMITS_PER_MESSAGE {
                let commits = std::mem::take(&mut commits);
                messages.send(ListLastCommitsForTreeResponse { commits }).await?;
            }
        }
        objects.close().await?;
        if commits.is_empty() {
            return Ok(());
        }
        messages.send(ListLastCommitsForTreeResponse { commits }).await
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_stay_in_the_tree() {
        for path in ["a", "a/b/", "./a", "a/../b", ".", "a//b", "..a"] {
            assert!(is_local(path.as_bytes()), "{path}");
        }
        for path in ["", "/a", "..", "a/../..", "../a", "./.."] {
            assert!(!is_local(path.as_bytes()), "{path}");
        }
    }
}
