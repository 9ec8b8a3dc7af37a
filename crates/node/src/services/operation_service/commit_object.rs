//! Writing commit objects.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use bytes::Bytes;
use tonic::Status;

use super::signature::Signature;
use crate::{node::Node, storage::RepositoryPath};

/// What git, and Gitaly, say to a person without a name or an address.
pub(super) const NAMELESS: &str =
    "commit: failed to parse signature - Signature cannot have an empty name or email";

/// What goes into a commit.
pub(super) struct NewCommit<'a> {
    pub(super) tree: &'a str,
    pub(super) parents: &'a [&'a str],
    pub(super) author: &'a Signature,
    pub(super) committer: &'a Signature,
    pub(super) message: Bytes,
}

/// Writes a commit and answers its id.
pub(super) async fn write_commit(
    node: &Node,
    repository: &RepositoryPath,
    commit: NewCommit<'_>,
) -> Result<String, Status> {
    if commit.message.contains(&0) {
        return Err(Status::invalid_argument("commit message contains NUL byte"));
    }
    let mut command = node
        .git
        .command(repository, "commit-tree")
        .env("GIT_AUTHOR_NAME", OsStr::from_bytes(&commit.author.name))
        .env("GIT_AUTHOR_EMAIL", OsStr::from_bytes(&commit.author.email))
        .env("GIT_AUTHOR_DATE", commit.author.date())
        .env("GIT_COMMITTER_NAME", OsStr::from_bytes(&commit.committer.name))
        .env("GIT_COMMITTER_EMAIL", OsStr::from_bytes(&commit.committer.email))
        .env("GIT_COMMITTER_DATE", commit.committer.date())
        .arg(commit.tree);
    for parent in commit.parents {
        command = command.args(["-p", parent]);
    }
    let output = command.output_with(commit.message).await?;
    if output.exit.success() {
        return Ok(String::from_utf8_lossy(output.stdout.trim_ascii()).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("empty ident name") || stderr.contains("only of disallowed characters") {
        return Err(Status::invalid_argument(NAMELESS));
    }
    Err(output.into_error().into())
}
