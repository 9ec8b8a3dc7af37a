//! The test kit itself, against real servers and real clusters.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod cluster;
mod proxy;
mod servers;
