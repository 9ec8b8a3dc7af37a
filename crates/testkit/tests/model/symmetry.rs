//! Nodes are interchangeable: two states that differ only in which node is which need one visit.
//!
//! Everything that is known of a node, its row in every set included, is packed into one number; a state is then three
//! such numbers in any order, and what belongs to no node. The hash sorts the numbers. The checker tells states apart by
//! their hash alone, so it never visits a second one of the same orbit, while the paths it prints keep their real nodes.
//!
//! Of epochs and generations only matters whether what was read of them once is still so: they only ever rise.

use std::hash::{Hash, Hasher};

use crate::state::{Copying, LateCopy, NODES, Part, Progress, Refs, Set, Stage, State};

/// Appends fields to a number.
#[derive(Default)]
struct Column(u128);

impl Column {
    fn push(&mut self, bits: u32, value: u8) {
        debug_assert!(u32::from(value) < 1 << bits, "{value} in {bits} bits");
        self.0 = self.0 << bits | u128::from(value);
    }

    fn flag(&mut self, value: bool) {
        self.push(1, u8::from(value));
    }

    fn refs(&mut self, refs: Refs) {
        for value in refs {
            self.push(3, value);
        }
    }
}

fn column(state: &State, node: usize) -> u128 {
    let mut column = Column::default();
    let own = &state.nodes[node];
    column.flag(own.down);
    column.refs(own.refs);
    for part in own.parts {
        column.push(
            3,
            match part {
                Part::Nothing => 0,
                Part::Asked => 1,
                Part::Prepared => 2,
                Part::Applied => 3,
                Part::Told(round) => 4 + round,
            },
        );
    }
    column.flag(own.seen.is_some());
    column.refs(own.seen.unwrap_or_default());
    let mut member = |set: Set| column.flag(set.contains(node));
    member(state.database.up_to_date);
    member(state.database.primary);
    member(state.database.ticket.as_ref().map_or(Set::EMPTY, |ticket| ticket.participants));
    for write in &state.writes {
        member(write.ballot.primary);
        member(write.ballot.voters);
        member(write.ballot.prepared);
        member(write.ballot.committed);
    }
    for router in &state.routers {
        member(router.route.map_or(Set::EMPTY, |route| route.nodes));
        member(router.route.map_or(Set::EMPTY, |route| route.primary));
    }
    column.flag(state.repair.as_ref().is_some_and(|repair| repair.target == node));
    column.flag(state.late.as_ref().is_some_and(|late| late.target == node));
    column.0
}

fn progress(progress: Progress) -> (u8, Refs) {
    match progress {
        Progress::Started => (0, Refs::default()),
        Progress::Read(refs) => (1, refs),
        Progress::Written => (2, Refs::default()),
        Progress::Failed => (3, Refs::default()),
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let mut columns: [u128; NODES] = std::array::from_fn(|node| column(self, node));
        columns.sort_unstable();
        columns.hash(hasher);
        for router in &self.routers {
            (router.stopped, router.route.map(|route| route.epoch == self.database.epoch)).hash(hasher);
        }
        let database = &self.database;
        (database.generation > 0, database.epoch > 0, database.revoking).hash(hasher);
        database.ticket.as_ref().map(|ticket| (ticket.holder, ticket.in_doubt)).hash(hasher);
        for write in &self.writes {
            (write.stage, write.old, write.told, write.awaits, write.strange_hooks).hash(hasher);
            (write.stage == Stage::Asked && write.ballot.epoch == database.epoch, write.ballot.round)
                .hash(hasher);
        }
        let repair = self.repair.as_ref();
        repair
            .map(|Copying { generation, under_ticket, progress: at, target: _ }| {
                (*generation == database.generation, *under_ticket, progress(*at))
            })
            .hash(hasher);
        let late = self.late.as_ref();
        late.map(|LateCopy { read, superseded, target: _ }| (*read, *superseded)).hash(hasher);
        self.left.hash(hasher);
    }
}
