//! What must hold in every state, and what must be possible for that to mean anything.

use stateright::Property;

use crate::{
    protocol::Protocol,
    state::{MAJORITY, NODES, Set, Stage, State, value_of},
};

/// A reader sees an update, or one that was made from it, at a node.
fn shows(state: &State, node: usize, reference: usize, write: usize) -> bool {
    state.descends(reference, state.nodes[node].refs[reference], value_of(write))
}

/// The acknowledged updates, one for each reference that a write moved.
fn acknowledged<'a>(
    protocol: &'a Protocol,
    state: &'a State,
) -> impl Iterator<Item = (usize, usize)> + Clone + 'a {
    protocol
        .plans
        .iter()
        .enumerate()
        .filter(|(write, _)| state.writes[*write].stage == Stage::Acknowledged)
        .flat_map(|(write, plan)| plan.references.iter().map(move |&reference| (write, reference)))
}

fn acknowledged_is_kept(protocol: &Protocol, state: &State) -> bool {
    acknowledged(protocol, state).all(|(write, reference)| {
        (0..NODES).filter(|&node| shows(state, node, reference, write)).count() >= MAJORITY
    })
}

fn one_chain(protocol: &Protocol, state: &State) -> bool {
    let updates = acknowledged(protocol, state);
    updates.clone().all(|(first, reference)| {
        updates.clone().filter(|&(_, other)| other == reference).all(|(second, _)| {
            state.descends(reference, value_of(first), value_of(second))
                || state.descends(reference, value_of(second), value_of(first))
        })
    })
}

fn replaced_once(protocol: &Protocol, state: &State) -> bool {
    let updates = acknowledged(protocol, state);
    let old = |write: usize, reference: usize| state.writes[write].old.map(|old| old[reference]);
    updates.clone().all(|(first, reference)| {
        updates
            .clone()
            .filter(|&(second, other)| other == reference && second != first)
            .all(|(second, _)| old(first, reference) != old(second, reference))
    })
}

fn equal_when_idle(_: &Protocol, state: &State) -> bool {
    state.database.ticket.is_some() || {
        let mut held = state.database.up_to_date.iter().map(|node| state.nodes[node].refs);
        held.next().is_none_or(|first| held.all(|other| other == first))
    }
}

fn reads_are_fresh(protocol: &Protocol, state: &State) -> bool {
    let cached = state.routers.iter().filter(|router| !router.stopped).filter_map(|router| router.route);
    let readable = cached.map(|route| route.nodes).fold(state.database.up_to_date, Set::union);
    let mut readable = readable.intersection(state.up()).iter();
    readable.all(|node| {
        acknowledged(protocol, state).all(|(write, reference)| shows(state, node, reference, write))
    })
}

fn refused_is_nowhere(_: &Protocol, state: &State) -> bool {
    state
        .writes
        .iter()
        .enumerate()
        .filter(|(_, write)| write.stage == Stage::Refused)
        .all(|(write, _)| state.nodes.iter().all(|node| !node.refs.contains(&value_of(write))))
}

fn hooks_on_the_primary(_: &Protocol, state: &State) -> bool {
    !state.writes.iter().any(|write| write.strange_hooks)
}

fn somebody_is_up_to_date(_: &Protocol, state: &State) -> bool {
    state.database.primary.is_subset(state.database.up_to_date)
}

/// Where nobody can do anything more, without a crash, a restart or a SIGCONT, there is nothing left to be done.
fn nothing_waits_for_ever(protocol: &Protocol, state: &State) -> bool {
    let mut steps = Vec::new();
    protocol.progress(state, &mut steps);
    if !steps.is_empty() {
        return true;
    }
    if let Some(ticket) = &state.database.ticket {
        // Nobody who took part can be asked.
        return ticket.participants.intersection(state.up()).is_empty();
    }
    let written = protocol
        .plans
        .iter()
        .zip(&state.writes)
        .all(|(plan, write)| write.stage.is_over() || state.routers[plan.router].stopped);
    let repaired =
        !protocol.repairs || state.in_reach().is_empty() || state.up().is_subset(state.database.up_to_date);
    written && repaired
}

fn every_write_ends(_: &Protocol, state: &State) -> bool {
    state.writes.iter().all(|write| write.stage.is_over())
}

fn unknown(state: &State) -> impl Iterator<Item = usize> {
    state.writes.iter().enumerate().filter(|(_, write)| write.stage == Stage::Unknown).map(|(id, _)| id)
}

fn settled(state: &State) -> bool {
    state.database.ticket.is_none() && state.database.generation > 0
}

/// Names of what must hold.
pub(crate) mod name {
    pub(crate) const KEPT: &str = "acknowledged updates are on a majority of the assigned replicas";
    pub(crate) const CHAIN: &str = "acknowledged updates of a reference form one chain";
    pub(crate) const ONCE: &str = "no value is replaced by two acknowledged updates";
    pub(crate) const EQUAL: &str = "up-to-date replicas are equal while nobody holds the ticket";
    pub(crate) const FRESH: &str = "a read sees every update that was acknowledged before";
    pub(crate) const REFUSED: &str = "a refused update appears nowhere";
    pub(crate) const HOOKS: &str = "hooks run on the recorded primary";
    pub(crate) const PRIMARY: &str = "the primary is up to date";
    pub(crate) const PROGRESS: &str = "nothing waits for ever";
    pub(crate) const ENDS: &str = "every write ends";
}

/// Names of what must be possible.
pub(crate) mod possible {
    pub(crate) const ALL_ACKNOWLEDGED: &str = "every write is acknowledged";
    pub(crate) const BARE_MAJORITY: &str = "a write is acknowledged with a replica left behind";
    pub(crate) const PRIMARY_MOVES: &str = "the primary moves";
    pub(crate) const SETTLED_AS_WRITTEN: &str = "a write in doubt is settled as written";
    pub(crate) const SETTLED_AS_NOT_WRITTEN: &str = "a write in doubt is settled as not written";
    pub(crate) const LAST_ROUND: &str = "a copy takes the ticket for its last round";
    pub(crate) const LEVEL_AGAIN: &str = "a replica that was behind is level with an acknowledged write";
}

pub(crate) fn all() -> Vec<Property<Protocol>> {
    vec![
        Property::always(name::KEPT, acknowledged_is_kept),
        Property::always(name::CHAIN, one_chain),
        Property::always(name::ONCE, replaced_once),
        Property::always(name::EQUAL, equal_when_idle),
        Property::always(name::FRESH, reads_are_fresh),
        Property::always(name::REFUSED, refused_is_nowhere),
        Property::always(name::HOOKS, hooks_on_the_primary),
        Property::always(name::PRIMARY, somebody_is_up_to_date),
        Property::always(name::PROGRESS, nothing_waits_for_ever),
        Property::eventually(name::ENDS, every_write_ends),
        Property::sometimes(possible::ALL_ACKNOWLEDGED, |_, state: &State| {
            state.writes.iter().all(|write| write.stage == Stage::Acknowledged || write.old.is_none())
                && state.writes.iter().any(|write| write.stage == Stage::Acknowledged)
        }),
        Property::sometimes(possible::BARE_MAJORITY, |_, state: &State| {
            state.database.up_to_date.len() == MAJORITY
                && state.writes.iter().any(|write| write.stage == Stage::Acknowledged)
        }),
        Property::sometimes(possible::PRIMARY_MOVES, |_, state: &State| state.database.epoch > 0),
        Property::sometimes(possible::SETTLED_AS_WRITTEN, |_, state: &State| {
            settled(state)
                && unknown(state).any(|write| {
                    state
                        .database
                        .up_to_date
                        .iter()
                        .all(|node| state.nodes[node].refs.contains(&value_of(write)))
                })
        }),
        Property::sometimes(possible::SETTLED_AS_NOT_WRITTEN, |_, state: &State| {
            settled(state)
                && unknown(state).any(|write| {
                    state.nodes.iter().any(|node| node.refs.contains(&value_of(write)))
                        && !state
                            .database
                            .up_to_date
                            .iter()
                            .any(|node| state.nodes[node].refs.contains(&value_of(write)))
                })
        }),
        Property::sometimes(possible::LAST_ROUND, |_, state: &State| {
            state.repair.as_ref().is_some_and(|copying| copying.under_ticket)
        }),
        Property::sometimes(possible::LEVEL_AGAIN, |_, state: &State| {
            state.database.up_to_date.len() == NODES
                && state.writes.iter().any(|write| write.stage == Stage::Acknowledged)
        }),
    ]
}
