//! yamux, as HashiCorp's and libp2p's Go programs speak it: many streams over one connection.
//!
//! * [`frame`]: the twelve bytes in front of everything.
//! * [`state`]: what a session knows and decides, without I/O: windows, ends of streams, what leaves next.
//! * [`outbox`]: what waits to be sent, in its order, and for how much more of it.
//! * [`driver`]: the one task that owns the connection and moves frames between it and the state.
//!
//! Written here, because of what the libraries at hand do not do: packfiles pass through a router without being copied (a
//! stream gives away what was read from the socket, and takes it to be written from where it lies); a stream is acknowledged
//! when it is taken, as HashiCorp's side wants it, and not with the first bytes that it says; a frame may be as large as its
//! window, of which Go programs make use; and a peer that opens too many streams loses those and not the session.

pub(super) mod driver;
pub(super) mod frame;
mod outbox;
pub(super) mod state;

#[cfg(test)]
mod tests;
