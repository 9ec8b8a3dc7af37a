//! What a scene is made of: processes in pairs, ways that are slow or closed, and looks at the disks.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tabularium_cli::local::git::Git;
use tabularium_testkit::{
    cluster::service::Kind as Service,
    proxy::{Direction, Fault as Relay},
};
use tokio::time::{Instant, sleep};

use super::actor::{Actor, PATH};
use crate::{
    cluster::{Links, Site},
    healed,
    push::Wish,
};

/// How long routers take to hold their session with the coordinator that is left to them, and to know their nodes.
const PAIRED: Duration = Duration::from_secs(3);
/// How long all replicas may take to be equal before a scene begins.
const EQUAL_WITHIN: Duration = Duration::from_secs(20);
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// How git names the directories where objects are before a push is accepted.
const QUARANTINE: &str = "tmp_objdir-";

/// One gateway, with the only router it reaches and the only coordinator that this reaches.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    /// The gateway's place.
    pub(super) gateway: usize,
    pub(super) router: String,
    pub(super) coordinator: String,
}

/// All is set: the repository has equal replicas, and every gateway has a way of its own to them.
pub(super) struct Stage {
    git: Git,
    /// Something will go wrong here.
    pub(super) troubled: Pair,
    /// Not here.
    pub(super) well: Pair,
    pub(super) primary: String,
    /// The replica that one or the other cannot reach.
    pub(super) secondary: String,
    replica_path: String,
}

impl Stage {
    /// `router`: the place of the one in trouble. Nothing when the repository is not as it has to be.
    pub(super) async fn set(site: &Site, actor: &Actor, git: &Git, router: usize) -> Result<Option<Self>> {
        let (routers, coordinators) = (site.names(Service::Router), site.names(Service::Coordinator));
        ensure!(
            routers.len() > 1 && routers.len() == coordinators.len(),
            "routers and coordinators are no pairs"
        );
        only(site, Service::Gateway, &routers);
        only(site, Service::Router, &coordinators);
        let pair = |place: usize| Pair {
            gateway: place,
            router: routers[place].clone(),
            coordinator: coordinators[place].clone(),
        };
        let (troubled, well) = (pair(router), pair((router + 1) % routers.len()));
        sleep(PAIRED).await;
        let nodes = site.names(Service::Node);
        if !equal(site, nodes.len()).await {
            return Ok(None);
        }
        // Both routers know the way, and have pushed and read by it.
        for pair in [&troubled, &well] {
            let wishes = actor.branches(1).await?;
            actor.push(pair.gateway, &wishes).await?;
            actor.read_for(pair.gateway, Duration::ZERO).await?;
        }
        if !equal(site, nodes.len()).await {
            return Ok(None);
        }
        let details = site.test.details(PATH).await.context("details")?;
        let route = details.route.context("no route")?;
        let (primary, replica_path) = (route.primary, route.replica_path);
        let Some(secondary) = nodes.into_iter().find(|node| *node != primary) else { return Ok(None) };
        Ok(Some(Self { git: git.clone(), troubled, well, primary, secondary, replica_path }))
    }

    /// The nodes that are no primary.
    pub(super) fn secondaries(&self, site: &Site) -> Vec<String> {
        let nodes = site.names(Service::Node).into_iter();
        nodes.filter(|node| *node != self.primary).collect()
    }

    /// Waits until so many of the branches are on a node's disk. Answers whether they are.
    pub(super) async fn on_disk(
        &self,
        (site, node): (&Site, &str),
        wishes: &[Wish],
        count: usize,
        within: Duration,
    ) -> Result<bool> {
        let end = Instant::now() + within;
        let replica = self.replica(site, node)?;
        loop {
            let refs = healed::refs(&self.git, &replica).await?;
            if wishes.iter().filter(|wish| refs.contains_key(&wish.reference)).count() >= count {
                return Ok(true);
            }
            if Instant::now() > end {
                return Ok(false);
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Waits until a push has brought objects to a node. Its first vote has not been answered yet where votes are slow.
    pub(super) async fn incoming(&self, (site, node): (&Site, &str), within: Duration) -> Result<bool> {
        let end = Instant::now() + within;
        let objects = self.replica(site, node)?.join("objects");
        loop {
            let mut names = fs::read_dir(&objects)?.flatten().map(|entry| entry.file_name());
            if names.any(|name| name.to_string_lossy().starts_with(QUARANTINE)) {
                return Ok(true);
            }
            if Instant::now() > end {
                return Ok(false);
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Makes it impossible for git to change a branch on a node; answers what has to be removed again.
    pub(super) fn lock(&self, site: &Site, node: &str, wish: &Wish) -> Result<PathBuf> {
        let path = self.replica(site, node)?.join(format!("{}.lock", wish.reference));
        fs::write(&path, "").with_context(|| path.display().to_string())?;
        Ok(path)
    }

    fn replica(&self, site: &Site, node: &str) -> Result<PathBuf> {
        let mut replicas = site.replicas(&self.replica_path).into_iter();
        let found = replicas.find(|(storage, _)| storage == node);
        found.map(|(_, path)| path).with_context(|| format!("no storage {node}"))
    }
}

impl Pair {
    /// A router has its ways to nodes from its coordinator: they are the same. Closes one.
    pub(super) fn close(&self, links: &Links, node: &str) {
        refuse(links, &self.coordinator, node);
    }

    /// Whatever nodes answer, votes included, takes so long.
    pub(super) fn slow(&self, links: &Links, by: Duration) {
        links.each(&self.coordinator, "node", |proxy| {
            proxy.set_one_way(Direction::Down, Relay::Delay(by));
        });
    }

    /// The router is heard by no coordinator, and hears none, and is not told so.
    pub(super) fn isolate(&self, links: &Links) {
        links.each(&self.router, "coordinator", |proxy| proxy.set(Relay::BlackHole));
    }
}

/// Waits until the replicas are equal. Answers whether they are.
pub(super) async fn equal(site: &Site, count: usize) -> bool {
    let end = Instant::now() + EQUAL_WITHIN;
    while let Err(why) = site.test.equal_checksums(PATH, count).await {
        if Instant::now() > end {
            tracing::warn!(why, "no scene: the replicas are not equal");
            return false;
        }
        sleep(LOOK_INTERVAL).await;
    }
    true
}

/// Whoever calls is refused, and what was connected is not any more.
pub(super) fn refuse(links: &Links, from: &str, to: &str) {
    links.each(from, to, |proxy| {
        proxy.set(Relay::Refuse);
        proxy.cut();
    });
}

/// Everybody of a kind reaches one of those, each another one.
fn only(site: &Site, kind: Service, with: &[String]) {
    for (index, name) in site.names(kind).iter().enumerate() {
        for (_, other) in with.iter().enumerate().filter(|(place, _)| *place != index % with.len()) {
            refuse(&site.links, name, other);
        }
    }
}
