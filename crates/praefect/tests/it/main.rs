//! The program in Praefect's seat, against a real Postgres and real storage nodes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod commands;
mod import;
mod serving;
mod stage;
