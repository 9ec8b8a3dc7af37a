//! The commits of one branch, made again on top of another.

use std::{fmt, sync::Arc};

use tonic::Status;

use super::{
    commit_object::{NewCommit, write_commit},
    signature::Signature,
};
use crate::{
    error::GitError,
    git::{catfile::CatFile, merge, quarantine::Quarantine, revision::ObjectHash},
    node::Node,
};

/// Why there is no new branch.
pub(super) enum RebaseError {
    Conflict(Conflict),
    Failed(Status),
}

/// A commit that does not fit on top of the others.
pub(super) struct Conflict {
    commit: String,
    pub(super) files: Vec<Vec<u8>>,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rebase: commit {:?}: there are conflicting files", self.commit)
    }
}

impl From<Status> for RebaseError {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

impl From<GitError> for RebaseError {
    fn from(error: GitError) -> Self {
        Self::Failed(error.into())
    }
}

/// Makes what `branch` has beyond `upstream` again on top of it and answers the last commit. Merges are left out, and so is
/// what is in the other branch already. New commits are in the quarantine.
pub(super) async fn rebase(
    node: &Arc<Node>,
    quarantine: &Quarantine,
    upstream: &str,
    branch: &str,
    committer: &Signature,
) -> Result<String, RebaseError> {
    let repository = quarantine.repository();
    let base = merge::merge_base(&node.git, repository, upstream, branch).await?;
    match base.ok_or_else(|| Status::internal("get merge-base: no common ancestor"))? {
        base if base == upstream => return Ok(branch.to_owned()),
        base if base == branch => return Ok(upstream.to_owned()),
        _ => {}
    }
    let listed = node
        .git
        .command(repository, "rev-list")
        .reads()
        .args(["--cherry-pick", "--right-only", "--no-merges", "--topo-order", "--reverse"])
        .arg(format!("{upstream}...{branch}"))
        .checked()
        .await?;
    let mut onto = Onto {
        node,
        quarantine,
        objects: CatFile::start(&node.git, repository).await?,
        committer,
        tip: upstream.to_owned(),
        tree: String::new(),
    };
    onto.tree = onto.tree_of(upstream).await?;
    for commit in String::from_utf8_lossy(&listed).lines() {
        onto.pick(commit).await?;
    }
    onto.objects.close().await?;
    Ok(onto.tip)
}

/// A branch that grows commit by commit.
struct Onto<'a> {
    node: &'a Arc<Node>,
    quarantine: &'a Quarantine,
    objects: CatFile,
    committer: &'a Signature,
    tip: String,
    tree: String,
}

impl Onto<'_> {
    async fn tree_of(&mut self, commit: &str) -> Result<String, Status> {
        let tree = self.objects.info(format!("{commit}^{{tree}}").as_bytes()).await?;
        Ok(tree.ok_or_else(|| Status::internal(format!("tree of {commit} is missing")))?.id)
    }

    async fn pick(&mut self, id: &str) -> Result<(), RebaseError> {
        let missing = || Status::internal(format!("commit {id} is missing"));
        let commit = self.objects.commit(id.as_bytes()).await?.ok_or_else(missing)?;
        let git = &self.node.git;
        let parent = commit.parent_ids.first();
        let merged = match parent {
            Some(parent) => {
                merge::merge_changes(git, self.quarantine, parent, &self.tree, &commit.tree_id).await?
            }
            None => merge::merge(git, self.quarantine.repository(), &self.tip, id).await?,
        };
        let conflict = |files| RebaseError::Conflict(Conflict { commit: id.to_owned(), files });
        let tree = merged.clean().map_err(conflict)?;
        if tree == self.tree {
            // What was empty from the beginning stays; what has become empty is not needed any more.
            let before = match parent {
                Some(parent) => self.tree_of(&parent.clone()).await?,
                None => ObjectHash::of(self.quarantine.repository()).await?.empty_tree().to_owned(),
            };
            if before != commit.tree_id {
                return Ok(());
            }
        }
        let message = self.objects.commit_message(id.as_bytes()).await?.ok_or_else(missing)?;
        let author = Signature::of_author(&commit.author.unwrap_or_default());
        let new = NewCommit {
            tree: &tree,
            parents: &[&self.tip],
            author: &author,
            committer: self.committer,
            message: message.into(),
        };
        self.tip = write_commit(self.node, self.quarantine.repository(), new).await?;
        self.tree = tree;
        Ok(())
    }
}
