//! Everything that may be done to the cluster, by name.

use std::time::Duration;

use tabularium_common::faults::CrashPoint;
use tabularium_testkit::cluster::service::Kind as Service;

use crate::{clocks::Jump, scenes::Scene};

/// What may be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Harm {
    /// `kill -9` of the node that takes a hot repository's writes; its children live on.
    KillPrimary,
    /// `kill -9` of a node with all its children.
    KillNode,
    Kill(Service),
    /// SIGSTOP.
    StopPrimary,
    Stop(Service),
    /// SIGSTOP for half a minute: longer than every lease and every patience.
    StopLong(Service),
    /// Everything that calls a node: cut, refused, swallowed, swallowed one way, delayed.
    Link(Callee, Trouble),
    /// A router reaches no coordinator, and its clients reach it.
    IsolateRouter,
    NatsRestart,
    NatsEmpty,
    NatsDown,
    /// Away for a minute: longer than anybody waits for it.
    NatsGone,
    PostgresRestart,
    PostgresDown,
    /// Away for a minute.
    PostgresGone,
    /// SIGSTOP to every process of it.
    PostgresStop,
    /// A node comes back with its disk as it was some time ago.
    OldDisk,
    /// A repository is deleted and another one created under its name while the first is repaired.
    Rebirth,
    Scene(Scene),
    /// SIGSTOP of all nodes but a hot repository's primary, and a look at the disks.
    LonePrimary,
    /// No room on the disks of so many nodes.
    DiskFull(usize),
    Crash(CrashPoint),
    /// A process's clock jumps, forward or back, and back to the right time later.
    Clock(Service, Jump),
    /// That of the database, which decides when leases are over.
    PostgresClock(Jump),
}

/// Whose connections suffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Callee {
    Node,
    Coordinator,
    Router,
}

/// What happens to connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    Cut,
    Swallow,
    SwallowRequests,
    SwallowAnswers,
    Delay,
}

impl Trouble {
    const ALL: [Self; 5] =
        [Self::Cut, Self::Swallow, Self::SwallowRequests, Self::SwallowAnswers, Self::Delay];

    fn name(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::Swallow => "swallow",
            Self::SwallowRequests => "swallow-requests",
            Self::SwallowAnswers => "swallow-answers",
            Self::Delay => "delay",
        }
    }
}

impl Callee {
    fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Coordinator => "coordinator",
            Self::Router => "router",
        }
    }

    pub(crate) fn service(self) -> Service {
        match self {
            Self::Node => Service::Node,
            Self::Coordinator => Service::Coordinator,
            Self::Router => Service::Router,
        }
    }
}

impl Harm {
    /// Everything, each as often as it is worth looking at.
    pub(crate) fn all() -> Vec<Self> {
        use Harm::{
            Crash, DiskFull, IsolateRouter, Kill, KillNode, KillPrimary, Link, LonePrimary, NatsDown,
            NatsEmpty, NatsGone, NatsRestart, OldDisk, PostgresDown, PostgresGone, PostgresRestart,
            PostgresStop, Rebirth, Stop, StopLong, StopPrimary,
        };
        let mut all = vec![
            KillPrimary,
            KillPrimary,
            KillNode,
            Kill(Service::Router),
            Kill(Service::Router),
            Kill(Service::Coordinator),
            Kill(Service::Coordinator),
            Kill(Service::Replicator),
            StopPrimary,
            StopPrimary,
            IsolateRouter,
            Stop(Service::Node),
            Stop(Service::Router),
            Stop(Service::Coordinator),
            Stop(Service::Replicator),
            NatsRestart,
            NatsEmpty,
            NatsDown,
            NatsGone,
            PostgresRestart,
            PostgresDown,
            PostgresGone,
            PostgresStop,
            StopLong(Service::Router),
            OldDisk,
            Rebirth,
            LonePrimary,
            DiskFull(1),
            DiskFull(2),
        ];
        for callee in [Callee::Node, Callee::Coordinator] {
            all.extend(Trouble::ALL.map(|trouble| Link(callee, trouble)));
        }
        all.push(Link(Callee::Router, Trouble::Cut));
        all.push(Link(Callee::Router, Trouble::Delay));
        all.extend(CrashPoint::ALL.iter().map(|point| Crash(*point)));
        all.extend(Scene::ALL.map(Self::Scene));
        for jump in [Jump::Near, Jump::Far] {
            let services = [Service::Node, Service::Router, Service::Coordinator];
            all.extend(services.map(|kind| Self::Clock(kind, jump)));
            all.push(Self::PostgresClock(jump));
        }
        all
    }

    /// Whether a cluster to which both are done at once still has a router and a coordinator. Two nodes may be gone:
    /// nothing can be written then, and nothing may be lost.
    pub(crate) fn leaves_some_of(self, other: Self) -> bool {
        let ends = |harm: Self| match harm {
            Self::Kill(kind) | Self::Stop(kind) | Self::StopLong(kind) | Self::Clock(kind, Jump::Far) => {
                Some(kind.name())
            }
            Self::Link(callee, trouble) if trouble != Trouble::Delay => Some(callee.name()),
            Self::Crash(point) => Some(point.service()),
            Self::IsolateRouter => Some("router"),
            _ => None,
        };
        if self.is_alone() || other.is_alone() {
            return false;
        }
        ends(self).is_none() || ends(self) != ends(other)
    }

    /// Whether it is a story of its own, that another fault would spoil.
    fn is_alone(self) -> bool {
        matches!(self, Self::Scene(_) | Self::OldDisk | Self::Rebirth | Self::LonePrimary)
    }

    /// Whether it needs clocks that can be moved.
    pub(crate) fn moves_clocks(self) -> bool {
        matches!(self, Self::Clock(..) | Self::PostgresClock(_))
    }

    /// How long it is held at least, when that is longer than for others.
    pub(crate) fn held(self) -> Option<Duration> {
        match self {
            Self::PostgresGone | Self::NatsGone => Some(Duration::from_secs(60)),
            Self::StopLong(_) => Some(Duration::from_secs(30)),
            // All is over when it has been done.
            Self::OldDisk | Self::Rebirth | Self::LonePrimary | Self::Scene(_) => Some(Duration::ZERO),
            _ => None,
        }
    }

    pub(crate) fn name(self) -> String {
        match self {
            Self::KillPrimary => "kill-primary".into(),
            Self::KillNode => "kill-node".into(),
            Self::Kill(kind) => format!("kill-{}", kind.name()),
            Self::StopPrimary => "stop-primary".into(),
            Self::Stop(kind) => format!("stop-{}", kind.name()),
            Self::Link(callee, trouble) => format!("{}-{}", trouble.name(), callee.name()),
            Self::IsolateRouter => "isolate-router".into(),
            Self::NatsRestart => "nats-restart".into(),
            Self::NatsEmpty => "nats-empty".into(),
            Self::NatsDown => "nats-down".into(),
            Self::NatsGone => "nats-gone".into(),
            Self::PostgresRestart => "postgres-restart".into(),
            Self::PostgresDown => "postgres-down".into(),
            Self::PostgresGone => "postgres-gone".into(),
            Self::PostgresStop => "postgres-stop".into(),
            Self::StopLong(kind) => format!("stop-{}-30s", kind.name()),
            Self::OldDisk => "old-disk".into(),
            Self::Rebirth => "rebirth".into(),
            Self::Scene(scene) => scene.name().into(),
            Self::LonePrimary => "lone-primary".into(),
            Self::DiskFull(count) => format!("disk-full-{count}"),
            Self::Crash(point) => format!("crash-{}", point.name()),
            Self::Clock(kind, jump) => format!("clock-{}-{}", kind.name(), jump.name()),
            Self::PostgresClock(jump) => format!("clock-postgres-{}", jump.name()),
        }
    }
}
