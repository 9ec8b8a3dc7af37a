//! CommitDiff and CommitDelta: file by file.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    sync::Arc,
};

use tabularium_proto::gitaly::{
    CommitDelta, CommitDeltaRequest, CommitDeltaResponse, CommitDiffRequest, CommitDiffResponse,
    commit_diff_request::{DiffMode, WhitespaceChanges},
};
use tonic::{Response, Status};

use super::{PATCH_PIECE_BYTES, check_arguments, check_sides, diff_command, pieces, refused, stats};
use crate::{
    error::GitError,
    git::{
        Exit, GitCommand,
        diff::{
            Malformed,
            limits::{Amount, Enforced, Limits},
            patch::{FileDiff, Parser},
            raw::{self, Change, Record},
        },
        lines::Lines,
        revision::ObjectHash,
    },
    node::Node,
    services::{
        listing::{self, Messages},
        streams::ResponseStream,
    },
    storage::RepositoryPath,
};

/// Why a difference could not be read to its end.
pub(super) enum DiffError {
    Git(GitError),
    Malformed(Malformed),
    Exit(Exit),
}

impl From<GitError> for DiffError {
    fn from(error: GitError) -> Self {
        Self::Git(error)
    }
}

impl From<Malformed> for DiffError {
    fn from(error: Malformed) -> Self {
        Self::Malformed(error)
    }
}

impl DiffError {
    /// `doing` stands before what went wrong.
    pub(super) fn status(self, doing: &str) -> Status {
        match self {
            Self::Git(error) => error.into(),
            Self::Malformed(error) => Status::internal(format!("{doing}parse failure: {error}")),
            Self::Exit(exit) => refused(doing, exit),
        }
    }
}

/// `git diff` that is running.
pub(super) struct FileDiffs {
    lines: Lines,
    parser: Parser,
    list: Option<raw::Parser>,
    piece: Vec<u8>,
    read: bool,
}

impl FileDiffs {
    /// Of a command that prints the list of files and their patches, or only the list, with `-z`.
    pub(super) async fn start(command: GitCommand, parser: Parser) -> Result<Self, GitError> {
        let lines = Lines::start(command, "diff", 0).await?;
        Ok(Self { lines, parser, list: Some(raw::Parser::default()), piece: Vec::new(), read: false })
    }

    /// Of a command that prints one patch.
    pub(super) async fn start_patch(command: GitCommand, parser: Parser) -> Result<Self, GitError> {
        let lines = Lines::start(command, "diff", b'\n').await?;
        Ok(Self { lines, parser, list: None, piece: Vec::new(), read: false })
    }

    /// The next file; `None` behind the last.
    pub(super) async fn next(&mut self) -> Result<Option<FileDiff>, DiffError> {
        if let Some(list) = &mut self.list {
            // An empty record stands between the list and the patches.
            while let Some(record) = self.lines.next().await?.filter(|record| !record.is_empty()) {
                if let Some(Record::Change(change)) = list.record(&record)? {
                    self.parser.list(change)?;
                }
            }
            list.finish()?;
            self.list = None;
            self.lines.delimited_by(b'\n');
        }
        loop {
            if let Some(diff) = self.parser.next() {
                return Ok(Some(diff));
            }
            if self.read || self.parser.ended() {
                return Ok(None);
            }
            if let Some(begins) = self.lines.piece(&mut self.piece).await? {
                self.parser.piece(&self.piece, begins)?;
            } else {
                self.parser.finish();
                self.read = true;
            }
        }
    }

    /// The end of git, which must be a good one unless nobody wants to know the rest.
    pub(super) async fn finish(self) -> Result<(), DiffError> {
        if self.parser.ended() {
            return Ok(());
        }
        let (exit, _) = self.lines.finish().await?;
        if exit.success() { Ok(()) } else { Err(DiffError::Exit(exit)) }
    }
}

/// `--abbrev` that abbreviates nothing.
pub(super) fn whole_ids(hash: ObjectHash) -> String {
    format!("--abbrev={}", 2 * hash.bytes())
}

fn sides(command: GitCommand, left: &str, right: &str, paths: &[Vec<u8>]) -> GitCommand {
    let command = command.args(["--end-of-options", left, right, "--"]);
    command.args(paths.iter().map(|path| OsStr::from_bytes(path)))
}

fn limits(request: &CommitDiffRequest) -> Limits {
    let amount = |files: i32, lines: i32, bytes: i32| Amount {
        files: files.into(),
        lines: lines.into(),
        bytes: bytes.into(),
    };
    Limits {
        collapse_behind: request
            .collapse_diffs
            .then(|| amount(request.safe_max_files, request.safe_max_lines, request.safe_max_bytes)),
        enforced: request.enforce_limits.then(|| Enforced {
            total: Some(amount(request.max_files, request.max_lines, request.max_bytes)),
            patch_bytes: request.max_patch_bytes.into(),
            patch_bytes_by_extension: request.max_patch_bytes_for_file_extension.clone(),
        }),
        collect_all_paths: request.collect_all_paths,
    }
}

/// What tells a file apart from all others of the difference.
type Key = (Vec<u8>, String, String);

pub(super) fn commit_diff(
    node: &Arc<Node>,
    request: CommitDiffRequest,
) -> Result<Response<ResponseStream<CommitDiffResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let (left, right) = (&request.left_commit_id, &request.right_commit_id);
    check_sides(left, right)?;
    check_arguments("eachDiff: cmd", [left.as_bytes(), right.as_bytes()])?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "CommitDiff", |messages| async move {
        let hash = ObjectHash::of(&repository).await?;
        let mut left_out = match request.whitespace_changes() {
            WhitespaceChanges::Unspecified => Vec::new(),
            WhitespaceChanges::Ignore | WhitespaceChanges::IgnoreAll => {
                all_changes(&node, &repository, &request, hash).await?
            }
        };
        let mut command = diff_command(&node, &repository)
            .args(["--patch", "--raw", "--find-renames=30%", "--full-index"])
            .args(["--src-prefix=a/", "--dst-prefix=b/"])
            .arg(whole_ids(hash));
        if request.diff_mode() == DiffMode::Worddiff {
            command = command.arg("--word-diff=porcelain");
        }
        command = match request.whitespace_changes() {
            WhitespaceChanges::Unspecified => command,
            WhitespaceChanges::Ignore => command.arg("--ignore-space-change"),
            WhitespaceChanges::IgnoreAll => command.arg("--ignore-all-space"),
        };
        let command =
            sides(command.arg("-z"), &request.left_commit_id, &request.right_commit_id, &request.paths);
        let parser = Parser::new(limits(&request), hash.zero());
        let mut diffs = FileDiffs::start(command, parser).await?;
        let mut seen: HashSet<Key> = HashSet::new();
        let mut overflow = false;
        while let Some(diff) = diffs.next().await.map_err(|error| error.status("eachDiff: "))? {
            if !left_out.is_empty() {
                seen.insert((diff.to_path.clone(), diff.from.id.clone(), diff.to.id.clone()));
            }
            overflow |= diff.overflow;
            send(&messages, diff).await?;
        }
        diffs.finish().await.map_err(|error| error.status("eachDiff: "))?;
        left_out.retain(|change| !is_seen(&seen, change, &hash.zero()));
        if overflow || left_out.is_empty() {
            return Ok(());
        }
        send_left_out(&node, &repository, &request, left_out, &messages).await
    }))
}

/// Every change, also those of white space.
async fn all_changes(
    node: &Node,
    repository: &RepositoryPath,
    request: &CommitDiffRequest,
    hash: ObjectHash,
) -> Result<Vec<Change>, Status> {
    let command = node.git.command(repository, "diff-tree");
    let command = command.args(["-r", "-z", "--find-renames=30%"]).arg(whole_ids(hash));
    let command = sides(command, &request.left_commit_id, &request.right_commit_id, &request.paths);
    let mut records = Lines::start(command, "diff-tree", 0).await?;
    let (mut parser, mut changes) = (raw::Parser::default(), Vec::new());
    let malformed = |error: Malformed| Status::internal(format!("diff-tree parse: {error}"));
    while let Some(record) = records.next().await? {
        if let Some(Record::Change(change)) = parser.record(&record).map_err(malformed)? {
            changes.push(change);
        }
    }
    parser.finish().map_err(malformed)?;
    // What is wrong with the revisions `git diff` says.
    records.finish().await?;
    Ok(changes)
}

/// Whether the file was among those that differ without their white space.
fn is_seen(seen: &HashSet<Key>, change: &Change, zero_id: &str) -> bool {
    change.old.iter().any(|(old, _)| {
        let key = |new: &str| (change.path.clone(), old.id.clone(), new.to_owned());
        // A change of type was told of as an end and a beginning.
        seen.contains(&key(&change.new.id)) || seen.contains(&key(zero_id))
    })
}

/// Files in which nothing but white space changed: without patches, and behind the others.
async fn send_left_out(
    node: &Node,
    repository: &RepositoryPath,
    request: &CommitDiffRequest,
    left_out: Vec<Change>,
    messages: &Messages<CommitDiffResponse>,
) -> Result<(), Status> {
    let command = diff_command(node, repository);
    let command = sides(
        command.args(["--numstat", "-z"]),
        &request.left_commit_id,
        &request.right_commit_id,
        &request.paths,
    );
    let mut counted = HashMap::new();
    let mut stats = stats::NumStats::start(command).await?;
    while let Some(stat) = stats.next().await.map_err(|error| error.status("numstat: "))? {
        counted.insert(stat.path, (stat.added, stat.removed));
    }
    stats.finish().await.map_err(|error| error.status("numstat: "))?;
    for Change { old, new, path, .. } in left_out {
        let (lines_added, lines_removed) = counted.get(&path).copied().unwrap_or_default();
        let Some((old, _)) = old.into_iter().next() else { continue };
        let message = CommitDiffResponse {
            from_path: path.clone(),
            to_path: path,
            from_id: old.id,
            to_id: new.id,
            old_mode: old.mode,
            new_mode: new.mode,
            end_of_patch: true,
            lines_added,
            lines_removed,
            ..CommitDiffResponse::default()
        };
        messages.send(message).await?;
    }
    Ok(())
}

async fn send(messages: &Messages<CommitDiffResponse>, diff: FileDiff) -> Result<(), Status> {
    let mut message = CommitDiffResponse {
        from_path: diff.from_path,
        to_path: diff.to_path,
        from_id: diff.from.id,
        to_id: diff.to.id,
        old_mode: diff.from.mode,
        new_mode: diff.to.mode,
        binary: diff.binary,
        overflow_marker: diff.overflow,
        collapsed: diff.collapsed,
        too_large: diff.too_large,
        lines_added: diff.lines_added,
        lines_removed: diff.lines_removed,
        ..CommitDiffResponse::default()
    };
    for (piece, last) in pieces(&diff.patch) {
        message.raw_patch_data = piece.to_vec();
        message.end_of_patch = last;
        messages.send(std::mem::take(&mut message)).await?;
    }
    Ok(())
}

pub(super) fn commit_delta(
    node: &Arc<Node>,
    request: CommitDeltaRequest,
) -> Result<Response<ResponseStream<CommitDeltaResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let (left, right) = (&request.left_commit_id, &request.right_commit_id);
    check_sides(left, right)?;
    check_arguments("cmd", [left.as_bytes(), right.as_bytes()])?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "CommitDelta", |messages| async move {
        let hash = ObjectHash::of(&repository).await?;
        let command = diff_command(&node, &repository)
            .args(["--raw", "--full-index", "--find-renames", "-z"])
            .arg(whole_ids(hash));
        let command = sides(command, &request.left_commit_id, &request.right_commit_id, &request.paths);
        let mut diffs = FileDiffs::start(command, Parser::new(Limits::default(), hash.zero())).await?;
        let (mut deltas, mut bytes) = (Vec::new(), 0);
        while let Some(diff) = diffs.next().await.map_err(|error| error.status(""))? {
            let FileDiff { from, to, from_path, to_path, .. } = diff;
            bytes += from.id.len() + to.id.len() + from_path.len() + to_path.len() + 8;
            deltas.push(CommitDelta {
                from_path,
                to_path,
                from_id: from.id,
                to_id: to.id,
                old_mode: from.mode,
                new_mode: to.mode,
            });
            if bytes > PATCH_PIECE_BYTES {
                bytes = 0;
                messages.send(CommitDeltaResponse { deltas: std::mem::take(&mut deltas) }).await?;
            }
        }
        diffs.finish().await.map_err(|error| error.status(""))?;
        if deltas.is_empty() { Ok(()) } else { messages.send(CommitDeltaResponse { deltas }).await }
    }))
}
