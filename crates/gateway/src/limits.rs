//! Every bound of the gateway that is not configured, its unit in its name.

use std::time::Duration;

/// Longest request target, query included. Far above the longest repository path plus `/info/refs?service=…`.
pub(crate) const MAX_URI_BYTES: usize = 4096;
/// All header names and values of one request together.
pub(crate) const MAX_HEADER_BYTES: usize = 32 * 1024;
/// Header lines of one request.
pub(crate) const MAX_HEADERS: usize = 100;
/// `Git-Protocol` must be shorter than this.
pub(crate) const MAX_GIT_PROTOCOL_BYTES: usize = 64;
/// Longest user name taken from a Basic credential; a longer one counts as none.
pub(crate) const MAX_USER_NAME_BYTES: usize = 255;

/// Pack bytes in one gRPC message: what Gitaly's peers send, and far below the limit of 4 MiB.
pub(crate) const MESSAGE_DATA_BYTES: usize = 128 * 1024;
/// What the gzip decoder hands on at once.
pub(crate) const DECODED_CHUNK_BYTES: usize = 64 * 1024;
/// Body of a request to the JSON API.
pub(crate) const API_BODY_BYTES: usize = 64 * 1024;
/// Repositories on one page of the JSON API.
pub(crate) const MAX_PAGE_SIZE: u32 = 1000;

/// Until the first bytes of a reference advertisement.
pub(crate) const ADVERTISEMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// A call of the JSON API, and reading its request.
pub(crate) const API_TIMEOUT: Duration = Duration::from_secs(30);
/// Asking a coordinator whether a repository is a mirror. Pushes wait for it, also those that are to fail at once because no
/// coordinator can record them; without an answer the router decides.
pub(crate) const MIRROR_TIMEOUT: Duration = Duration::from_secs(1);
/// How long an upstream that failed is tried last instead of in turn.
pub(crate) const UPSTREAM_REST: Duration = Duration::from_secs(1);
/// How often upstreams are asked for their health, and how long one may take to answer. One that is late is tried last:
/// too harsh a judgement costs nothing.
pub(crate) const UPSTREAM_PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// See [`UPSTREAM_PROBE_INTERVAL`].
pub(crate) const UPSTREAM_PROBE_TIMEOUT: Duration = Duration::from_millis(750);
/// How long a router that has no sidechannels is not asked for one again.
pub(crate) const SIDECHANNEL_REST: Duration = Duration::from_secs(10);
/// The front of a request's body that is kept until the answer begins, so that the request can be sent to another router.
pub(crate) const REPLAY_BYTES: usize = 64 * 1024;
/// After a failure to accept a connection, such as too many open files.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Text of an upstream's error that is shown to a client.
pub(crate) const MAX_ERROR_TEXT_BYTES: usize = 1024;
/// Standard error of a git process that is kept for the log; what comes later is dropped.
pub(crate) const MAX_STDERR_BYTES: usize = 4096;

const _: () = assert!(MESSAGE_DATA_BYTES * 2 < tabularium_common::grpc::MAX_MESSAGE_BYTES);
const _: () = assert!(MAX_ERROR_TEXT_BYTES + 16 < tabularium_common::pktline::MAX_PAYLOAD_BYTES);
/// How much of a read's answer is held so that another router can give it.
pub(crate) const ANSWER_HOLD_BYTES: usize = 64 * 1024;
/// How long the answer to a push is held for its end, with which the push's generation comes, and how much of it.
pub(crate) const PUSH_ANSWER_HOLD: Duration = Duration::from_millis(500);
/// See [`PUSH_ANSWER_HOLD`].
pub(crate) const PUSH_ANSWER_BYTES: usize = 64 * 1024;
