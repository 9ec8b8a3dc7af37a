//! What UserCherryPick and UserRevert have in common: one commit's change is made, or unmade, on top of a branch.

use std::sync::Arc;

use tabularium_proto::gitaly::{GitCommit, OperationBranchUpdate, Repository, User};
use tonic::Status;

use super::{
    commit_object::{NewCommit, write_signed_commit},
    signature::Signature,
    start::Start,
    update::{Change, Requester, UpdateError, expected_old, update},
};
use crate::{
    error::GitError,
    git::{
        catfile::CatFile,
        merge,
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash},
    },
    node::Node,
    peer::Peers,
    storage::RepositoryPath,
    votes::Voter,
};

/// The fields that both requests have.
pub(super) struct Wanted<'a> {
    pub(super) repository: Option<&'a Repository>,
    pub(super) user: Option<&'a User>,
    /// The commit to pick or to revert; `None` if there is none in the request.
    pub(super) commit: Option<&'a str>,
    pub(super) branch: &'a [u8],
    pub(super) message: &'a [u8],
    pub(super) start_branch: &'a [u8],
    pub(super) start_repository: Option<&'a Repository>,
    pub(super) timestamp: Option<&'a prost_types::Timestamp>,
    pub(super) expected_old: &'a str,
    pub(super) dry_run: bool,
    pub(super) sign: bool,
}

impl Wanted<'_> {
    /// Refuses a request that lacks something.
    pub(super) fn check(&self) -> Result<(), Status> {
        for (missing, text) in [
            (self.user.is_none(), "empty User"),
            (self.commit.is_none(), "empty Commit"),
            (self.branch.is_empty(), "empty BranchName"),
            (self.message.is_empty(), "empty Message"),
        ] {
            if missing {
                return Err(Status::invalid_argument(text));
            }
        }
        Ok(())
    }
}

/// A request that has been looked at, and what it is about.
pub(super) struct Picking<'a> {
    pub(super) wanted: Wanted<'a>,
    pub(super) node: &'a Arc<Node>,
    pub(super) repository: RepositoryPath,
    pub(super) quarantine: Quarantine,
    pub(super) hash: ObjectHash,
    /// What the new commit is made on.
    pub(super) start: String,
    pub(super) committer: Signature,
}

/// What becomes of changes that are made once more.
pub(super) enum Applied {
    Tree(String),
    /// In these files.
    Conflicting(Vec<Vec<u8>>),
    /// All of them had been made.
    Already,
}

/// Why a branch was not moved.
pub(super) enum PickError {
    /// It holds what the new commit does not.
    Diverged {
        branch: String,
        new: String,
    },
    Update(Change, UpdateError),
    Failed(Status),
}

impl From<Status> for PickError {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

impl From<GitError> for PickError {
    fn from(error: GitError) -> Self {
        Self::Failed(error.into())
    }
}

impl<'a> Picking<'a> {
    pub(super) async fn begin(
        node: &'a Arc<Node>,
        wanted: Wanted<'a>,
        peers: &Peers,
    ) -> Result<Self, Status> {
        let repository = node.storages.open(wanted.repository)?;
        wanted.check()?;
        let quarantine = Quarantine::create(node, &repository)?;
        let start = Start {
            target: wanted.repository,
            repository: wanted.start_repository,
            branch: if wanted.start_branch.is_empty() { wanted.branch } else { wanted.start_branch },
        };
        let start = start.commit(node, &quarantine, peers).await?;
        let start =
            start.ok_or_else(|| Status::invalid_argument("resolve start ref: reference not found"))?;
        let committer = Signature::of_request(&wanted.user.cloned().unwrap_or_default(), wanted.timestamp)?;
        let hash = ObjectHash::of(&repository).await?;
        Ok(Self { wanted, node, repository, quarantine, hash, start, committer })
    }

    /// The id of a commit or tree; `None` if the revision leads to none.
    pub(super) async fn resolve(&self, revision: &str) -> Result<Option<String>, Status> {
        if revision::check(revision.as_bytes()).is_err() {
            return Ok(None);
        }
        Ok(references::resolve(&self.node.git, self.quarantine.repository(), revision.as_bytes()).await?)
    }

    /// The commit to pick or to revert, and its id.
    pub(super) async fn commit(&self, absent: impl Fn() -> Status) -> Result<(String, GitCommit), Status> {
        let name = format!("{}^{{commit}}", self.wanted.commit.unwrap_or_default());
        let id = self.resolve(&name).await?.ok_or_else(&absent)?;
        let mut objects = CatFile::start(&self.node.git, self.quarantine.repository()).await?;
        let commit = objects.commit(id.as_bytes()).await?.ok_or_else(&absent)?;
        objects.close().await?;
        Ok((id, commit))
    }

    /// Makes the changes that lead from `base` to the tree `theirs` to the start.
    pub(super) async fn apply(&self, base: &str, theirs: &str) -> Result<Applied, Status> {
        let ours = format!("{}^{{tree}}", self.start);
        let merged = merge::merge_changes(&self.node.git, &self.quarantine, base, &ours, theirs).await?;
        let tree = match merged.clean() {
            Ok(tree) => tree,
            Err(conflicting_files) => return Ok(Applied::Conflicting(conflicting_files)),
        };
        let nothing_new = self.resolve(&ours).await?.as_ref() == Some(&tree);
        Ok(if nothing_new { Applied::Already } else { Applied::Tree(tree) })
    }

    /// Makes the commit, and answers its id.
    pub(super) async fn write(&self, tree: &str, author: &Signature) -> Result<String, Status> {
        let new = NewCommit {
            tree,
            parents: &[&self.start],
            author,
            committer: &self.committer,
            message: self.wanted.message.to_vec().into(),
        };
        write_signed_commit(self.node, &self.quarantine, new, self.wanted.sign).await
    }

    /// Moves the branch to `picked`, or only sees whether it could be moved.
    pub(super) async fn finish(
        self,
        picked: String,
        voter: &Voter,
    ) -> Result<OperationBranchUpdate, PickError> {
        let Self { wanted, node, repository, quarantine, hash, start, .. } = self;
        let repo_created = !references::has_branches(&node.git, &repository).await?;
        let reference = revision::branch_reference(wanted.branch);
        let (old, branch_created) = match expected_old(node, &repository, hash, wanted.expected_old).await? {
            Some(expected) => (expected, false),
            None => match references::read(&node.git, &repository, &reference).await? {
                Some(present) => (present, false),
                None => (hash.zero(), true),
            },
        };
        // A trial goes the whole way, with hooks, and ends where it began.
        let new = if wanted.dry_run { start } else { picked };
        if !branch_created && !merge::is_ancestor(&node.git, quarantine.repository(), &old, &new).await? {
            return Err(PickError::Diverged { branch: old, new });
        }
        let change = Change { reference, old, new: new.clone() };
        let (sent, user) = (wanted.repository.cloned().unwrap_or_default(), wanted.user.cloned());
        let user = user.unwrap_or_default();
        let requester = Requester { repository: &sent, user: &user, voter };
        match update(node, &repository, requester, Some(quarantine), &change).await {
            Ok(()) => Ok(OperationBranchUpdate { commit_id: new, repo_created, branch_created }),
            Err(error) => Err(PickError::Update(change, error)),
        }
    }
}
