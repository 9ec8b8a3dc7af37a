//! What git prints, record by record, as it prints it.

use std::io;

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::ChildStdout,
};

use super::{Exit, GitCommand, GitProcess};
use crate::error::GitError;

/// Longest record: a path, an id and some words.
const MAX_RECORD_BYTES: usize = 1024 * 1024;

/// A running command whose output is read in records.
pub(crate) struct Lines {
    process: GitProcess,
    stdout: BufReader<ChildStdout>,
    delimiter: u8,
    subcommand: &'static str,
}

impl Lines {
    /// Starts the command. `delimiter` ends every record.
    pub(crate) async fn start(
        command: GitCommand,
        subcommand: &'static str,
        delimiter: u8,
    ) -> Result<Self, GitError> {
        let mut process = command.reads().spawn(false).await?;
        let Some(stdout) = process.take_stdout() else {
            return Err(GitError::Io { subcommand, source: io::Error::other("pipes are missing") });
        };
        Ok(Self { process, stdout: BufReader::new(stdout), delimiter, subcommand })
    }

    /// The next record without its delimiter; `None` at the end of the output.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, GitError> {
        let mut record = Vec::new();
        let limit = u64::try_from(MAX_RECORD_BYTES).unwrap_or(u64::MAX);
        let mut bounded = (&mut self.stdout).take(limit);
        let read = bounded.read_until(self.delimiter, &mut record).await;
        read.map_err(|source| GitError::Io { subcommand: self.subcommand, source })?;
        if record.is_empty() {
            return Ok(None);
        }
        if record.last() == Some(&self.delimiter) {
            record.pop();
        } else if record.len() == MAX_RECORD_BYTES {
            return Err(GitError::TooMuchOutput { subcommand: self.subcommand, limit: MAX_RECORD_BYTES });
        }
        Ok(Some(record))
    }

    /// Waits for the end of the command.
    pub(crate) async fn finish(self) -> Result<(Exit, Vec<u8>), GitError> {
        drop(self.stdout);
        self.process.finish().await
    }

    /// Waits for the end of the command, whose exit code must be 0.
    pub(crate) async fn checked(self) -> Result<(), GitError> {
        let subcommand = self.subcommand;
        let (exit, stderr) = self.finish().await?;
        if exit.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&stderr).trim_end().to_owned();
        Err(GitError::Failed { subcommand, exit, stderr })
    }
}
