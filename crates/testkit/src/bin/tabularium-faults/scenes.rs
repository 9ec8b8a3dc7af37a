//! Several faults at once that together open one window, in which one safety step alone stands between a client and harm.
//!
//! Each gateway reaches one router and each router one coordinator. One of these pairs is in trouble: what the clients of
//! the other one do meanwhile is what it must not get wrong. Without such scenes chance would have to find windows that are seconds wide.

use std::time::Duration;

use anyhow::{Result, ensure};
use tabularium_testkit::{
    cluster::service::Kind as Service,
    proxy::{Direction, Fault as Relay},
};
use tokio::time::{Instant, sleep};

use crate::cluster::{Links, Site};

/// What a node's answers wait for when it is to be late in every vote: longer than the longest grace, and short enough for
/// pings and health checks.
const LATE: Duration = Duration::from_millis(550);
/// What every vote waits for when a push is to take long. Health checks wait behind other answers.
const SLOW: Duration = Duration::from_millis(350);
/// What a router's requests wait for on their way to coordinators: shorter than its leases.
const LATE_REQUESTS: Duration = Duration::from_millis(1200);
/// How long writes that were under way take to end, and others to come to the votes that are slow now.
const UNDER_WAY: Duration = Duration::from_secs(3);

/// How long routers take to hold their session with the coordinator that is left to them.
const PAIRED: Duration = Duration::from_secs(3);

/// How long is looked whether enough replicas keep what is recorded.
const WATCHED: Duration = Duration::from_secs(8);
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// A window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scene {
    /// A router cannot be told that a replica was left behind, because it reaches no coordinator. Its clients go on
    /// reading while others write.
    OldRoute,
    /// A router's word takes long to reach coordinators, and a replica is left behind in its writes. Clients of
    /// the other router read what it does not know to be old.
    LateRecord,
    /// A router loses its coordinators in the middle of a push of many references that takes longer than its lease. A
    /// replica that does not take part is made equal meanwhile, in the middle of it.
    LateVotes,
    /// Nobody but the primary of a repository votes in time, and nothing is repaired.
    LateSecondaries,
}

impl Scene {
    pub(crate) const ALL: [Self; 4] =
        [Self::OldRoute, Self::LateRecord, Self::LateVotes, Self::LateSecondaries];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::OldRoute => "old-route",
            Self::LateRecord => "late-record",
            Self::LateVotes => "late-votes",
            Self::LateSecondaries => "late-secondaries",
        }
    }

    /// How long it takes.
    pub(crate) fn held(self) -> Duration {
        match self {
            // Longer than a router's session outlives its coordinator.
            Self::OldRoute => Duration::from_secs(6),
            Self::LateRecord => Duration::from_secs(8),
            // A write's lease, its settlement, a copy, and some votes after it.
            Self::LateVotes => Duration::from_secs(14),
            // It has been watched already.
            Self::LateSecondaries => Duration::ZERO,
        }
    }

    /// Sets it. `router` is the one in trouble, by its place; `secondary` no primary of a repository that matters; `path` such
    /// a repository. Answers what is wrong already.
    pub(crate) async fn set(
        self,
        site: &mut Site,
        router: usize,
        secondary: &str,
        path: &str,
    ) -> Result<Option<String>> {
        let (routers, coordinators) = (site.names(Service::Router), site.names(Service::Coordinator));
        ensure!(
            routers.len() > 1 && routers.len() == coordinators.len(),
            "routers and coordinators are no pairs"
        );
        let other = (router + 1) % routers.len();
        pair(site, Service::Gateway, &routers);
        pair(site, Service::Router, &coordinators);
        sleep(PAIRED).await;
        // Where nodes are, a router hears from its coordinator: their ways to the nodes are the same.
        let links = site.links.clone();
        let late = |pair: usize, node: &str, by: Duration| {
            links.each(&coordinators[pair], node, |proxy| {
                proxy.set_one_way(Direction::Down, Relay::Delay(by));
            });
        };
        match self {
            Self::OldRoute => {
                repair_nothing(site)?;
                links.each(&routers[router], "coordinator", |proxy| proxy.set(Relay::BlackHole));
                late(other, secondary, LATE);
            }
            Self::LateRecord => {
                links.each(&routers[router], "coordinator", |proxy| {
                    proxy.set_one_way(Direction::Up, Relay::Delay(LATE_REQUESTS));
                });
                late(router, secondary, LATE);
            }
            Self::LateVotes => {
                for node in site.names(Service::Node).iter().filter(|node| *node != secondary) {
                    late(router, node, SLOW);
                }
                refuse(&links, &coordinators[router], secondary);
                sleep(UNDER_WAY).await;
                // Stopped, so that the other one settles and repairs, over its own ways.
                refuse(&links, "replicator", &coordinators[router]);
                site.pause(&coordinators[router])?;
            }
            Self::LateSecondaries => {
                let Ok(primary) = site.primary(path).await else { return Ok(None) };
                repair_nothing(site)?;
                for node in site.names(Service::Node).iter().filter(|node| **node != primary) {
                    (0..coordinators.len()).for_each(|pair| late(pair, node, LATE));
                }
                let end = Instant::now() + WATCHED;
                while Instant::now() < end {
                    if let Some(why) = site.kept_by_too_few(path).await {
                        return Ok(Some(why));
                    }
                    sleep(LOOK_INTERVAL).await;
                }
            }
        }
        Ok(None)
    }
}

/// What is behind stays so.
fn repair_nothing(site: &mut Site) -> Result<()> {
    site.names(Service::Replicator).iter().try_for_each(|replicator| site.pause(replicator))
}

fn refuse(links: &Links, from: &str, to: &str) {
    links.each(from, to, |proxy| {
        proxy.set(Relay::Refuse);
        proxy.cut();
    });
}

/// Everybody of a kind reaches one of those, each another one.
fn pair(site: &Site, kind: Service, with: &[String]) {
    for (index, name) in site.names(kind).iter().enumerate() {
        for (_, other) in with.iter().enumerate().filter(|(place, _)| *place != index % with.len()) {
            refuse(&site.links, name, other);
        }
    }
}
