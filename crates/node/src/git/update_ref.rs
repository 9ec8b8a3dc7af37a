//! Reference transactions through `git update-ref --stdin`.
//!
//! Queueing changes touches nothing. [`Transaction::commit`] locks all references, checks what they are, votes, and moves
//! them together; it runs in a task of its own, so that a client that hangs up cannot leave it half way. Git runs no hooks
//! here: the votes are cast between its answers.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use sha1::{Digest as _, Sha1};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{ChildStdin, ChildStdout},
    time::timeout,
};

use super::{Git, GitProcess, Slot};
use crate::{
    error::GitError,
    node::Node,
    storage::RepositoryPath,
    votes::{Ballot, Sections, VoteError, Voter},
};

/// How long locking and checking references may take. Git itself waits for a lock for a second, for packed references
/// ten; the rest is for transactions of a hundred thousand references, each with a file that is synced.
const PREPARE_DEADLINE: Duration = Duration::from_secs(300);
/// How long moving them may take. Whoever is stopped in the midst of it has moved some and not others, so this is only
/// for a disk that does not answer any more.
const COMMIT_DEADLINE: Duration = Duration::from_secs(3600);

const SUBCOMMAND: &str = "update-ref";

/// What a reference must be for a change to go through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Anything.
    Any,
    /// This object; the zero id stands for "does not exist".
    Value(String),
}

/// Why references were not moved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpdateRefError {
    /// Somebody else holds the lock.
    #[error("reference is already locked")]
    Locked {
        /// Full name.
        reference: String,
    },
    /// The reference is not what was expected.
    #[error("reference does not point to expected object")]
    Mismatch {
        /// Full name.
        reference: String,
        /// In hex; empty if git did not tell.
        expected: String,
        /// In hex; empty if git did not tell.
        actual: String,
    },
    /// The new object is not there.
    #[error("target object missing")]
    MissingObject {
        /// Full name.
        reference: String,
        /// In hex.
        object: String,
    },
    /// A branch can only point to a commit.
    #[error("target object not a commit")]
    NotACommit {
        /// Full name.
        reference: String,
        /// In hex.
        object: String,
    },
    /// One name would be a directory of the other.
    #[error("reference conflicts with {other:?}: {reference:?}")]
    Conflict {
        /// Full name.
        reference: String,
        /// Full name of the one that is there.
        other: String,
    },
    /// The same reference twice.
    #[error("reference has multiple updates: {reference:?}")]
    Repeated {
        /// Full name.
        reference: String,
    },
    /// A name that git refuses.
    #[error("invalid reference format")]
    Invalid {
        /// As given.
        reference: String,
    },
    /// The replicas do not move it. After the second vote, it has moved here all the same.
    #[error(transparent)]
    Vote(#[from] VoteError),
    /// Anything else.
    #[error(transparent)]
    Git(#[from] GitError),
}

/// A transaction that is being put together.
pub(crate) struct Transaction {
    process: GitProcess,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    replica: PathBuf,
    /// Of everything that was queued.
    subject: Subject,
}

/// What is voted on: changes of references, as git tells its hooks of them.
#[derive(Clone, Default)]
pub(crate) struct Subject(Sha1);

impl Subject {
    /// Adds a change of a reference.
    pub(crate) fn add(&mut self, reference: &[u8], new: &str, expected: &Expected) {
        let old = match expected {
            Expected::Value(value) if !value.is_empty() => value.clone(),
            _ => "0".repeat(new.len()),
        };
        for part in [old.as_bytes(), b" ", new.as_bytes(), b" ", reference, b"\n"] {
            self.0.update(part);
        }
    }

    /// The vote on all of it.
    pub(crate) fn ballot(&self) -> Ballot {
        self.0.clone().finalize().into()
    }
}

fn broken(source: io::Error) -> UpdateRefError {
    UpdateRefError::Git(GitError::Io { subcommand: SUBCOMMAND, source })
}

impl Transaction {
    /// Starts git. With `follow` a symbolic reference stands for what it points to, else it is changed itself.
    pub(crate) async fn start(
        git: &Git,
        repository: &RepositoryPath,
        follow: bool,
    ) -> Result<Self, UpdateRefError> {
        Self::start_in(git, repository, follow, &git.slot().await?).await
    }

    /// Starts git in room that has been taken before.
    pub(crate) async fn start_in(
        git: &Git,
        repository: &RepositoryPath,
        follow: bool,
        slot: &Slot,
    ) -> Result<Self, UpdateRefError> {
        let mut command = git.command(repository, SUBCOMMAND).slot(slot);
        if !follow {
            command = command.arg("--no-deref");
        }
        let mut process = command.args(["-z", "--stdin"]).spawn(true).await?;
        let (Some(stdin), Some(stdout)) = (process.take_stdin(), process.take_stdout()) else {
            return Err(broken(io::Error::other("pipes are missing")));
        };
        let stdout = BufReader::new(stdout);
        let (replica, subject) = (repository.path.clone(), Subject::default());
        let mut transaction = Self { process, stdin, stdout, replica, subject };
        transaction.stdin.write_all(b"start\0").await.map_err(broken)?;
        Ok(transaction)
    }

    /// Queues a change; the zero id deletes. `reference` has passed [`super::revision::check_reference`].
    pub(crate) async fn update(
        &mut self,
        reference: &[u8],
        new: &str,
        expected: &Expected,
    ) -> Result<(), UpdateRefError> {
        let old = match expected {
            Expected::Any => "",
            Expected::Value(value) => value,
        };
        self.speaks_of(reference, new, expected);
        let line = [b"update ", reference, b"\0", new.as_bytes(), b"\0", old.as_bytes(), b"\0"].concat();
        // A process that has given up closes its end; why, is told when the transaction is committed.
        match self.stdin.write_all(&line).await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.map_err(broken),
        }
    }

    /// Adds a change to what is voted on that comes about with another one.
    pub(crate) fn speaks_of(&mut self, reference: &[u8], new: &str, expected: &Expected) {
        self.subject.add(reference, new, expected);
    }

    /// Queues a reference that nobody votes on: it follows from those that are.
    pub(crate) async fn hold(&mut self, reference: &[u8], id: &str) -> Result<(), UpdateRefError> {
        let line = [b"update ", reference, b"\0", id.as_bytes(), b"\0\0"].concat();
        match self.stdin.write_all(&line).await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.map_err(broken),
        }
    }

    /// Queues the deletion of a reference that need not exist.
    pub(crate) async fn delete(&mut self, reference: &[u8]) -> Result<(), UpdateRefError> {
        self.subject.0.update(reference);
        self.subject.0.update(b"\n");
        let line = [b"delete ", reference, b"\0\0"].concat();
        match self.stdin.write_all(&line).await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.map_err(broken),
        }
    }

    /// Locks, checks, votes on and moves everything that was queued, or nothing.
    pub(crate) async fn commit(self, node: &Node, voter: &Voter) -> Result<(), UpdateRefError> {
        let work = self.prepare_and_commit(Arc::clone(&node.sections), voter.clone());
        match node.tasks.spawn("reference transaction", work).await {
            Ok(result) => result,
            Err(error) => Err(broken(io::Error::other(error))),
        }
    }

    async fn prepare_and_commit(
        mut self,
        sections: Arc<Sections>,
        voter: Voter,
    ) -> Result<(), UpdateRefError> {
        for (request, answer) in [("", "start: ok"), ("prepare\0", "prepare: ok")] {
            if !self.asked(request, answer, PREPARE_DEADLINE).await? {
                return Err(self.refusal().await);
            }
        }
        let ballot = self.subject.ballot();
        let section = sections.enter(&self.replica).await;
        if let Err(error) = voter.prepared(&self.replica, ballot).await {
            self.give_up().await?;
            return Err(error.into());
        }
        if !self.asked("commit\0", "commit: ok", COMMIT_DEADLINE).await? {
            return Err(self.refusal().await);
        }
        let Self { process, stdin, replica, .. } = self;
        drop(stdin);
        let (exit, stderr) = process.finish().await?;
        if !exit.success() {
            // References have moved: `commit: ok` was the word. What git says after that is worth a line, not a failure.
            tracing::warn!(%exit, stderr = %String::from_utf8_lossy(&stderr), "git update-ref after its commit");
        }
        drop(section);
        Ok(voter.committed(&replica, ballot).await?)
    }

    /// Whether git answers a request as it should.
    async fn asked(
        &mut self,
        request: &str,
        answer: &str,
        deadline: Duration,
    ) -> Result<bool, UpdateRefError> {
        // A failed write means that git has ended; the missing answer below leads to its reason.
        let _ = self.stdin.write_all(request.as_bytes()).await;
        let mut line = String::new();
        let read = timeout(deadline, self.stdout.read_line(&mut line)).await;
        read.map_err(io::Error::from).and_then(|read| read).map_err(broken)?;
        Ok(line.trim_end() == answer)
    }

    /// No reference is locked any more when this returns.
    async fn give_up(mut self) -> Result<(), UpdateRefError> {
        self.asked("abort\0", "abort: ok", PREPARE_DEADLINE).await?;
        let Self { process, stdin, .. } = self;
        drop(stdin);
        process.finish().await?;
        Ok(())
    }

    async fn refusal(self) -> UpdateRefError {
        let Self { process, stdin, .. } = self;
        drop(stdin);
        match process.finish().await {
            Err(error) => error.into(),
            Ok((exit, stderr)) => {
                let stderr = String::from_utf8_lossy(&stderr).trim_end().to_owned();
                classify(&stderr).unwrap_or(UpdateRefError::Git(GitError::Failed {
                    subcommand: SUBCOMMAND,
                    exit,
                    stderr,
                }))
            }
        }
    }
}

/// What stands between `before` and `after`.
fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(before)?;
    rest.split_once(after).map(|(found, _)| found)
}

/// The reason in git's last words, if it is one of those that clients are told apart.
fn classify(stderr: &str) -> Option<UpdateRefError> {
    let text = stderr.lines().find_map(|line| line.strip_prefix("fatal: ")).unwrap_or(stderr);
    if let Some(reference) = text.split_once("invalid ref format: ").map(|(_, name)| name) {
        return Some(UpdateRefError::Invalid { reference: reference.to_owned() });
    }
    if let Some(reference) = between(text, "multiple updates for ref '", "'")
        .or_else(|| between(text, "multiple updates for '", "'"))
    {
        return Some(UpdateRefError::Repeated { reference: reference.to_owned() });
    }
    if let Some((_, rest)) = text.split_once("trying to write ref '") {
        let (reference, rest) = rest.split_once('\'')?;
        let object = rest.rsplit(' ').next().unwrap_or_default().to_owned();
        return Some(UpdateRefError::MissingObject { reference: reference.to_owned(), object });
    }
    if let Some((_, rest)) = text.split_once("trying to write non-commit object ") {
        let (object, rest) = rest.split_once(' ')?;
        let reference = between(rest, "'", "'").unwrap_or_default().to_owned();
        return Some(UpdateRefError::NotACommit { reference, object: object.to_owned() });
    }
    if let Some(reference) = between(text, "cannot lock ref '", "'") {
        return Some(classify_lock(text, reference.to_owned()));
    }
    if text.contains("Unable to create '") && text.contains(".lock'") {
        let path = between(text, "Unable to create '", ".lock'").unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default();
        return Some(UpdateRefError::Locked { reference: name.to_owned() });
    }
    if let Some((one, other)) = text
        .split_once("cannot process '")
        .and_then(|(_, rest)| rest.split_once("' and '"))
        .and_then(|(one, rest)| rest.split_once('\'').map(|(other, _)| (one, other)))
    {
        return Some(UpdateRefError::Conflict { reference: one.to_owned(), other: other.to_owned() });
    }
    None
}

fn classify_lock(text: &str, reference: String) -> UpdateRefError {
    if text.contains("File exists") || text.contains("Unable to create '") {
        return UpdateRefError::Locked { reference };
    }
    if let Some(other) = between(text, ": '", "' exists; cannot create") {
        return UpdateRefError::Conflict { reference, other: other.to_owned() };
    }
    if let Some((one, other)) = text
        .split_once("cannot process '")
        .and_then(|(_, rest)| rest.split_once("' and '"))
        .and_then(|(one, rest)| rest.split_once('\'').map(|(other, _)| (one, other)))
    {
        let other = if one == reference { other } else { one }.to_owned();
        return UpdateRefError::Conflict { reference, other };
    }
    let expected = text.rsplit_once(" but expected ").map_or("", |(_, id)| id).trim().to_owned();
    let actual = between(text, ": is at ", " but expected").unwrap_or_default().to_owned();
    UpdateRefError::Mismatch { reference, expected, actual }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(stderr: &str) -> String {
        format!("{:?}", classify(stderr))
    }

    #[test]
    fn gits_words_become_reasons() {
        let cases = [
            (
                "fatal: prepare: cannot lock ref 'refs/heads/a': Unable to create '/r/refs/heads/a.lock': File exists.\n\nAnother git process seems to be running",
                "Some(Locked { reference: \"refs/heads/a\" })",
            ),
            (
                "fatal: prepare: cannot lock ref 'refs/heads/a': is at 11 but expected 22",
                "Some(Mismatch { reference: \"refs/heads/a\", expected: \"22\", actual: \"11\" })",
            ),
            (
                "fatal: prepare: cannot lock ref 'refs/heads/a': reference already exists",
                "Some(Mismatch { reference: \"refs/heads/a\", expected: \"\", actual: \"\" })",
            ),
            (
                "fatal: prepare: cannot lock ref 'refs/heads/a': unable to resolve reference 'refs/heads/a'",
                "Some(Mismatch { reference: \"refs/heads/a\", expected: \"\", actual: \"\" })",
            ),
            (
                "fatal: prepare: cannot lock ref 'refs/heads/a': reference is missing but expected 22",
                "Some(Mismatch { reference: \"refs/heads/a\", expected: \"22\", actual: \"\" })",
            ),
            (
                "fatal: prepare: cannot update ref 'refs/heads/a': trying to write ref 'refs/heads/a' with nonexistent object 33",
                "Some(MissingObject { reference: \"refs/heads/a\", object: \"33\" })",
            ),
            (
                "fatal: prepare: cannot update ref 'refs/heads/a': trying to write non-commit object 44 to branch 'refs/heads/a'",
                "Some(NotACommit { reference: \"refs/heads/a\", object: \"44\" })",
            ),
            (
                "fatal: prepare: cannot lock ref 'refs/heads/a/b': 'refs/heads/a' exists; cannot create 'refs/heads/a/b'",
                "Some(Conflict { reference: \"refs/heads/a/b\", other: \"refs/heads/a\" })",
            ),
            (
                "fatal: prepare: cannot lock ref 'refs/heads/a': cannot process 'refs/heads/a' and 'refs/heads/a/b' at the same time",
                "Some(Conflict { reference: \"refs/heads/a\", other: \"refs/heads/a/b\" })",
            ),
            (
                "fatal: prepare: multiple updates for ref 'refs/heads/a' not allowed",
                "Some(Repeated { reference: \"refs/heads/a\" })",
            ),
            ("fatal: invalid ref format: refs/heads/..", "Some(Invalid { reference: \"refs/heads/..\" })"),
            (
                "fatal: prepare: Unable to create '/r/packed-refs.lock': File exists.",
                "Some(Locked { reference: \"packed-refs\" })",
            ),
            ("fatal: out of memory", "None"),
        ];
        for (stderr, expected) in cases {
            assert_eq!(reason(stderr), expected, "{stderr}");
        }
    }
}
