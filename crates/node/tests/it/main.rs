//! The node against real git, through its RPCs.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod api;
mod blob_diffs;
mod blob_listings;
mod blobs;
mod bridge;
mod commit_files;
mod commits;
mod copies;
mod corruption;
mod diffs;
mod files;
mod harness;
mod history;
mod hostile;
mod lifecycle;
mod operations;
mod process;
mod ref_reads;
mod refs;
mod repository_reads;
mod seed;
mod server;
mod transport;
mod upkeep;
mod voting;
mod ssh;
mod ssh_bridge;
