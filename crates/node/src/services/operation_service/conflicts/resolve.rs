//! ResolveConflicts.

use std::{collections::HashMap, ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc};

use serde::Deserialize;
use tabularium_proto::gitaly::{
    ResolveConflictsRequest, ResolveConflictsRequestHeader, ResolveConflictsResponse,
    resolve_conflicts_request::ResolveConflictsRequestPayload as Payload,
};
use tonic::{Response, Status, Streaming};

use super::{
    super::{
        commit_object::{NewCommit, write_commit},
        edited_tree::{EditError, edited_tree},
        signature::Signature,
        start::Start,
        tree_edit::{Action, parse_path},
        update::{Change, Requester, UpdateError, update},
    },
    content,
    markers::{Marked, MarkerError},
    name_files,
};
use crate::{
    error::GitError,
    git::{
        catfile::CatFile,
        merge::{self, Merge},
        quarantine::Quarantine,
        revision::ObjectHash,
    },
    node::Node,
    peer::Peers,
    votes::{Voter, ballot},
};

/// Longest list of resolutions, in bytes.
const MAX_JSON_BYTES: usize = 32 * 1024 * 1024;

/// What is to become of one file.
#[derive(Debug, Deserialize)]
struct Resolution {
    #[serde(default)]
    old_path: String,
    #[serde(default)]
    new_path: String,
    /// A side for each conflict.
    sections: Option<HashMap<String, String>>,
    /// All of the file, if no side is chosen.
    content: Option<String>,
}

/// Why nothing is resolved.
enum ResolveError {
    /// What people are told.
    Unresolved(String),
    Failed(Status),
}

impl From<Status> for ResolveError {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

impl From<GitError> for ResolveError {
    fn from(error: GitError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<MarkerError> for ResolveError {
    fn from(error: MarkerError) -> Self {
        match error {
            MarkerError::Unresolved(_) => Self::Unresolved(error.to_string()),
            MarkerError::Unmergeable(_) | MarkerError::Unexpected(_) | MarkerError::Unended(_) => {
                Self::Failed(Status::internal(error.to_string()))
            }
        }
    }
}

fn check(header: &ResolveConflictsRequestHeader) -> Result<(), Status> {
    for (missing, text) in [
        (header.our_commit_oid.is_empty(), "empty OurCommitOid"),
        (header.target_repository.is_none(), "empty TargetRepository"),
        (header.their_commit_oid.is_empty(), "empty TheirCommitOid"),
        (header.source_branch.is_empty(), "empty SourceBranch"),
        (header.target_branch.is_empty(), "empty TargetBranch"),
        (header.commit_message.is_empty(), "empty CommitMessage"),
        (header.user.is_none(), "empty User"),
    ] {
        if missing {
            return Err(Status::invalid_argument(text));
        }
    }
    Ok(())
}

async fn resolutions(requests: &mut Streaming<ResolveConflictsRequest>) -> Result<Vec<Resolution>, Status> {
    let mut json = Vec::new();
    while let Some(request) = requests.message().await? {
        if let Some(Payload::FilesJson(piece)) = request.resolve_conflicts_request_payload {
            json.extend_from_slice(&piece);
        }
        if json.len() > MAX_JSON_BYTES {
            let text = format!("resolutions of more than {MAX_JSON_BYTES} bytes");
            return Err(Status::resource_exhausted(text));
        }
    }
    let unreadable = |error: serde_json::Error| Status::internal(format!("resolutions: {error}"));
    let fields: Vec<HashMap<String, serde_json::Value>> =
        serde_json::from_slice(&json).map_err(unreadable)?;
    if fields.iter().any(|fields| !fields.contains_key("sections") && !fields.contains_key("content")) {
        return Err(Status::invalid_argument("missing sections or content for a resolution"));
    }
    serde_json::from_slice(&json).map_err(unreadable)
}

pub(super) async fn resolve(
    node: &Arc<Node>,
    mut requests: Streaming<ResolveConflictsRequest>,
    peers: &Peers,
    voter: &Voter,
) -> Result<Response<ResolveConflictsResponse>, Status> {
    let first = requests.message().await?.and_then(|request| request.resolve_conflicts_request_payload);
    let Some(Payload::Header(header)) = first else {
        return Err(Status::invalid_argument("empty ResolveConflictsRequestHeader"));
    };
    let repository = node.storages.open(header.repository.as_ref())?;
    check(&header)?;
    let user = header.user.clone().unwrap_or_default();
    let author = Signature::of_request(&user, header.timestamp.as_ref())?;
    let resolutions = resolutions(&mut requests).await?;
    let quarantine = Quarantine::create(node, &repository)?;
    bring_target(node, &quarantine, &header, peers).await?;
    let hash = ObjectHash::of(&repository).await?;
    let oid = |text: &str| {
        let text = hash.parse(text.as_bytes());
        text.map_err(|_| {
            Status::internal("Rugged::InvalidError: unable to parse OID - contains invalid characters")
        })
    };
    let sides = Sides {
        node,
        quarantine: &quarantine,
        ours: oid(&header.our_commit_oid)?,
        theirs: oid(&header.their_commit_oid)?,
    };
    let tree = match sides.resolve(&resolutions).await {
        Ok(tree) => tree,
        Err(ResolveError::Failed(status)) => return Err(status),
        Err(ResolveError::Unresolved(resolution_error)) => {
            // Nothing has changed, on any replica.
            voter.committed(&repository.path, ballot(resolution_error.as_bytes())).await?;
            return Ok(Response::new(ResolveConflictsResponse { resolution_error }));
        }
    };
    let Sides { ours, theirs, .. } = sides;
    let commit = NewCommit {
        tree: &tree,
        parents: &[&ours, &theirs],
        author: &author,
        committer: &author,
        message: header.commit_message.into(),
    };
    let new = write_commit(node, quarantine.repository(), commit).await?;
    let reference = [b"refs/heads/", header.source_branch.as_slice()].concat();
    let change = Change { reference, old: ours, new };
    let sent = header.repository.unwrap_or_default();
    let requester = Requester { repository: &sent, user: &user, voter };
    match update(node, &repository, requester, Some(quarantine), &change).await {
        Ok(()) => Ok(Response::new(ResolveConflictsResponse::default())),
        Err(UpdateError::Hook(refusal)) => Err(Status::internal(refusal.full_message())),
        Err(UpdateError::Reference) => {
            Err(Status::internal(format!("reference update: {}", change.refusal())))
        }
        Err(UpdateError::Failed(status)) => Err(status),
    }
}

/// The branch that is merged may be another repository's.
async fn bring_target(
    node: &Node,
    quarantine: &Quarantine,
    header: &ResolveConflictsRequestHeader,
    peers: &Peers,
) -> Result<(), Status> {
    let branch = [b"refs/heads/", header.target_branch.as_slice()].concat();
    let target = Start {
        target: header.repository.as_ref(),
        repository: header.target_repository.as_ref(),
        branch: &branch,
    };
    target.commit(node, quarantine, peers).await?.map(drop).ok_or_else(|| {
        let name = String::from_utf8_lossy(&branch);
        let text = format!("could not resolve target revision {name:?}: reference not found");
        Status::internal(text)
    })
}

/// The commits that are merged.
struct Sides<'a> {
    node: &'a Arc<Node>,
    quarantine: &'a Quarantine,
    ours: String,
    theirs: String,
}

impl Sides<'_> {
    /// The tree without conflicts.
    async fn resolve(&self, resolutions: &[Resolution]) -> Result<String, ResolveError> {
        let repository = self.quarantine.repository();
        let merged = merge::merge(&self.node.git, repository, &self.ours, &self.theirs).await?;
        if merged.conflicts.is_empty() {
            return Ok(merged.tree);
        }
        let mut objects = CatFile::start(&self.node.git, repository).await?;
        let mut actions = Vec::new();
        for resolution in resolutions {
            let path = resolution.old_path.as_bytes();
            if !merged.conflicts.iter().any(|entry| entry.path == path) {
                let text = "NoMethodError: undefined method `resolve_lines' for nil:NilClass";
                return Err(Status::internal(text).into());
            }
            let content = self.resolved(&mut objects, &merged, resolution).await?;
            let id = self.write(path, content).await?;
            let path = parse_path(path).map_err(|error| Status::internal(error.text()))?;
            actions.push(Action::Update { path, id });
        }
        objects.close().await?;
        let named = |path: &[u8]| resolutions.iter().any(|resolution| resolution.old_path.as_bytes() == path);
        if let Some(left) = merged.conflicts.iter().find(|entry| !named(&entry.path)) {
            let path = String::from_utf8_lossy(&left.path);
            let text = format!("Missing resolutions for the following files: {path}");
            return Err(ResolveError::Unresolved(text));
        }
        let tree = edited_tree(self.node, repository, Some(&merged.tree), &actions).await;
        Ok(tree.map_err(|error| match error {
            EditError::Misfit(error) => Status::internal(format!("add to tree: {}", error.text())),
            EditError::Failed(status) => status,
        })?)
    }

    /// What is to be in one file.
    async fn resolved(
        &self,
        objects: &mut CatFile,
        merged: &Merge,
        resolution: &Resolution,
    ) -> Result<Vec<u8>, ResolveError> {
        let (ours, theirs, path) = (self.ours.as_str(), self.theirs.as_str(), resolution.old_path.as_str());
        let marked = content(objects, &merged.tree, path.as_bytes()).await?;
        let marked = marked.ok_or_else(|| Status::internal("path not found in merged-tree"))?;
        let chosen = resolution.content.as_deref().unwrap_or_default();
        if !chosen.is_empty() {
            let (our_path, their_path) = (path.as_bytes(), resolution.new_path.as_bytes());
            if name_files(&marked, (ours, our_path), (theirs, their_path)) == chosen.as_bytes() {
                let text = format!("Resolved content has no changes for file {path}");
                return Err(ResolveError::Unresolved(text));
            }
        }
        let before = content(objects, ours, path.as_bytes()).await?;
        let before = before.ok_or_else(|| Status::internal("retrieving object: object not found"))?;
        let parsed = Marked::parse(&marked, ours, theirs, path)?;
        match resolution.sections.as_ref().filter(|sections| !sections.is_empty()) {
            Some(sections) => Ok(parsed.resolve(sections, before.ends_with(b"\n"))?),
            None => Ok(chosen.as_bytes().to_vec()),
        }
    }

    /// Makes it a blob, as if it stood at the path.
    async fn write(&self, path: &[u8], content: Vec<u8>) -> Result<String, Status> {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let option = [b"--path=", name].concat();
        let command = self.node.git.command(self.quarantine.repository(), "hash-object");
        let command = command.args(["-w", "-t", "blob", "--stdin"]).arg(OsStr::from_bytes(&option));
        let id = command.output_with(content).await?.checked()?;
        Ok(String::from_utf8_lossy(id.trim_ascii()).into_owned())
    }
}
