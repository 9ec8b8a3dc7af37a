//! A git client whose home directory and work trees are thrown away.

use std::path::{Path, PathBuf};

use tabularium_cli::local::git::Git;
use tempfile::TempDir;

/// A client; panics with git's words when a command fails that should not.
pub struct GitClient {
    directory: TempDir,
    git: Git,
}

impl Default for GitClient {
    fn default() -> Self {
        Self::new()
    }
}

impl GitClient {
    /// With nothing in its home directory.
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("tabularium-test-git-").tempdir().unwrap();
        let git = Git::new(&directory.path().join("home")).unwrap();
        Self { directory, git }
    }

    /// As new, with a variable added to the environment of every command.
    #[must_use]
    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.git = self.git.with(key, value);
        self
    }

    /// The client itself, for commands that may fail or whose pipes are wanted.
    pub fn git(&self) -> &Git {
        &self.git
    }

    /// Where a work tree or repository of that name is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs git in the work tree of that name (`.`: beside them) and answers its standard output.
    pub async fn run(&self, name: &str, arguments: &[&str]) -> String {
        self.run_in(&self.path(name), arguments).await
    }

    /// Runs git in any directory.
    pub async fn run_in(&self, directory: &Path, arguments: &[&str]) -> String {
        match self.git.run(directory, arguments).await {
            Ok(output) => output,
            Err(error) => panic!("{error} ({arguments:?})"),
        }
    }

    /// Runs git and answers whether it said yes, and what it wrote to standard error.
    pub async fn try_run(&self, name: &str, arguments: &[&str]) -> (bool, String) {
        let output = self.git.output(&self.path(name), arguments).await.unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// A work tree with `commits` commits on `main`.
    pub async fn work_tree(&self, name: &str, commits: u32) -> PathBuf {
        self.run(".", &["init", "--quiet", name]).await;
        for number in 1..=commits {
            self.commit(name, "file", &format!("{number}\n")).await;
        }
        self.path(name)
    }

    /// Writes a file and commits it; answers the commit.
    pub async fn commit(&self, name: &str, file: &str, content: &str) -> String {
        let path = self.path(name).join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        self.run(name, &["add", file]).await;
        self.run(name, &["commit", "--quiet", "--allow-empty", "-m", &format!("{file}: {}", content.len())])
            .await;
        self.run(name, &["rev-parse", "HEAD"]).await
    }

    /// Branches and tags with what they point at: equal texts mean equal refs.
    pub async fn refs(&self, name: &str) -> String {
        self.git.refs(&self.path(name)).await.unwrap_or_else(|error| panic!("{error}"))
    }
}
