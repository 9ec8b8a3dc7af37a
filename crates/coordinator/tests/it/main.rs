//! Coordinators against real Postgres and NATS, with storage nodes and routers that are played.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod binary;
mod database_tls;
mod duties;
mod geo;
mod migrations;
mod node;
mod objects;
mod operator;
mod operators;
mod placement;
mod recovery;
mod relay;
mod repair;
mod routes;
mod support;
mod suspicions;
mod tickets;
mod truth;
mod writes;
