//! The node against real git, through its RPCs.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod bridge;
mod copies;
mod files;
mod harness;
mod lifecycle;
mod process;
mod server;
mod transport;
