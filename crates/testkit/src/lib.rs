//! What tests of the other crates stand on: throw-away servers, whole clusters, faults.
//!
//! Everything here fails by panicking: a test that cannot have its server has failed, and says why. Nothing started
//! here outlives the test process, even one that is killed.
//!
//! * [`postgres::Postgres`] gives every test a database of its own on one server per test process, or on the server
//!   that `TABULARIUM_TEST_POSTGRES_URL` names.
//! * [`nats::Nats`] does the same for NATS (`TABULARIUM_TEST_NATS_URL`); a test that stops the server starts its own.
//! * [`cluster::TestCluster`] is a whole cluster of real processes; [`git::GitClient`] pushes to it and clones from it.
//! * [`certificates::Authority`] issues certificates, for clusters over TLS too.
//! * [`proxy::FaultProxy`] stands between two processes and cuts, delays or swallows. [`wait::wait_until`] waits for
//!   conditions instead of times.
//!
//! Two programs stand on it: `tabularium-bench` measures, `tabularium-faults` (`script/faults`) breaks a cluster in every
//! way it knows and looks whether a promise was broken.
//!
//! Run the tests with `cargo test -p tabularium-testkit`.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "only tests use it, and a test fails by panicking"
)]

pub mod certificates;
pub mod cluster;
pub mod git;
pub mod nats;
pub mod postgres;
pub mod proxy;
pub mod wait;
