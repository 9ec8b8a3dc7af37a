//! Writing commit objects, signed ones too.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use bytes::Bytes;
use tonic::Status;

use super::signature::Signature;
use crate::{
    error::internal_io,
    git::{catfile::CatFile, command::GitCommand, objects, quarantine::Quarantine, revision::ObjectHash},
    node::Node,
    signing::Signing,
    storage::RepositoryPath,
};

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
    run(node.git.command(repository, "commit-tree"), commit).await
}

/// Writes a commit into the quarantine and answers its id. It is signed if there is a key and the request asks for it.
pub(super) async fn write_signed_commit(
    node: &Node,
    quarantine: &Quarantine,
    commit: NewCommit<'_>,
    asked: bool,
) -> Result<String, Status> {
    let Some(signing) = node.signing.as_ref().filter(|signing| signing.wanted(asked)) else {
        return write_commit(node, quarantine.repository(), commit).await;
    };
    let someone = signing.committer.as_ref();
    let someone = someone.map(|committer| commit.committer.with_person(&committer.name, &committer.email));
    let commit = NewCommit { committer: someone.as_ref().unwrap_or(commit.committer), ..commit };

    // What is signed is what git makes of all this.
    let drafts = quarantine.drafts().map_err(internal_io("making a directory for drafts"))?;
    let draft = node.git.command(&drafts.writing, "commit-tree").config("core.fsync=none");
    let draft = run(draft, commit).await?;
    let mut written = CatFile::start(&node.git, &drafts.writing).await?;
    let missing = || Status::internal("the commit to be signed is not there");
    let (info, draft) = written.whole(draft.as_bytes()).await?.ok_or_else(missing)?;
    let hash = written.hash();
    written.close().await?;
    let author = objects::parse_commit(&info.id, &draft, info.size).author.unwrap_or_default();
    let signed = sign(signing, hash, &draft, author.date.unwrap_or_default().seconds)?;

    let command = node.git.command(quarantine.repository(), "hash-object");
    let output = command.args(["-w", "-t", "commit", "--stdin"]).output_with(signed).await?;
    if !output.exit.success() {
        return Err(output.into_error().into());
    }
    Ok(String::from_utf8_lossy(output.stdout.trim_ascii()).into_owned())
}

/// The commit with its signature as the last of its headers.
fn sign(signing: &Signing, hash: ObjectHash, commit: &[u8], written: i64) -> Result<Vec<u8>, Status> {
    let signature = signing.sign(commit, written).map_err(|error| Status::internal(error.to_string()))?;
    let end = commit.windows(2).position(|ends| ends == b"\n\n").map(|end| end + 1);
    let (headers, rest) = commit.split_at(end.unwrap_or(commit.len()));
    let mut signed = headers.to_vec();
    let mut key: &[u8] = match hash {
        ObjectHash::Sha1 => b"gpgsig",
        ObjectHash::Sha256 => b"gpgsig-sha256",
    };
    for line in signature.split_inclusive(|byte| *byte == b'\n') {
        signed.extend([key, b" ", line].concat());
        // What belongs to the header above.
        key = b"";
    }
    signed.extend(rest);
    Ok(signed)
}

async fn run(mut command: GitCommand, commit: NewCommit<'_>) -> Result<String, Status> {
    if commit.message.contains(&0) {
        return Err(Status::invalid_argument("commit message contains NUL byte"));
    }
    command = command
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
