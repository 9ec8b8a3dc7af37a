//! What git prints, record by record, as it prints it.

use std::{io, pin::pin};

use bytes::Bytes;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{ChildStdin, ChildStdout},
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
    /// The end of the present record is still in the pipe.
    continued: bool,
    subcommand: &'static str,
    /// What the command has not been given yet of its input.
    input: Option<(ChildStdin, Bytes)>,
}

impl Lines {
    /// Starts the command. `delimiter` ends every record.
    pub(crate) async fn start(
        command: GitCommand,
        subcommand: &'static str,
        delimiter: u8,
    ) -> Result<Self, GitError> {
        let process = command.reads().spawn(false).await?;
        Self::of(process, subcommand, delimiter, None)
    }

    /// Starts the command with `input` on its standard input.
    pub(crate) async fn start_with(
        command: GitCommand,
        subcommand: &'static str,
        delimiter: u8,
        input: impl Into<Bytes>,
    ) -> Result<Self, GitError> {
        let mut process = command.reads().spawn(true).await?;
        let input = process.take_stdin().map(|stdin| (stdin, input.into()));
        Self::of(process, subcommand, delimiter, input)
    }

    fn of(
        mut process: GitProcess,
        subcommand: &'static str,
        delimiter: u8,
        input: Option<(ChildStdin, Bytes)>,
    ) -> Result<Self, GitError> {
        let Some(stdout) = process.take_stdout() else {
            return Err(GitError::Io { subcommand, source: io::Error::other("pipes are missing") });
        };
        let stdout = BufReader::new(stdout);
        Ok(Self { process, stdout, delimiter, continued: false, subcommand, input })
    }

    /// Ends records differently from now on.
    pub(crate) fn delimited_by(&mut self, delimiter: u8) {
        self.delimiter = delimiter;
    }

    /// Reads the next piece of a record, its delimiter included, and answers whether it is the record's first; `None` at
    /// the end of the output. For records that may be longer than [`Lines::next`] takes.
    pub(crate) async fn piece(&mut self, piece: &mut Vec<u8>) -> Result<Option<bool>, GitError> {
        piece.clear();
        let limit = u64::try_from(MAX_RECORD_BYTES).unwrap_or(u64::MAX);
        let mut bounded = (&mut self.stdout).take(limit);
        let read = fed(&mut self.input, bounded.read_until(self.delimiter, piece)).await;
        read.map_err(|source| GitError::Io { subcommand: self.subcommand, source })?;
        if piece.is_empty() {
            return Ok(None);
        }
        let begins = !std::mem::replace(&mut self.continued, piece.last() != Some(&self.delimiter));
        Ok(Some(begins))
    }

    /// The next record without its delimiter; `None` at the end of the output.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, GitError> {
        let mut record = Vec::new();
        let limit = u64::try_from(MAX_RECORD_BYTES).unwrap_or(u64::MAX);
        let mut bounded = (&mut self.stdout).take(limit);
        let read = fed(&mut self.input, bounded.read_until(self.delimiter, &mut record)).await;
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
        drop(self.input);
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

/// Reads, and writes meanwhile: neither end waits for the other.
async fn fed<T>(input: &mut Option<(ChildStdin, Bytes)>, read: impl Future<Output = T>) -> T {
    let mut read = pin!(read);
    while let Some((stdin, rest)) = input {
        let written = tokio::select! {
            biased;
            done = &mut read => return done,
            written = stdin.write_buf(rest) => written,
        };
        // A command that has read enough closes its end; its exit code tells whether that was right.
        if written.is_err() || rest.is_empty() {
            *input = None;
        }
    }
    read.await
}
