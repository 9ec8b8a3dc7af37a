//! Listings of references, branches and tags: `git for-each-ref`, read as it prints.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use tabularium_proto::gitaly::{
    Branch, FindAllBranchesRequest, FindAllBranchesResponse, FindAllRemoteBranchesRequest,
    FindAllRemoteBranchesResponse, FindAllTagsRequest, FindAllTagsResponse, FindLocalBranchesRequest,
    FindLocalBranchesResponse, GitCommit, ListRefsRequest, ListRefsResponse, PaginationCursor,
    PaginationParameter, SortDirection, find_all_branches_response, find_all_tags_request,
    find_local_branches_request, list_refs_request, list_refs_response,
};
use tonic::{Response, Status};

use crate::{
    git::{Exit, GitCommand, catfile::CatFile, lines::Lines, references, revision},
    node::Node,
    services::{
        listing::{self, ITEMS_PER_MESSAGE, Messages, Page, Verdict, unknown_page_token},
        streams::ResponseStream,
    },
    storage::RepositoryPath,
};

pub(super) const SUBCOMMAND: &str = "for-each-ref";

/// One line of the listing.
struct Listed {
    id: String,
    name: Vec<u8>,
    peeled: String,
}

fn parse(line: &[u8]) -> Option<Listed> {
    let mut words = line.splitn(3, |byte| *byte == b' ');
    let id = String::from_utf8_lossy(words.next()?).into_owned();
    let name = words.next()?.to_vec();
    let peeled = String::from_utf8_lossy(words.next().unwrap_or_default()).into_owned();
    Some(Listed { id, name, peeled })
}

/// A listing that is running, cut to a page.
struct Listing {
    lines: Lines,
    page: Page,
}

impl Listing {
    async fn start(command: GitCommand, page: Page) -> Result<Self, Status> {
        Ok(Self { lines: Lines::start(command, SUBCOMMAND, b'\n').await?, page })
    }

    /// The next reference on the page, or whether there are more behind it.
    async fn next(&mut self) -> Result<Result<Listed, bool>, Status> {
        while let Some(line) = self.lines.next().await? {
            let Some(listed) = parse(&line) else { continue };
            match self.page.admit(&listed.name) {
                Verdict::Skip => {}
                Verdict::Take => return Ok(Ok(listed)),
                Verdict::Stop => return Ok(Err(true)),
            }
        }
        Ok(Err(false))
    }

    async fn finish(self, more: bool) -> Result<(), Status> {
        if more {
            return Ok(());
        }
        let (exit, _) = self.lines.finish().await?;
        if let Exit { code: Some(code @ 1..) } = exit {
            return Err(Status::internal(format!("finding refs: listing failed with exit code {code}")));
        }
        if !exit.success() {
            return Err(Status::internal(format!("finding refs: {exit}")));
        }
        if self.page.token_missing() { Err(unknown_page_token()) } else { Ok(()) }
    }
}

fn command(node: &Node, repository: &RepositoryPath, sort: &str) -> GitCommand {
    node.git
        .command(repository, SUBCOMMAND)
        .args(["--format=%(objectname) %(refname) %(*objectname)"])
        .arg(format!("--sort={sort}"))
}

fn descending(key: &str, direction: i32) -> String {
    let sign = if direction == SortDirection::Descending as i32 { "-" } else { "" };
    format!("{sign}{key}")
}

/// The page token of ListRefs.
#[derive(Serialize, Deserialize)]
struct RefToken {
    ref_name: String,
}

fn ref_page(parameters: Option<&PaginationParameter>) -> Result<Page, Status> {
    let Some(parameters) = parameters else { return Ok(Page::whole()) };
    let mut after = String::new();
    if !parameters.page_token.is_empty() {
        let decoded = STANDARD.decode(&parameters.page_token).map_err(|_| unknown_page_token())?;
        let token: RefToken = serde_json::from_slice(&decoded).map_err(|_| unknown_page_token())?;
        after = token.ref_name;
    }
    Ok(Page::new(after.as_bytes(), usize::try_from(parameters.limit).ok()))
}

fn ref_cursor(name: &[u8]) -> Result<PaginationCursor, Status> {
    let token = RefToken { ref_name: String::from_utf8_lossy(name).into_owned() };
    let token = serde_json::to_vec(&token).map_err(|error| Status::internal(error.to_string()))?;
    Ok(PaginationCursor { next_cursor: STANDARD.encode(token) })
}

pub(super) fn list_refs(
    node: &Arc<Node>,
    request: &ListRefsRequest,
) -> Result<Response<ResponseStream<ListRefsResponse>>, Status> {
    use list_refs_request::sort_by::Key;
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.patterns.is_empty() {
        return Err(Status::invalid_argument("patterns must have at least one entry"));
    }
    let sort = request.sort_by.unwrap_or_default();
    let key = match Key::try_from(sort.key) {
        Ok(Key::Refname) => "refname",
        Ok(Key::Creatordate) => "creatordate",
        Ok(Key::Authordate) => "authordate",
        Ok(Key::Committerdate) => "committerdate",
        Err(_) => {
            let text = format!("sorting key \"{}\" is not supported", sort.key);
            return Err(Status::invalid_argument(text));
        }
    };
    let mut command = command(node, &repository, &descending(key, sort.direction));
    for id in &request.pointing_at_oids {
        revision::check(id).map_err(|error| Status::invalid_argument(error.to_string()))?;
        command = command.arg(OsStr::from_bytes(&[b"--points-at=", id.as_slice()].concat()));
    }
    if request.ignore_case {
        command = command.arg("--ignore-case");
    }
    // Needs git 2.42; an older one refuses it and says so.
    for pattern in &request.exclude_patterns {
        command = command.arg(OsStr::from_bytes(&[b"--exclude=", pattern.as_slice()].concat()));
    }
    command = command.arg("--").args(request.patterns.iter().map(|pattern| OsStr::from_bytes(pattern)));
    let page = ref_page(request.pagination_params.as_ref())?;
    let paged = request.pagination_params.is_some();
    let (head, peel) = (request.head, request.peel_tags);
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListRefs", |messages| async move {
        if page.is_empty() {
            return Ok(());
        }
        let mut batch = Vec::new();
        let mut last = Vec::new();
        if head && let Some(target) = references::resolve(&node.git, &repository, b"HEAD").await? {
            batch.push(list_refs_response::Reference {
                name: b"HEAD".to_vec(),
                target,
                peeled_target: String::new(),
            });
        }
        let mut listing = Listing::start(command, page).await?;
        let mut any = false;
        let more = loop {
            match listing.next().await? {
                Err(more) => break more,
                Ok(listed) => {
                    any = true;
                    if batch.len() >= ITEMS_PER_MESSAGE {
                        let references = std::mem::take(&mut batch);
                        messages.send(ListRefsResponse { references, pagination_cursor: None }).await?;
                    }
                    last.clone_from(&listed.name);
                    let peeled_target = if peel { listed.peeled } else { String::new() };
                    batch.push(list_refs_response::Reference {
                        name: listed.name,
                        target: listed.id,
                        peeled_target,
                    });
                }
            }
        };
        listing.finish(more).await?;
        // A head without any reference is not worth a message to Gitaly.
        if any {
            let pagination_cursor = if paged && more { Some(ref_cursor(&last)?) } else { None };
            messages.send(ListRefsResponse { references: batch, pagination_cursor }).await?;
        }
        Ok(())
    }))
}

pub(super) fn find_local_branches(
    node: &Arc<Node>,
    request: &FindLocalBranchesRequest,
) -> Result<Response<ResponseStream<FindLocalBranchesResponse>>, Status> {
    use find_local_branches_request::SortBy;
    let repository = node.storages.open(request.repository.as_ref())?;
    let sort = match SortBy::try_from(request.sort_by) {
        Ok(SortBy::Name) => "refname",
        Ok(SortBy::UpdatedAsc) => "committerdate",
        Ok(SortBy::UpdatedDesc) => "-committerdate",
        Err(_) => return Err(Status::invalid_argument("unknown sort key")),
    };
    let mut command = command(node, &repository, sort);
    for pattern in &request.exclude_patterns {
        command = command.arg(OsStr::from_bytes(&[b"--exclude=", pattern.as_slice()].concat()));
    }
    let command = command.args(["--", "refs/heads/"]);
    let page = Page::of_references(request.pagination_params.as_ref());
    Ok(branches(node, repository, command, page, "FindLocalBranches", |local_branches| {
        FindLocalBranchesResponse { local_branches }
    }))
}

pub(super) fn find_all_branches(
    node: &Arc<Node>,
    request: FindAllBranchesRequest,
) -> Result<Response<ResponseStream<FindAllBranchesResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    for name in &request.merged_branches {
        revision::check_argument(name)
            .map_err(|error| Status::internal(format!("finding refs: spawning for-each-ref: {error}")))?;
    }
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "FindAllBranches", |messages| async move {
        let mut command = command(&node, &repository, "refname");
        let mut patterns: Vec<&[u8]> = vec![b"refs/heads/", b"refs/remotes/"];
        if request.merged_only {
            // Without a default branch git refuses what follows, and so do we.
            let branch = references::default_branch(&node.git, &repository).await?.unwrap_or_default();
            command = command.arg(OsStr::from_bytes(&[b"--merged=", branch.as_slice()].concat()));
            if !request.merged_branches.is_empty() {
                patterns = request.merged_branches.iter().map(Vec::as_slice).collect();
            }
        }
        let command = command.arg("--").args(patterns.into_iter().map(OsStr::from_bytes));
        let wrap = |branches: Vec<Branch>| FindAllBranchesResponse {
            branches: branches
                .into_iter()
                .map(|Branch { name, target_commit }| find_all_branches_response::Branch {
                    name,
                    target: target_commit,
                })
                .collect(),
        };
        send_branches(&node, &repository, command, Page::whole(), &messages, wrap).await
    }))
}

pub(super) fn find_all_remote_branches(
    node: &Arc<Node>,
    request: &FindAllRemoteBranchesRequest,
) -> Result<Response<ResponseStream<FindAllRemoteBranchesResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.remote_name.is_empty() {
        return Err(Status::invalid_argument("empty RemoteName"));
    }
    let pattern = format!("refs/remotes/{}", request.remote_name);
    let command = command(node, &repository, "refname").args(["--", &pattern]);
    let name = "FindAllRemoteBranches";
    Ok(branches(node, repository, command, Page::whole(), name, |branches| FindAllRemoteBranchesResponse {
        branches,
    }))
}

/// The commit a branch points to. A reference may lead to something else, but not to nothing.
pub(super) async fn branch_commit(objects: &mut CatFile, id: &str) -> Result<Option<GitCommit>, Status> {
    let commit = objects.commit(id.as_bytes()).await?;
    if commit.is_none() && objects.info(id.as_bytes()).await?.is_none() {
        return Err(Status::internal(format!("object {id} is missing")));
    }
    Ok(commit)
}

fn branches<T: Send + 'static>(
    node: &Arc<Node>,
    repository: RepositoryPath,
    command: GitCommand,
    page: Page,
    name: &'static str,
    wrap: fn(Vec<Branch>) -> T,
) -> Response<ResponseStream<T>> {
    let node = Arc::clone(node);
    listing::stream(&node.tasks.clone(), name, move |messages| async move {
        send_branches(&node, &repository, command, page, &messages, wrap).await
    })
}

async fn send_branches<T>(
    node: &Node,
    repository: &RepositoryPath,
    command: GitCommand,
    page: Page,
    messages: &Messages<T>,
    wrap: fn(Vec<Branch>) -> T,
) -> Result<(), Status> {
    if page.is_empty() {
        return Ok(());
    }
    let (reading, listing) = node.git.two_slots().await?;
    let mut objects = CatFile::start_in(&node.git, repository, &reading).await?;
    let mut listing = Listing::start(command.slot(&listing), page).await?;
    let mut batch = Vec::new();
    let more = loop {
        match listing.next().await? {
            Err(more) => break more,
            Ok(listed) => {
                let target_commit = branch_commit(&mut objects, &listed.id).await?;
                batch.push(Branch { name: listed.name, target_commit });
                if batch.len() >= ITEMS_PER_MESSAGE {
                    messages.send(wrap(std::mem::take(&mut batch))).await?;
                }
            }
        }
    };
    listing.finish(more).await?;
    objects.close().await?;
    if batch.is_empty() { Ok(()) } else { messages.send(wrap(batch)).await }
}

pub(super) fn find_all_tags(
    node: &Arc<Node>,
    request: &FindAllTagsRequest,
) -> Result<Response<ResponseStream<FindAllTagsResponse>>, Status> {
    use find_all_tags_request::sort_by::Key;
    let repository = node.storages.open(request.repository.as_ref())?;
    let sort = request.sort_by.unwrap_or_default();
    let key = match Key::try_from(sort.key) {
        Ok(Key::Refname) => "refname",
        Ok(Key::Creatordate) => "creatordate",
        Ok(Key::VersionRefname) => "version:refname",
        Err(_) => {
            return Err(Status::invalid_argument(format!("unsupported sorting key: {}", sort.key)));
        }
    };
    let command = command(node, &repository, &descending(key, sort.direction)).args(["--", "refs/tags/"]);
    let page = Page::of_references(request.pagination_params.as_ref());
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "FindAllTags", |messages| async move {
        if page.is_empty() {
            return Ok(());
        }
        let (reading, listing) = node.git.two_slots().await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let mut listing = Listing::start(command.slot(&listing), page).await?;
        let mut batch = Vec::new();
        let more = loop {
            match listing.next().await? {
                Err(more) => break more,
                Ok(listed) => {
                    let name = listed.name.strip_prefix(b"refs/tags/").unwrap_or(&listed.name);
                    let tag = objects.tag(&listed.id, name).await?;
                    let missing = || Status::internal(format!("object of tag {} is missing", listed.id));
                    batch.push(tag.ok_or_else(missing)?);
                    if batch.len() >= ITEMS_PER_MESSAGE {
                        messages.send(FindAllTagsResponse { tags: std::mem::take(&mut batch) }).await?;
                    }
                }
            }
        };
        listing.finish(more).await?;
        objects.close().await?;
        if batch.is_empty() { Ok(()) } else { messages.send(FindAllTagsResponse { tags: batch }).await }
    }))
}
