//! What quorum writes cost: latency by number of replicas, with one that is slow; rate of one hot repository; uploads that
//! lose a secondary; statements per write; and how long a replica that missed writes takes to take part again.

mod latency;
mod pusher;
mod rejoin;
mod stage;
mod statements;
mod upload;

use std::path::Path;

use anyhow::Result;

use self::stage::{Size, Stage};
use crate::figures::Figures;

/// What can be measured alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// Small pushes to one, three and five replicas.
    Latency,
    /// Transactions of the database.
    Statements,
    /// A secondary that answers late.
    Slow,
    /// One repository with many pushers.
    Hot,
    /// Large pushes that lose a secondary.
    Upload,
    /// A node that missed writes.
    Rejoin,
}

/// How much of each is measured.
#[derive(Debug, Clone)]
pub(crate) struct Extent {
    /// Empty: all.
    pub(crate) only: Vec<Part>,
    /// Pushes of each kind whose median counts.
    pub(crate) pushes: usize,
    /// Size of the upload that loses a secondary, in MiB.
    pub(crate) upload_mebibytes: u64,
    /// Writes that a node misses.
    pub(crate) missed_writes: usize,
}

impl Extent {
    fn has(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// Measures and prints.
pub(crate) async fn run(extent: Extent) -> Result<Figures> {
    let directory = tempfile::Builder::new().prefix("tabularium-bench-").tempdir_in("/tmp")?;
    let mut figures = Figures::new();
    if extent.has(Part::Latency) {
        latency::measure(&mut figures, directory.path(), extent.pushes).await?;
    }
    let mut stage = Stage::start(directory.path().join("three"), Size { nodes: 3, routers: 2 }).await?;
    let measured = measure(&mut figures, &mut stage, directory.path(), &extent).await;
    measured.inspect_err(|_| eprintln!("{}", stage.log_tails()))?;
    stage.cluster.stop().await?;
    Ok(figures)
}

async fn measure(figures: &mut Figures, stage: &mut Stage, directory: &Path, extent: &Extent) -> Result<()> {
    if extent.has(Part::Statements) {
        statements::measure(figures, stage, directory, extent.pushes).await?;
    }
    if extent.has(Part::Slow) {
        latency::measure_slow_secondary(figures, stage, directory, extent.pushes).await?;
    }
    if extent.has(Part::Hot) {
        latency::measure_hot(figures, stage, directory).await?;
    }
    if extent.has(Part::Upload) {
        upload::measure(figures, stage, directory, extent.upload_mebibytes).await?;
    }
    if extent.has(Part::Rejoin) {
        rejoin::measure(figures, stage, extent.missed_writes).await?;
    }
    Ok(())
}
