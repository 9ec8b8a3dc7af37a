//! ListConflictFiles.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    ConflictFile, ConflictFileHeader, ListConflictFilesRequest, ListConflictFilesResponse,
    conflict_file::ConflictFilePayload as Payload,
};
use tonic::Status;

use super::{content, name_files};
use crate::{
    git::{
        CHUNK_BYTES,
        catfile::CatFile,
        merge::{self, Entry, Stage},
        quarantine::Quarantine,
        references, revision,
    },
    node::Node,
    services::listing::Messages,
    storage::RepositoryPath,
};

/// Refuses a request that lacks something.
pub(super) fn check(request: &ListConflictFilesRequest) -> Result<(), Status> {
    if request.our_commit_oid.is_empty() {
        return Err(Status::invalid_argument("empty OurCommitOid"));
    }
    if request.their_commit_oid.is_empty() {
        return Err(Status::invalid_argument("empty TheirCommitOid"));
    }
    Ok(())
}

/// A file in conflict. A side that does not have it has no path.
#[derive(Debug, Default, PartialEq, Eq)]
struct Conflict {
    ancestor: Vec<u8>,
    ours: Vec<u8>,
    theirs: Vec<u8>,
    our_mode: i32,
}

impl Conflict {
    fn path(&self) -> &[u8] {
        if self.ours.is_empty() { &self.theirs } else { &self.ours }
    }
}

/// One for each path.
fn conflicts(entries: &[Entry]) -> Vec<Conflict> {
    let same_path = |one: &Entry, other: &Entry| one.path == other.path;
    let conflict = |entries: &[Entry]| {
        let mut conflict = Conflict::default();
        for entry in entries {
            match entry.stage {
                Stage::Ancestor => conflict.ancestor.clone_from(&entry.path),
                Stage::Theirs => conflict.theirs.clone_from(&entry.path),
                Stage::Ours => {
                    conflict.ours.clone_from(&entry.path);
                    conflict.our_mode = i32::try_from(entry.mode).unwrap_or_default();
                }
            }
        }
        conflict
    };
    entries.chunk_by(same_path).map(conflict).collect()
}

pub(super) async fn list(
    node: Arc<Node>,
    repository: RepositoryPath,
    request: ListConflictFilesRequest,
    messages: Messages<ListConflictFilesResponse>,
) -> Result<(), Status> {
    // What merging writes goes when this is over.
    let quarantine = Quarantine::create(&node, &repository)?;
    let repository = quarantine.repository();
    let ours = commit(&node, repository, &request.our_commit_oid, "our").await?;
    let theirs = commit(&node, repository, &request.their_commit_oid, "their").await?;
    let merged = merge::merge(&node.git, repository, &ours, &theirs).await?;
    let mut objects = CatFile::start(&node.git, repository).await?;
    let mut batch = Batch { messages, files: Vec::new(), bytes: 0 };
    for conflict in conflicts(&merged.conflicts) {
        if !request.allow_tree_conflicts && (conflict.ours.is_empty() || conflict.theirs.is_empty()) {
            return Err(Status::failed_precondition("conflict side missing"));
        }
        batch.add(Payload::Header(ConflictFileHeader {
            commit_oid: request.our_commit_oid.clone(),
            their_path: conflict.theirs.clone(),
            our_path: conflict.ours.clone(),
            our_mode: conflict.our_mode,
            ancestor_path: conflict.ancestor.clone(),
        }));
        if request.skip_content {
            continue;
        }
        let content = content(&mut objects, &merged.tree, conflict.path()).await?;
        let content = content
            .ok_or_else(|| Status::failed_precondition("getting file revision: reference not found"))?;
        if std::str::from_utf8(&content).is_err() {
            return Err(Status::failed_precondition("unsupported encoding"));
        }
        let content = name_files(&content, (&ours, &conflict.ours), (&theirs, &conflict.theirs));
        for piece in content.chunks(CHUNK_BYTES) {
            batch.add(Payload::Content(piece.to_vec()));
            batch.send_if_large(piece.len()).await?;
        }
    }
    objects.close().await?;
    batch.send().await
}

async fn commit(node: &Node, repository: &RepositoryPath, name: &str, whose: &str) -> Result<String, Status> {
    let found = match revision::check(name.as_bytes()) {
        Ok(()) => references::resolve(&node.git, repository, format!("{name}^{{commit}}").as_bytes()).await?,
        Err(_) => None,
    };
    let absent =
        || Status::failed_precondition(format!("could not lookup '{whose}' OID: reference not found"));
    found.ok_or_else(absent)
}

/// What goes into the next message.
struct Batch {
    messages: Messages<ListConflictFilesResponse>,
    files: Vec<ConflictFile>,
    bytes: usize,
}

impl Batch {
    fn add(&mut self, payload: Payload) {
        self.files.push(ConflictFile { conflict_file_payload: Some(payload) });
    }

    async fn send_if_large(&mut self, added: usize) -> Result<(), Status> {
        self.bytes += added;
        if self.bytes < CHUNK_BYTES {
            return Ok(());
        }
        self.bytes = 0;
        self.send().await
    }

    async fn send(&mut self) -> Result<(), Status> {
        if self.files.is_empty() {
            return Ok(());
        }
        let files = std::mem::take(&mut self.files);
        self.messages.send(ListConflictFilesResponse { files }).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_a_path_are_one_conflict() {
        let entry = |stage, path: &[u8]| Entry { mode: 0o100_755, stage, path: path.to_vec() };
        let entries = [
            entry(Stage::Ancestor, b"a"),
            entry(Stage::Ours, b"a"),
            entry(Stage::Theirs, b"a"),
            entry(Stage::Theirs, b"b"),
        ];
        let both = Conflict {
            ancestor: b"a".to_vec(),
            ours: b"a".to_vec(),
            theirs: b"a".to_vec(),
            our_mode: 0o100_755,
        };
        let added = Conflict { theirs: b"b".to_vec(), ..Conflict::default() };
        assert_eq!(added.path(), b"b");
        assert_eq!(conflicts(&entries), [both, added]);
    }
}
