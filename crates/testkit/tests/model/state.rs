//! What there is: nodes with disks, routers with cached routes, one database, writes and copies under way.

use std::{fmt, hash::Hash};

/// Storages that the repository is assigned to.
pub(crate) const NODES: usize = 3;
/// Routers that serve it.
pub(crate) const ROUTERS: usize = 2;
/// References in it.
pub(crate) const REFS: usize = 2;
/// Most writes of one run.
pub(crate) const WRITES: usize = 3;
/// How many nodes must have a write: the majority of those assigned.
pub(crate) const MAJORITY: usize = NODES / 2 + 1;

/// A value of each reference. Zero is what the repository began with; write `w` moves references to `w + 1`, so that a
/// value tells which write made it.
pub(crate) type Refs = [u8; REFS];

/// The value to which a write moves its references.
pub(crate) fn value_of(write: usize) -> u8 {
    u8::try_from(write + 1).unwrap()
}

/// A set of nodes, or of routers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub(crate) struct Set(u8);

impl Set {
    pub(crate) const EMPTY: Self = Self(0);

    pub(crate) fn only(member: usize) -> Self {
        Self(1 << member)
    }

    pub(crate) fn contains(self, member: usize) -> bool {
        self.0 & (1 << member) != 0
    }

    pub(crate) fn insert(&mut self, member: usize) {
        self.0 |= 1 << member;
    }

    pub(crate) fn remove(&mut self, member: usize) {
        self.0 &= !(1 << member);
    }

    pub(crate) fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn is_subset(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    pub(crate) fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(crate) fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = usize> {
        (0..NODES.max(ROUTERS)).filter(move |&member| self.contains(member))
    }
}

impl FromIterator<usize> for Set {
    fn from_iter<I: IntoIterator<Item = usize>>(members: I) -> Self {
        members.into_iter().fold(Self::EMPTY, |set, member| set.union(Self::only(member)))
    }
}

impl fmt::Debug for Set {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_set().entries(self.iter()).finish()
    }
}

/// Everything at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) nodes: [Node; NODES],
    pub(crate) routers: [Router; ROUTERS],
    pub(crate) database: Database,
    pub(crate) writes: [Write; WRITES],
    /// The one duty to copy that is being done.
    pub(crate) repair: Option<Copying>,
    /// A copy whose worker lost the duty and does not know it.
    pub(crate) late: Option<LateCopy>,
    pub(crate) left: Mishaps,
}

/// A storage's only replica, and what its node does with it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Node {
    pub(crate) down: bool,
    /// Outlives a crash.
    pub(crate) refs: Refs,
    /// How far the node is with each write. A crash forgets it.
    pub(crate) parts: [Part; WRITES],
    /// What the coordinator that settles a write has seen here.
    pub(crate) seen: Option<Refs>,
}

/// A node's part in a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub(crate) enum Part {
    #[default]
    Nothing,
    /// It has what the client sent, and waits to be let at the references.
    Asked,
    /// It holds the lock of the reference, has voted PREPARED, and waits for the answer.
    Prepared,
    /// COMMIT was answered to its PREPARED vote of that round. Whether it has heard it yet is open.
    Told(u8),
    /// It has moved the reference, has voted COMMITTED, and has more references to move.
    Applied,
}

#[derive(Clone, Debug, PartialEq, Eq, Default, Hash)]
pub(crate) struct Router {
    /// By SIGSTOP: it comes back and knows nothing of it.
    pub(crate) stopped: bool,
    pub(crate) route: Option<Route>,
}

/// What a router was told of the repository, and keeps while its session holds a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Route {
    /// Who may be read from and asked to write.
    pub(crate) nodes: Set,
    pub(crate) primary: Set,
    pub(crate) epoch: u8,
}

/// The rows of one repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Database {
    pub(crate) generation: u8,
    pub(crate) epoch: u8,
    /// A set of one.
    pub(crate) primary: Set,
    /// Whose recorded generation is the repository's.
    pub(crate) up_to_date: Set,
    pub(crate) ticket: Option<Ticket>,
    /// Routers that have not yet given up a route which does not hold any more.
    pub(crate) revoking: Set,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ticket {
    pub(crate) holder: Holder,
    pub(crate) participants: Set,
    /// The lease ran out, or the router said that it does not know.
    pub(crate) in_doubt: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Holder {
    Write(usize),
    Repair,
}

/// A write as its router and its client know it.
#[derive(Clone, Debug, PartialEq, Eq, Default, Hash)]
pub(crate) struct Write {
    pub(crate) stage: Stage,
    /// The values that the client believes it replaces.
    pub(crate) old: Option<Refs>,
    /// COMMIT was answered to somebody since the ticket was taken.
    pub(crate) told: bool,
    pub(crate) ballot: Ballot,
    /// Routers that must have given up their route before this write is acknowledged.
    pub(crate) awaits: Set,
    /// A node that was not the recorded primary ran its hooks.
    pub(crate) strange_hooks: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub(crate) enum Stage {
    #[default]
    Waiting,
    /// Nodes take in what the client sends; no ticket yet.
    Asked,
    /// `BeginWrite` was answered.
    Ticketed,
    /// `CommitWrite` took place; its answer is not given yet.
    Recorded,
    /// The client was told that it is done.
    Acknowledged,
    /// The client was told that nothing was changed.
    Refused,
    /// The client was told, or must assume, that nobody knows.
    Unknown,
}

impl Stage {
    pub(crate) fn is_over(self) -> bool {
        matches!(self, Self::Acknowledged | Self::Refused | Self::Unknown)
    }
}

/// The votes of a write. Several references that are not moved atomically take a round each.
#[derive(Clone, Debug, PartialEq, Eq, Default, Hash)]
pub(crate) struct Ballot {
    pub(crate) epoch: u8,
    pub(crate) primary: Set,
    /// Those whose votes count.
    pub(crate) voters: Set,
    pub(crate) round: u8,
    pub(crate) prepared: Set,
    pub(crate) committed: Set,
}

/// A replication duty at work.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Copying {
    pub(crate) target: usize,
    /// Of the repository when the round began.
    pub(crate) generation: u8,
    pub(crate) under_ticket: bool,
    pub(crate) progress: Progress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Progress {
    /// The node was not asked yet.
    Started,
    /// The target has read what the source holds.
    Read(Refs),
    /// The target was made equal to that.
    Written,
    /// The target went down meanwhile.
    Failed,
}

/// A copy that nobody waits for any more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LateCopy {
    pub(crate) target: usize,
    /// None: the request has not reached the node.
    pub(crate) read: Option<Refs>,
    /// The node has seen a later attempt.
    pub(crate) superseded: bool,
}

/// What may still go wrong in this run. Zero of everything ends every run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Mishaps {
    /// `kill -9` of a node. It may come back.
    pub(crate) node_crashes: u8,
    /// `kill -9` of a router; it is started again and knows nothing.
    pub(crate) router_crashes: u8,
    /// SIGSTOP of a router, later SIGCONT.
    pub(crate) router_stops: u8,
    /// A coordinator dies while it settles a write; another begins anew.
    pub(crate) coordinator_crashes: u8,
    /// A replicator is stopped so long that its duty is given to another.
    pub(crate) lost_workers: u8,
    /// Writes settled although a live participant was not heard.
    pub(crate) unheard: u8,
}

impl Mishaps {
    pub(crate) const NONE: Self = Self {
        node_crashes: 0,
        router_crashes: 0,
        router_stops: 0,
        coordinator_crashes: 0,
        lost_workers: 0,
        unheard: 0,
    };
}

impl Database {
    pub(crate) fn name_primary(&mut self, primary: usize) {
        if self.primary != Set::only(primary) {
            self.primary = Set::only(primary);
            self.epoch += 1;
        }
    }
}

impl State {
    pub(crate) fn is_up(&self, node: usize) -> bool {
        !self.nodes[node].down
    }

    pub(crate) fn up(&self) -> Set {
        (0..NODES).filter(|&node| self.is_up(node)).collect()
    }

    /// Up-to-date replicas that answer.
    pub(crate) fn in_reach(&self) -> Set {
        self.database.up_to_date.intersection(self.up())
    }

    pub(crate) fn fresh_route(&self) -> Route {
        let Database { up_to_date, primary, epoch, .. } = self.database;
        Route { nodes: up_to_date, primary, epoch }
    }

    /// Whether `value` of a reference is `ancestor` or was made from it.
    pub(crate) fn descends(&self, reference: usize, value: u8, ancestor: u8) -> bool {
        let mut value = value;
        loop {
            if value == ancestor {
                return true;
            }
            let Some(write) = usize::from(value).checked_sub(1) else { return false };
            value = self.writes[write].old.map_or(0, |old| old[reference]);
        }
    }

    /// Nodes stop what they do for a write, except what they were told already.
    pub(crate) fn cancel_parts(&mut self, write: usize) {
        for node in &mut self.nodes {
            if !matches!(node.parts[write], Part::Told(_)) {
                node.parts[write] = Part::Nothing;
            }
        }
    }

    /// The client has its answer, and the router forgets the write.
    pub(crate) fn end_write(&mut self, write: usize, stage: Stage) {
        self.cancel_parts(write);
        let write = &mut self.writes[write];
        write.stage = stage;
        write.told = false;
        write.ballot = Ballot::default();
        write.awaits = Set::EMPTY;
    }

    /// The up-to-date set as a transaction leaves it: one generation further. Owes the revocation of routes that lead
    /// to somebody who is no more in it.
    pub(crate) fn record(&mut self, up_to_date: Set, primary: usize) {
        let database = &mut self.database;
        database.generation += 1;
        database.up_to_date = up_to_date;
        database.name_primary(primary);
        for (id, router) in self.routers.iter().enumerate() {
            if router.route.is_some_and(|route| !route.nodes.is_subset(up_to_date)) {
                database.revoking.insert(id);
            }
        }
    }

    /// A router asks the coordinator and keeps the answer. It does so as soon as it can: no later answer is as stale.
    pub(crate) fn renew_route(&mut self, router: usize) {
        self.give_up_route(router);
        self.routers[router].route = Some(self.fresh_route());
    }

    /// A router cannot use its route any more, and whoever waits for that knows.
    pub(crate) fn give_up_route(&mut self, router: usize) {
        self.database.revoking.remove(router);
        for write in &mut self.writes {
            write.awaits.remove(router);
        }
    }
}
