//! A large push whose secondary is killed or stopped after two seconds, against the same push undisturbed.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::stage::Stage;
use crate::{
    figures::{Bar, Figures, median},
    generated::{self, Content},
};

const ROUNDS: usize = 3;
const UNTIL_FAULT: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disturbance {
    None,
    Killed,
    Stopped,
}

/// Leaves the cluster whole.
pub(super) async fn measure(
    figures: &mut Figures,
    stage: &mut Stage,
    directory: &Path,
    mebibytes: u64,
) -> Result<()> {
    let source = directory.join("upload.git");
    generated::repository(&source, mebibytes, Content::Noise).await?;
    let mut seconds = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..ROUNDS {
        for (which, disturbance) in
            [Disturbance::None, Disturbance::Killed, Disturbance::Stopped].into_iter().enumerate()
        {
            let path = format!("bench/upload-{round}-{which}.git");
            let pushed = push(stage, &source, &path, disturbance).await;
            seconds[which].push(pushed.with_context(|| format!("secondary: {disturbance:?}"))?);
        }
    }
    let [undisturbed, killed, stopped] = seconds.map(median);
    figures.print("writes.upload.undisturbed_seconds", undisturbed, Bar::Told);
    figures.print("writes.upload.secondary_killed_ratio", killed / undisturbed, Bar::AtMost(1.2));
    figures.print("writes.upload.secondary_stopped_ratio", stopped / undisturbed, Bar::AtMost(1.2));
    Ok(())
}

async fn push(stage: &mut Stage, source: &Path, path: &str, disturbance: Disturbance) -> Result<f64> {
    stage.create(path).await?;
    let secondary = format!("home/{}", stage.secondary(path).await?);
    let url = stage.url(0, path);
    let begun = Instant::now();
    let pushing = async {
        generated::git(source, &["push", "--quiet", "--mirror", &url]).await?;
        Ok::<_, anyhow::Error>(begun.elapsed().as_secs_f64())
    };
    let disturbing = async {
        tokio::time::sleep(UNTIL_FAULT).await;
        match disturbance {
            Disturbance::None => Ok(()),
            Disturbance::Killed => stage.cluster.kill(&secondary),
            Disturbance::Stopped => stage.cluster.pause(&secondary),
        }
    };
    let (pushed, disturbed) = tokio::join!(pushing, disturbing);
    disturbed?;
    match disturbance {
        Disturbance::None => {}
        Disturbance::Killed => stage.cluster.restart(&secondary).await?,
        Disturbance::Stopped => stage.cluster.resume(&secondary)?,
    }
    let seconds = pushed?;
    stage.level(path).await?;
    Ok(seconds)
}
