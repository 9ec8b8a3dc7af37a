//! What a coordinator does with a write of which nobody knows whether it happened: asks the participants what they
//! hold, and settles on what most of them do.

use crate::{
    protocol::{Protocol, Safeguard, Step as AnyStep},
    state::{Holder, Part, Refs, Set, Stage, State},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The router that holds the ticket renews it no more.
    LeaseRunsOut,
    /// A replica gives up what waits for an answer, and says what it holds.
    Quiesce(usize),
    /// One transaction: those who hold this are up to date, of the others nothing is known.
    Settle { refs: Refs, primary: usize },
    /// The same, though one that is up was not heard.
    SettleUnheard { refs: Refs, primary: usize },
    /// The coordinator dies, and what it was told is forgotten.
    CrashCoordinator,
}

pub(crate) fn open(protocol: &Protocol, state: &State, steps: &mut Vec<AnyStep>) {
    let mut push = |step| steps.push(AnyStep::Recovery(step));
    let Some(ticket) = &state.database.ticket else { return };
    let Holder::Write(write) = ticket.holder else { return };
    if !ticket.in_doubt {
        if !is_renewed(protocol, state, write) {
            push(Step::LeaseRunsOut);
        }
        return;
    }
    let reachable = witnesses(state).intersection(state.up());
    for node in reachable.iter().filter(|&node| state.nodes[node].seen.is_none()) {
        push(Step::Quiesce(node));
    }
    let heard = heard(state);
    if reachable.is_subset(heard) {
        for (refs, primary) in verdicts(state, heard) {
            push(Step::Settle { refs, primary });
        }
    }
}

pub(crate) fn mishaps(state: &State, steps: &mut Vec<AnyStep>) {
    let heard = heard(state);
    if heard.is_empty() {
        return;
    }
    if state.left.coordinator_crashes > 0 {
        steps.push(AnyStep::Recovery(Step::CrashCoordinator));
    }
    if state.left.unheard > 0 && !witnesses(state).intersection(state.up()).is_subset(heard) {
        for (refs, primary) in verdicts(state, heard) {
            steps.push(AnyStep::Recovery(Step::SettleUnheard { refs, primary }));
        }
    }
}

fn is_renewed(protocol: &Protocol, state: &State, write: usize) -> bool {
    state.writes[write].stage == Stage::Ticketed && !state.routers[protocol.plans[write].router].stopped
}

fn heard(state: &State) -> Set {
    state.nodes.iter().enumerate().filter(|(_, node)| node.seen.is_some()).map(|(id, _)| id).collect()
}

/// Who is asked: those that took part, and those up to date that did not.
fn witnesses(state: &State) -> Set {
    let Some(ticket) = &state.database.ticket else { return Set::EMPTY };
    ticket.participants.union(state.database.up_to_date)
}

/// What may be settled on, with who may be primary then. More than one where the protocol leaves the choice open.
fn verdicts(state: &State, heard: Set) -> Vec<(Refs, usize)> {
    let mut counts: Vec<(Refs, Set)> = Vec::new();
    let took_part = state.database.ticket.as_ref().map_or(Set::EMPTY, |ticket| ticket.participants);
    for node in heard.intersection(took_part).iter() {
        let Some(refs) = state.nodes[node].seen else { continue };
        match counts.iter_mut().find(|(other, _)| *other == refs) {
            Some((_, holders)) => holders.insert(node),
            None => counts.push((refs, Set::only(node))),
        }
    }
    let most = counts.iter().map(|(_, holders)| holders.len()).max().unwrap_or(0);
    counts.retain(|(_, holders)| holders.len() == most);
    let primary = state.database.primary;
    let of_primary = |refs: Refs| primary.iter().any(|node| state.nodes[node].seen == Some(refs));
    if counts.iter().any(|&(refs, _)| of_primary(refs)) {
        counts.retain(|&(refs, _)| of_primary(refs));
    }
    let mut verdicts = Vec::new();
    for (refs, _) in counts {
        let holders = heard.iter().filter(|&node| state.nodes[node].seen == Some(refs)).collect();
        let candidates = if primary.is_subset(holders) { primary } else { holders };
        verdicts.extend(candidates.iter().map(|candidate| (refs, candidate)));
    }
    verdicts
}

pub(crate) fn take(protocol: &Protocol, state: &mut State, step: Step) {
    match step {
        Step::LeaseRunsOut => {
            if let Some(ticket) = &mut state.database.ticket {
                ticket.in_doubt = true;
            }
        }
        Step::Quiesce(node) => {
            let node = &mut state.nodes[node];
            if protocol.has(Safeguard::Quiesce) {
                for part in &mut node.parts {
                    if matches!(part, Part::Prepared | Part::Told(_)) {
                        *part = Part::Nothing;
                    }
                }
            }
            node.seen = Some(node.refs);
        }
        Step::SettleUnheard { refs, primary } => {
            state.left.unheard -= 1;
            settle(state, refs, primary);
        }
        Step::Settle { refs, primary } => settle(state, refs, primary),
        Step::CrashCoordinator => {
            state.left.coordinator_crashes -= 1;
            forget_what_was_heard(state);
        }
    }
}

fn settle(state: &mut State, refs: Refs, primary: usize) {
    let holders = heard(state).iter().filter(|&node| state.nodes[node].seen == Some(refs)).collect();
    state.database.ticket = None;
    state.record(holders, primary);
    forget_what_was_heard(state);
}

fn forget_what_was_heard(state: &mut State) {
    for node in &mut state.nodes {
        node.seen = None;
    }
}
