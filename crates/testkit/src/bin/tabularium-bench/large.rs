//! Peak memory of every service while one large repository is pushed, copied and cloned.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    figures::{Bar, Figures},
    generated::{self, Content, Measured},
    process,
};

const WARM_UP: &str = "bench/warm-up.git";
const RELATIVE_PATH: &str = "bench/large.git";
/// How far above its idle memory a service may go, in MiB.
const ALLOWED_MEBIBYTES: f64 = 64.0;

/// Measures and prints.
pub(crate) async fn run(mebibytes: u64) -> Result<Figures> {
    let directory = tempfile::Builder::new().prefix("tabularium-bench-").tempdir_in("/tmp")?;
    let (small, large) = (directory.path().join("small.git"), directory.path().join("large.git"));
    generated::repository(&small, 1, Content::Text).await?;
    generated::repository(&large, mebibytes, Content::Noise).await?;
    let measured = Measured::start(directory.path().join("cluster")).await?;

    let measuring = measure(&measured, directory.path(), [&small, &large]).await;
    let figures = measuring.inspect_err(|_| eprintln!("{}", measured.log_tails()))?;
    measured.cluster.stop().await?;
    Ok(figures)
}

async fn measure(measured: &Measured, directory: &Path, [small, large]: [&Path; 2]) -> Result<Figures> {
    // What a service needs once, however small the work, is part of being idle.
    let url = measured.create_and_push(WARM_UP, small).await?;
    generated::clone_seconds(directory, &url).await?;
    measured.converged(WARM_UP).await?;

    let mut idle = BTreeMap::new();
    for service in &measured.site.processes {
        process::reset_peak(service.pid)?;
        idle.insert(service.name.clone(), process::resident_mebibytes(service.pid)?);
    }
    let url = measured.create_and_push(RELATIVE_PATH, large).await?;
    measured.converged(RELATIVE_PATH).await?;
    let seconds = generated::clone_seconds(directory, &url).await?;

    let mut figures = Figures::new();
    figures.print("large.clone_seconds", seconds, Bar::Told);
    for service in &measured.site.processes {
        let idle = idle.get(&service.name).context("a service that was not there before")?;
        let name = service.name.replace('/', ".");
        figures.print(&format!("large.{name}.idle_mib"), *idle, Bar::Told);
        let above = process::peak_mebibytes(service.pid)? - idle;
        figures.print(&format!("large.{name}.peak_above_idle_mib"), above, Bar::AtMost(ALLOWED_MEBIBYTES));
    }
    Ok(figures)
}
