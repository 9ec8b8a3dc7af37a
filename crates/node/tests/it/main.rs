//! The node against real git, through its RPCs.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod api;
mod blobs;
mod bridge;
mod commit_files;
mod commits;
mod copies;
mod corruption;
mod files;
mod harness;
mod hostile;
mod lifecycle;
mod operations;
mod process;
mod refs;
mod seed;
mod server;
mod transport;
mod upkeep;
mod voting;
