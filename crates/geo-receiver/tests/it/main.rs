//! A receiver on a real bus, posted to as GitLab and as our own notifier do.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod bus;
mod program;
mod refusals;
mod support;
mod taken;
