//! The workers: they bring replicas up to date, remove what is left of deleted repositories, tell subscribed sites what
//! changed, and fetch what changed at home sites.
//!
//! A message on the bus is a reason to look, never the data to act on. What a duty is about is read from the
//! coordinator when the work starts ([`tabularium_proto::coordinator`]'s `DutyService`), what became of it is recorded
//! there when it ends, and only then is the message acknowledged. A worker that dies, a bus that loses everything and a
//! message that comes twice cost time and nothing else.
//!
//! A message enters in `worker`, which takes one at a time from `messages` into each of a class's slots; `workshop` takes it through
//! start, work and finish, and answers how it is settled on the bus (`settlement`, pure). The work itself is a module
//! for each class: `copying`, which goes in rounds (`replication`) for as long as its `lease` runs, `cleanup`, `geo_notify`
//! (with the payloads in `hook`), and `geo_sync` (with what it asks of the home site in `home` and of the local router in
//! `mirror`).
//!
//! It must not know placement, SQL, git or how the coordinator decides what is owed.
//!
//! Tests: `cargo nextest run -p tabularium-replicator`; those in `tests/it` need `nats-server` on the path.

mod calls;
mod cleanup;
pub mod config;
mod coordinators;
mod copying;
mod failure;
mod geo_notify;
mod geo_sync;
mod home;
mod hook;
mod http_client;
mod lease;
mod messages;
mod metrics;
mod mirror;
mod nodes;
mod refs;
mod replication;
mod server;
mod settlement;
mod streams;
mod worker;
mod workshop;

pub use server::{RunError, Running, run, start, start_with};
