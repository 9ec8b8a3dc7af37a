//! Several faults at once that together open one window, in which one safety step alone stands between a client and harm.
//!
//! Chance would have to find windows that are less than a second wide. A scene has its own client and its own repository
//! ([`actor`]), makes everything ready ([`stage`]), waits for what it needs to happen, and strikes then. Each gateway
//! reaches one router and each router one coordinator; one of these pairs is in trouble, and what the clients of the
//! other one do meanwhile is what it must not get wrong.
//!
//! What a scene leads to is judged as everything else is. The nemesis plays them between its other faults, and
//! [`crate::prove`] with the step left out that the scene is about.

pub(crate) mod actor;
mod stage;

use std::{fs, time::Duration};

use anyhow::Result;
use tabularium_testkit::cluster::service::Kind as Service;
use tokio::{time::sleep, try_join};

use crate::{cluster::Site, history::Finding, witness::Witness};
use actor::{Actor, PATH};
use stage::{Stage, refuse};

/// What every vote waits for when a push is to take long. Health checks wait behind other answers.
const SLOW: Duration = Duration::from_millis(350);
/// The same, when there is to be time to strike before the first vote, and none to notice before the last.
const BRISK: Duration = Duration::from_millis(60);
/// So many branches in one push, each voted on for itself, take longer than the lease of a write, its settlement and a copy
/// together.
const MANY: usize = 24;
/// So many of them on the primary's disk: the push is in its middle.
const SOME: usize = 3;
/// How long a push may take to come to its middle, or to its end.
const LONG: Duration = Duration::from_secs(30);
/// How long a push of one branch may take to bring its objects.
const SHORT: Duration = Duration::from_secs(3);
/// How long a router takes to know that a node is gone.
const KNOWN: Duration = Duration::from_millis(1500);
/// How long readers look through a window that a settlement closes. Shorter than a write's lease.
const UNSETTLED: Duration = Duration::from_millis(3500);
/// The same, where a router's session ends it.
const SESSION: Duration = Duration::from_millis(2500);

/// How long readers look for a node that came back, until routers read from it again included.
const AGED: Duration = Duration::from_secs(5);

/// How long a push of so many branches votes, the time before its middle not counted.
const VOTED: Duration = Duration::from_secs(24);

/// All their names begin so.
pub(crate) const PREFIX: &str = "scene-";

/// A window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scene {
    /// A router loses its coordinator where a write begins, and has lost one node.
    Unasked,
    /// All nodes but the primary are stopped in the middle of a push.
    Alone,
    /// A node is stopped in the middle of a push.
    LeftBehind,
    /// A router's coordinator stands still when a write is to be recorded that left a replica behind. Clients of the other
    /// router read what that one does not know to be old.
    LateRecord,
    /// A router can be told by nobody that a replica was left behind. Its clients read.
    OldRoute,
    /// A router loses its coordinator in the middle of a push that takes longer than its lease, and a replica that does not
    /// take part is made equal meanwhile.
    LateVotes,
    /// The primary cannot do what the others could.
    Refused,
    /// A node comes back with its disk as it was before a push. Clients read.
    OldDisk,
}

impl Scene {
    pub(crate) const ALL: [Self; 8] = [
        Self::Unasked,
        Self::Alone,
        Self::LeftBehind,
        Self::LateRecord,
        Self::OldRoute,
        Self::LateVotes,
        Self::Refused,
        Self::OldDisk,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unasked => "scene-unasked",
            Self::Alone => "scene-alone",
            Self::LeftBehind => "scene-left-behind",
            Self::LateRecord => "scene-late-record",
            Self::OldRoute => "scene-old-route",
            Self::LateVotes => "scene-late-votes",
            Self::Refused => "scene-refused",
            Self::OldDisk => "scene-old-disk",
        }
    }

    /// Plays it; `router` is the one in trouble, by its place. Answers what was seen on the disks meanwhile, or nothing when
    /// it could not be played. What was closed, stopped or killed stays so.
    pub(crate) async fn play(
        self,
        site: &mut Site,
        (actor, witness): (&Actor, &Witness),
        router: usize,
    ) -> Result<Option<Vec<Finding>>> {
        let Some(stage) = Stage::set(site, actor, &witness.git, router).await? else { return Ok(None) };
        let mut findings = Vec::new();
        match self {
            Self::Unasked => unasked(&stage, site, actor).await?,
            Self::Alone => {
                alone(&stage, site, actor).await?;
                findings = witness.kept_by_too_few(site, PATH).await?;
            }
            Self::LeftBehind => left_behind(&stage, site, actor).await?,
            Self::LateRecord => late_record(&stage, site, actor).await?,
            Self::OldRoute => old_route(&stage, site, actor).await?,
            Self::LateVotes => late_votes(&stage, site, actor).await?,
            Self::Refused => refused(&stage, site, actor).await?,
            Self::OldDisk => old_disk(&stage, site, actor).await?,
        }
        Ok(Some(findings))
    }
}

/// What is asked for is lost on the way, which is noticed half a second later at the earliest: nobody ever hears of the write.
async fn unasked(stage: &Stage, site: &mut Site, actor: &Actor) -> Result<()> {
    let Stage { troubled, primary, secondary, .. } = stage;
    let wishes = actor.branches(1).await?;
    troubled.slow(&site.links, BRISK);
    troubled.close(&site.links, secondary);
    try_join!(actor.push(troubled.gateway, &wishes), async {
        stage.incoming((site, primary), SHORT).await?;
        troubled.isolate(&site.links);
        Ok(())
    })?;
    Ok(())
}

async fn alone(stage: &Stage, site: &mut Site, actor: &Actor) -> Result<()> {
    let Stage { troubled, primary, .. } = stage;
    let wishes = actor.branches(MANY).await?;
    troubled.slow(&site.links, SLOW);
    try_join!(actor.push(troubled.gateway, &wishes), async {
        stage.on_disk((site, primary), &wishes, SOME, LONG).await?;
        stage.secondaries(site).iter().try_for_each(|node| site.pause(node))
    })?;
    Ok(())
}

async fn left_behind(stage: &Stage, site: &mut Site, actor: &Actor) -> Result<()> {
    let Stage { troubled, primary, secondary, .. } = stage;
    let wishes = actor.branches(MANY).await?;
    troubled.slow(&site.links, SLOW);
    try_join!(actor.push(troubled.gateway, &wishes), async {
        stage.on_disk((site, primary), &wishes, SOME, LONG).await?;
        site.pause(secondary)
    })?;
    Ok(())
}

/// What is on the primary's disk is known to the router a slow vote later: by then its coordinator stands still.
async fn late_record(stage: &Stage, site: &mut Site, actor: &Actor) -> Result<()> {
    let Stage { troubled, well, primary, secondary, .. } = stage;
    let wishes = actor.branches(1).await?;
    troubled.slow(&site.links, SLOW);
    troubled.close(&site.links, secondary);
    let links = site.links.clone();
    try_join!(actor.push(troubled.gateway, &wishes), async {
        stage.on_disk((site, primary), &wishes, 1, LONG).await?;
        site.pause(&troubled.coordinator)?;
        actor.read_for(well.gateway, UNSETTLED).await?;
        links.heal();
        site.resume(&troubled.coordinator)
    })?;
    Ok(())
}

/// What is behind stays so: nobody copies.
async fn old_route(stage: &Stage, site: &mut Site, actor: &Actor) -> Result<()> {
    let Stage { troubled, well, secondary, .. } = stage;
    site.names(Service::Replicator).iter().try_for_each(|replicator| site.pause(replicator))?;
    well.close(&site.links, secondary);
    sleep(KNOWN).await;
    let wishes = actor.branches(1).await?;
    actor.read_for(troubled.gateway, Duration::ZERO).await?;
    troubled.isolate(&site.links);
    try_join!(actor.push(well.gateway, &wishes), actor.read_for(troubled.gateway, SESSION))?;
    Ok(())
}

/// The other coordinator settles and repairs, over its own ways.
async fn late_votes(stage: &Stage, site: &mut Site, actor: &Actor) -> Result<()> {
    let Stage { troubled, primary, secondary, .. } = stage;
    let wishes = actor.branches(MANY).await?;
    troubled.slow(&site.links, SLOW);
    troubled.close(&site.links, secondary);
    let links = site.links.clone();
    try_join!(actor.push(troubled.gateway, &wishes), async {
        stage.on_disk((site, primary), &wishes, SOME, LONG).await?;
        refuse(&links, "replicator", &troubled.coordinator);
        site.pause(&troubled.coordinator)?;
        stage.on_disk((site, primary), &wishes, MANY, VOTED).await?;
        links.heal();
        site.resume(&troubled.coordinator)
    })?;
    Ok(())
}

/// A lock that was left lying about.
async fn refused(stage: &Stage, site: &mut Site, actor: &Actor) -> Result<()> {
    let wishes = actor.branches(1).await?;
    let lock = stage.lock(site, &stage.primary, &wishes[0])?;
    let pushed = actor.push(stage.troubled.gateway, &wishes).await;
    fs::remove_file(lock)?;
    pushed
}

/// The node's replica was up to date, and counts as such.
async fn old_disk(stage: &Stage, site: &mut Site, actor: &Actor) -> Result<()> {
    let Stage { well, troubled, secondary, .. } = stage;
    site.cut_power(secondary).await?;
    let disk = site.copy_disk(secondary)?;
    site.run_all().await?;
    if !stage::equal(site, site.names(Service::Node).len()).await {
        return Ok(());
    }
    // Until routers write to it again: else the push would leave it behind.
    sleep(KNOWN).await;
    let wishes = actor.branches(1).await?;
    actor.push(well.gateway, &wishes).await?;
    if !stage.on_disk((site, secondary), &wishes, 1, SHORT).await? {
        return Ok(());
    }
    site.cut_power(secondary).await?;
    site.put_disk_back(secondary, &disk)?;
    site.run_all().await?;
    try_join!(actor.read_for(well.gateway, AGED), actor.read_for(troubled.gateway, AGED))?;
    Ok(())
}
