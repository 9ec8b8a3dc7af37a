//! Looks whether what was acknowledged is on enough disks, while most of the nodes stand still.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tabularium_cli::local::git::Git;
use tabularium_testkit::cluster::service::Kind as Service;
use tokio::time::sleep;

use crate::{
    cluster::Site,
    healed,
    history::{Finding, Outcome, Recorder},
    scenes::actor::BRANCHES,
};

/// How often the nodes are stopped; each time some write is in the middle.
const ROUNDS: u32 = 4;
/// How long they stand still: what has no quorum any more is refused meanwhile.
const STILL: Duration = Duration::from_millis(2500);
/// How long they run in between: all take part again.
const RUNNING: Duration = Duration::from_secs(3);
/// What these branches were is under what they are; those of scenes never change.
const GROWING: [&str; 5] = ["/main", "/left", "/right", "/release", "/shared"];

/// What it takes to look.
pub(crate) struct Witness {
    pub(crate) git: Git,
    /// Where the clients' object stores are, by the repositories' names.
    pub(crate) stores: PathBuf,
    pub(crate) recorder: Arc<Recorder>,
}

impl Witness {
    /// Stops all nodes but the repository's primary, several times. Answers what is wrong; nothing at all when there is no
    /// primary.
    pub(crate) async fn lone_primary(&self, site: &mut Site, path: &str) -> Result<Option<Vec<Finding>>> {
        let mut findings = Vec::new();
        for _ in 0..ROUNDS {
            let Ok(primary) = site.primary(path).await else { return Ok(None) };
            let nodes = site.names(Service::Node);
            let others: Vec<_> = nodes.iter().filter(|node| **node != primary).collect();
            others.iter().try_for_each(|node| site.pause(node))?;
            sleep(STILL).await;
            findings.extend(self.kept_by_too_few(site, path).await?);
            others.iter().try_for_each(|node| site.resume(node))?;
            sleep(RUNNING).await;
        }
        Ok(Some(findings))
    }

    /// Acknowledged updates that are on fewer disks than a majority, themselves or in what was made of them.
    pub(crate) async fn kept_by_too_few(&self, site: &Site, path: &str) -> Result<Vec<Finding>> {
        // First what was acknowledged, then what is there.
        let history = self.recorder.so_far()?;
        let mut newest = BTreeMap::new();
        for update in
            history.writes.iter().filter(|write| write.repository == path).flat_map(|write| &write.updates)
        {
            let grows = GROWING.iter().any(|end| update.reference.ends_with(end))
                || update.reference.starts_with(BRANCHES);
            if let (true, Outcome::Acknowledged, Some(new)) = (grows, update.outcome, &update.new) {
                newest.insert(&update.reference, new);
            }
        }
        let details = site.test.details(path).await.context("details")?;
        let replicas = site.replicas(&details.route.context("no route")?.replica_path);
        let mut disks = Vec::new();
        for (_, replica) in &replicas {
            disks.push(healed::refs(&self.git, replica).await?);
        }
        let mut findings = Vec::new();
        for (reference, new) in newest {
            let mut count = 0;
            for there in disks.iter().filter_map(|refs| refs.get(reference)) {
                let asked = ["merge-base", "--is-ancestor", new, there];
                count += usize::from(self.git.output(&self.stores.join(path), asked).await?.status.success());
            }
            if count <= replicas.len() / 2 {
                let detail = format!(
                    "{path} {reference}: acknowledged {new} is on {count} of {} disks",
                    replicas.len()
                );
                findings.push(Finding { what: "too few".into(), detail });
            }
        }
        Ok(findings)
    }
}
