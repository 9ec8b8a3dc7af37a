//! The program in Praefect's seat, against a real Postgres and real storage nodes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, tells what it measured, and what it starts ends with its runtime"
)]

mod commands;
mod import;
mod serving;
mod stage;
