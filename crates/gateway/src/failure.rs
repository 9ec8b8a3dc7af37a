//! What a client is told when its request fails before the first byte of an answer. Git prints the body of a failed
//! `info/refs` line by line behind `remote: `, if it is plain text.
//!
//! | upstream's code | status | note |
//! | --- | --- | --- |
//! | `NOT_FOUND` | 404 | |
//! | `PERMISSION_DENIED`, a mirror's `FAILED_PRECONDITION` | 403 | |
//! | `INVALID_ARGUMENT`, `OUT_OF_RANGE` | 400 | |
//! | `ALREADY_EXISTS`, other `FAILED_PRECONDITION` | 409 | |
//! | `FAILED_PRECONDITION` "read-only" | 503 | no replica may take writes just now; repair lifts it |
//! | `RESOURCE_EXHAUSTED` | 429 | |
//! | `UNAVAILABLE`, `ABORTED` | 503 | |
//! | `DEADLINE_EXCEEDED` | 504 | |
//! | `UNIMPLEMENTED` | 501 | |
//! | `UNAUTHENTICATED` | 502 | the gateway's own token is wrong: a password prompt would send people astray |
//! | `INTERNAL`, `UNKNOWN`, `DATA_LOSS`, `CANCELLED`, `OK` | 500 | the log has the text, the client the correlation id |
//! | none: the connection broke | 503 | a push is told that it may have been made |

use http::{HeaderValue, StatusCode, header};
use tabularium_common::telemetry::CorrelationId;
use tonic::{Code, Status};

use crate::{
    access::Unauthenticated,
    limits::MAX_ERROR_TEXT_BYTES,
    path::{RepositoryPath, RouteError},
    request_body::BodyFault,
    upstream::{is_lost, never_dialled},
};

/// How the coordinator and the routers begin the refusal of a push to a mirror.
const MIRROR_REFUSAL: &str = "repository is a mirror of ";

/// A refusal or an error, as the client sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) status: StatusCode,
    pub(crate) text: String,
    /// Sent along with it.
    pub(crate) header: Option<(header::HeaderName, HeaderValue)>,
}

impl Failure {
    pub(crate) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), header: None }
    }

    fn with(mut self, name: header::HeaderName, value: &'static str) -> Self {
        self.header = Some((name, HeaderValue::from_static(value)));
        self
    }

    /// Worth asking again in a moment.
    pub(crate) fn busy(text: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, text).with(header::RETRY_AFTER, "1")
    }

    /// Nothing moved for too long.
    pub(crate) fn stalled() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "no data moved for too long; the transfer was broken off")
    }

    /// A push to a repository that is written at another site. `repository_url` is where people push there.
    pub(crate) fn mirror(home_site: &str, repository_url: &str) -> Self {
        let push = if repository_url.is_empty() {
            "push to that site".to_owned()
        } else {
            format!("push to {}", shown(repository_url))
        };
        Self::new(StatusCode::FORBIDDEN, format!("{MIRROR_REFUSAL}{home_site}; {push}"))
    }

    /// A push failed thus.
    pub(crate) fn of_push(status: &Status, repository: &RepositoryPath, id: &CorrelationId) -> Self {
        if is_lost(status) && !never_dialled(status) {
            return Self::busy(format!(
                "the connection to the storage service broke in the midst of the push, which may have been made; \
                 push again to find out (request {id})"
            ));
        }
        Self::of(status, Some(repository), id)
    }

    /// From an upstream's answer, or from what stood in place of one.
    pub(crate) fn of(status: &Status, repository: Option<&RepositoryPath>, id: &CorrelationId) -> Self {
        let unavailable =
            || Self::busy(format!("the storage service is unavailable; try again (request {id})"));
        if is_lost(status) {
            return unavailable();
        }
        let text = shown(status.message());
        match status.code() {
            Code::NotFound => match repository {
                Some(repository) => {
                    Self::new(StatusCode::NOT_FOUND, format!("repository '{}' not found", repository.name()))
                }
                None => Self::new(StatusCode::NOT_FOUND, text),
            },
            Code::PermissionDenied => Self::new(StatusCode::FORBIDDEN, text),
            Code::InvalidArgument | Code::OutOfRange => Self::new(StatusCode::BAD_REQUEST, text),
            Code::AlreadyExists => match repository {
                Some(repository) => Self::new(
                    StatusCode::CONFLICT,
                    format!("repository '{}' exists already", repository.name()),
                ),
                None => Self::new(StatusCode::CONFLICT, text),
            },
            Code::FailedPrecondition => Self::precondition(text),
            Code::ResourceExhausted => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, text).with(header::RETRY_AFTER, "1")
            }
            Code::Unavailable | Code::Aborted => unavailable(),
            Code::DeadlineExceeded => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                format!("the storage service did not answer in time (request {id})"),
            ),
            Code::Unimplemented => Self::new(StatusCode::NOT_IMPLEMENTED, text),
            Code::Unauthenticated => Self::new(
                StatusCode::BAD_GATEWAY,
                format!("the storage service does not accept this gateway's token (request {id})"),
            ),
            Code::Internal | Code::Unknown | Code::DataLoss | Code::Cancelled | Code::Ok => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, format!("internal error (request {id})"))
            }
        }
    }

    fn precondition(text: String) -> Self {
        if let Some(start) = text.find(MIRROR_REFUSAL) {
            return Self::new(StatusCode::FORBIDDEN, &text[start..]);
        }
        if text.contains("read-only") {
            return Self::busy(text);
        }
        Self::new(StatusCode::CONFLICT, text)
    }
}

/// Whether a fetch that failed thus, before its first byte, is told so inside git's protocol: git prints `ERR` lines of
/// an answer, but not the body of a failed POST. Codes with an HTTP status of their own keep it.
pub(crate) fn is_told_in_protocol(status: &Status) -> bool {
    if is_lost(status) {
        return false;
    }
    match status.code() {
        Code::Internal | Code::Unknown | Code::DataLoss | Code::FailedPrecondition => true,
        Code::Ok
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::InvalidArgument
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unavailable
        | Code::Unauthenticated => false,
    }
}

/// An upstream's text made fit for one line on a terminal.
pub(crate) fn shown(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(MAX_ERROR_TEXT_BYTES));
    for c in text.trim().chars() {
        let c = if c.is_control() { ' ' } else { c };
        if line.len() + c.len_utf8() > MAX_ERROR_TEXT_BYTES {
            break;
        }
        line.push(c);
    }
    line
}

impl From<Unauthenticated> for Failure {
    fn from(error: Unauthenticated) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, error.to_string())
            .with(header::WWW_AUTHENTICATE, "Basic realm=\"tabularium\"")
    }
}

impl From<RouteError> for Failure {
    fn from(error: RouteError) -> Self {
        let text = error.to_string();
        match error {
            RouteError::UriTooLong => Self::new(StatusCode::URI_TOO_LONG, text),
            RouteError::Encoding | RouteError::Path(_) => Self::new(StatusCode::BAD_REQUEST, text),
            RouteError::Dumb | RouteError::Service(_) => Self::new(StatusCode::FORBIDDEN, text),
            RouteError::Method(allowed) => {
                Self::new(StatusCode::METHOD_NOT_ALLOWED, text).with(header::ALLOW, allowed)
            }
            RouteError::Unknown => Self::new(StatusCode::NOT_FOUND, text),
        }
    }
}

impl From<BodyFault> for Failure {
    fn from(fault: BodyFault) -> Self {
        let status = match &fault {
            BodyFault::Lost(_) | BodyFault::Gzip(_) => StatusCode::BAD_REQUEST,
            BodyFault::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            BodyFault::Abandoned => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, fault.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(status: &Status) -> Failure {
        Failure::of(status, Some(&RepositoryPath::parse("g/p").unwrap()), &CorrelationId::new())
    }

    #[test]
    fn codes_become_statuses() {
        for (status, expected) in [
            (Status::not_found("accessor call: repository not found"), 404),
            (Status::permission_denied("no"), 403),
            (Status::unauthenticated("authentication required"), 502),
            (Status::failed_precondition("repository is in read-only mode"), 503),
            (Status::failed_precondition("mutator call: repository is a mirror of berlin; push to x"), 403),
            (Status::failed_precondition("repository not valid"), 409),
            (Status::already_exists("x"), 409),
            (Status::unavailable("x"), 503),
            (Status::resource_exhausted("rate limit reached"), 429),
            (Status::invalid_argument("storage name not found"), 400),
            (Status::internal("secret /path"), 500),
        ] {
            assert_eq!(of(&status).status.as_u16(), expected, "{status:?}");
        }
        assert_eq!(of(&Status::not_found("x")).text, "repository 'g/p' not found");
        let mirror = of(&Status::failed_precondition("mutator call: repository is a mirror of b; push to u"));
        assert_eq!(mirror.text, "repository is a mirror of b; push to u");
        assert!(!of(&Status::internal("secret /path")).text.contains("secret"));
        assert!(of(&Status::unavailable("x")).header.is_some_and(|(name, _)| name == header::RETRY_AFTER));
    }

    #[test]
    fn what_no_upstream_said_is_no_internal_error() {
        let lost = Status::from_error(Box::new(std::io::Error::other("reset")));
        assert!(is_lost(&lost) && lost.code() == Code::Unknown && !is_told_in_protocol(&lost));
        let (path, id) = (RepositoryPath::parse("g/p").unwrap(), CorrelationId::new());
        let (read, push) = (of(&lost), Failure::of_push(&lost, &path, &id));
        for failure in [&read, &push] {
            assert_eq!(failure.status, StatusCode::SERVICE_UNAVAILABLE);
            assert!(failure.header.as_ref().is_some_and(|(name, _)| name == header::RETRY_AFTER));
        }
        assert!(push.text.contains("may have been made") && !read.text.contains("made"), "{push:?}");
        let told = Failure::of_push(&Status::internal("x"), &path, &id);
        assert_eq!(told.status, StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[test]
    fn the_refusal_of_a_mirror_names_site_and_url() {
        assert_eq!(
            Failure::mirror("berlin", "https://git.berlin.example/g/p.git").text,
            "repository is a mirror of berlin; push to https://git.berlin.example/g/p.git"
        );
        assert_eq!(Failure::mirror("b", "").text, "repository is a mirror of b; push to that site");
    }

    #[test]
    fn texts_are_one_line_and_bounded() {
        assert_eq!(shown(" a\nb\x1b[31m "), "a b [31m");
        assert!(shown(&"ä".repeat(5000)).len() <= MAX_ERROR_TEXT_BYTES);
    }
}
