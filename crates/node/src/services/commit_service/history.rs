//! Finding, listing and counting commits.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc};

use tabularium_proto::gitaly::{
    CountCommitsRequest, CountCommitsResponse, FindCommitRequest, FindCommitResponse, GlobalOptions,
    ListCommitsByOidRequest, ListCommitsByOidResponse, ListCommitsRequest, ListCommitsResponse,
    PaginationCursor, list_commits_request::Order,
};
use tonic::{Response, Status};

use super::invalid;
use crate::{
    git::{GitCommand, catfile::CatFile, lines::Lines, objects, revision},
    node::Node,
    services::{
        listing::{self, Batch, Page, Verdict, unknown_page_token},
        streams::ResponseStream,
    },
};

pub(super) async fn find_commit(
    node: &Node,
    request: FindCommitRequest,
) -> Result<Response<FindCommitResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check(&request.revision).map_err(invalid)?;
    let mut objects = CatFile::start(&node.git, &repository).await?;
    let mut commit = objects.commit(&request.revision).await?;
    objects.close().await?;
    if let Some(commit) = commit.as_mut().filter(|_| request.trailers) {
        let command = node.git.command(&repository, "show").reads();
        let format = "--format=%(trailers:unfold,separator=%x00)";
        let output = command.args(["--no-patch", format, &commit.id]).checked().await?;
        commit.trailers = objects::parse_trailers(&output);
    }
    Ok(Response::new(FindCommitResponse { commit }))
}

pub(super) fn literal_pathspecs(command: GitCommand, options: Option<&GlobalOptions>) -> GitCommand {
    if options.is_some_and(|options| options.literal_pathspecs) {
        command.env("GIT_LITERAL_PATHSPECS", "1")
    } else {
        command
    }
}

fn option(name: &str, value: &[u8]) -> Vec<u8> {
    [name.as_bytes(), value].concat()
}

/// `git rev-list` for the request; everything that becomes an argument has been checked or follows an equals sign.
fn rev_list(command: GitCommand, request: &ListCommitsRequest) -> Result<GitCommand, Status> {
    let order = Order::try_from(request.order).map_err(|_| Status::invalid_argument("unknown order"))?;
    let mut command = match order {
        Order::None => command,
        Order::Topo => command.arg("--topo-order"),
        Order::Date => command.arg("--date-order"),
    };
    for (wanted, flag) in [
        (request.first_parent, "--first-parent"),
        (request.disable_walk, "--no-walk"),
        (request.reverse, "--reverse"),
        (request.ignore_case, "--regexp-ignore-case"),
    ] {
        if wanted {
            command = command.arg(flag);
        }
    }
    if request.max_parents > 0 {
        command = command.arg(format!("--max-parents={}", request.max_parents));
    }
    if request.skip > 0 {
        command = command.arg(format!("--skip={}", request.skip));
    }
    if let Some(after) = &request.after {
        command = command.arg(format!("--max-age={}", after.seconds));
    }
    if let Some(before) = &request.before {
        command = command.arg(format!("--min-age={}", before.seconds));
    }
    if !request.author.is_empty() {
        command = command.arg(OsStr::from_bytes(&option("--author=", &request.author)));
    }
    for pattern in &request.commit_message_patterns {
        command = command.arg(OsStr::from_bytes(&option("--grep=", pattern)));
    }
    let command = literal_pathspecs(command, request.global_options.as_ref());
    let paths = request.paths.iter().map(|path| OsStr::from_bytes(path));
    Ok(command.args(&request.revisions).arg("--").args(paths))
}

pub(super) fn list_commits(
    node: &Arc<Node>,
    request: &ListCommitsRequest,
) -> Result<Response<ResponseStream<ListCommitsResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.revisions.is_empty() {
        return Err(Status::invalid_argument("missing revisions"));
    }
    for name in &request.revisions {
        revision::check_pseudo(name.as_bytes())
            .map_err(|error| Status::invalid_argument(format!("invalid revision: {error}")))?;
    }
    let command = rev_list(node.git.command(&repository, "rev-list"), request)?;
    let mut page = Page::of_commits(request.pagination_params.as_ref());
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListCommits", |messages| async move {
        let (reading, listing) = node.git.two_slots().await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let mut ids = Lines::start(command.slot(&listing), "rev-list", b'\n').await?;
        let mut batch = Batch::default();
        let mut last = String::new();
        let mut more = false;
        while let Some(id) = ids.next().await? {
            match page.admit(&id) {
                Verdict::Skip => continue,
                Verdict::Take => {}
                Verdict::Stop => {
                    more = true;
                    break;
                }
            }
            let Some(commit) = objects.commit(&id).await? else {
                return Err(Status::internal(format!("commit {} is missing", String::from_utf8_lossy(&id))));
            };
            last.clone_from(&commit.id);
            if let Some(commits) = batch.push(commit) {
                messages.send(ListCommitsResponse { commits, pagination_cursor: None }).await?;
            }
        }
        if !more {
            ids.checked().await?;
            if page.token_missing() {
                return Err(unknown_page_token());
            }
        }
        objects.close().await?;
        let pagination_cursor = more.then_some(PaginationCursor { next_cursor: last });
        let commits = batch.take();
        if commits.is_empty() && pagination_cursor.is_none() {
            return Ok(());
        }
        messages.send(ListCommitsResponse { commits, pagination_cursor }).await
    }))
}

pub(super) fn list_commits_by_oid(
    node: &Arc<Node>,
    request: ListCommitsByOidRequest,
) -> Result<Response<ResponseStream<ListCommitsByOidResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListCommitsByOid", |messages| async move {
        let mut objects = CatFile::start(&node.git, &repository).await?;
        let mut batch = Batch::default();
        // What cannot be a commit's name is a commit that is not there.
        for id in request.oid.into_iter().filter(|id| revision::check(id.as_bytes()).is_ok()) {
            let Some(commit) = objects.commit(id.as_bytes()).await? else { continue };
            if let Some(commits) = batch.push(commit) {
                messages.send(ListCommitsByOidResponse { commits }).await?;
            }
        }
        objects.close().await?;
        match batch.rest() {
            Some(commits) => messages.send(ListCommitsByOidResponse { commits }).await,
            None => Ok(()),
        }
    }))
}

pub(super) async fn count_commits(
    node: &Node,
    request: CountCommitsRequest,
) -> Result<Response<CountCommitsResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check_or_empty(&request.revision).map_err(invalid)?;
    for name in &request.revisions {
        revision::check_pseudo(name).map_err(invalid)?;
    }
    if request.revision.is_empty() && request.revisions.is_empty() && !request.all {
        return Err(Status::invalid_argument("empty Revision and false All"));
    }
    let mut command = node.git.command(&repository, "rev-list").reads().arg("--count");
    command = literal_pathspecs(command, request.global_options.as_ref());
    if let Some(after) = &request.after {
        command = command.arg(format!("--max-age={}", after.seconds));
    }
    if let Some(before) = &request.before {
        command = command.arg(format!("--min-age={}", before.seconds));
    }
    if request.max_count > 0 {
        command = command.arg(format!("--max-count={}", request.max_count));
    }
    if request.first_parent {
        command = command.arg("--first-parent");
    }
    if request.all {
        command = command.arg("--all");
    }
    if !request.revision.is_empty() {
        command = command.arg(OsStr::from_bytes(&request.revision));
    }
    command = command.args(request.revisions.iter().map(|name| OsStr::from_bytes(name))).arg("--");
    if !request.path.is_empty() {
        command = command.arg(OsStr::from_bytes(&request.path));
    }
    let output = command.output().await?;
    // To Gitaly's clients a revision that does not exist has no commits.
    let count = if output.exit.success() {
        let text = String::from_utf8_lossy(output.stdout.trim_ascii()).into_owned();
        text.parse().map_err(|_| Status::internal(format!("git rev-list --count printed {text:?}")))?
    } else {
        0
    };
    Ok(Response::new(CountCommitsResponse { count }))
}
