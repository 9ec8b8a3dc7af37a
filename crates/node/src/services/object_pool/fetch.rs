//! FetchIntoObjectPool: brings a pool up to date with the repository it was made of.
//!
//! The pool's references follow the origin's, under `refs/remotes/origin/`. What they held before and do not hold any more is
//! held by references under `refs/dangling/` from then on, for members may borrow it. Which those are depends on the references
//! before and after alone, so they are the same on every replica.

use std::collections::{BTreeMap, BTreeSet};

use tabularium_proto::gitaly::{
    FetchIntoObjectPoolRequest, FetchIntoObjectPoolResponse, OptimizeRepositoryRequest, Repository,
};
use tokio::io::AsyncWriteExt as _;
use tonic::Status;

use super::{fetch_beside, locate};
use crate::{
    error::internal_io,
    git::{
        revision::ObjectHash,
        update_ref::{Expected, Transaction, UpdateRefError},
    },
    hooks,
    node::Node,
    services::repository::optimize,
    storage::{Quarantine, RepositoryPath, check_repository},
    votes::Voter,
};

/// Where the origin's references are in the pool.
const ORIGIN: &str = "refs/remotes/origin/";
/// What no other reference holds.
const DANGLING: &str = "refs/dangling/";
const REFSPEC: &str = "+refs/*:refs/remotes/origin/*";

/// References and what they point to.
type References = BTreeMap<Vec<u8>, String>;

fn locate_both(
    node: &Node,
    request: &FetchIntoObjectPoolRequest,
) -> Result<(RepositoryPath, RepositoryPath, Repository), Status> {
    let origin = request.origin.as_ref().ok_or_else(|| Status::invalid_argument("origin is empty"))?;
    let pool = request.object_pool.as_ref();
    let pool = pool.ok_or_else(|| Status::invalid_argument("object pool is empty"))?;
    let sent = pool.repository.clone().unwrap_or_default();
    if origin.storage_name != sent.storage_name {
        return Err(Status::invalid_argument("origin has different storage than object pool"));
    }
    let invalid = |text: &str| Status::invalid_argument(format!("object pool invalid: {text}"));
    let (place, _) = locate(node, Some(pool)).map_err(|status| invalid(status.message()))?;
    check_repository(&place.path).map_err(|_| invalid("object pool is not a valid git repository"))?;
    let origin = node.storages.open(Some(origin)).map_err(|error| {
        let status = Status::from(error);
        Status::new(status.code(), format!("computing origin repo's path: {}", status.message()))
    })?;
    Ok((origin, place, sent))
}

pub(super) async fn fetch(
    node: &Node,
    request: &FetchIntoObjectPoolRequest,
    voter: &Voter,
) -> Result<FetchIntoObjectPoolResponse, Status> {
    let (origin, pool, sent) = locate_both(node, request)?;
    let _alone = node.copying.lock(&pool.path).await;
    let before = references(node, &pool, ORIGIN).await?;
    let wanted: References = references(node, &origin, "refs/")
        .await?
        .into_iter()
        .filter_map(|(name, id)| Some(([ORIGIN.as_bytes(), name.strip_prefix(b"refs/")?].concat(), id)))
        .collect();
    prune(node, &origin, &pool, (&before, &wanted), voter).await?;

    let session = node.hooks.session(voter, &pool);
    let command = hooks::attend(session.as_ref(), node.git.command(&pool, "fetch"));
    let output = fetch_beside(node, command)
        .args(["--quiet", "--atomic", "--no-tags", "--no-write-fetch-head", "--no-show-forced-updates"])
        .arg(&origin.path)
        .arg(REFSPEC)
        .output()
        .await?;
    if !output.exit.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let text = format!("fetch into object pool: {}, stderr: {stderr:?}", output.exit);
        return Err(hooks::failure(session.as_ref()).unwrap_or_else(|| Status::internal(text)));
    }
    let upkeep = OptimizeRepositoryRequest { repository: Some(sent), ..OptimizeRepositoryRequest::default() };
    optimize(node, &upkeep).await?;
    Ok(FetchIntoObjectPoolResponse {})
}

async fn references(node: &Node, repository: &RepositoryPath, prefix: &str) -> Result<References, Status> {
    let command = node.git.command(repository, "for-each-ref").reads();
    let mut process = command.args(["--format=%(objectname) %(refname)", prefix]).spawn(false).await?;
    let mut listed = Vec::new();
    while let Some(chunk) = process.read_chunk().await? {
        listed.extend_from_slice(&chunk);
    }
    let (exit, stderr) = process.finish().await?;
    if !exit.success() {
        let stderr = String::from_utf8_lossy(&stderr);
        return Err(Status::internal(format!("git for-each-ref: {exit}, stderr: {stderr:?}")));
    }
    let lines = listed.split(|byte| *byte == b'\n');
    Ok(lines
        .filter_map(|line| {
            let at = line.iter().position(|byte| *byte == b' ')?;
            let id = String::from_utf8_lossy(line.get(..at)?).into_owned();
            Some((line.get(at + 1..)?.to_vec(), id))
        })
        .collect())
}

/// Deletes the references that the origin has not any more, and holds what is going to be lost with them and with those that
/// are going to move. Before the fetch: a new reference may need the place of an old one.
async fn prune(
    node: &Node,
    origin: &RepositoryPath,
    pool: &RepositoryPath,
    (before, wanted): (&References, &References),
    voter: &Voter,
) -> Result<(), Status> {
    let failed = |error: UpdateRefError| match error {
        UpdateRefError::Vote(error) => Status::from(error),
        UpdateRefError::Git(error) => Status::from(error),
        other => Status::internal(format!("pruning references: {other}")),
    };
    let zero = ObjectHash::of(pool).await?.zero();
    let lost = lost(node, origin, pool, before, wanted).await?;
    let mut transaction = Transaction::start(&node.git, pool, false).await.map_err(failed)?;
    for name in before.keys().filter(|name| !wanted.contains_key(*name)) {
        transaction.update(name, &zero, &Expected::Any).await.map_err(failed)?;
    }
    for id in lost {
        let name = format!("{DANGLING}{id}");
        transaction.hold(name.as_bytes(), &id).await.map_err(failed)?;
    }
    transaction.commit(node, voter).await.map_err(failed)
}

/// Of what the references hold, that which they will not.
async fn lost(
    node: &Node,
    origin: &RepositoryPath,
    pool: &RepositoryPath,
    before: &References,
    wanted: &References,
) -> Result<BTreeSet<String>, Status> {
    let after: BTreeSet<&String> = wanted.values().collect();
    let gone: BTreeSet<String> = before
        .iter()
        .filter(|(name, id)| wanted.get(*name) != Some(*id) && !after.contains(id))
        .map(|(_, id)| id.clone())
        .collect();
    if gone.is_empty() {
        return Ok(gone);
    }
    // The origin has what is going to come.
    let both = Quarantine { object_directory: None, alternates: vec![origin.path.join("objects")] };
    let both = RepositoryPath { quarantine: Some(both), ..pool.clone() };
    let mut input = String::new();
    for id in &gone {
        input.extend([id.as_str(), "\n"]);
    }
    input.push_str("--not\n");
    for id in after {
        input.extend([id.as_str(), "\n"]);
    }
    let command = node.git.command(&both, "rev-list").reads();
    let mut process = command.args(["--objects", "--no-object-names", "--stdin"]).spawn(true).await?;
    if let Some(mut stdin) = process.take_stdin() {
        // Nothing is printed before all of it is read.
        stdin.write_all(input.as_bytes()).await.map_err(internal_io("git rev-list"))?;
    }
    let mut lost = BTreeSet::new();
    let mut rest = Vec::new();
    while let Some(chunk) = process.read_chunk().await? {
        rest.extend_from_slice(&chunk);
        let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines = String::from_utf8_lossy(rest.get(..whole).unwrap_or_default()).into_owned();
        lost.extend(lines.lines().filter(|id| gone.contains(*id)).map(str::to_owned));
        rest.drain(..whole);
    }
    let (exit, stderr) = process.finish().await?;
    if !exit.success() {
        let stderr = String::from_utf8_lossy(&stderr);
        return Err(Status::internal(format!("git rev-list: {exit}, stderr: {stderr:?}")));
    }
    Ok(lost)
}
