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
use tokio::time::sleep;

use crate::cluster::{Links, Site};

/// What a node's answers wait for when it is to be late in every vote: longer than the longest grace, and short enough for
/// pings and health checks.
const LATE: Duration = Duration::from_millis(550);
/// What every vote waits for when a push is to take long. Health checks wait behind other answers.
const SLOW: Duration = Duration::from_millis(350);
/// How long a write takes from when a node is late until it is to be recorded.
const TO_THE_RECORD: Duration = Duration::from_millis(700);
/// How long a write that is not recorded stands before it is settled.
const UNSETTLED: Duration = Duration::from_secs(5);
/// How long a replica that was left behind takes to be used again.
const REPAIRED: Duration = Duration::from_secs(3);
/// A write has to be in the middle.
const ROUNDS: u32 = 3;
/// How long writes that were under way take to end, and others to come to the votes that are slow now.
const UNDER_WAY: Duration = Duration::from_secs(3);

/// How long routers take to hold their session with the coordinator that is left to them.
const PAIRED: Duration = Duration::from_secs(3);

/// A window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scene {
    /// A router cannot be told that a replica was left behind, because it reaches no coordinator. Its clients go on
    /// reading while others write.
    OldRoute,
    /// A router's coordinator stands still when it is to record writes in which a replica was left behind. Clients of the
    /// other router read what that does not know to be old.
    LateRecord,
    /// A router loses its coordinators in the middle of a push of many references that takes longer than its lease. A
    /// replica that does not take part is made equal meanwhile, in the middle of it.
    LateVotes,
}

impl Scene {
    pub(crate) const ALL: [Self; 3] = [Self::OldRoute, Self::LateRecord, Self::LateVotes];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::OldRoute => "old-route",
            Self::LateRecord => "late-record",
            Self::LateVotes => "late-votes",
        }
    }

    /// How long it takes.
    pub(crate) fn held(self) -> Duration {
        match self {
            // Longer than a router's session outlives its coordinator.
            Self::OldRoute => Duration::from_secs(6),
            // It takes its time in rounds.
            Self::LateRecord => Duration::ZERO,
            // A write's lease, its settlement, a copy, and some votes after it.
            Self::LateVotes => Duration::from_secs(14),
        }
    }

    /// Sets it. `router` is the one in trouble, by its place; `secondary` no primary of a repository that matters.
    pub(crate) async fn set(self, site: &mut Site, router: usize, secondary: &str) -> Result<()> {
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
                // What is behind stays so.
                for replicator in site.names(Service::Replicator) {
                    site.pause(&replicator)?;
                }
                links.each(&routers[router], "coordinator", |proxy| proxy.set(Relay::BlackHole));
                late(other, secondary, LATE);
            }
            Self::LateRecord => {
                for _ in 0..ROUNDS {
                    late(router, secondary, LATE);
                    sleep(TO_THE_RECORD).await;
                    site.pause(&coordinators[router])?;
                    sleep(UNSETTLED).await;
                    site.resume(&coordinators[router])?;
                    links.each(&coordinators[router], secondary, |proxy| proxy.set(Relay::None));
                    sleep(REPAIRED).await;
                }
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
        }
        Ok(())
    }
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
