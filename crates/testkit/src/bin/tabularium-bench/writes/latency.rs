//! Small pushes: one replica against three against five, a slow secondary, and many pushers of one repository.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tabularium_testkit::proxy::Fault;

use super::{
    pusher::Pusher,
    stage::{Size, Stage},
};
use crate::figures::{Bar, Figures, median};

/// Pushes before any is measured.
const WARM_UP: usize = 5;
/// Of every answer of the slow secondary.
const SLOWNESS: Duration = Duration::from_millis(200);
/// Pushers of the hot repository, and how long they push.
const HOT_PUSHERS: usize = 6;
const HOT_SECONDS: Duration = Duration::from_secs(15);
/// Commits that each of them has made before: twice as many as it is expected to push.
const HOT_COMMITS: usize = 120;

/// Turn by turn, on clusters of one, three and five nodes that run side by side.
pub(super) async fn measure(figures: &mut Figures, directory: &Path, pushes: usize) -> Result<()> {
    const PATH: &str = "bench/small.git";
    let mut stages = Vec::new();
    let mut pushers = Vec::new();
    for nodes in [1, 3, 5] {
        let stage =
            Stage::start(directory.join(format!("cluster-{nodes}")), Size { nodes, routers: 1 }).await?;
        stage.create(PATH).await?;
        let mut pusher =
            Pusher::new(directory, &format!("pusher-{nodes}"), stage.url(0, PATH), "main").await?;
        pusher.push().await?;
        for _ in 0..WARM_UP {
            pusher.again().await?;
        }
        stages.push(stage);
        pushers.push(pusher);
    }
    let mut seconds = vec![Vec::new(); pushers.len()];
    for round in 0..pushes {
        for turn in 0..pushers.len() {
            let turn = (turn + round) % pushers.len();
            seconds[turn].push(pushers[turn].again().await?);
        }
    }
    let medians: Vec<f64> = seconds.into_iter().map(median).collect();
    for (stage, nodes) in stages.into_iter().zip([1, 3, 5]) {
        // What was left behind was not waited for, and would make the figures meaningless.
        let level = stage.is_level(PATH).await?;
        figures.print(
            &format!("writes.small.all_took_part.{nodes}"),
            f64::from(u8::from(!level)),
            Bar::AtMost(0.0),
        );
        stage.cluster.stop().await?;
    }
    for (nodes, median) in [1, 3, 5].iter().zip(&medians) {
        figures.print(&format!("writes.small.p50_ms.{nodes}"), median * 1e3, Bar::Told);
    }
    figures.print("writes.small.three_to_one", medians[1] / medians[0], Bar::AtMost(1.5));
    figures.print("writes.small.five_to_three", medians[2] / medians[1], Bar::AtMost(1.1));
    Ok(())
}

/// The same repository with and without a secondary that answers late.
pub(super) async fn measure_slow_secondary(
    figures: &mut Figures,
    stage: &Stage,
    directory: &Path,
    pushes: usize,
) -> Result<()> {
    const PATH: &str = "bench/slow.git";
    stage.create(PATH).await?;
    let mut pusher = Pusher::new(directory, "pusher-slow", stage.url(0, PATH), "main").await?;
    pusher.push().await?;
    let slow = stage.secondary(PATH).await?;
    let mut seconds = [Vec::new(), Vec::new()];
    for (which, fault) in [Fault::None, Fault::Delay(SLOWNESS)].into_iter().enumerate() {
        stage.hinder(&slow, fault);
        for _ in 0..WARM_UP {
            pusher.again().await?;
        }
        for _ in 0..pushes {
            seconds[which].push(pusher.again().await?);
        }
    }
    stage.hinder(&slow, Fault::None);
    let [quick, slow] = seconds.map(median);
    figures.print("writes.slow_secondary.added_ms", (slow - quick) * 1e3, Bar::AtMost(50.0));
    stage.level(PATH).await
}

/// Pushes per second that one repository takes from several pushers through two routers. The pushers share the machine
/// with the cluster, so that what they push has been committed before.
pub(super) async fn measure_hot(figures: &mut Figures, stage: &Stage, directory: &Path) -> Result<()> {
    const PATH: &str = "bench/hot.git";
    stage.create(PATH).await?;
    let mut pushers = Vec::new();
    for number in 0..HOT_PUSHERS {
        let (name, url) = (format!("hot-{number}"), stage.url(number % 2, PATH));
        let mut pusher = Pusher::new(directory, &name, url, &name).await?;
        pusher.push().await?;
        let commits = pusher.commit_ahead(HOT_COMMITS).await?;
        pushers.push((pusher, commits));
    }
    let begun = Instant::now();
    let end = begun + HOT_SECONDS;
    let pushing = pushers.into_iter().map(|(pusher, commits)| async move {
        for (pushed, commit) in commits.iter().enumerate() {
            if Instant::now() >= end {
                return Ok(pushed);
            }
            pusher.push_commit(commit).await?;
        }
        anyhow::bail!("a pusher had too few commits")
    });
    let pushed = futures::future::try_join_all(pushing).await.context("pushes to the hot repository")?;
    let rate = pushed.into_iter().sum::<usize>() as f64 / begun.elapsed().as_secs_f64();
    figures.print("writes.hot.pushes_per_second", rate, Bar::AtLeast(20.0));
    stage.level(PATH).await
}
