//! Whether git, when it tells its hooks of a branch that moves, tells them of `HEAD` too if that stands for the branch.
//! Some versions do. What it tells is what is voted on, so a follower has to know; git itself is asked, once.

use std::{fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use crate::{error::GitError, git::Git};

const BRANCH: &str = "refs/heads/main";
/// Notes what git tells its hook before it moves anything.
const HOOK: &[u8] = b"#!/bin/sh\n[ \"$1\" = prepared ] || exit 0\nexec cat >\"$GIT_DIR/seen\"\n";
/// A commit of the empty tree. Nobody looks for the tree.
const COMMIT: &[u8] =
    b"tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nauthor a <a> 0 +0000\ncommitter a <a> 0 +0000\n\na\n";

/// What git's hooks are told of a branch that `HEAD` stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadListing {
    /// The branch.
    Branch,
    /// The branch, then `HEAD`.
    BranchAndHead,
    /// Something that was not foreseen.
    Unknown,
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Git(#[from] GitError),
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl HeadListing {
    /// Asks git, in a repository of its own that is made in this directory and removed.
    pub(crate) async fn find_out(git: &Git, within: &Path) -> Self {
        match try_out(git, within).await {
            Ok(listing) => {
                if listing == Self::Unknown {
                    tracing::warn!("git tells its hooks of HEAD in a way that is not known here");
                }
                listing
            }
            Err(error) => {
                tracing::warn!(%error, "what git tells its hooks of HEAD could not be found out");
                Self::Unknown
            }
        }
    }
}

async fn try_out(git: &Git, within: &Path) -> Result<HeadListing, Failed> {
    let directory = tempfile::Builder::new().prefix("head-").tempdir_in(within)?;
    let repository = directory.path();
    let branch = BRANCH.trim_start_matches("refs/heads/");
    let init =
        git.bare_command("init").args(["--quiet", "--bare", "--template=", "--initial-branch", branch]);
    init.arg(repository).checked().await?;
    let hooks = repository.join("own-hooks");
    fs::create_dir(&hooks)?;
    let hook = hooks.join("reference-transaction");
    fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(hook)?.write_all(HOOK)?;

    let object = git.bare_command("hash-object").env("GIT_DIR", repository);
    let object = object.args(["-t", "commit", "-w", "--stdin"]).output_with(COMMIT).await?.checked()?;
    let commit = String::from_utf8_lossy(&object).trim_end().to_owned();
    let mut setting = std::ffi::OsString::from("core.hooksPath=");
    setting.push(&hooks);
    let update = git.bare_command("update-ref").env("GIT_DIR", repository).config(setting);
    update.args([BRANCH, &commit]).checked().await?;
    let seen = fs::read_to_string(repository.join("seen"))?;
    Ok(judge(&seen, &commit))
}

fn judge(seen: &str, commit: &str) -> HeadListing {
    let line = |name: &str| format!("{} {commit} {name}\n", "0".repeat(commit.len()));
    if seen == line(BRANCH) {
        HeadListing::Branch
    } else if seen == line(BRANCH) + &line("HEAD") {
        HeadListing::BranchAndHead
    } else {
        HeadListing::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_git_that_is_here_is_known() {
        let search_path = std::env::var_os("PATH").unwrap();
        let metrics = crate::metrics::Metrics::new(&mut prometheus_client::registry::Registry::default());
        let patience = std::time::Duration::from_secs(10);
        let tasks = tabularium_common::lifecycle::Tasks::new();
        let git = Git::new("git".into(), search_path, 2, patience, tasks, metrics);
        let directory = tempfile::tempdir().unwrap();
        let listing = try_out(&git, directory.path()).await.unwrap();
        assert_ne!(listing, HeadListing::Unknown);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_foreseen_is_not_known() {
        let (commit, zero) = ("1".repeat(40), "0".repeat(40));
        let branch = format!("{zero} {commit} {BRANCH}\n");
        let head = format!("{zero} {commit} HEAD\n");
        assert_eq!(judge(&branch, &commit), HeadListing::Branch);
        assert_eq!(judge(&format!("{branch}{head}"), &commit), HeadListing::BranchAndHead);
        for seen in [String::new(), head.clone(), format!("{head}{branch}")] {
            assert_eq!(judge(&seen, &commit), HeadListing::Unknown, "{seen}");
        }
    }
}
