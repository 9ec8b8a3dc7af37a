//! Merging without a working copy: `git merge-tree` makes the tree, and says what is in conflict.
//!
//! Trees that are made here depend on nothing but the commits they are made from, so every replica makes the same ones.

use tonic::Status;

use super::{
    Git,
    quarantine::{Drafts, Quarantine},
};
use crate::{
    error::{GitError, internal_io},
    storage::RepositoryPath,
};

/// Who made the commits that nobody ever sees.
const NOBODY: &str = "Nobody";

/// Where an entry of a merge that did not succeed comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// What both sides began with.
    Ancestor,
    /// The first side.
    Ours,
    /// The second side.
    Theirs,
}

/// One side's file that could not be merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As it stands in a tree.
    pub(crate) mode: u32,
    /// Whose it is.
    pub(crate) stage: Stage,
    /// From the root of the tree.
    pub(crate) path: Vec<u8>,
}

/// What came of a merge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Merge {
    /// With conflict markers where there are conflicts.
    pub(crate) tree: String,
    /// In the order of their paths; none if everything went well.
    pub(crate) conflicts: Vec<Entry>,
}

impl Merge {
    /// The tree, or the names of the files in conflict.
    pub(crate) fn clean(self) -> Result<String, Vec<Vec<u8>>> {
        if self.conflicts.is_empty() {
            return Ok(self.tree);
        }
        let mut paths: Vec<Vec<u8>> = self.conflicts.into_iter().map(|entry| entry.path).collect();
        // A file's entries stand together.
        paths.dedup();
        Err(paths)
    }
}

/// Merges two commits, which need not have anything in common.
pub(crate) async fn merge(
    git: &Git,
    repository: &RepositoryPath,
    ours: &str,
    theirs: &str,
) -> Result<Merge, Status> {
    let output = git
        .command(repository, "merge-tree")
        .args(["--write-tree", "-z", "--no-messages", "--allow-unrelated-histories"])
        .args([ours, theirs])
        .output()
        .await?;
    match output.exit.code {
        Some(0) => parse(&output.stdout).ok_or_else(|| Status::internal("merge: no tree")),
        // The same exit code without a tree tells of a revision that is no commit.
        Some(1) if !output.stdout.is_empty() => {
            let merge = parse(&output.stdout).filter(|merge| !merge.conflicts.is_empty());
            merge.ok_or_else(|| Status::internal("merge: a conflict that cannot be read"))
        }
        _ => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            Err(Status::internal(format!("merge: {}", stderr.trim_end())))
        }
    }
}

/// Makes the changes that lead from `base` to the tree `theirs` to the tree `ours`. The base is the merge base of two commits
/// that are made for this and thrown away: not every git can be told one.
pub(crate) async fn merge_changes(
    git: &Git,
    quarantine: &Quarantine,
    base: &str,
    ours: &str,
    theirs: &str,
) -> Result<Merge, Status> {
    let drafts = drafts(quarantine)?;
    merge_drafts(git, &drafts, base, ours, theirs).await
}

/// The same where not even the base is a commit.
pub(crate) async fn merge_trees(
    git: &Git,
    quarantine: &Quarantine,
    base: &str,
    ours: &str,
    theirs: &str,
) -> Result<Merge, Status> {
    let drafts = drafts(quarantine)?;
    let base = draft(git, &drafts.writing, &[], base).await?;
    merge_drafts(git, &drafts, &base, ours, theirs).await
}

fn drafts(quarantine: &Quarantine) -> Result<Drafts, Status> {
    quarantine.drafts().map_err(internal_io("creating a place for drafts"))
}

async fn merge_drafts(
    git: &Git,
    drafts: &Drafts,
    base: &str,
    ours: &str,
    theirs: &str,
) -> Result<Merge, Status> {
    let ours = draft(git, &drafts.writing, &["-p", base], ours).await?;
    let theirs = draft(git, &drafts.writing, &["-p", base], theirs).await?;
    merge(git, &drafts.reading, &ours, &theirs).await
}

/// A commit with this tree that is only there to be merged.
async fn draft(
    git: &Git,
    repository: &RepositoryPath,
    parents: &[&str],
    tree: &str,
) -> Result<String, GitError> {
    let mut command = git.command(repository, "commit-tree").config("core.fsync=none");
    for who in ["AUTHOR", "COMMITTER"] {
        command = command
            .env(format!("GIT_{who}_NAME"), NOBODY)
            .env(format!("GIT_{who}_EMAIL"), NOBODY)
            .env(format!("GIT_{who}_DATE"), "@0 +0000");
    }
    let id = command.args(parents).arg(tree).checked().await?;
    Ok(String::from_utf8_lossy(id.trim_ascii()).into_owned())
}

/// What `git merge-tree -z` prints.
fn parse(stdout: &[u8]) -> Option<Merge> {
    let mut parts = stdout.split(|byte| *byte == 0);
    let tree = std::str::from_utf8(parts.next()?.trim_ascii()).ok()?;
    let entries = parts.take_while(|part| !part.is_empty());
    let conflicts = entries.map(parse_entry).collect::<Option<Vec<Entry>>>()?;
    Some(Merge { tree: tree.to_owned(), conflicts }).filter(|merge| !merge.tree.is_empty())
}

/// `<mode> <object> <stage>\t<path>`.
fn parse_entry(line: &[u8]) -> Option<Entry> {
    let tab = line.iter().position(|byte| *byte == b'\t')?;
    let mut words = std::str::from_utf8(line.get(..tab)?).ok()?.split(' ');
    let mode = u32::from_str_radix(words.next()?, 8).ok()?;
    let stage = match words.nth(1)? {
        "1" => Stage::Ancestor,
        "2" => Stage::Ours,
        "3" => Stage::Theirs,
        _ => return None,
    };
    Some(Entry { mode, stage, path: line.get(tab + 1..)?.to_vec() })
}

/// Whether `child` contains `ancestor`, both of which are commits.
pub(crate) async fn is_ancestor(
    git: &Git,
    repository: &RepositoryPath,
    ancestor: &str,
    child: &str,
) -> Result<bool, GitError> {
    let command = git.command(repository, "merge-base").reads();
    let output = command.args(["--is-ancestor", ancestor, child]).output().await?;
    match output.exit.code {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => Err(output.into_error()),
    }
}

/// The best commit that both have in common; `None` if they have none.
pub(crate) async fn merge_base(
    git: &Git,
    repository: &RepositoryPath,
    one: &str,
    other: &str,
) -> Result<Option<String>, GitError> {
    let output = git.command(repository, "merge-base").reads().args([one, other]).output().await?;
    if output.exit.code == Some(1) {
        return Ok(None);
    }
    Ok(Some(String::from_utf8_lossy(output.checked()?.trim_ascii()).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_merge_tree_prints() {
        assert_eq!(parse(b"aabb\0"), Some(Merge { tree: "aabb".into(), conflicts: vec![] }));
        let entry = |mode, stage, path: &[u8]| Entry { mode, stage, path: path.to_vec() };
        let merge = Merge {
            tree: "aabb".into(),
            conflicts: vec![
                entry(0o100_644, Stage::Ancestor, b"a file"),
                entry(0o100_755, Stage::Ours, b"a file"),
                entry(0o160_000, Stage::Theirs, b"d/\xff\n"),
            ],
        };
        let printed = b"aabb\x00100644 11 1\ta file\x00100755 22 2\ta file\x00160000 33 3\td/\xff\n\0\0more";
        assert_eq!(parse(printed), Some(merge.clone()));
        assert_eq!(merge.clean(), Err(vec![b"a file".to_vec(), b"d/\xff\n".to_vec()]));
        for bad in [&b""[..], b"aabb\x00100644 11 4\ta\0", b"aabb\x00100644 11\ta\0", b"aabb\0a\0"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
