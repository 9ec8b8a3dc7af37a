//! A node that was down while many writes went by: how soon its replica takes part again while writes go on, and whether
//! it stays.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{pusher::Pusher, stage::Stage};
use crate::figures::{Bar, Figures};

const PATH: &str = "bench/rejoin.git";
const WRITERS: usize = 4;
const PEAK: Duration = Duration::from_secs(10);
/// For how long after it came back the replica must stay level.
const WATCH: Duration = Duration::from_secs(20);
const GIVE_UP: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);

/// Leaves the cluster whole.
pub(super) async fn measure(figures: &mut Figures, stage: &mut Stage, missed: usize) -> Result<()> {
    stage.create(PATH).await?;
    let work = tempfile::tempdir()?;
    let pusher = Pusher::new(work.path(), "pusher-rejoin", stage.url(0, PATH), "main").await?;
    pusher.push().await?;
    let commit = pusher.head().await?;

    let number = AtomicUsize::new(0);
    let begun = Instant::now();
    write(stage, &commit, &number, None, |_| begun.elapsed() < PEAK).await?;
    let peak = number.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    figures.print("writes.rejoin.peak_per_second", peak, Bar::Told);

    let down = format!("home/{}", stage.secondary(PATH).await?);
    stage.cluster.kill(&down)?;
    let start = number.load(Ordering::Relaxed);
    write(stage, &commit, &number, None, |done| done < start + missed).await?;

    stage.cluster.restart(&down).await?;
    let (back, ended) = (Instant::now(), Arc::new(AtomicBool::new(false)));
    let pause = Duration::from_secs_f64(WRITERS as f64 / (peak / 2.0));
    let writing = write(stage, &commit, &number, Some(pause), |_| !ended.load(Ordering::Relaxed));
    let watching = async {
        let watched = watch(stage, back).await;
        ended.store(true, Ordering::Relaxed);
        watched
    };
    let (written, watched) = tokio::join!(writing, watching);
    written.context("writes while the replica came back")?;
    let Watched { seconds, level_share } = watched?;
    figures.print("writes.rejoin.seconds", seconds, Bar::AtMost(30.0));
    figures.print("writes.rejoin.level_share_afterwards", level_share, Bar::AtLeast(0.95));
    stage.level(PATH).await
}

/// Writes with all writers while `goes_on` says so; `pause`: from the start of one write to that of the next.
async fn write(
    stage: &Stage,
    commit: &str,
    number: &AtomicUsize,
    pause: Option<Duration>,
    goes_on: impl Fn(usize) -> bool,
) -> Result<()> {
    let writer = async || {
        while goes_on(number.load(Ordering::Relaxed)) {
            let begun = Instant::now();
            let name = format!("w{}", number.fetch_add(1, Ordering::Relaxed));
            stage.write_ref(PATH, &name, commit).await.with_context(|| name.clone())?;
            if let Some(pause) = pause {
                tokio::time::sleep(pause.saturating_sub(begun.elapsed())).await;
            }
        }
        Ok::<_, anyhow::Error>(())
    };
    let writers = futures::future::join_all((0..WRITERS).map(|_| writer()));
    writers.await.into_iter().collect()
}

struct Watched {
    seconds: f64,
    level_share: f64,
}

async fn watch(stage: &Stage, back: Instant) -> Result<Watched> {
    while !stage.is_level(PATH).await? {
        if back.elapsed() > GIVE_UP {
            return Ok(Watched { seconds: f64::INFINITY, level_share: 0.0 });
        }
        tokio::time::sleep(POLL).await;
    }
    let seconds = back.elapsed().as_secs_f64();
    let (since, mut polls, mut level) = (Instant::now(), 0_u32, 0_u32);
    while since.elapsed() < WATCH {
        polls += 1;
        level += u32::from(stage.is_level(PATH).await?);
        tokio::time::sleep(POLL).await;
    }
    Ok(Watched { seconds, level_share: f64::from(level) / f64::from(polls) })
}
