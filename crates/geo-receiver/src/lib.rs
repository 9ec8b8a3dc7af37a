//! Takes the events of home sites, our own and GitLab's, and makes them durable before it answers.
//!
//! A request enters at `POST /api/v4/geo/receive_events` in `http`: the token names the home site (`tokens`), the body
//! is bounded and parsed, `event` decides (pure) whether it asks for a sync and of what, and `publish` puts that on the
//! bus and waits for the bus's word. Only then is it answered 201. When the bus has no word the answer is 503, and the
//! sender tries again.
//!
//! An event is a hint. Nothing in it is believed beyond the name of a repository: not the URLs, not the refs, and the
//! site is the one whose token was sent. Lost, repeated and reordered events change nothing, because a replicator asks
//! the home site itself.
//!
//! It must not know coordinators, routers, repositories or what a sync does.
//!
//! Tests: `cargo nextest run -p tabularium-geo-receiver`; those in `tests/it` need `nats-server` on the path.

pub mod config;
mod event;
mod http;
mod listener;
mod metrics;
mod publish;
mod server;
mod tokens;

pub use server::{RunError, Running, run, start};
