//! The client of the scenes: it does what it is told, in a repository that nobody else writes to, so that nothing undoes
//! or repairs by chance what a scene has led to.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use futures::future::try_join_all;
use tabularium_cli::local::git::Git;
use tokio::time::Instant;

use crate::{
    clients::Tested,
    history::{Event, Read, Recorder},
    push::{self, Destination, Wish},
};

/// Its repository.
pub(crate) const PATH: &str = "scene.git";
/// Its branches begin so. Each is created once and never changed.
pub(crate) const BRANCHES: &str = "refs/heads/scene-";
/// So many read at once when a window is narrow.
const READERS: usize = 4;

/// Who pushes and reads.
pub(crate) struct Actor {
    git: Git,
    gateways: Vec<String>,
    tested: Tested,
    recorder: Arc<Recorder>,
    branches: AtomicU32,
}

impl Actor {
    /// `PATH` exists and is empty.
    pub(crate) async fn new(
        git: Git,
        directory: &Path,
        gateways: Vec<String>,
        recorder: Arc<Recorder>,
    ) -> Result<Self> {
        let tested = Tested::new(&git, directory, PATH, false).await?;
        Ok(Self { git, gateways, tested, recorder, branches: AtomicU32::new(0) })
    }

    /// New branches, to be pushed together.
    pub(crate) async fn branches(&self, count: usize) -> Result<Vec<Wish>> {
        let mut wishes = Vec::with_capacity(count);
        for _ in 0..count {
            let number = self.branches.fetch_add(1, Ordering::Relaxed);
            let message = format!("scene {number}");
            let arguments = ["commit-tree", "-m", &message, &self.tested.tree];
            let new = push::local(&self.git, &self.tested.store, &arguments, b"").await?;
            let reference = format!("{BRANCHES}{number}");
            wishes.push(Wish { reference, old: None, new: Some(new), lease: true });
        }
        Ok(wishes)
    }

    /// One push, not atomic.
    pub(crate) async fn push(&self, gateway: usize, wishes: &[Wish]) -> Result<()> {
        let destination = Destination {
            git: &self.git,
            store: &self.tested.store,
            recorder: &self.recorder,
            client: "actor",
            gateway,
            gateway_url: &self.gateways[gateway],
            repository: PATH,
        };
        self.recorder.record(&Event::Write(destination.push(wishes, false).await?))
    }

    /// Several clients at once read again and again for a while, at least once.
    pub(crate) async fn read_for(&self, gateway: usize, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        let readers = (0..READERS).map(|number| async move {
            loop {
                self.read(gateway, number).await?;
                if Instant::now() >= end {
                    return Ok::<_, anyhow::Error>(());
                }
            }
        });
        try_join_all(readers).await.map(drop)
    }

    async fn read(&self, gateway: usize, number: usize) -> Result<()> {
        let invoked = self.recorder.now();
        let answer = push::list(&self.git, &self.tested.store, &self.url(gateway)).await?;
        let completed = self.recorder.now();
        let (refs, said) = match answer {
            Ok(refs) => (Some(refs), String::new()),
            Err(said) => (None, said),
        };
        self.recorder.record(&Event::Read(Read {
            client: format!("onlooker-{number}"),
            gateway,
            repository: PATH.into(),
            invoked,
            completed,
            refs,
            said,
        }))
    }

    fn url(&self, gateway: usize) -> String {
        format!("{}/{PATH}", self.gateways[gateway])
    }
}
