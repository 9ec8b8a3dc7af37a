//! Every reason for which the router itself ends an RPC, and the status that Gitaly's clients expect for it.

use http::{HeaderMap, HeaderValue};
use tabularium_common::{
    auth::AuthError,
    grpc::{DEADLINE_EXCEEDED, MalformedTimeout},
    ids::ParseIdError,
};
use tonic::{Code, Status};

use crate::{first_message::FirstMessageError, wire::WireError};

/// Why an RPC is refused. Texts are those of the wire reference, sections h.2 and h.3, or Praefect's own where it says
/// something else than that.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Auth(#[from] AuthError),
    #[error(transparent)]
    Timeout(#[from] MalformedTimeout),
    #[error(transparent)]
    FirstMessage(#[from] FirstMessageError),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{DEADLINE_EXCEEDED}")]
    DeadlineExceeded,
    #[error("full method name not found: {0}")]
    UnknownMethod(String),
    #[error("{0} is not supported by this router")]
    NotBuilt(String),
    #[error("repository not set")]
    RepositoryNotSet,
    #[error("repository path not set")]
    PathNotSet,
    #[error("storage name not set")]
    StorageNotSet,
    #[error("storage scoped: target storage is invalid")]
    TargetStorage,
    #[error("virtual storage does not exist")]
    VirtualStorage,
    /// The same, said of the storage of a repository.
    #[error("storage name not found")]
    StorageNotFound,
    #[error("{0}")]
    Path(ParseIdError),
    #[error("resolving additional repository on different storage than target repository is not supported")]
    AdditionalElsewhere,
    #[error("repository not found")]
    RepositoryNotFound,
    #[error("repository does not exist")]
    NothingToRemove,
    #[error("{0} must be a whole number")]
    NotANumber(&'static str),
    #[error("the repository is at generation {at} here, and at least {wanted} was asked for")]
    Behind { at: i64, wanted: i64 },
    #[error("no healthy nodes")]
    NoHealthyNodes,
    #[error("no suitable node to serve the request")]
    NoSuitableNode,
    #[error("primary gitaly is not healthy")]
    PrimaryUnhealthy,
    #[error("this router has not reached a coordinator yet")]
    NoTopology,
    #[error(
        "no coordinator can be reached, and of {needed} replicas that have to say how new they are {answered} do"
    )]
    Unconfirmed { answered: usize, needed: usize },
    #[error("storage {0} cannot be reached")]
    Unreachable(String),
    #[error("the connection to storage {0} was lost")]
    Lost(String),
    #[error("storage {0} answered without a gRPC status")]
    NotGrpc(String),
    #[error("the write was applied but could not be recorded: {0}")]
    NotRecorded(String),
    #[error("storage {0} was started anew while it was asked about")]
    StartedAnew(String),
    #[error("what became of the write is not known: too few nodes are known to hold the same")]
    InDoubt,
    #[error("the right to write was lost to another router or coordinator")]
    IntentLost,
    #[error("the router gave up driving the write")]
    Abandoned,
    #[error("other writes to the repository take too long")]
    Busy,
    #[error("a node's answer to a maintenance RPC is larger than {0} bytes")]
    AnswerTooLarge(usize),
    /// A coordinator's or node's own answer.
    #[error("{}", .0.message())]
    Status(Status),
}

impl Refusal {
    /// The gRPC status code.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Auth(error) => Status::from(error.clone()).code(),
            Self::FirstMessage(error) => match error {
                FirstMessageError::Missing | FirstMessageError::Flag(_) => Code::InvalidArgument,
                FirstMessageError::Cancelled => Code::Cancelled,
                FirstMessageError::Compressed => Code::Unimplemented,
                FirstMessageError::TooLarge(_) => Code::ResourceExhausted,
                FirstMessageError::Late => Code::DeadlineExceeded,
            },
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::NotBuilt(_) => Code::Unimplemented,
            Self::Behind { .. } => Code::FailedPrecondition,
            Self::Wire(_)
            | Self::NotANumber(_)
            | Self::RepositoryNotSet
            | Self::PathNotSet
            | Self::StorageNotSet
            | Self::TargetStorage
            | Self::VirtualStorage
            | Self::StorageNotFound
            | Self::Path(_)
            | Self::AdditionalElsewhere => Code::InvalidArgument,
            Self::RepositoryNotFound | Self::NothingToRemove => Code::NotFound,
            Self::Timeout(_)
            | Self::UnknownMethod(_)
            | Self::NoHealthyNodes
            | Self::NoSuitableNode
            | Self::PrimaryUnhealthy
            | Self::AnswerTooLarge(_) => Code::Internal,
            Self::NoTopology
            | Self::Unconfirmed { .. }
            | Self::Unreachable(_)
            | Self::Lost(_)
            | Self::NotGrpc(_)
            | Self::NotRecorded(_)
            | Self::StartedAnew(_)
            | Self::InDoubt
            | Self::Abandoned
            | Self::Busy
            | Self::IntentLost => Code::Unavailable,
            Self::Status(status) => status.code(),
        }
    }

    /// As a status, a coordinator's details and metadata kept.
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Status(status) => status.clone(),
            other => Status::new(other.code(), other.to_string()),
        }
    }

    /// As the trailers that end a stream.
    pub(crate) fn trailers(&self) -> HeaderMap {
        trailers(&self.status())
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        refusal.status()
    }
}

/// A status as trailers.
pub(crate) fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(3);
    if status.add_header(&mut trailers).is_err() {
        // Only a text that cannot be a header's value ends here; the code can always be told.
        trailers.clear();
        trailers.insert("grpc-status", HeaderValue::from(status.code() as i32));
    }
    trailers
}

/// The code in trailers, or in the headers of an answer that has no body. `None`: there is none.
pub(crate) fn code_of(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_codes_are_those_of_the_wire_reference() {
        for (refusal, code, text) in [
            (Refusal::RepositoryNotSet, Code::InvalidArgument, "repository not set"),
            (Refusal::StorageNotSet, Code::InvalidArgument, "storage name not set"),
            (Refusal::VirtualStorage, Code::InvalidArgument, "virtual storage does not exist"),
            (Refusal::NoHealthyNodes, Code::Internal, "no healthy nodes"),
            (
                Refusal::UnknownMethod("/gitaly.X/Y".into()),
                Code::Internal,
                "full method name not found: /gitaly.X/Y",
            ),
            (Refusal::StorageNotFound, Code::InvalidArgument, "storage name not found"),
            (Refusal::RepositoryNotFound, Code::NotFound, "repository not found"),
            (Refusal::NothingToRemove, Code::NotFound, "repository does not exist"),
            (
                Refusal::Path(ParseIdError::Escapes),
                Code::InvalidArgument,
                "relative path escapes root directory",
            ),
        ] {
            let status = Status::from_header_map(&refusal.trailers()).unwrap();
            assert_eq!((status.code(), status.message()), (code, text));
            assert_eq!(code_of(&refusal.trailers()), Some(code));
        }
    }
}
