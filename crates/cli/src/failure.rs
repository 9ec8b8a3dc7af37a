//! How a command fails, and with which exit code.

use std::process::ExitCode;

use tonic::{Code, Status};

use crate::local::LocalError;

/// One line: what, where, what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The answer is no: not there, already there, not healthy, not allowed.
    #[error("{0}")]
    No(String),
    /// The command line makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Whoever should answer does not.
    #[error("{0}")]
    Unreachable(String),
    /// Anything else.
    #[error("{0}")]
    Internal(String),
}

impl Failure {
    /// 1 no, 2 usage, 69 unreachable (`EX_UNAVAILABLE`), 70 internal (`EX_SOFTWARE`).
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::No(_) => 1,
            Self::Usage(_) => 2,
            Self::Unreachable(_) => 69,
            Self::Internal(_) => 70,
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code())
    }

    /// A refused call: `what` was asked of `whom`.
    pub(crate) fn of_status(what: &str, whom: &str, status: &Status) -> Self {
        let message = status.message();
        match status.code() {
            Code::Unavailable | Code::DeadlineExceeded => Self::Unreachable(format!(
                "{what}: {whom} does not answer ({message}); try `tabularium check`"
            )),
            Code::Unauthenticated | Code::PermissionDenied => {
                Self::No(format!("{what}: {whom} refuses our token ({message}); check the token file"))
            }
            Code::InvalidArgument => Self::Usage(format!("{what}: {message}")),
            // Gitaly's texts begin with the steps that led there.
            Code::AlreadyExists => {
                Self::No(format!("{what}: {}", message.rsplit(": ").next().unwrap_or(message)))
            }
            Code::NotFound | Code::FailedPrecondition | Code::Aborted | Code::ResourceExhausted => {
                Self::No(format!("{what}: {message}"))
            }
            code => Self::Internal(format!("{what}: {whom} answered {code:?}: {message}")),
        }
    }
}

impl From<LocalError> for Failure {
    fn from(error: LocalError) -> Self {
        Self::of_local(&error)
    }
}

impl Failure {
    /// A local cluster that could not be started, steered or stopped.
    pub(crate) fn of_local(error: &LocalError) -> Self {
        match error {
            LocalError::MissingProgram { .. } => Self::Unreachable(error.to_string()),
            LocalError::Refused(_) => Self::No(error.to_string()),
            LocalError::Io { .. } | LocalError::Process { .. } => Self::Internal(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_tell_what_kind_of_failure_it_was() {
        for (code, exit) in [
            (Code::NotFound, 1),
            (Code::AlreadyExists, 1),
            (Code::PermissionDenied, 1),
            (Code::InvalidArgument, 2),
            (Code::Unavailable, 69),
            (Code::Internal, 70),
            (Code::Unimplemented, 70),
        ] {
            let failure = Failure::of_status("listing", "the coordinator", &Status::new(code, "why"));
            assert_eq!(failure.code(), exit, "{code:?}");
            assert!(failure.to_string().contains("why"));
            assert!(!failure.to_string().contains('\n'));
        }
    }
}
