//! Failures as Gitaly's clients know them: code and text word for word, and at most one detail message.

use std::{io, time::Duration};

use prost::Message;
use tabularium_proto::gitaly;
use tonic::{Code, Status};

use crate::votes::VoteError;

/// Why a `gitaly.Repository` could not be used (wire reference, section h.2).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RepositoryError {
    /// No repository in the request.
    #[error("repository not set")]
    NotSet,
    /// Empty relative path.
    #[error("repository path not set")]
    PathNotSet,
    /// Empty storage name.
    #[error("storage name not set")]
    StorageNotSet,
    /// Not a storage of this node.
    #[error("storage name not found")]
    UnknownStorage,
    /// The path leads out of the storage, or into the node's own directory.
    #[error("relative path escapes root directory")]
    Escapes,
    /// A path that cannot be used for another reason.
    #[error("relative path {0}")]
    BadPath(String),
    /// A quarantine directory that does not belong to the repository.
    #[error("git object directory is outside of the repository")]
    ForeignObjects,
    /// The storage's directory is gone.
    #[error("storage does not exist")]
    StorageMissing,
    /// Nothing at the path.
    #[error("repository not found")]
    NotFound,
    /// A directory that is not a git repository; the entry that is missing.
    #[error("repository not valid: {0:?} does not exist")]
    Invalid(&'static str),
    /// The file system refused.
    #[error("{0}")]
    Io(String),
}

impl From<RepositoryError> for Status {
    fn from(error: RepositoryError) -> Self {
        let code = match &error {
            RepositoryError::NotSet
            | RepositoryError::PathNotSet
            | RepositoryError::StorageNotSet
            | RepositoryError::UnknownStorage
            | RepositoryError::Escapes
            | RepositoryError::BadPath(_)
            | RepositoryError::ForeignObjects => Code::InvalidArgument,
            RepositoryError::StorageMissing | RepositoryError::NotFound => Code::NotFound,
            RepositoryError::Invalid(_) => Code::FailedPrecondition,
            RepositoryError::Io(_) => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

/// Why a repository did not come into being.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreationError {
    /// Something is where it should be.
    #[error("repository exists already")]
    Exists,
    /// It would lie in a repository.
    #[error("a parent directory is a repository")]
    InsideAnother,
    /// It could not be made.
    #[error("{}", .0.message())]
    Failed(#[from] Status),
}

impl CreationError {
    /// Behind the name of what was being done.
    pub(crate) fn while_doing(&self, doing: &str) -> Status {
        let code = match self {
            Self::Exists => Code::AlreadyExists,
            Self::InsideAnother => Code::FailedPrecondition,
            Self::Failed(status) => status.code(),
        };
        Status::new(code, format!("{doing}: {self}"))
    }
}

impl From<VoteError> for CreationError {
    fn from(error: VoteError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<CreationError> for Status {
    fn from(error: CreationError) -> Self {
        match error {
            CreationError::Failed(status) => status,
            vacancy => vacancy.while_doing("creating repository"),
        }
    }
}

/// Why a git process gave no usable result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GitError {
    /// Too many git processes ran for too long (section h.4).
    #[error("maximum time in concurrency queue reached")]
    QueueTimeout,
    /// The node stops and no longer waits for the process.
    #[error("the node is stopping")]
    Stopping,
    /// The process could not be started.
    #[error("starting git {subcommand}: {source}")]
    Spawn {
        /// Which git command.
        subcommand: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Its pipes broke.
    #[error("git {subcommand}: {source}")]
    Io {
        /// Which git command.
        subcommand: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It wrote more than is kept in memory.
    #[error("git {subcommand} wrote more than {limit} bytes")]
    TooMuchOutput {
        /// Which git command.
        subcommand: &'static str,
        /// The bound, in bytes.
        limit: usize,
    },
    /// It ended with another exit code than 0.
    #[error("git {subcommand}: {exit}, stderr: {stderr:?}")]
    Failed {
        /// Which git command.
        subcommand: &'static str,
        /// How it ended.
        exit: crate::git::Exit,
        /// The end of what it said.
        stderr: String,
    },
}

impl From<GitError> for Status {
    fn from(error: GitError) -> Self {
        let text = error.to_string();
        match error {
            GitError::QueueTimeout => with_detail(
                Code::ResourceExhausted,
                &text,
                "LimitError",
                &gitaly::LimitError { error_message: text.clone(), retry_after: Some(retry_never()) },
            ),
            GitError::Stopping => Self::unavailable(text),
            GitError::Spawn { .. }
            | GitError::Io { .. }
            | GitError::TooMuchOutput { .. }
            | GitError::Failed { .. } => Self::internal(text),
        }
    }
}

fn retry_never() -> prost_types::Duration {
    prost_types::Duration::try_from(Duration::ZERO).unwrap_or_default()
}

/// A status that carries one of Gitaly's detail messages (section h.1): `message` is its name without the package.
pub(crate) fn with_detail(code: Code, text: &str, message: &str, detail: &impl Message) -> Status {
    let status = tonic_types::Status {
        code: i32::from(code),
        message: text.to_owned(),
        details: vec![prost_types::Any {
            type_url: format!("type.googleapis.com/gitaly.{message}"),
            value: detail.encode_to_vec(),
        }],
    };
    Status::with_details(code, text, status.encode_to_vec().into())
}

/// An I/O failure that the client can do nothing about, with what was being done.
pub(crate) fn internal_io(doing: &str) -> impl FnOnce(io::Error) -> Status + '_ {
    move |error| Status::internal(format!("{doing}: {error}"))
}
