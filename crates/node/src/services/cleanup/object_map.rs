//! ApplyBfgObjectMapStream: internal references to what was replaced when a history was rewritten elsewhere go.

use std::collections::{HashMap, HashSet};

use tabularium_proto::gitaly::{
    ApplyBfgObjectMapStreamRequest, ApplyBfgObjectMapStreamResponse, ObjectType,
    apply_bfg_object_map_stream_response::Entry,
};
use tonic::{Status, Streaming};

use crate::{
    git::{
        Git, Slot,
        catfile::CatFile,
        lines::Lines,
        revision::ObjectHash,
        update_ref::{Transaction, UpdateRefError},
    },
    node::Node,
    services::listing::{Batch, Messages},
    storage::RepositoryPath,
    votes::Voter,
};

/// References that GitLab keeps for itself.
const INTERNAL: [&str; 6] = [
    "refs/environments/",
    "refs/keep-around/",
    "refs/merge-requests/",
    "refs/pipelines/",
    "refs/remotes/",
    "refs/tmp/",
];
/// The first line of a map that `git filter-repo` wrote.
const HEADER: &[u8] = b"old                                      new";
/// A line of two ids is shorter.
const MAX_LINE_BYTES: usize = 4096;

/// Removes internal references to commits that have been replaced, all of them or none, and says what became of what.
pub(super) async fn apply(
    node: &Node,
    repository: &RepositoryPath,
    mut map: ObjectMap,
    voter: &Voter,
    messages: &Messages<ApplyBfgObjectMapStreamResponse>,
) -> Result<(), Status> {
    let hash = ObjectHash::of(repository).await?;
    let (changing, reading) = node.git.two_slots().await?;
    let references = internal_references(&node.git, repository, &reading).await?;
    let mut objects = CatFile::start_in(&node.git, repository, &reading).await?;
    let mut transaction =
        Transaction::start_in(&node.git, repository, false, &changing).await.map_err(failed)?;
    let mut removed = HashSet::new();
    let mut batch = Batch::default();
    while let Some((number, line)) = map.line().await? {
        if line == HEADER {
            continue;
        }
        let (old, new) = parse(hash, number, &line).map_err(Status::invalid_argument)?;
        // What was looked at and left as it was.
        if old == new {
            continue;
        }
        let internal = references.get(&old);
        let kind = match internal {
            Some(_) => ObjectType::Commit,
            None => objects.info(new.as_bytes()).await?.map_or(ObjectType::Unknown, |info| info.kind.into()),
        };
        let entry = Entry { r#type: kind as i32, old_oid: old, new_oid: new };
        if let Some(entries) = batch.push(entry) {
            messages.send(ApplyBfgObjectMapStreamResponse { entries }).await?;
        }
        for reference in internal.into_iter().flatten() {
            if removed.insert(reference) {
                transaction.delete(reference).await.map_err(failed)?;
            }
        }
    }
    objects.close().await?;
    transaction.commit(node, voter).await.map_err(failed)?;
    match batch.rest() {
        Some(entries) => messages.send(ApplyBfgObjectMapStreamResponse { entries }).await,
        None => Ok(()),
    }
}

fn failed(error: UpdateRefError) -> Status {
    match error {
        UpdateRefError::Git(error) => error.into(),
        UpdateRefError::Vote(error) => error.into(),
        error => Status::internal(error.to_string()),
    }
}

/// Internal references by what they point to and by its parents.
async fn internal_references(
    git: &Git,
    repository: &RepositoryPath,
    slot: &Slot,
) -> Result<HashMap<String, Vec<Vec<u8>>>, Status> {
    let command = git.command(repository, "for-each-ref").slot(slot);
    let command = command.args(["--format=%(objectname) %(parent) %(refname)", "--"]).args(INTERNAL);
    let mut lines = Lines::start(command, "for-each-ref", b'\n').await?;
    let mut references = HashMap::<String, Vec<Vec<u8>>>::new();
    while let Some(line) = lines.next().await? {
        let mut words = line.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
        let Some(name) = words.next_back() else { continue };
        for id in words {
            let id = String::from_utf8_lossy(id).into_owned();
            references.entry(id).or_default().push(name.to_vec());
        }
    }
    lines.checked().await?;
    Ok(references)
}

/// The ids of a line.
fn parse(hash: ObjectHash, number: u64, line: &[u8]) -> Result<(String, String), String> {
    let space = line.iter().position(|byte| *byte == b' ');
    let space = space.ok_or_else(|| format!("object map invalid at line {number}"))?;
    let (old, new) = line.split_at(space);
    let new = new.get(1..).unwrap_or_default();
    let old = hash.parse(old).map_err(|_| format!("invalid old object ID at line {number}"))?;
    let new = hash.parse(new).map_err(|_| format!("invalid new object ID at line {number}"))?;
    Ok((old, new))
}

/// The lines of a map that comes in pieces.
pub(super) struct ObjectMap {
    /// What has come and was not read.
    rest: Vec<u8>,
    requests: Streaming<ApplyBfgObjectMapStreamRequest>,
    /// Of the next line.
    number: u64,
}

impl ObjectMap {
    /// One that begins with this.
    pub(super) fn new(beginning: Vec<u8>, requests: Streaming<ApplyBfgObjectMapStreamRequest>) -> Self {
        Self { rest: beginning, requests, number: 0 }
    }

    /// The next line and its number, counted from 0.
    async fn line(&mut self) -> Result<Option<(u64, Vec<u8>)>, Status> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.rest.drain(..=end).collect();
                line.pop();
                return Ok(Some(self.numbered(line)));
            }
            if self.rest.len() > MAX_LINE_BYTES {
                return Err(Status::invalid_argument(format!("object map invalid at line {}", self.number)));
            }
            match self.requests.message().await? {
                Some(request) => self.rest.extend(request.object_map),
                None if self.rest.is_empty() => return Ok(None),
                None => {
                    let line = std::mem::take(&mut self.rest);
                    return Ok(Some(self.numbered(line)));
                }
            }
        }
    }

    fn numbered(&mut self, mut line: Vec<u8>) -> (u64, Vec<u8>) {
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        let number = self.number;
        self.number += 1;
        (number, line)
    }
}
