//! What is in a commit's tree: single entries with their content, directories, all files.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use tabularium_proto::gitaly::{
    GetTreeEntriesError, GetTreeEntriesRequest, GetTreeEntriesResponse, ListFilesRequest, ListFilesResponse,
    PaginationCursor, PaginationParameter, PathError, ResolveRevisionError, TreeEntry, TreeEntryRequest,
    TreeEntryResponse, get_tree_entries_error, get_tree_entries_request::SortBy, path_error,
    tree_entry::EntryType, tree_entry_response::ObjectType,
};
use tonic::{Code, Response, Status};

use super::invalid;
use crate::{
    error::with_detail,
    git::{
        Slot,
        catfile::{CatFile, ObjectKind, clean_path},
        lines::Lines,
        objects::ItemKind,
        references, revision,
    },
    node::Node,
    services::{
        listing::{self, FLUSH_BYTES, Messages, Page, Verdict},
        streams::ResponseStream,
    },
    storage::RepositoryPath,
};

/// Directories with a single subdirectory are shown as one path, at most so many of them.
const MAX_FLAT_DEPTH: usize = 10;
/// Most that is kept to be sorted.
const MAX_SORTED_BYTES: usize = 256 * 1024 * 1024;
/// Bytes of an entry beside its path, for the size of messages.
const ENTRY_OVERHEAD: usize = 128;

pub(super) fn tree_entry(
    node: &Arc<Node>,
    request: TreeEntryRequest,
) -> Result<Response<ResponseStream<TreeEntryResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check(&request.revision).map_err(invalid)?;
    if request.path.is_empty() {
        return Err(Status::invalid_argument("empty Path"));
    }
    if request.limit < 0 {
        return Err(Status::invalid_argument("negative Limit"));
    }
    if request.max_size < 0 {
        return Err(Status::invalid_argument("negative MaxSize"));
    }
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "TreeEntry", |messages| async move {
        let mut objects = CatFile::start(&node.git, &repository).await?;
        let found = objects.entry(&request.revision, &request.path).await?;
        let entry = found.ok_or_else(|| Status::not_found("tree entry not found"))?;
        let mode = i32::try_from(entry.mode).unwrap_or_default();
        let kind = ItemKind::of_mode(entry.mode);
        let mut first = TreeEntryResponse { mode, oid: entry.id.clone(), ..TreeEntryResponse::default() };
        if kind == ItemKind::Commit {
            first.set_type(ObjectType::Commit);
            objects.close().await?;
            return messages.send(first).await;
        }
        let missing = || Status::internal(format!("object {} is missing", entry.id));
        let info = objects.info(entry.id.as_bytes()).await?.ok_or_else(missing)?;
        first.size = i64::try_from(info.size).unwrap_or(i64::MAX);
        if kind == ItemKind::Tree {
            first.set_type(ObjectType::Tree);
            objects.close().await?;
            return messages.send(first).await;
        }
        first.set_type(ObjectType::Blob);
        if request.max_size > 0 && first.size > request.max_size {
            return Err(Status::failed_precondition(format!(
                "object size ({}) is bigger than the maximum allowed size ({})",
                first.size, request.max_size
            )));
        }
        let limit = if request.limit == 0 { u64::MAX } else { request.limit.unsigned_abs() };
        let mut left = limit.min(info.size);
        objects.open(entry.id.as_bytes()).await?.ok_or_else(missing)?;
        let mut message = first;
        while left > 0 {
            let Some(piece) = objects.chunk().await? else { break };
            let wanted = usize::try_from(left).map_or(piece.len(), |left| left.min(piece.len()));
            message.data = piece.slice(..wanted).to_vec();
            left = left.saturating_sub(u64::try_from(wanted).unwrap_or(u64::MAX));
            messages.send(std::mem::take(&mut message)).await?;
        }
        objects.close().await?;
        // A file without content is its metadata.
        if message.oid.is_empty() { Ok(()) } else { messages.send(message).await }
    }))
}

/// The page token of GetTreeEntries: the path of the last entry, and the tree that it was in, which is the one to go on
/// with wherever the revision leads by then. Old clients send an object id instead.
#[derive(Serialize, Deserialize)]
struct Token {
    file_name: String,
    #[serde(default)]
    tree_oid: String,
}

/// Which entries are wanted, and by what they are told apart.
#[derive(Clone)]
struct EntryPage {
    page: Page,
    by_id: bool,
    token: String,
    /// The tree of the page before, if it is known.
    tree: String,
}

impl EntryPage {
    fn of(parameters: Option<&PaginationParameter>) -> Self {
        let Some(parameters) = parameters else {
            return Self { page: Page::whole(), by_id: false, token: String::new(), tree: String::new() };
        };
        let decoded = STANDARD.decode(&parameters.page_token).ok();
        let decoded = decoded.and_then(|decoded| serde_json::from_slice::<Token>(&decoded).ok());
        let limit = usize::try_from(parameters.limit).ok();
        let by_id = decoded.is_none();
        let Token { file_name: token, tree_oid: tree } = decoded
            .unwrap_or_else(|| Token { file_name: parameters.page_token.clone(), tree_oid: String::new() });
        Self { page: Page::new(token.as_bytes(), limit), by_id, token, tree }
    }

    fn admit(&mut self, entry: &Line) -> Verdict {
        let path = String::from_utf8_lossy(&entry.path);
        self.page.admit(if self.by_id { entry.id.as_bytes() } else { path.as_bytes() })
    }
}

/// One line of `git ls-tree -z`.
#[derive(Clone)]
pub(super) struct Line {
    mode: i32,
    pub(super) kind: ItemKind,
    pub(super) id: String,
    pub(super) path: Vec<u8>,
}

pub(super) fn parse_line(line: &[u8]) -> Option<Line> {
    let tab = line.iter().position(|byte| *byte == b'\t')?;
    let mut words = std::str::from_utf8(line.get(..tab)?).ok()?.split(' ');
    let mode = u32::from_str_radix(words.next()?, 8).ok()?;
    let id = words.nth(1)?.to_owned();
    let path = line.get(tab + 1..)?.to_vec();
    Some(Line { mode: i32::try_from(mode).ok()?, kind: ItemKind::of_mode(mode), id, path })
}

/// The tree that is listed.
struct Listed {
    repository: RepositoryPath,
    tree: String,
    prefix: Vec<u8>,
    recursive: bool,
    /// Room for the pass that is running.
    slot: Slot,
}

impl Listed {
    async fn lines(&self, node: &Node) -> Result<Lines, Status> {
        let mut command = node.git.command(&self.repository, "ls-tree").args(["-z", "--full-tree"]);
        if self.recursive {
            command = command.args(["-r", "-t"]);
        }
        Ok(Lines::start(command.slot(&self.slot).arg(&self.tree), "ls-tree", 0).await?)
    }

    /// The next entry of one of these kinds, with its path from the root.
    async fn next(&self, lines: &mut Lines, kind: Option<ItemKind>) -> Result<Option<Line>, Status> {
        while let Some(line) = lines.next().await? {
            let Some(mut line) = parse_line(&line) else {
                return Err(Status::internal("git ls-tree printed an unknown line"));
            };
            if kind.is_some_and(|kind| kind != line.kind) {
                continue;
            }
            if !self.prefix.is_empty() {
                line.path = [self.prefix.as_slice(), b"/", &line.path].concat();
            }
            return Ok(Some(line));
        }
        Ok(None)
    }
}

/// Sorting by type is one pass for each type: nothing needs to be kept.
fn passes(sort: SortBy) -> &'static [Option<ItemKind>] {
    match sort {
        SortBy::TreesFirst => &[Some(ItemKind::Tree), Some(ItemKind::Blob), Some(ItemKind::Commit)],
        SortBy::Default | SortBy::Filesystem => &[None],
    }
}

/// The entries in their order.
struct Entries<'a> {
    node: &'a Node,
    listed: &'a Listed,
    passes: std::slice::Iter<'static, Option<ItemKind>>,
    running: Option<(Lines, Option<ItemKind>)>,
    sorted: Option<std::vec::IntoIter<Line>>,
}

impl<'a> Entries<'a> {
    async fn start(node: &'a Node, listed: &'a Listed, sort: SortBy) -> Result<Self, Status> {
        let mut entries = Self { node, listed, passes: passes(sort).iter(), running: None, sorted: None };
        if sort == SortBy::Filesystem {
            // Git has another order, so all have to be there before the first is known.
            let (mut lines, mut bytes) = (Vec::new(), 0);
            while let Some(line) = entries.next().await? {
                bytes += line.path.len() + ENTRY_OVERHEAD;
                if bytes > MAX_SORTED_BYTES {
                    return Err(Status::internal("too many tree entries to be sorted"));
                }
                lines.push(line);
            }
            lines.sort_by(|one, other| one.path.cmp(&other.path));
            entries.sorted = Some(lines.into_iter());
        }
        Ok(entries)
    }

    async fn next(&mut self) -> Result<Option<Line>, Status> {
        if let Some(sorted) = &mut self.sorted {
            return Ok(sorted.next());
        }
        loop {
            if let Some((lines, kind)) = &mut self.running
                && let Some(line) = self.listed.next(lines, *kind).await?
            {
                return Ok(Some(line));
            }
            if let Some((lines, _)) = self.running.take() {
                lines.checked().await?;
            }
            let Some(kind) = self.passes.next() else { return Ok(None) };
            self.running = Some((self.listed.lines(self.node).await?, *kind));
        }
    }
}

fn resolve_error(code: Code, text: &str, revision: &[u8]) -> Status {
    let error =
        get_tree_entries_error::Error::ResolveTree(ResolveRevisionError { revision: revision.to_vec() });
    with_detail(code, text, "GetTreeEntriesError", &GetTreeEntriesError { error: Some(error) })
}

pub(super) fn get_tree_entries(
    node: &Arc<Node>,
    request: GetTreeEntriesRequest,
) -> Result<Response<ResponseStream<GetTreeEntriesResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check(&request.revision).map_err(invalid)?;
    if request.path.is_empty() {
        let error = get_tree_entries_error::Error::Path(PathError {
            path: Vec::new(),
            error_type: path_error::ErrorType::EmptyPath as i32,
        });
        let detail = GetTreeEntriesError { error: Some(error) };
        return Err(with_detail(Code::InvalidArgument, "empty path", "GetTreeEntriesError", &detail));
    }
    let sort = SortBy::try_from(request.sort).map_err(|_| Status::invalid_argument("unknown sort key"))?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "GetTreeEntries", |messages| async move {
        let (reading, listing) = node.git.two_slots().await?;
        let mut objects = CatFile::start_in(&node.git, &repository, &reading).await?;
        let page = EntryPage::of(request.pagination_params.as_ref());
        let listed = resolve_tree(&mut objects, repository, &request, &page.tree, listing).await?;
        // Whatever the client calls it.
        let commit_oid = String::from_utf8_lossy(&request.revision).into_owned();
        if page.page.is_empty() {
            return objects.close().await.map_err(Status::from);
        }
        let mut sender = Sender {
            messages,
            entries: Vec::new(),
            bytes: 0,
            cursor: Some(PaginationCursor {
                next_cursor: if request.pagination_params.is_some() {
                    find_cursor(&node, &listed, sort, page.clone()).await?
                } else {
                    String::new()
                },
            }),
        };
        let flat = !request.recursive && !request.skip_flat_paths;
        send_page(&node, &listed, sort, page, flat.then_some(&mut objects), &commit_oid, &mut sender).await?;
        sender.flush().await?;
        objects.close().await.map_err(Status::from)
    }))
}

async fn resolve_tree(
    objects: &mut CatFile,
    repository: RepositoryPath,
    request: &GetTreeEntriesRequest,
    tree: &str,
    slot: Slot,
) -> Result<Listed, Status> {
    let prefix = clean_path(&request.path).to_vec();
    let name = if !tree.is_empty() {
        format!("{tree}^{{tree}}").into_bytes()
    } else if prefix.is_empty() {
        [request.revision.as_slice(), b"^{tree}"].concat()
    } else {
        [request.revision.as_slice(), b":", &prefix].concat()
    };
    let Some(info) = objects.info(&name).await? else {
        let code = if request.recursive { Code::NotFound } else { Code::InvalidArgument };
        return Err(resolve_error(code, "invalid revision or path", &request.revision));
    };
    if info.kind != ObjectKind::Tree {
        return Err(resolve_error(Code::InvalidArgument, "path not treeish", &request.revision));
    }
    Ok(Listed { repository, tree: info.id, prefix, recursive: request.recursive, slot })
}

/// The token of the page after this one, empty if there is none. It travels in the first message, so it is found in a
/// pass of its own.
async fn find_cursor(
    node: &Node,
    listed: &Listed,
    sort: SortBy,
    mut page: EntryPage,
) -> Result<String, Status> {
    let mut last = Vec::new();
    let mut entries = Entries::start(node, listed, sort).await?;
    while let Some(line) = entries.next().await? {
        match page.admit(&line) {
            Verdict::Skip => {}
            Verdict::Take => last = line.path,
            Verdict::Stop => {
                let file_name = String::from_utf8_lossy(&last).into_owned();
                let token = Token { file_name, tree_oid: listed.tree.clone() };
                let token =
                    serde_json::to_vec(&token).map_err(|error| Status::internal(error.to_string()))?;
                return Ok(STANDARD.encode(token));
            }
        }
    }
    if page.page.token_missing() {
        return Err(Status::internal(format!("could not find starting OID: {}", page.token)));
    }
    Ok(String::new())
}

struct Sender {
    messages: Messages<GetTreeEntriesResponse>,
    entries: Vec<TreeEntry>,
    bytes: usize,
    cursor: Option<PaginationCursor>,
}

impl Sender {
    async fn push(&mut self, entry: TreeEntry) -> Result<(), Status> {
        self.bytes += entry.path.len() + entry.flat_path.len() + ENTRY_OVERHEAD;
        self.entries.push(entry);
        if self.bytes >= FLUSH_BYTES { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), Status> {
        if self.entries.is_empty() {
            return Ok(());
        }
        self.bytes = 0;
        let entries = std::mem::take(&mut self.entries);
        let pagination_cursor = self.cursor.take();
        self.messages.send(GetTreeEntriesResponse { entries, pagination_cursor }).await
    }
}

async fn send_page(
    node: &Node,
    listed: &Listed,
    sort: SortBy,
    mut page: EntryPage,
    mut flat: Option<&mut CatFile>,
    commit_oid: &str,
    sender: &mut Sender,
) -> Result<(), Status> {
    let mut entries = Entries::start(node, listed, sort).await?;
    while let Some(line) = entries.next().await? {
        match page.admit(&line) {
            Verdict::Skip => continue,
            Verdict::Take => {}
            Verdict::Stop => return Ok(()),
        }
        let flat_path = match &mut flat {
            Some(objects) => flat_path(objects, &line).await?,
            None => Vec::new(),
        };
        let kind = match line.kind {
            ItemKind::Blob => EntryType::Blob,
            ItemKind::Tree => EntryType::Tree,
            ItemKind::Commit => EntryType::Commit,
        };
        let entry = TreeEntry {
            oid: line.id,
            path: line.path,
            r#type: kind as i32,
            mode: line.mode,
            commit_oid: commit_oid.to_owned(),
            flat_path,
        };
        sender.push(entry).await?;
    }
    Ok(())
}

async fn flat_path(objects: &mut CatFile, line: &Line) -> Result<Vec<u8>, Status> {
    let mut path = line.path.clone();
    if line.kind != ItemKind::Tree {
        return Ok(path);
    }
    let mut tree = line.id.clone();
    for _ in 1..MAX_FLAT_DEPTH {
        let Some(items) = objects.tree(tree.as_bytes()).await? else { break };
        let [only] = items.as_slice() else { break };
        if ItemKind::of_mode(only.mode) != ItemKind::Tree {
            break;
        }
        path.push(b'/');
        path.extend_from_slice(&only.name);
        tree.clone_from(&only.id);
    }
    Ok(path)
}

pub(super) fn list_files(
    node: &Arc<Node>,
    request: ListFilesRequest,
) -> Result<Response<ResponseStream<ListFilesResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check_or_empty(&request.revision).map_err(invalid)?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "ListFiles", |messages| async move {
        let revision = if request.revision.is_empty() {
            references::default_branch(&node.git, &repository)
                .await?
                .ok_or_else(|| Status::failed_precondition("repository does not have a default branch"))?
        } else {
            request.revision
        };
        let tree = [revision.as_slice(), b"^{tree}"].concat();
        let Some(tree) = references::resolve(&node.git, &repository, &tree).await? else {
            return messages.send(ListFilesResponse { paths: Vec::new() }).await;
        };
        let command = node.git.command(&repository, "ls-tree").args(["-z", "-r", "--full-tree"]);
        let mut lines = Lines::start(command.arg(OsStr::from_bytes(tree.as_bytes())), "ls-tree", 0).await?;
        let (mut paths, mut bytes) = (Vec::new(), 0);
        while let Some(line) = lines.next().await? {
            let Some(line) = parse_line(&line).filter(|line| line.kind == ItemKind::Blob) else { continue };
            bytes += line.path.len() + 8;
            paths.push(line.path);
            if bytes >= FLUSH_BYTES {
                bytes = 0;
                messages.send(ListFilesResponse { paths: std::mem::take(&mut paths) }).await?;
            }
        }
        lines.checked().await?;
        if paths.is_empty() { Ok(()) } else { messages.send(ListFilesResponse { paths }).await }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_ls_tree() {
        let line = parse_line(b"160000 commit aabb\ta\tb\n\xff").unwrap();
        assert_eq!((line.mode, line.kind, line.id.as_str()), (0o160_000, ItemKind::Commit, "aabb"));
        assert_eq!(line.path, b"a\tb\n\xff");
        assert!(parse_line(b"100644 blob").is_none());
    }

    #[test]
    fn page_tokens() {
        let parameters = |page_token: &str| PaginationParameter { page_token: page_token.into(), limit: 5 };
        let path = EntryPage::of(Some(&parameters(&STANDARD.encode(br#"{"file_name":"a/b"}"#))));
        assert_eq!((path.by_id, path.token.as_str()), (false, "a/b"));
        let tree =
            EntryPage::of(Some(&parameters(&STANDARD.encode(br#"{"file_name":"a","tree_oid":"cc"}"#))));
        assert_eq!((tree.token.as_str(), tree.tree.as_str()), ("a", "cc"));
        let id = EntryPage::of(Some(&parameters("aabb")));
        assert_eq!((id.by_id, id.token.as_str()), (true, "aabb"));
    }
}
