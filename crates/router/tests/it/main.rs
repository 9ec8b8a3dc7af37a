//! A router between fake storage nodes and a fake coordinator.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod answers;
mod coordinator;
mod freshness;
mod house;
mod lease;
mod metadata;
mod node;
mod operators;
mod praefect;
mod quorum;
mod reads;
mod records;
mod refusals;
mod repair;
mod rules;
mod sidechannels;
mod silence;
mod streams;
mod unasked;
mod voter;
mod writes;
