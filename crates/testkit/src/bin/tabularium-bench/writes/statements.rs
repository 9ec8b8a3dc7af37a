//! What a write and a cached read cost the database, in transactions beyond those of an idle cluster. Of a write's, two
//! stand between the client and its answer, which a test of the coordinator counts; what follows from it, like the geo log
//! that is told to others, takes the rest.

use std::{path::Path, time::Duration};

use anyhow::Result;
use tabularium_testkit::postgres;

use super::{pusher::Pusher, stage::Stage};
use crate::figures::{Bar, Figures};

/// How long the cluster is watched doing nothing.
const IDLE: Duration = Duration::from_secs(5);
/// Statistics come that much late.
const STATISTICS_DELAY: Duration = Duration::from_millis(1500);

pub(super) async fn measure(
    figures: &mut Figures,
    stage: &Stage,
    directory: &Path,
    pushes: usize,
) -> Result<()> {
    const PATH: &str = "bench/statements.git";
    stage.create(PATH).await?;
    let mut pusher = Pusher::new(directory, "pusher-statements", stage.url(0, PATH), "main").await?;
    pusher.push().await?;
    stage.level(PATH).await?;

    let before = commits(stage).await?;
    tokio::time::sleep(IDLE).await;
    let idle = per_second(commits(stage).await? - before, IDLE);

    for (name, write, bar) in [("write", true, Bar::Told), ("cached_read", false, Bar::AtMost(0.2))] {
        let before = commits(stage).await?;
        let begun = tokio::time::Instant::now();
        for _ in 0..pushes {
            if write {
                pusher.again().await?;
            } else {
                crate::generated::git(directory, &["ls-remote", "--quiet", &stage.url(0, PATH)]).await?;
            }
        }
        let spent = commits(stage).await? - before;
        // Until the statistics were asked for, their delay included, as above.
        let own = spent - idle * begun.elapsed().as_secs_f64();
        figures.print(&format!("writes.transactions_per_{name}"), own / pushes as f64, bar);
    }
    Ok(())
}

fn per_second(count: f64, span: Duration) -> f64 {
    count / (span + STATISTICS_DELAY).as_secs_f64()
}

/// Transactions that the site's database has committed.
async fn commits(stage: &Stage) -> Result<f64> {
    tokio::time::sleep(STATISTICS_DELAY).await;
    Ok(postgres::committed_transactions(&stage.site.database_url).await?)
}
