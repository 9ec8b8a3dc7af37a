//! The node's side: vote before a reference moves, move it when told, vote that it has moved.

use crate::{
    protocol::{Protocol, Safeguard, Step as AnyStep},
    state::{NODES, Part, Stage, State, value_of},
    writing,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Locks the reference and votes PREPARED; or finds another value than the client's old one, and fails.
    Prepare { node: usize, write: usize },
    /// Moves the reference, which is on disk then, and votes COMMITTED.
    Apply { node: usize, write: usize },
    /// The router is silent, or the answer is lost with its connection: git gives the transaction up.
    GiveUp { node: usize, write: usize },
}

/// The reference is locked by another write's transaction.
fn is_locked(protocol: &Protocol, state: &State, node: usize, write: usize, reference: usize) -> bool {
    state.nodes[node].parts.iter().enumerate().any(|(other, part)| {
        let round = match part {
            Part::Prepared => state.writes[other].ballot.round,
            Part::Told(round) => *round,
            Part::Nothing | Part::Asked | Part::Applied => return false,
        };
        other != write && writing::reference(protocol, other, round) == reference
    })
}

pub(crate) fn open(protocol: &Protocol, state: &State, steps: &mut Vec<AnyStep>) {
    let mut push = |step| steps.push(AnyStep::Vote(step));
    for node in (0..NODES).filter(|&node| state.is_up(node)) {
        for (id, plan) in protocol.plans.iter().enumerate() {
            let write = &state.writes[id];
            match state.nodes[node].parts[id] {
                Part::Asked => {
                    let reference = writing::reference(protocol, id, write.ballot.round);
                    if write.stage == Stage::Ticketed && !is_locked(protocol, state, node, id, reference) {
                        push(Step::Prepare { node, write: id });
                    }
                }
                Part::Told(_) => {
                    push(Step::Apply { node, write: id });
                    if write.stage != Stage::Ticketed || state.routers[plan.router].stopped {
                        push(Step::GiveUp { node, write: id });
                    }
                }
                Part::Prepared => {
                    if state.routers[plan.router].stopped && protocol.has(Safeguard::SilenceEndsVotes) {
                        push(Step::GiveUp { node, write: id });
                    }
                }
                Part::Nothing | Part::Applied => {}
            }
        }
    }
}

pub(crate) fn take(protocol: &Protocol, state: &mut State, step: Step) {
    match step {
        Step::Prepare { node, write: id } => {
            let write = &mut state.writes[id];
            let reference = writing::reference(protocol, id, write.ballot.round);
            let here = &mut state.nodes[node];
            if write.old.is_some_and(|old| old[reference] == here.refs[reference]) {
                here.parts[id] = Part::Prepared;
                write.ballot.prepared.insert(node);
            } else {
                here.parts[id] = Part::Nothing;
                write.ballot.voters.remove(node);
            }
        }
        Step::Apply { node, write: id } => {
            let here = &mut state.nodes[node];
            let Part::Told(round) = here.parts[id] else { return };
            here.parts[id] = Part::Nothing;
            here.refs[writing::reference(protocol, id, round)] = value_of(id);
            let write = &mut state.writes[id];
            if write.stage == Stage::Ticketed
                && write.ballot.round == round
                && write.ballot.voters.contains(node)
            {
                write.ballot.committed.insert(node);
                if !writing::is_last(protocol, id, round) {
                    here.parts[id] = Part::Applied;
                }
            }
        }
        Step::GiveUp { node, write } => state.nodes[node].parts[write] = Part::Nothing,
    }
}
