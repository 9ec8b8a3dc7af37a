//! What the beginning of a node's answer to a read says of the replica that gave it.

use tonic::Code;

/// How a refusal of a token begins.
const REFUSED_TOKEN: &str = "permission denied: ";

/// Whoever answers so does not take our token: it has another secret, or another time of day. Nothing was carried out.
pub(crate) fn refuses_token(code: Code, message: &str) -> bool {
    code == Code::Unauthenticated || (code == Code::PermissionDenied && message.starts_with(REFUSED_TOKEN))
}

/// What is done with an answer that has just begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Judgement {
    /// It is the client's.
    Answered,
    /// Another node is asked. It says nothing of the replica.
    Unavailable,
    /// Another replica is asked. If that one does better, this one is suspected.
    Suspicious,
}

/// Judges a status that came instead of the first message. Texts are those of the wire reference, section h.2: of one
/// repository, and of nothing that the client could have asked for in it.
///
/// What a damaged replica answers with OK (a commit that it does not find, say) looks like any other answer.
pub(crate) fn judge(code: Code, message: &str) -> Judgement {
    match code {
        Code::Unavailable => Judgement::Unavailable,
        // The client was let in here.
        _ if refuses_token(code, message) => Judgement::Unavailable,
        Code::NotFound
            if message.ends_with("repository not found") || message.ends_with("storage does not exist") =>
        {
            Judgement::Suspicious
        }
        Code::FailedPrecondition if message.contains("repository not valid: ") => Judgement::Suspicious,
        Code::Internal | Code::DataLoss | Code::Unknown => Judgement::Suspicious,
        _ => Judgement::Answered,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_speaks_of_the_replica_is_asked_elsewhere() {
        for (code, message, expected) in [
            (Code::NotFound, "repository not found", Judgement::Suspicious),
            (Code::NotFound, "opening it: repository not found", Judgement::Suspicious),
            (Code::NotFound, "storage does not exist", Judgement::Suspicious),
            (Code::NotFound, "tree entry not found", Judgement::Answered),
            (
                Code::FailedPrecondition,
                "repository not valid: \"objects\" does not exist",
                Judgement::Suspicious,
            ),
            (Code::FailedPrecondition, "revspec 'x' not found", Judgement::Answered),
            (Code::Internal, "git cat-file: exit code 128", Judgement::Suspicious),
            (Code::DataLoss, "", Judgement::Suspicious),
            (Code::Unavailable, "the node is stopping", Judgement::Unavailable),
            (Code::Unauthenticated, "authentication required", Judgement::Unavailable),
            (Code::PermissionDenied, "permission denied: token has expired", Judgement::Unavailable),
            (Code::PermissionDenied, "not on this branch", Judgement::Answered),
            (Code::InvalidArgument, "empty revision", Judgement::Answered),
            (Code::ResourceExhausted, "maximum time in concurrency queue reached", Judgement::Answered),
            (Code::DeadlineExceeded, "", Judgement::Answered),
            (Code::Ok, "", Judgement::Answered),
        ] {
            assert_eq!(judge(code, message), expected, "{code}: {message}");
        }
    }
}
