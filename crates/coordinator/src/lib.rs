//! The owner of repository placement: which storages hold a repository, how new each copy is, which is the primary, and
//! what is still owed to whom. It keeps all that in Postgres and is the only process that talks SQL. Several run at once
//! on one database; each can do everything.
//!
//! It must not know git, nor relay a byte of it; that a node holds what is recorded here is the routers' and
//! replicators' word.
//!
//! * A router resolves a repository, begins a write, commits it: `service::routing`, then [`writing`], whose decisions are
//!   the pure [`placement`], [`failover`] and [`settlement`], and whose memory is [`db`]. Writers of one repository wait for
//!   its ticket in a [`queue`]; how many replicas must take part says [`quorum`]; what they hold when nobody knows what
//!   became of a write, [`inspection`] asks them.
//! * What routers cache is registered in [`leases`] (pure) and [`sessions`]; before a commit that made a cached route wrong
//!   is answered, [`revocation`] takes it back everywhere.
//! * A write owes copies and notifications: rows of the outbox ([`db::outbox`]), told to the message bus by the relay among
//!   the [`tasks`], done by replicators, who report to `service::duty`. A copy goes in rounds until nothing was written
//!   meanwhile, if need be while nobody writes: [`repair`], decided by the pure [`duties`].
//! * What nodes keep beside their replicas where no vote tells them: [`records`]. A lost database is made anew from that:
//!   [`rebuild`] (pure), `service::rebuild`.
//! * What Praefect has recorded is taken over: [`import`] (pure), `service::import`.
//! * Replicas come and go: [`movement`] by the pure [`placement`]. They are compared, and their objects looked through, at
//!   leisure or when that is asked for ([`tasks`], decided by the pure [`verification`] and [`soundness`]); what turns out
//!   corrupt is taken out of reads and made again: [`expulsion`].
//! * Operators look in through `service::operator` and [`http`].
//!
//! Unit and property tests are beside the code; `tests/it` runs coordinators against real Postgres and NATS:
//! `cargo nextest run -p tabularium-coordinator`.

mod app;
mod config;
mod database_clock;
mod database_tls;
mod db;
mod duties;
mod error;
mod expulsion;
mod failover;
mod fsck_config;
mod health;
mod http;
mod import;
mod inspection;
mod leases;
mod metrics;
mod movement;
mod peers;
mod placement;
mod queue;
mod quorum;
mod rebuild;
mod records;
mod repair;
mod repair_config;
mod repository;
mod revocation;
mod service;
mod sessions;
mod settlement;
mod soundness;
mod suspicions;
mod tasks;
mod topology;
mod verification;
mod writing;

use std::path::Path;

pub use app::{Coordinator, RunError, Secrets, migrate, migrations, ping, read_write};
pub use config::{
    Config, DatabaseUrl, HomeSiteConfig, StorageConfig, SubscriberConfig, Timing, VirtualStorageConfig,
};
pub use database_tls::{DatabaseTls, SslMode};
pub use db::migrations::Migration;
pub use fsck_config::FsckConfig;
pub use quorum::{QuorumPolicy, UnknownPolicy};
pub use repair_config::RepairConfig;
use tabularium_common::lifecycle::stop_signal;

/// Serves until SIGTERM or SIGINT.
pub async fn run(config: Config, announce: Option<&Path>) -> Result<(), RunError> {
    let coordinator = tokio::select! {
        started = Coordinator::start(config) => started?,
        // Nothing is served yet that would have to be finished.
        _ = stop_signal() => return Ok(()),
    };
    if let Some(path) = announce {
        coordinator.announce(path)?;
    }
    if let Err(error) = stop_signal().await {
        tracing::error!(%error, "signals cannot be watched; stopping");
    }
    coordinator.stop().await
}
