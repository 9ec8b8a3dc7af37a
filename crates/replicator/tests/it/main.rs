//! A replicator between a real bus and stand-ins for coordinator, storage node, router and other sites.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod bus;
mod coordinator;
mod copying;
mod duties;
mod life;
mod node;
mod notify;
mod program;
mod site;
mod support;
mod sync;
