//! A repository that is deleted while it is repaired, and created again under its name: nothing of the first may come back.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use anyhow::Result;
use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};
use tabularium_cli::local::git::Git;
use tabularium_testkit::cluster::service::Kind as Service;
use tokio::time::{Instant, sleep};

use crate::{
    clients::Tested,
    cluster::Site,
    history::{Event, Finding, Outcome, Recorder, Write},
    push::{self, Destination, Wish},
};

/// Its name.
pub(crate) const PATH: &str = "reborn.git";
/// Pushes that the replica under repair lacks.
const MISSED: u32 = 4;
/// How long each step may take while nothing else is wrong.
const STEP_WITHIN: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(200);

/// The repository in its present life.
pub(crate) struct Rebirth {
    git: Git,
    gateways: Vec<String>,
    tested: Tested,
    recorder: Arc<Recorder>,
    lives: u32,
    commits: u32,
    /// What this life began with.
    first: Option<Write>,
}

impl Rebirth {
    /// `PATH` exists and is empty.
    pub(crate) async fn new(
        git: Git,
        directory: &Path,
        gateways: Vec<String>,
        recorder: Arc<Recorder>,
    ) -> Result<Self> {
        let tested = Tested::new(&git, directory, PATH, false).await?;
        Ok(Self { git, gateways, tested, recorder, lives: 0, commits: 0, first: None })
    }

    /// One life more. Answers the node that was under repair.
    pub(crate) async fn again(&mut self, site: &mut Site, random: &mut StdRng) -> Result<Option<String>> {
        let Ok(primary) = site.primary(PATH).await else { return Ok(None) };
        let nodes = site.names(Service::Node);
        let secondaries: Vec<_> = nodes.iter().filter(|node| **node != primary).collect();
        let Some(behind) = secondaries.choose(random).map(|node| (*node).clone()) else { return Ok(None) };
        site.pause(&behind)?;
        for number in 0..MISSED {
            self.push(&format!("refs/heads/missed-{number}")).await?;
        }
        site.resume(&behind)?;
        // Into the repair, or before it, or after.
        sleep(Duration::from_millis(random.random_range(0..400))).await;
        let end = Instant::now() + STEP_WITHIN;
        if let Err(why) = recreated(site, end).await {
            self.find(format!("cannot be deleted and created again: {why}"))?;
            return Ok(Some(behind));
        }
        self.lives += 1;
        let reference = format!("refs/heads/life-{}", self.lives);
        let write = self.push(&reference).await?;
        let done = write.updates.iter().all(|update| update.outcome == Outcome::Acknowledged);
        let new = write.updates.first().and_then(|update| update.new.clone());
        self.first = Some(write);
        let Some(new) = new.filter(|_| done) else { return Ok(Some(behind)) };
        let expected = BTreeMap::from([(reference, new)]);
        for gateway in &self.gateways {
            // Errors are counted where all clients' are.
            let url = format!("{gateway}/{PATH}");
            if let Ok(refs) = push::list(&self.git, &self.tested.store, &url).await?
                && refs != expected
            {
                self.find(format!(
                    "life {}: {expected:?} is expected by {gateway}, not {refs:?}",
                    self.lives
                ))?;
            }
        }
        Ok(Some(behind))
    }

    /// Writes down what the last life began with, for the comparison with the disks.
    pub(crate) fn tell(&self) -> Result<()> {
        self.first.iter().try_for_each(|write| self.recorder.record(&Event::Write(write.clone())))
    }

    fn find(&self, detail: String) -> Result<()> {
        self.recorder.record(&Event::Finding(Finding { what: PATH.to_owned(), detail }))
    }

    /// Creates a reference.
    async fn push(&mut self, reference: &str) -> Result<Write> {
        self.commits += 1;
        let message = format!("{} {}", self.lives, self.commits);
        let arguments = ["commit-tree", "-m", &message, &self.tested.tree];
        let new = push::local(&self.git, &self.tested.store, &arguments, b"").await?;
        let wish = Wish { reference: reference.to_owned(), old: None, new: Some(new), lease: true };
        let gateway = self.commits as usize % self.gateways.len();
        let destination = Destination {
            git: &self.git,
            store: &self.tested.store,
            recorder: &self.recorder,
            client: "rebirth",
            gateway,
            gateway_url: &self.gateways[gateway],
            repository: PATH,
        };
        destination.push(&[wish], false).await
    }
}

/// Deletes and creates it, each until it is done. Both may have been done by a call that failed.
async fn recreated(site: &Site, end: Instant) -> Result<(), tonic::Status> {
    use tonic::Code::{AlreadyExists, NotFound};
    let mut index = 0;
    let mut tried = false;
    for (deletes, done) in [(true, NotFound), (false, AlreadyExists)] {
        loop {
            index += 1;
            let asked = if deletes { site.remove(index, PATH).await } else { site.create(index, PATH).await };
            match asked {
                Ok(()) => break,
                Err(status) if status.code() == done && tried => break,
                Err(status) if Instant::now() > end => return Err(status),
                Err(status) => {
                    tracing::info!(code = ?status.code(), error = status.message(), deletes, "once more");
                    tried = true;
                    sleep(AGAIN).await;
                }
            }
        }
        tried = false;
    }
    Ok(())
}
