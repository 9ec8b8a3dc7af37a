//! A model of the write protocol, and a checker that visits every state it can reach.
//!
//! Three nodes, two routers, two references, one database, up to three writes. Each run of [`sound`] bounds what may go
//! wrong (a node's crash, a router's crash or stop, a coordinator's crash, a replicator that loses its duty, a replica that
//! is not heard) and then tries every order of every step. [`broken`] takes one safeguard away at a time and demands that
//! the checker finds the harm, so that a property which cannot fail would be noticed.
//!
//! A push goes through [`writing`] (the router: ask, take the ticket, answer votes, record, answer the client) and
//! [`voting`] (the nodes: lock and vote, move the reference and vote). What nobody ends is ended by [`recovery`]; who was
//! left behind is brought back by [`repair`]; who reads where is told by [`routes`]. [`protocol`] puts them together and
//! adds crashes, [`properties`] says what must hold, [`state`] is all there is, [`symmetry`] why much of it need not be visited.
//!
//! # What is one step
//!
//! A transaction of the database; a vote that is cast, with its arrival at the router; an answer that a router gives to all
//! who wait for it; a reference that a node moves. Between any two of them anybody may crash, stop, or be overtaken: also
//! between the answer to the votes and the record, and between the record and the answer to the client.
//!
//! # What is left out, and why nothing is lost by it
//!
//! * **Time.** A lease runs out at any moment after its router was stopped, crashed or gave up. A router's own clock runs out
//!   before the coordinator's; here both do at once, the latest moment that is allowed. An answer that was given may arrive
//!   at any time later, however long after the lease: more than the nodes' own limit on silence allows. So no property
//!   stands on how long anything takes; that it takes no longer than promised is for tests with clocks.
//! * **Messages.** A vote has no effect before its router looks at it, so its journey is the router's delay. An answer's
//!   journey is the time between `Told` and the node's next step, and it may be lost. Requests to the database are lost
//!   by crashes of their sender; a repeated `CommitWrite` gets the first one's answer, so losing the answer is a delay.
//! * **Coordinators** hold nothing but what they heard while they settle a write, which a crash forgets, and route leases,
//!   whose own core is tested by itself. Which of them takes a step makes no difference to the rows.
//! * **The vote before the ticket** is the moment at which a node has been asked and lives: nothing is changed by it.
//!   Who votes too late there or afterwards is somebody whose vote is still missing when the router goes on.
//! * **Reads** change nothing: instead of a step that reads, each state is judged by what a read that begins in it, at any
//!   node by any router's route, would see.
//! * **Objects.** A value of a reference stands for all that can be reached from it. Every write makes a value of its own.
//! * **Clients** compare and set: a write replaces the values that its client saw at the primary when it began.
//! * **One repository**, whose creation, renaming and deletion are elsewhere; one replica copied at a time; the quorum policy
//!   `majority`; nodes that can quiesce; disks that are kept and do not lie.
//!
//! Bounds are not proofs: what takes four writes or three crashes at once is not visited.
//!
//! `cargo test -p tabularium-testkit --test model -- --nocapture` prints how many states were visited, and for each
//! safeguard the shortest way to the harm that it prevents.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "tests"
)]

mod broken;
mod properties;
mod protocol;
mod recovery;
mod repair;
mod routes;
mod sound;
mod state;
mod symmetry;
mod voting;
mod writing;
