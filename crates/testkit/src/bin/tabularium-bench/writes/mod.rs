//! What quorum writes cost: latency by number of replicas, with one that is slow; rate of one hot repository; uploads that
//! lose a secondary; statements per write; and how long a replica that missed writes takes to take part again.

mod latency;
mod pusher;
mod rejoin;
mod stage;
mod statements;
mod upload;

use anyhow::Result;

use crate::figures::Figures;

/// How much of each is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    /// Pushes of each kind whose median counts.
    pub(crate) pushes: usize,
    /// Size of the upload that loses a secondary, in MiB.
    pub(crate) upload_mebibytes: u64,
    /// Writes that a node misses.
    pub(crate) missed_writes: usize,
}

/// Measures and prints.
pub(crate) async fn run(extent: Extent) -> Result<Figures> {
    let directory = tempfile::Builder::new().prefix("tabularium-bench-").tempdir_in("/tmp")?;
    let mut figures = Figures::new();
    latency::measure(&mut figures, directory.path(), extent.pushes).await?;
    let stage =
        stage::Stage::start(directory.path().join("three"), stage::Size { nodes: 3, routers: 2 }).await?;
    let measured = async {
        statements::measure(&mut figures, &stage, directory.path(), extent.pushes).await?;
        latency::measure_slow_secondary(&mut figures, &stage, directory.path(), extent.pushes).await?;
        latency::measure_hot(&mut figures, &stage, directory.path()).await
    };
    if let Err(error) = measured.await {
        eprintln!("{}", stage.log_tails());
        return Err(error);
    }
    let stage = upload::measure(&mut figures, stage, directory.path(), extent.upload_mebibytes).await?;
    rejoin::measure(&mut figures, stage, extent.missed_writes).await?;
    Ok(figures)
}
