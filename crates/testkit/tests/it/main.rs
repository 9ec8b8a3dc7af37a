//! The test kit itself, against real servers and real clusters.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "tests"
)]

mod backups;
mod bad_input;
mod cluster;
mod corruption;
mod crashes;
mod faults;
mod freshness;
mod gitlab;
mod house;
mod old_disk;
mod operations;
mod proxy;
mod raw;
mod read_repair;
mod rebuild;
mod servers;
mod support;
mod transport;
mod web_changes;
mod without_database;
