//! One connection that carries RPCs in both directions, as Gitaly does it (wire reference, section d).
//!
//! The side that dials writes [`BACKCHANNEL`] and starts yamux as its client. Its first stream carries an ordinary HTTP/2
//! connection: it asks, the other side serves. Streams that the other side opens go the opposite way, and that is how a
//! node votes: it asks the router about a change while it is still at the router's RPC.
//!
//! * [`mod@dial`]: the router's end. It gives the stream for RPCs and serves what the node opens.
//! * [`Incoming`]: the node's end: connections as a tonic server takes them. Each is sniffed, after the handshake of TLS if it
//!   has one; plain HTTP/2 and multiplexed connections share one port. Handlers find [`Backchannel`] among the extensions of requests that came over the latter.
//!
//! A session is one piece: when the stream of the RPCs or the backchannel ends, or the peer is gone, all of it ends, at
//! once, and every call on it fails. One task owns the session's connection: [`yamux`].
//!
//! What is too much for messages goes beside them: whoever makes an RPC offers a *sidechannel*, and whoever serves it opens
//! one more stream the opposite way for it (section e): [`sidechannel`]. Clients of a router, and of a node, dial like routers
//! do, and serve nothing but sidechannels.

mod accept;
mod backchannel;
mod dial;
mod preamble;
mod session;
pub mod sidechannel;
mod stream;
#[cfg(test)]
mod tests;
mod yamux;

use std::time::Duration;

pub use accept::{Incoming, Origin, Served, identify, introduce};
pub use backchannel::{Backchannel, ConnectionId};
pub use dial::{Way, channel, dial};
pub use stream::Stream;

/// Length of every preamble. HTTP/2's own is longer, so a client that speaks it is never waited for in vain.
const PREAMBLE_BYTES: usize = 11;
/// What a connection that is to be multiplexed begins with.
pub const BACKCHANNEL: &[u8; PREAMBLE_BYTES] = b"backchannel";

/// How long a connection may take to say what it is, and a multiplexed one to open the stream for RPCs.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections at once that have not said yet what they are. More wait in the kernel's backlog.
pub const MAX_HANDSHAKES: usize = 1024;

/// How often a node pings the router once it has used the backchannel. With [`VOTE_PING_TIMEOUT`] it bounds how long a vote
/// outlives a router that fell silent: 3 s. A write's lease is longer than that, and what became of a write is looked into
/// only after its lease ran out; so no node can still be told to apply a change that has been given up. Raise either only
/// together with the shortest lease that coordinators accept.
pub const VOTE_PING_INTERVAL: Duration = Duration::from_secs(1);
/// See [`VOTE_PING_INTERVAL`].
pub const VOTE_PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Streams that the peer may have open at once on a connection that we dialled: a sidechannel for each fetch that goes on.
/// One more is reset. Where we accept, it is the one for RPCs.
const MAX_INBOUND_STREAMS: usize = 1024;
/// Streams that we may have open at once. Whoever wants one more waits.
const MAX_OUTBOUND_STREAMS: usize = 1024;
/// What may lie here of a stream that nobody reads. Streams begin with half of it, which HashiCorp's side never raises.
const WINDOW_BYTES: u32 = 512 * 1024;
/// What may wait of one stream to be sent. It bounds how long a vote stands behind a pack.
const SEND_QUEUE_BYTES: usize = 256 * 1024;
/// Largest frame sent: what git writes at once.
const FRAME_BYTES: usize = 64 * 1024;
/// What is said on a sidechannel in answer to one thing leaves at once up to here: all but packs.
const PROMPT_BYTES: usize = 256 * 1024;
/// And then when so much has come together. Half of what HashiCorp's side allows, which gives back its half when it has
/// read that.
const GATHER_BYTES: usize = 128 * 1024;
/// Or after such a time. On the clock of timers it is up to 1 ms more.
const GATHER_TIME: Duration = Duration::from_millis(2);
/// How long a peer may take nothing of what it is sent; Gitaly's own.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer may take to finish a stream that was finished here, before it is reset; Gitaly's own.
const FINISH_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a session that ends may take to send what is queued.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
