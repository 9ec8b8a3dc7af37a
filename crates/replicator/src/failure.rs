//! Work that did not get done, in the words the operator will read.

use secrecy::{ExposeSecret as _, SecretString};
use tonic::{Code, Status};

/// Longest failure text that is recorded, in bytes.
const MAX_MESSAGE_BYTES: usize = 1024;

/// Why work was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    /// What was tried and what came of it.
    pub(crate) message: String,
    /// The other end could not be reached, or not in time: to be retried for ever.
    pub(crate) unreachable: bool,
    /// The replica that was to be copied from does not hold what it is to hold.
    pub(crate) bad_source: bool,
}

impl Failure {
    /// The other end answered, and the answer was not the wanted one.
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self { message: message.into(), unreachable: false, bad_source: false }
    }

    /// The other end did not answer.
    pub(crate) fn unreachable(message: impl Into<String>) -> Self {
        Self { message: message.into(), unreachable: true, bad_source: false }
    }

    /// What was to be copied from does not hold what it is to hold.
    pub(crate) fn bad_source(message: impl Into<String>) -> Self {
        Self { message: message.into(), unreachable: false, bad_source: true }
    }

    /// What a call said while we were `doing` something, such as `copying to node-2`.
    pub(crate) fn of_call(doing: &str, status: &Status) -> Self {
        Self {
            message: format!("{doing}: {:?}: {}", status.code(), status.message()),
            unreachable: not_reached(status),
            bad_source: false,
        }
    }
}

/// Whether a status says that the other end was not reached or did not answer in time. One that was made here, because
/// the connection failed, has a source; one that came over the wire has none.
pub(crate) fn not_reached(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded)
        || std::error::Error::source(status).is_some()
}

/// A text for the record: secrets struck out, one line, bounded.
pub(crate) fn presentable(text: &str, secrets: &[SecretString]) -> String {
    let mut text =
        secrets.iter().fold(text.to_owned(), |text, secret| text.replace(secret.expose_secret(), "[secret]"));
    text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.len() > MAX_MESSAGE_BYTES {
        let end = (0..=MAX_MESSAGE_BYTES).rev().find(|index| text.is_char_boundary(*index)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_holds_no_secret_and_is_bounded() {
        let secrets = [SecretString::from("hunter2".to_owned())];
        assert_eq!(presentable("a\n b: hunter2!", &secrets), "a b: [secret]!");
        let long = presentable(&"ä".repeat(5000), &secrets);
        assert!(long.len() <= MAX_MESSAGE_BYTES + '…'.len_utf8());
    }

    #[test]
    fn only_silence_counts_as_unreachable() {
        assert!(Failure::of_call("x", &Status::unavailable("gone")).unreachable);
        assert!(Failure::of_call("x", &Status::deadline_exceeded("late")).unreachable);
        assert!(!Failure::of_call("x", &Status::internal("broken")).unreachable);
        let local = Status::from_error(Box::new(std::io::Error::other("connection reset")));
        assert!(Failure::of_call("x", &local).unreachable);
    }
}
