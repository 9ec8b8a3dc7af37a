//! DiffBlobs: how pairs of blobs differ, named by the blobs or by what FindChangedPaths said of them.

use std::{collections::HashMap, ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc};

use tabularium_proto::gitaly::{
    ChangedPaths, DiffBlobsRequest, DiffBlobsResponse, changed_paths,
    diff_blobs_request::{BlobPair, DiffMode, WhitespaceChanges},
    diff_blobs_response,
};
use tonic::{Response, Status};

use super::{
    commits::{DiffError, FileDiffs},
    diff_command, pieces,
};
use crate::{
    git::{
        Exit, GitCommand,
        catfile::{CatFile, ObjectKind},
        diff::{
            Malformed,
            limits::{Enforced, Limits},
            patch::{FileDiff, Parser},
            raw::Side,
        },
        objects::ItemKind,
        revision::{self, ObjectHash, is_zero},
    },
    node::Node,
    place::Temporary,
    services::{
        listing::{self, Messages},
        streams::ResponseStream,
    },
    storage::{Quarantine, RepositoryPath},
};

/// What git is given to compare, and what the answer calls it.
struct Pair {
    left: Vec<u8>,
    right: Vec<u8>,
    from: Side,
    to: Side,
}

fn check(request: &DiffBlobsRequest) -> Result<(), Status> {
    let refuse = |text: &str| Err(Status::invalid_argument(text));
    match (request.blob_pairs.is_empty(), request.raw_info.is_empty()) {
        (true, true) => return refuse("request contains no file pairs to diff"),
        (false, false) => return refuse("blob pairs and raw info both used in request"),
        _ => {}
    }
    for entry in &request.raw_info {
        if entry.old_blob_id.is_empty() || entry.new_blob_id.is_empty() {
            return refuse("raw info entry missing blob IDs");
        }
        if entry.path.is_empty() {
            return refuse("raw info entry missing path");
        }
        let moved = matches!(entry.status(), changed_paths::Status::Renamed | changed_paths::Status::Copied);
        if moved && entry.old_path.is_empty() {
            return refuse("rename/copy raw info entry missing old path");
        }
    }
    let exact = request.whitespace_changes() == WhitespaceChanges::Unspecified;
    if !exact && !request.blob_pairs.is_empty() {
        return refuse("whitespace changes cannot be ignored when blob pairs are provided");
    }
    Ok(())
}

fn limits(patch_bytes: i64) -> Limits {
    let enforced = Enforced { total: None, patch_bytes, patch_bytes_by_extension: HashMap::new() };
    Limits { enforced: Some(enforced), ..Limits::default() }
}

pub(super) fn diff_blobs(
    node: &Arc<Node>,
    request: DiffBlobsRequest,
) -> Result<Response<ResponseStream<DiffBlobsResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    check(&request)?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "DiffBlobs", |messages| async move {
        let hash = ObjectHash::of(&repository).await?;
        let limit = i64::from(request.patch_bytes_limit);
        let by_blobs = request.raw_info.is_empty();
        let (pairs, limits) = if by_blobs {
            let pairs = resolve(&node, &repository, &request.blob_pairs).await?;
            (pairs, if limit > 0 { limits(limit).bounded() } else { Limits::default() })
        } else {
            // Here a patch may be as large as the limit.
            let limits = if limit == 0 { Limits::default() } else { limits(limit + 1) };
            (of_raw_info(&request.raw_info, hash)?, limits)
        };
        let comparison = Comparison::prepare(&node, &repository, &request, hash, limits, &pairs).await?;
        for pair in pairs {
            let diff = comparison.run(pair).await.map_err(|error| match error {
                DiffError::Git(error) => error.into(),
                DiffError::Malformed(error) if by_blobs => {
                    Status::internal(format!("generating diff: {error}"))
                }
                DiffError::Malformed(error) => Status::internal(format!("parsing diff: {error}")),
                DiffError::Exit(exit) => failed(by_blobs, exit),
            })?;
            send(&messages, diff).await?;
        }
        Ok(())
    }))
}

fn failed(by_blobs: bool, exit: Exit) -> Status {
    let command =
        if by_blobs { "generating diff: waiting for git-diff" } else { "waiting for git-diff-pairs" };
    Status::internal(format!("{command}: {exit}"))
}

/// What the pairs stand for. Zeros are nothing.
async fn resolve(node: &Node, repository: &RepositoryPath, pairs: &[BlobPair]) -> Result<Vec<Pair>, Status> {
    let mut objects = CatFile::start(&node.git, repository).await?;
    let mut resolved = Vec::with_capacity(pairs.len());
    for BlobPair { left_blob, right_blob } in pairs {
        let from = blob(&mut objects, left_blob, "left").await?;
        let to = blob(&mut objects, right_blob, "right").await?;
        if from == to {
            return Err(Status::invalid_argument("left and right blob revisions resolve to same OID"));
        }
        resolved.push(Pair { left: left_blob.clone(), right: right_blob.clone(), from, to });
    }
    objects.close().await?;
    Ok(resolved)
}

async fn blob(objects: &mut CatFile, name: &[u8], which: &str) -> Result<Side, Status> {
    let refuse = |text: String| Status::invalid_argument(format!("getting {which} blob info: {text}"));
    if name.contains(&b':') {
        revision::check_path_scoped(name)
            .map_err(|error| refuse(format!("validating path-scoped revision: {error}")))?;
    } else {
        let id = objects.hash().parse(name);
        let id = id.map_err(|error| refuse(format!("validating blob ID: {error}")))?;
        if is_zero(&id) {
            return Ok(Side { mode: 0, id });
        }
    }
    match objects.info(name).await? {
        None => Err(refuse("getting revision info: object not found".to_owned())),
        Some(info) if info.kind == ObjectKind::Blob => Ok(Side { mode: 0, id: info.id }),
        Some(_) => Err(refuse("revision is not blob".to_owned())),
    }
}

/// A change of type is the end of one file and the beginning of another.
fn of_raw_info(entries: &[ChangedPaths], hash: ObjectHash) -> Result<Vec<Pair>, Status> {
    let mut pairs = Vec::with_capacity(entries.len());
    let mut add = |from: Side, to: Side| {
        let (left, right) = (from.id.clone().into_bytes(), to.id.clone().into_bytes());
        pairs.push(Pair { left, right, from, to });
    };
    for entry in entries {
        let side = |mode, id: &str| match hash.parse(id.as_bytes()) {
            Ok(id) => Ok(Side { mode, id }),
            // Git would not understand it either.
            Err(_) => Err(failed(false, Exit { code: Some(128) })),
        };
        let from = side(entry.old_mode, &entry.old_blob_id)?;
        let to = side(entry.new_mode, &entry.new_blob_id)?;
        if entry.status() == changed_paths::Status::TypeChange {
            add(from, Side { mode: 0, id: hash.zero() });
            add(Side { mode: 0, id: hash.zero() }, to);
        } else {
            add(from, to);
        }
    }
    Ok(pairs)
}

/// Compares pair by pair.
struct Comparison {
    command: GitCommand,
    limits: Limits,
    hash: ObjectHash,
    /// Where the blob without content is, if it is needed.
    _empty_blob: Option<Temporary>,
}

impl Comparison {
    async fn prepare(
        node: &Node,
        repository: &RepositoryPath,
        request: &DiffBlobsRequest,
        hash: ObjectHash,
        limits: Limits,
        pairs: &[Pair],
    ) -> Result<Self, Status> {
        let slot = node.git.slot().await?;
        let one_sided = pairs.iter().any(|pair| is_zero(&pair.from.id) || is_zero(&pair.to.id));
        let (empty_blob, repository) = if one_sided {
            // Git compares blobs that it has, and it may not have this one.
            let place = Temporary::new(node, &repository.storage, "empty-blob-")?;
            let writing = at(repository, &place, true);
            let write = node.git.command(&writing, "hash-object").slot(&slot);
            write.args(["-w", "--stdin"]).checked().await?;
            let reading = at(repository, &place, false);
            (Some(place), reading)
        } else {
            (None, repository.clone())
        };
        let mut command = diff_command(node, &repository).slot(&slot).arg("--patch");
        if request.diff_mode() == DiffMode::Word {
            command = command.arg("--word-diff=porcelain");
        }
        command = match request.whitespace_changes() {
            WhitespaceChanges::Unspecified => command,
            WhitespaceChanges::Ignore => command.arg("--ignore-space-change"),
            WhitespaceChanges::IgnoreAll => command.arg("--ignore-all-space"),
        };
        Ok(Self { command, limits, hash, _empty_blob: empty_blob })
    }

    async fn run(&self, pair: Pair) -> Result<FileDiff, DiffError> {
        let Pair { left, right, from, to } = pair;
        let given = |side: &Side, name: Vec<u8>| {
            if is_zero(&side.id) { self.hash.empty_blob().as_bytes().to_vec() } else { name }
        };
        let present =
            |side: &Side| String::from_utf8_lossy(&given(side, side.id.clone().into_bytes())).into_owned();
        let equal = present(&from) == present(&to);
        let submodule = |side: &Side| {
            let mode = u32::try_from(side.mode).unwrap_or_default();
            ItemKind::of_mode(mode) == ItemKind::Commit
        };
        let (left, right) = (given(&from, left), given(&to, right));
        let by_hand = match (equal, submodule(&from) || submodule(&to)) {
            (true, _) => Some(Vec::new()),
            (false, true) => Some(submodule_patch(&from, &to)),
            (false, false) => None,
        };
        let mut parser = Parser::of_blobs(self.limits.clone(), from, to);
        if let Some(patch) = by_hand {
            patch.iter().try_for_each(|line| parser.piece(line.as_bytes(), true))?;
            parser.finish();
            return parser.next().ok_or(DiffError::Malformed(Malformed("no patch")));
        }
        let command = self.command.clone().arg("--end-of-options");
        let command = command.args([OsStr::from_bytes(&left), OsStr::from_bytes(&right)]).arg("--");
        let mut diffs = FileDiffs::start_patch(command, parser).await?;
        let found = diffs.next().await?;
        diffs.finish().await?;
        found.ok_or(DiffError::Malformed(Malformed("diff parser finished unexpectedly")))
    }
}

/// The repository with another place for objects, to write to or to read from.
fn at(repository: &RepositoryPath, place: &Temporary, writing: bool) -> RepositoryPath {
    let mut repository = repository.clone();
    let objects = repository.path.join("objects");
    let quarantine =
        repository.quarantine.get_or_insert(Quarantine { object_directory: None, alternates: Vec::new() });
    if writing {
        *quarantine =
            Quarantine { object_directory: Some(place.path().to_owned()), alternates: vec![objects] };
    } else {
        quarantine.alternates.push(place.path().to_owned());
    }
    repository
}

/// Submodules are commits of other repositories; git shows their ids.
fn submodule_patch(from: &Side, to: &Side) -> Vec<String> {
    let range = |side: &Side| if is_zero(&side.id) { "0,0" } else { "1" };
    let mut lines = vec![
        "diff --git a/submodule b/submodule\n".to_owned(),
        format!("@@ -{} +{} @@\n", range(from), range(to)),
    ];
    if !is_zero(&from.id) {
        lines.push(format!("-Subproject commit {}\n", from.id));
    }
    if !is_zero(&to.id) {
        lines.push(format!("+Subproject commit {}\n", to.id));
    }
    lines
}

async fn send(messages: &Messages<DiffBlobsResponse>, diff: FileDiff) -> Result<(), Status> {
    let mut message = DiffBlobsResponse {
        left_blob_id: diff.from.id,
        right_blob_id: diff.to.id,
        binary: diff.binary,
        over_patch_bytes_limit: diff.too_large,
        patch_size: i32::try_from(diff.patch_size).unwrap_or(i32::MAX),
        lines_added: diff.lines_added,
        lines_removed: diff.lines_removed,
        ..DiffBlobsResponse::default()
    };
    for (piece, last) in pieces(&diff.patch) {
        message.patch = piece.to_vec();
        if last {
            message.set_status(diff_blobs_response::Status::EndOfPatch);
        }
        messages.send(std::mem::take(&mut message)).await?;
    }
    Ok(())
}
