//! Every bound of the router, with its unit and its reason.

use std::time::Duration;

/// Largest first message read before the relay starts; gRPC's own limit, which Gitaly's clients rely on.
pub(crate) const FIRST_MESSAGE_BYTES: usize = tabularium_common::grpc::MAX_MESSAGE_BYTES;
/// How long a client may take to send its first message.
pub(crate) const FIRST_MESSAGE_WAIT: Duration = Duration::from_secs(60);

/// Receive window of one relayed stream, either side. A stream whose reader is slow holds at most this, one frame in
/// hand, what was held of its beginning and [`SEND_BUFFER_BYTES`], which together stay below 1 MiB.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// Largest frame taken, either side: large enough that system calls no longer dominate.
pub(crate) const MAX_FRAME_BYTES: u32 = 256 * 1024;
/// What may wait in one stream's send queue.
pub(crate) const SEND_BUFFER_BYTES: usize = 256 * 1024;
const _: () = assert!(
    STREAM_WINDOW_BYTES as usize + MAX_FRAME_BYTES as usize + SEND_BUFFER_BYTES + ANSWER_HOLD_BYTES
        <= 1024 * 1024
);
/// Read buffer of one socket: a peer that sends 16 KiB frames costs a quarter of the system calls.
pub(crate) const SOCKET_BUFFER_BYTES: usize = 64 * 1024;

/// Client connections at once; one more is closed at once.
pub(crate) const MAX_CONNECTIONS: usize = 10_000;
/// Accepted connections on their way to a worker.
pub(crate) const HANDOFF_QUEUE: usize = 64;
/// Pause after a failed accept (usually: no file descriptors left).
pub(crate) const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// How long a router that stops listens to a client that has been accepted and has said nothing yet.
pub(crate) const FIRST_BYTES_GRACE: Duration = Duration::from_millis(500);
/// How often a client connection is pinged.
pub(crate) const CLIENT_KEEPALIVE: Duration = Duration::from_secs(300);

/// Connections per worker to one node that carry streams.
pub(crate) const STREAM_CONNECTIONS: usize = 2;
/// Resets a node connection remembers at once: a burst of cancellations must not end a connection that others share.
pub(crate) const MAX_CONCURRENT_RESETS: usize = 100_000;
/// How often each node is asked for its health, and how long it may take to answer. A write waits for a primary that is
/// silent until it counts as down, which together takes at most two seconds.
pub(crate) const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// See [`PROBE_INTERVAL`].
pub(crate) const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
/// After so many probes in a row that ran out of time a node counts as down: one that is only busy answers one of them. A
/// refused connection counts at once.
pub(crate) const SLOW_PROBES: u8 = 3;

/// How long a node may take to say why, when the bytes that went beside its RPC have stopped to move.
pub(crate) const SIDECHANNEL_LAST_WORD: Duration = Duration::from_secs(2);
/// How long the head of an answer is held for its first frame while the client has not said all: it may wait for the head.
pub(crate) const STREAM_HEAD_HOLD: Duration = Duration::from_millis(250);
/// The beginning of an answer is held until so much of it is there, or for as long as the configuration says.
pub(crate) const ANSWER_HOLD_BYTES: usize = 64 * 1024;
/// How long a node that is believed to be down may take to begin its answer, when nobody else has answered.
pub(crate) const LAST_RESORT_WAIT: Duration = Duration::from_secs(2);
/// Longest silence of a node before another one is asked beside it, however slow its method usually is.
pub(crate) const MAX_HEDGE_WAIT: Duration = Duration::from_secs(10);
/// How many reads one worker may ask twice in a row, before the share that is configured holds.
pub(crate) const HEDGE_BURST: u32 = 32;
/// How long a node that was silent is only read from when there is no other.
pub(crate) const SILENCE_REST: Duration = Duration::from_secs(1);
/// Longest wait of a read for the generation that it asks for.
pub(crate) const MAX_FRESHNESS_WAIT: Duration = Duration::from_secs(30);
/// First and largest pause between two looks at whether it is there.
pub(crate) const FRESHNESS_PAUSE: (Duration, Duration) =
    (Duration::from_millis(10), Duration::from_millis(200));
/// How often a coordinator is told of the same replica.
pub(crate) const SUSPICION_REST: Duration = Duration::from_secs(5);
/// Replicas that a coordinator is told of within [`SUSPICION_REST`].
pub(crate) const MAX_SUSPICIONS: usize = 256;
/// Reports on their way to a coordinator.
pub(crate) const REPORTS_AT_ONCE: usize = 8;
/// How long one coordinator may take to take a report.
pub(crate) const REPORT_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer of one node to a maintenance RPC.
pub(crate) const MAINTENANCE_ANSWER_BYTES: usize = 64 * 1024;
/// How long a node may take to answer what the router asks it for itself.
pub(crate) const NODE_QUESTION_TIMEOUT: Duration = Duration::from_secs(5);

/// How often each coordinator is asked whether it is there, and how long it may take to answer. One that is late is asked
/// last, and what waits for it goes to the next: too harsh a judgement costs a call, and no more.
pub(crate) const COORDINATOR_PROBE: Duration = Duration::from_millis(500);
/// See [`COORDINATOR_PROBE`].
pub(crate) const COORDINATOR_PROBE_TIMEOUT: Duration = Duration::from_millis(500);
/// What is still given to a coordinator that did not answer when it was last asked.
pub(crate) const SILENT_COORDINATOR_PATIENCE: Duration = Duration::from_millis(250);
/// How long one coordinator may take to resolve a repository.
pub(crate) const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);
/// The same, while the last question was not answered by any of them.
pub(crate) const RESOLVE_AGAIN_TIMEOUT: Duration = Duration::from_millis(300);
/// How long coordinators have before the replicas are asked which of them is the newest; no time once they failed to
/// answer.
pub(crate) const RESOLVE_HEAD_START: Duration = Duration::from_millis(250);
/// How long a node may take to say how new its replica is.
pub(crate) const RECORD_PATIENCE: Duration = Duration::from_secs(1);
/// Revoked routes that wait until they are asked for again.
pub(crate) const ROUTES_TO_LEARN: usize = 1024;
/// How long one coordinator may take to begin a write, or to abort or renew one.
pub(crate) const WRITE_CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one coordinator may take to commit a write: it may wait for other routers' leases to run out.
pub(crate) const COMMIT_CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a settlement is tried, over all coordinators, before the client hears that it could not be recorded.
pub(crate) const SETTLE_PATIENCE: Duration = Duration::from_secs(30);
/// First and largest pause between tries of a settlement.
pub(crate) const SETTLE_BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How long a coordinator may take to open a session.
pub(crate) const SESSION_OPEN_TIMEOUT: Duration = Duration::from_secs(1);
/// First and largest pause between tries to open a session.
pub(crate) const SESSION_BACKOFF: (Duration, Duration) =
    (Duration::from_millis(50), Duration::from_millis(500));
/// Messages to the coordinator that may wait in a session; a session that is further behind is given up.
pub(crate) const SESSION_QUEUE: usize = 1024;
/// Longest lease that is taken from a coordinator.
pub(crate) const MAX_LEASE: Duration = Duration::from_secs(300);

/// Routes kept, over all shards and both halves of each.
pub(crate) const MAX_CACHED_ROUTES: usize = 131_072;
/// Shards of the route cache; a power of two.
pub(crate) const ROUTE_SHARDS: usize = 16;
/// How often a read joins somebody else's question for a route before it asks for itself.
pub(crate) const FOLLOW_ATTEMPTS: usize = 2;

/// How long a node may take to cast a vote that enough others have cast, at most; it halves with every write in a row in
/// which the node was late, down to the second value.
pub(crate) const VOTE_GRACE: (Duration, Duration) = (Duration::from_millis(400), Duration::from_millis(12));
/// Before the ticket is taken a node may also be late by a tenth of what the upload took, at most this.
pub(crate) const EARLY_GRACE_CAP: Duration = Duration::from_secs(5);
/// How long the primary may take to say that it has changed its refs when enough others have, and how long those that
/// the primary left behind may.
pub(crate) const PRIMARY_GRACE: Duration = Duration::from_secs(2);
/// How long one vote may wait for its answer; Gitaly's own limit.
pub(crate) const VOTE_WAIT: Duration = Duration::from_secs(300);
/// Votes on their way to the one that counts them; each node has one at a time.
pub(crate) const VOTE_QUEUE: usize = 64;
/// How long a write that has not begun is tried on changing routes, waiting for its ticket included.
pub(crate) const WRITE_PATIENCE: Duration = Duration::from_secs(10);
/// Pause before a write that has not begun is tried again.
pub(crate) const WRITE_BACKOFF: Duration = Duration::from_millis(25);
/// What may wait for one node of a client's stream.
pub(crate) const FAN_OUT_BYTES: usize = 1024 * 1024;
/// The front of a client's stream that is kept, so that a write which has not begun can begin again.
pub(crate) const REPLAY_BYTES: usize = 64 * 1024;
/// How often a read begins anew because nodes were started since its route was asked for.
pub(crate) const STARTS_MET: u32 = 4;
/// A push that changes a reference sends at least the length of a line, two object ids and two spaces.
pub(crate) const SHORTEST_COMMAND_BYTES: usize = 4 + 2 * (40 + 1);
/// How long a node may take to say what its replica holds, when it did not ask whether it may change it. Nobody else writes
/// meanwhile.
pub(crate) const COMPARISON_PATIENCE: Duration = Duration::from_secs(10);
/// How long a secondary may hold up the client's stream, over all, beside a tenth of the time it has taken so far.
pub(crate) const STALL_GRACE: Duration = Duration::from_millis(500);
/// How often it is looked at who holds it up.
pub(crate) const STALL_GLANCE: Duration = Duration::from_millis(50);
/// How long secondaries may go on once the client has its answer.
pub(crate) const SECONDARY_DRAIN: Duration = Duration::from_secs(5);
/// How often the health of those that take part in a write, or hold up a read, is looked at.
pub(crate) const HEALTH_GLANCE: Duration = Duration::from_millis(250);
/// How long a write whose client has gone may go on, once it has its ticket.
pub(crate) const ORPHAN_PATIENCE: Duration = Duration::from_secs(60);

/// How long a router that has just started lets its first clients wait for a coordinator's first word, and how often it looks.
pub(crate) const FIRST_WORD_WAIT: Duration = Duration::from_secs(1);
/// See [`FIRST_WORD_WAIT`].
pub(crate) const FIRST_WORD_GLANCE: Duration = Duration::from_millis(5);
