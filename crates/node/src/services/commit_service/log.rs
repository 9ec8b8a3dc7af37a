//! Commits that `git log` finds: FindCommits, FindAllCommits, CommitsByMessage.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc};

use tabularium_proto::gitaly::{
    CommitsByMessageRequest, CommitsByMessageResponse, FindAllCommitsRequest, FindAllCommitsResponse,
    FindCommitsError, FindCommitsRequest, FindCommitsResponse, GitCommit, find_all_commits_request,
    find_commits_request,
};
use tonic::{Code, Response, Status};

use super::{history::literal_pathspecs, invalid};
use crate::{
    error::with_detail,
    git::{
        GitCommand,
        catfile::CatFile,
        lines::Lines,
        log::{Details, Entry, Parser},
        references, revision,
    },
    node::Node,
    services::{
        listing::{self, Batch, Messages},
        streams::ResponseStream,
    },
    storage::RepositoryPath,
};

const SUBCOMMAND: &str = "log";

/// `--name=value`, whatever the value.
fn option(command: GitCommand, name: &str, value: &[u8]) -> GitCommand {
    command.arg(OsStr::from_bytes(&[name.as_bytes(), b"=", value].concat()))
}

/// Git would skip other commits when it follows a file, so it is left to us.
fn skips_by_hand(request: &FindCommitsRequest) -> bool {
    request.follow && request.offset > 0
}

fn find_commits_command(command: GitCommand, request: &FindCommitsRequest, details: Details) -> GitCommand {
    let mut command = command.arg(details.format());
    let mut limit = request.limit;
    if skips_by_hand(request) {
        limit = limit.saturating_add(request.offset);
    } else if request.offset > 0 {
        command = command.arg(format!("--skip={}", request.offset));
    }
    command = command.arg(format!("--max-count={limit}"));
    if !request.author.is_empty() {
        command = option(command, "--author", &request.author);
    }
    if let Some(before) = &request.before {
        command = command.arg(format!("--min-age={}", before.seconds));
    }
    if let Some(after) = &request.after {
        command = command.arg(format!("--max-age={}", after.seconds));
    }
    let topological = request.order() == find_commits_request::Order::Topo;
    for (wanted, flag) in [
        (request.follow && !request.paths.is_empty(), "--follow"),
        (request.skip_merges, "--no-merges"),
        (request.all, "--all"),
        (request.all, "--reverse"),
        (request.first_parent, "--first-parent"),
        (topological, "--topo-order"),
        (request.include_shortstat, "--shortstat"),
        (details.references, "--decorate=full"),
    ] {
        if wanted {
            command = command.arg(flag);
        }
    }
    for pattern in &request.include_referenced_by {
        command = option(command, "--decorate-refs", pattern);
    }
    if !request.message_regex.is_empty() {
        command = option(command, "--grep", request.message_regex.as_bytes()).arg("--regexp-ignore-case");
    }
    command = literal_pathspecs(command, request.global_options.as_ref());
    command = command.arg("--end-of-options");
    if !request.revision.is_empty() {
        command = command.arg(OsStr::from_bytes(&request.revision));
    }
    command.arg("--").args(request.paths.iter().map(|path| OsStr::from_bytes(path)))
}

/// What git says when a revision leads nowhere.
fn not_found(stderr: &[u8]) -> bool {
    let stderr = String::from_utf8_lossy(stderr);
    [
        "fatal: ambiguous argument '",
        "fatal: bad object ",
        "fatal: bad revision '",
        "fatal: Invalid revision range ",
    ]
    .iter()
    .any(|beginning| stderr.lines().any(|line| line.starts_with(beginning)))
}

fn no_commits() -> Status {
    with_detail(Code::NotFound, "commits not found", "FindCommitsError", &FindCommitsError::default())
}

pub(super) fn find_commits(
    node: &Arc<Node>,
    mut request: FindCommitsRequest,
) -> Result<Response<ResponseStream<FindCommitsResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check_or_empty(&request.revision).map_err(invalid)?;
    if request.paths.iter().any(Vec::is_empty) {
        return Err(Status::invalid_argument("path is empty string"));
    }
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "FindCommits", |messages| async move {
        if request.revision.is_empty() && !request.all {
            let branch = references::default_branch(&node.git, &repository).await?;
            request.revision = branch.ok_or_else(no_commits)?;
        }
        let details =
            Details { trailers: request.trailers, references: !request.include_referenced_by.is_empty() };
        let command = node.git.command(&repository, SUBCOMMAND);
        let (reading, listing) = node.git.two_slots().await?;
        let command = find_commits_command(command, &request, details).slot(&listing);
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let mut parts = Lines::start(command, SUBCOMMAND, 0).await?;
        let mut skip = if skips_by_hand(&request) { request.offset } else { 0 };
        let (mut parser, mut batch) = (Parser::default(), Batch::default());
        let mut read = false;
        while !read {
            let malformed = |error| Status::internal(format!("error streaming commits: {error}"));
            let entry = if let Some(part) = parts.next().await? {
                parser.part(&part).map_err(malformed)?
            } else {
                read = true;
                std::mem::take(&mut parser).finish().map_err(malformed)?
            };
            let Some(entry) = entry else { continue };
            if skip > 0 {
                skip -= 1;
                continue;
            }
            if let Some(commits) = batch.push(commit(&mut objects, entry).await?) {
                messages.send(FindCommitsResponse { commits }).await?;
            }
        }
        let (exit, stderr) = parts.finish().await?;
        if !exit.success() {
            let failed = || Status::internal("listing commits failed");
            return Err(if not_found(&stderr) { no_commits() } else { failed() });
        }
        objects.close().await?;
        match batch.rest() {
            Some(commits) => messages.send(FindCommitsResponse { commits }).await,
            None => Ok(()),
        }
    }))
}

async fn commit(objects: &mut CatFile, entry: Entry) -> Result<GitCommit, Status> {
    let missing = || {
        let id = String::from_utf8_lossy(&entry.id);
        Status::internal(format!("error streaming commits: cat-file get commit {id:?}: object not found"))
    };
    let mut commit = objects.commit(&entry.id).await?.ok_or_else(missing)?;
    commit.trailers = entry.trailers;
    commit.short_stats = entry.stats;
    commit.referenced_by = entry.references;
    Ok(commit)
}

/// Sends the commits that `command`, which has its options and revisions, lists. To Gitaly's clients a revision that does
/// not exist has none.
async fn send_listed<T: Send + 'static>(
    node: &Node,
    repository: &RepositoryPath,
    prepare: impl FnOnce(GitCommand) -> GitCommand,
    messages: Messages<T>,
    wrap: fn(Vec<GitCommit>) -> T,
) -> Result<(), Status> {
    let (reading, listing) = node.git.two_slots().await?;
    let command = node.git.command(repository, SUBCOMMAND).arg("--pretty=%H");
    let mut ids = Lines::start(prepare(command).slot(&listing), SUBCOMMAND, b'\n').await?;
    let mut objects = CatFile::start_in(&node.git, repository, &reading).await?;
    let mut batch = Batch::default();
    while let Some(id) = ids.next().await? {
        let commit = objects.commit(&id).await?.ok_or_else(|| Status::internal("object not found"))?;
        if let Some(commits) = batch.push(commit) {
            messages.send(wrap(commits)).await?;
        }
    }
    ids.finish().await?;
    objects.close().await?;
    match batch.rest() {
        Some(commits) => messages.send(wrap(commits)).await,
        None => Ok(()),
    }
}

fn counted(mut command: GitCommand, skip: i32, max_count: i32) -> GitCommand {
    if max_count > 0 {
        command = command.arg(format!("--max-count={max_count}"));
    }
    if skip > 0 {
        command = command.arg(format!("--skip={skip}"));
    }
    command
}

pub(super) fn find_all_commits(
    node: &Arc<Node>,
    request: FindAllCommitsRequest,
) -> Result<Response<ResponseStream<FindAllCommitsResponse>>, Status> {
    use find_all_commits_request::Order;
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check_or_empty(&request.revision).map_err(invalid)?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "FindAllCommits", |messages| async move {
        let prepare = |command| {
            let command = counted(command, request.skip, request.max_count);
            let command = match request.order() {
                Order::None => command,
                Order::Date => command.arg("--date-order"),
                Order::Topo => command.arg("--topo-order"),
            };
            if request.revision.is_empty() {
                command.args(["--branches", "--"])
            } else {
                command.arg("--end-of-options").arg(OsStr::from_bytes(&request.revision)).arg("--")
            }
        };
        let wrap = |commits| FindAllCommitsResponse { commits };
        send_listed(&node, &repository, prepare, messages, wrap).await
    }))
}

pub(super) fn commits_by_message(
    node: &Arc<Node>,
    mut request: CommitsByMessageRequest,
) -> Result<Response<ResponseStream<CommitsByMessageResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check_or_empty(&request.revision).map_err(invalid)?;
    if request.query.is_empty() {
        return Err(Status::invalid_argument("empty Query"));
    }
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "CommitsByMessage", |messages| async move {
        if request.revision.is_empty() {
            let Some(branch) = references::default_branch(&node.git, &repository).await? else {
                return Ok(());
            };
            request.revision = branch;
        }
        let prepare = |command| {
            let command = option(command, "--grep", request.query.as_bytes()).arg("--regexp-ignore-case");
            let command = counted(command, request.offset, request.limit);
            let command = literal_pathspecs(command, request.global_options.as_ref());
            let command = command.arg("--end-of-options").arg(OsStr::from_bytes(&request.revision)).arg("--");
            if request.path.is_empty() { command } else { command.arg(OsStr::from_bytes(&request.path)) }
        };
        let wrap = |commits| CommitsByMessageResponse { commits };
        send_listed(&node, &repository, prepare, messages, wrap).await
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_git_says_of_missing_revisions() {
        for text in [
            "fatal: bad revision 'x'\n",
            "warning: x\nfatal: bad object 1234\n",
            "fatal: ambiguous argument 'x': unknown revision or path not in the working tree.\nUse '--'\n",
            "fatal: Invalid revision range a..b\n",
        ] {
            assert!(not_found(text.as_bytes()), "{text}");
        }
        assert!(!not_found(b"fatal: --follow requires exactly one pathspec\n"));
    }
}
