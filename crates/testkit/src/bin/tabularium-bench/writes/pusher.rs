//! A work tree that pushes small commits to one branch, one after the other.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result};
use tokio::process::Command;

use crate::generated::git;

/// Somebody who pushes.
pub(super) struct Pusher {
    directory: PathBuf,
    url: String,
    branch: String,
    number: usize,
}

impl Pusher {
    /// A work tree of its own with one commit, not pushed yet.
    pub(super) async fn new(parent: &Path, name: &str, url: String, branch: &str) -> Result<Self> {
        let directory = parent.join(name);
        tokio::fs::create_dir_all(&directory).await?;
        git(&directory, &["init", "--quiet", "--initial-branch", branch]).await?;
        for setting in [["user.name", "Bench"], ["user.email", "bench@example.org"], ["gc.auto", "0"]] {
            git(&directory, &["config", setting[0], setting[1]]).await?;
        }
        let mut pusher = Self { directory, url, branch: branch.to_owned(), number: 0 };
        pusher.commit().await?;
        Ok(pusher)
    }

    /// A small commit more.
    pub(super) async fn commit(&mut self) -> Result<()> {
        self.number += 1;
        tokio::fs::write(self.directory.join("file"), format!("{} {}\n", self.branch, self.number)).await?;
        git(&self.directory, &["add", "file"]).await?;
        git(&self.directory, &["commit", "--quiet", "-m", "one more"]).await
    }

    /// Pushes what was committed; seconds that `git push` took.
    pub(super) async fn push(&self) -> Result<f64> {
        let begun = Instant::now();
        git(&self.directory, &["push", "--quiet", &self.url, &self.branch]).await?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Commits so often, the ids in order: for whoever is to do nothing but push.
    pub(super) async fn commit_ahead(&mut self, commits: usize) -> Result<Vec<String>> {
        let mut ids = Vec::with_capacity(commits);
        for _ in 0..commits {
            self.commit().await?;
            ids.push(self.head().await?);
        }
        Ok(ids)
    }

    /// Pushes that commit to the branch.
    pub(super) async fn push_commit(&self, id: &str) -> Result<()> {
        let refspec = format!("{id}:refs/heads/{}", self.branch);
        git(&self.directory, &["push", "--quiet", &self.url, &refspec]).await
    }

    /// Commits and pushes; seconds of the push alone.
    pub(super) async fn again(&mut self) -> Result<f64> {
        self.commit().await?;
        self.push().await
    }

    /// The newest commit.
    pub(super) async fn head(&self) -> Result<String> {
        let output =
            Command::new("git").args(["rev-parse", "HEAD"]).current_dir(&self.directory).output().await?;
        let head = String::from_utf8(output.stdout).context("git rev-parse")?;
        Ok(head.trim().to_owned())
    }
}
