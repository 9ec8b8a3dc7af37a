//! One connection that carries RPCs in both directions, as Gitaly does it (wire reference, section d).
//!
//! The side that dials writes [`BACKCHANNEL`] and starts yamux as its client. Its first stream carries an ordinary HTTP/2
//! connection: it asks, the other side serves. Streams that the other side opens go the opposite way, and that is how a
//! node votes: it asks the router about a change while it is still at the router's RPC.
//!
//! * [`mod@dial`]: the router's end. It gives the stream for RPCs and serves what the node opens.
//! * [`Incoming`]: the node's end: connections as a tonic server takes them. Each is sniffed; plain HTTP/2 and multiplexed
//!   connections share one port. Handlers find [`Backchannel`] among the extensions of requests that came over the latter.
//!
//! A session is one piece: when the stream of the RPCs or the backchannel ends, or the peer is gone, all of it ends, at
//! once, and every call on it fails. One task owns the session and alone polls it.

mod accept;
mod backchannel;
mod dial;
mod preamble;
mod session;
mod stream;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use accept::{Incoming, Origin, Served, introduce};
pub use backchannel::{Backchannel, ConnectionId};
pub use dial::dial;
pub use stream::Stream;

/// Length of every preamble. HTTP/2's own is longer, so a client that speaks it is never waited for in vain.
const PREAMBLE_BYTES: usize = 11;
/// What a connection that is to be multiplexed begins with.
pub const BACKCHANNEL: &[u8; PREAMBLE_BYTES] = b"backchannel";
/// What a stream begins with that carries a packfile beside the RPCs.
const SIDECHANNEL: &[u8; PREAMBLE_BYTES] = b"sidechannel";

/// How long a connection may take to say what it is, and a multiplexed one to open the stream for RPCs.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections at once that have not said yet what they are. More wait in the kernel's backlog.
pub const MAX_HANDSHAKES: usize = 1024;

/// How often a node pings the router over the backchannel. With [`VOTE_PING_TIMEOUT`] it bounds how long a vote outlives a
/// router that fell silent: 3 s. A write's lease is longer than that, and what became of a write is looked into only after
/// its lease ran out; so no node can still be told to apply a change that has been given up. Raise either only together
/// with the shortest lease that coordinators accept.
pub const VOTE_PING_INTERVAL: Duration = Duration::from_secs(1);
/// See [`VOTE_PING_INTERVAL`].
pub const VOTE_PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Streams that the peer may have open at once; Gitaly's backlog on the side that dials. One more is reset.
const MAX_INBOUND_STREAMS: usize = 256;
/// Streams that we may have open at once.
const MAX_OUTBOUND_STREAMS: usize = 256;
/// What all receive windows of a session may grow by, over the 256 KiB that each stream begins with: Gitaly's largest window.
const WINDOW_GROWTH_BYTES: usize = 16 * 1024 * 1024;
/// Largest frame sent. Its payload waits for no other stream, so it bounds how long a vote stands behind a pack; each costs
/// a system call, so that the default of 16 KiB halves the throughput.
const FRAME_BYTES: usize = 64 * 1024;
/// Buffer of the socket, either way. A frame's header and payload leave together when both fit.
const SOCKET_BUFFER_BYTES: usize = FRAME_BYTES + 4096;
/// How long a session that ends may take to send what is queued.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
