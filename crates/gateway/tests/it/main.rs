//! The gateway, driven by real git clients, before a stand-in for the cluster that runs the system's git.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod api;
mod beside;
mod clients;
mod fake;
mod fetch;
mod freshness;
mod limits;
mod process;
mod push;
mod refusals;
mod routers;
mod stage;
