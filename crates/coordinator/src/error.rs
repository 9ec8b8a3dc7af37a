//! What callers are told. The texts are Gitaly's and Praefect's where those have one: their clients look for them.

use tabularium_common::ids::SiteName;
use tonic::Status;

use crate::{db::DbError, metrics::WriteResult, queue::NoTurn};

/// A repository's name that cannot be one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NameError {
    #[error("repository not set")]
    RepositoryNotSet,
    #[error("storage name not set")]
    StorageNotSet,
    #[error("repository path not set")]
    PathNotSet,
    #[error("relative path escapes root directory")]
    Escapes,
    #[error("relative path {0}")]
    Malformed(String),
    #[error("virtual storage does not exist")]
    UnknownVirtualStorage,
}

impl From<NameError> for Status {
    fn from(error: NameError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

/// Why a write cannot begin, or cannot end as the router says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("{0}")]
    Argument(String),
    #[error("repository not found")]
    NotFound,
    #[error("additional repository not found")]
    AdditionalNotFound,
    #[error("resolving additional repository on different storage than target repository is not supported")]
    AdditionalElsewhere,
    #[error("route repository creation: reserve repository id: repository already exists")]
    Exists,
    #[error("repository is in read-only mode")]
    ReadOnly,
    #[error("no healthy nodes")]
    NoHealthyNode,
    #[error("repository is a mirror of {site}{}", push_to.as_ref().map(|url| format!("; push to {url}")).unwrap_or_default())]
    Mirror { site: SiteName, push_to: Option<String> },
    #[error("repository is not a mirror of {site}")]
    NotAMirror { site: SiteName },
    #[error("`{site}` is not a home site of mirrors here")]
    UnknownHomeSite { site: SiteName },
    #[error("write {id} is not open: it was settled, or its primary has moved")]
    NotOpen { id: String },
    #[error("the primary {primary} is not among the storages that committed")]
    WithoutPrimary { primary: String },
    #[error("another write holds the repository; try again")]
    Busy,
    #[error("the nodes were asked by a route that does not hold any more")]
    StaleRoute,
    #[error("{committed} of {quorum} replicas that must have the write are up to date with it")]
    TooFewCommitted { committed: usize, quorum: usize },
    #[error("{able} of {quorum} storages that must take part can be reached")]
    TooFewStorages { able: usize, quorum: usize },
    #[error(transparent)]
    Database(#[from] DbError),
}

impl From<NoTurn> for WriteError {
    fn from(_: NoTurn) -> Self {
        Self::Busy
    }
}

impl WriteError {
    pub(crate) fn result(&self) -> WriteResult {
        if matches!(self, Self::Database(_)) { WriteResult::Failed } else { WriteResult::Refused }
    }
}

impl From<WriteError> for Status {
    fn from(error: WriteError) -> Self {
        let text = error.to_string();
        match error {
            WriteError::Name(error) => error.into(),
            WriteError::Argument(_) | WriteError::AdditionalElsewhere | WriteError::WithoutPrimary { .. } => {
                Self::invalid_argument(text)
            }
            WriteError::NotFound | WriteError::AdditionalNotFound => Self::not_found(text),
            WriteError::Exists => Self::already_exists(text),
            WriteError::ReadOnly
            | WriteError::Mirror { .. }
            | WriteError::NotAMirror { .. }
            | WriteError::UnknownHomeSite { .. }
            | WriteError::TooFewCommitted { .. }
            | WriteError::TooFewStorages { .. }
            | WriteError::NotOpen { .. } => Self::failed_precondition(text),
            WriteError::Busy => Self::unavailable(text),
            WriteError::StaleRoute => Self::aborted(text),
            WriteError::NoHealthyNode => Self::internal(text),
            WriteError::Database(error) => error.into(),
        }
    }
}

impl From<DbError> for Status {
    fn from(error: DbError) -> Self {
        match error {
            DbError::Unavailable(_) => {
                tracing::warn!(%error, "request failed");
                Self::unavailable("the database cannot be reached; try again")
            }
            // What Postgres says is for the log; it may quote data.
            DbError::Refused(_) | DbError::Migration(_) => {
                tracing::error!(%error, "request failed");
                Self::internal("the database refused the statement; see the coordinator's log")
            }
        }
    }
}
