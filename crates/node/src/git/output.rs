//! How a git process ended, and what it said.

use std::fmt;

use crate::error::GitError;

/// The least exit code of a git that could not go on.
const DIED: i32 = 128;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Its exit code; `None` when a signal ended it.
    pub(crate) code: Option<i32>,
}

impl Exit {
    /// Exit code 0.
    pub(crate) fn success(self) -> bool {
        self.code == Some(0)
    }

    /// Git could not go on, or was killed; smaller codes are answers.
    pub(super) fn died(self) -> bool {
        self.code.is_none_or(|code| code >= DIED)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(f, "exit status {code}"),
            None => f.write_str("killed by a signal"),
        }
    }
}

/// What a process that has ended said.
#[derive(Debug)]
pub(crate) struct Output {
    /// How it ended. An exit code other than 0 is not an error here.
    pub(crate) exit: Exit,
    /// All of its standard output.
    pub(crate) stdout: Vec<u8>,
    /// The end of its standard error.
    pub(crate) stderr: Vec<u8>,
    pub(super) subcommand: &'static str,
}

impl Output {
    /// The standard output, if the exit code was 0.
    pub(crate) fn checked(self) -> Result<Vec<u8>, GitError> {
        if self.exit.success() { Ok(self.stdout) } else { Err(self.into_error()) }
    }

    /// The failure this output tells of.
    pub(crate) fn into_error(self) -> GitError {
        GitError::Failed {
            subcommand: self.subcommand,
            exit: self.exit,
            stderr: String::from_utf8_lossy(&self.stderr).trim_end().to_owned(),
        }
    }
}
