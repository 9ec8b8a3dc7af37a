//! Single references, read exactly: none of git's guessing that finds a tag where a branch was meant.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use super::{Git, revision};
use crate::{error::GitError, storage::RepositoryPath};

/// What the reference of this full name points to; `None` if it does not exist.
pub(crate) async fn read(
    git: &Git,
    repository: &RepositoryPath,
    name: &[u8],
) -> Result<Option<String>, GitError> {
    Ok(read_many(git, repository, &[name]).await?.pop().map(|(_, id)| id))
}

/// Those of the named references that exist, in the order of their names.
pub(crate) async fn read_many(
    git: &Git,
    repository: &RepositoryPath,
    names: &[&[u8]],
) -> Result<Vec<(Vec<u8>, String)>, GitError> {
    // A name that is not valid does not exist, and might be a pattern.
    let names: Vec<&[u8]> =
        names.iter().copied().filter(|name| revision::check_reference(name).is_ok()).collect();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let output = git
        .command(repository, "for-each-ref")
        .reads()
        .args(["--format=%(objectname) %(refname)", "--"])
        .args(names.iter().map(|name| OsStr::from_bytes(name)))
        .checked()
        .await?;
    Ok(parse(&output).filter(|(name, _)| names.contains(&name.as_slice())).collect())
}

fn parse(output: &[u8]) -> impl Iterator<Item = (Vec<u8>, String)> {
    output.split(|byte| *byte == b'\n').filter_map(|line| {
        let at = line.iter().position(|byte| *byte == b' ')?;
        let id = String::from_utf8_lossy(line.get(..at)?).into_owned();
        Some((line.get(at + 1..)?.to_vec(), id))
    })
}

/// Whether there is any branch.
pub(crate) async fn has_branches(git: &Git, repository: &RepositoryPath) -> Result<bool, GitError> {
    Ok(first_branch(git, repository).await?.is_some())
}

async fn first_branch(git: &Git, repository: &RepositoryPath) -> Result<Option<Vec<u8>>, GitError> {
    let output = git
        .command(repository, "for-each-ref")
        .reads()
        .args(["--count=1", "--format=%(objectname) %(refname)", "--", "refs/heads/"])
        .checked()
        .await?;
    Ok(parse(&output).next().map(|(name, _)| name))
}

/// What `HEAD` stands for, whether that exists or not; `None` if it names an object itself.
pub(crate) async fn head_target(git: &Git, repository: &RepositoryPath) -> Result<Option<Vec<u8>>, GitError> {
    let output = git.command(repository, "symbolic-ref").reads().args(["-q", "HEAD"]).output().await?;
    // Exit code 1 is git's word for a detached head.
    if output.exit.code == Some(1) {
        return Ok(None);
    }
    Ok(Some(output.checked()?.trim_ascii().to_vec()))
}

/// The default branch: what `HEAD` stands for, else `main`, `master` or any.
pub(crate) async fn default_branch(
    git: &Git,
    repository: &RepositoryPath,
) -> Result<Option<Vec<u8>>, GitError> {
    let head = head_target(git, repository).await?.unwrap_or_default();
    let candidates: [&[u8]; 3] = [&head, b"refs/heads/main", b"refs/heads/master"];
    let existing = read_many(git, repository, &candidates).await?;
    let chosen = candidates.iter().find(|name| existing.iter().any(|(found, _)| found == *name));
    match chosen {
        Some(name) => Ok(Some(name.to_vec())),
        None => first_branch(git, repository).await,
    }
}

/// The object a revision leads to; `None` if it leads to none.
pub(crate) async fn resolve(
    git: &Git,
    repository: &RepositoryPath,
    revision: &[u8],
) -> Result<Option<String>, GitError> {
    let output = git
        .command(repository, "rev-parse")
        .reads()
        .args(["--quiet", "--verify", "--end-of-options"])
        .arg(OsStr::from_bytes(revision))
        .output()
        .await?;
    if output.exit.code == Some(1) {
        return Ok(None);
    }
    match output.exit.code {
        // Peeling what cannot be peeled, and ids that nothing has, end with 128 and a reason.
        Some(128) if !is_damage(&output.stderr) => Ok(None),
        _ => Ok(Some(String::from_utf8_lossy(output.checked()?.trim_ascii()).into_owned())),
    }
}

/// Whether git complains of the repository and not of the revision.
fn is_damage(stderr: &[u8]) -> bool {
    let stderr = String::from_utf8_lossy(stderr);
    ["not a git repository", "corrupt", "unable to", "cannot", "bad config"]
        .iter()
        .any(|word| stderr.contains(word))
}
