//! What more than one service uses, and nothing that only one does.
//!
//! * [`ids`]: the names and numbers of the domain as types, parsed once at the edge.
//! * [`config`]: TOML files with strict keys; a bad one is refused with the key, the value and what is allowed.
//! * [`telemetry`]: logs, traces and the correlation id; [`admin`]: metrics, liveness and readiness on a port of their own.
//! * [`program`]: the frame of every service's `main`. [`lifecycle`]: one owner for every task, and the order in which a
//!   service stops. [`announce`]: where it listens, told to whoever started it.
//! * [`auth`]: Gitaly's v2 tokens. [`grpc`]: how we listen and dial. [`tls`]: certificates, and whom to believe.
//! * [`multiplex`]: Gitaly's connections that carry RPCs both ways, on which nodes vote.
//! * [`methods`]: the method registry: what every Gitaly RPC does, to which repository, as data.
//! * [`records`]: which of two replicas is newer, by what nodes keep beside them.
//! * [`faults`]: crash points for tests. [`pktline`]: git's framing. [`duties`]: what travels on the message bus; [`bus`]: the connection to it.
//!
//! It must not know placement, SQL, git processes or HTTP routes. Unit tests sit beside the code:
//! `cargo nextest run -p tabularium-common`.

pub mod admin;
pub mod announce;
pub mod auth;
pub mod bus;
pub mod config;
pub mod duties;
pub mod faults;
pub mod grpc;
pub mod ids;
pub mod lifecycle;
pub mod methods;
pub mod multiplex;
pub mod pktline;
pub mod program;
pub mod records;
pub mod telemetry;
pub mod tls;

/// The version every service reports.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
