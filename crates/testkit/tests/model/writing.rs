//! The router's side of a write, in the order of a push: ask the nodes, take the ticket, answer the votes, record,
//! answer the client.

use crate::{
    protocol::{Protocol, Safeguard, Step as AnyStep},
    state::{Ballot, Database, Holder, MAJORITY, NODES, Part, REFS, Refs, Set, Stage, State, Ticket, Write},
};

/// The number is the write's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The nodes of the route are sent what the client sends. When the primary is down another is named first.
    Ask {
        write: usize,
        primary: usize,
    },
    /// Too few replicas can be reached. Nothing was asked of anybody.
    Refuse(usize),
    /// The primary or too many others died before the ticket was taken.
    AskAgain(usize),
    /// `BeginWrite`: one transaction.
    Begin(usize),
    /// COMMIT to every PREPARED vote that waits, once there is a quorum of them.
    AnswerPrepared(usize),
    /// COMMIT to a quorum of COMMITTED votes: the next reference.
    AnswerCommitted(usize),
    /// `CommitWrite`: one transaction. Names the primary from then on.
    Commit {
        write: usize,
        primary: usize,
    },
    /// `AbortWrite`, NOT_APPLIED: nobody was told to go ahead, and no quorum can come about.
    AbortNotApplied(usize),
    /// `AbortWrite`, IN_DOUBT.
    AbortInDoubt(usize),
    /// The lease ran out, or the write was settled: the router cancels what is left of it.
    Abandon(usize),
    Acknowledge(usize),
}

/// The router may answer votes. Its own clock runs out before the coordinator's; here both at once, the latest moment
/// that is allowed.
fn lease_runs(protocol: &Protocol, state: &State, write: usize) -> bool {
    if !protocol.has(Safeguard::LeaseFence) || !protocol.has(Safeguard::Intent) {
        return true;
    }
    state
        .database
        .ticket
        .as_ref()
        .is_some_and(|ticket| ticket.holder == Holder::Write(write) && !ticket.in_doubt)
}

fn holds_ticket(state: &State, write: usize) -> bool {
    state.database.ticket.as_ref().is_some_and(|ticket| ticket.holder == Holder::Write(write))
}

pub(crate) fn quorum(protocol: &Protocol) -> usize {
    if protocol.has(Safeguard::Majority) { MAJORITY } else { 1 }
}

/// The reference that the write moves in its current round.
pub(crate) fn reference(protocol: &Protocol, write: usize, round: u8) -> usize {
    protocol.plans[write].references[usize::from(round)]
}

pub(crate) fn is_last(protocol: &Protocol, write: usize, round: u8) -> bool {
    usize::from(round) + 1 == protocol.plans[write].references.len()
}

fn prepared_quorum(protocol: &Protocol, ballot: &Ballot) -> bool {
    ballot.primary.is_subset(ballot.prepared) && ballot.prepared.len() >= quorum(protocol)
}

/// Voters that may yet cast the vote they owe.
fn hopeful(state: &State, write: usize) -> Set {
    let voters = state.writes[write].ballot.voters;
    voters
        .iter()
        .filter(|&node| state.is_up(node) && state.nodes[node].parts[write] != Part::Nothing)
        .collect()
}

pub(crate) fn open(protocol: &Protocol, state: &State, steps: &mut Vec<AnyStep>) {
    let mut push = |step| steps.push(AnyStep::Write(step));
    let Database { ticket, primary, .. } = &state.database;
    for (id, plan) in protocol.plans.iter().enumerate() {
        if state.routers[plan.router].stopped {
            continue;
        }
        let write = &state.writes[id];
        let ballot = &write.ballot;
        match write.stage {
            Stage::Waiting => {
                if state.in_reach().len() < quorum(protocol) {
                    push(Step::Refuse(id));
                } else if primary.is_subset(state.up()) {
                    primary.iter().for_each(|primary| push(Step::Ask { write: id, primary }));
                } else if ticket.is_none() {
                    state.in_reach().iter().for_each(|primary| push(Step::Ask { write: id, primary }));
                }
            }
            Stage::Asked => {
                let there = hopeful(state, id);
                if !ballot.primary.is_subset(there) || there.len() < quorum(protocol) {
                    push(Step::AskAgain(id));
                } else if ticket.is_none() {
                    push(Step::Begin(id));
                }
            }
            Stage::Ticketed => {
                let in_time = lease_runs(protocol, state, id);
                let last = is_last(protocol, id, ballot.round);
                let hopeful = hopeful(state, id);
                if in_time
                    && prepared_quorum(protocol, ballot)
                    && hopeful.iter().any(|node| state.nodes[node].parts[id] == Part::Prepared)
                {
                    push(Step::AnswerPrepared(id));
                }
                if ballot.committed.len() >= quorum(protocol) {
                    if last {
                        let stays = primary.is_subset(ballot.committed);
                        let candidates = if stays { *primary } else { ballot.committed };
                        candidates.iter().for_each(|primary| push(Step::Commit { write: id, primary }));
                    } else if in_time {
                        push(Step::AnswerCommitted(id));
                    }
                }
                if !in_time {
                    push(Step::Abandon(id));
                } else if !write.told {
                    if !ballot.primary.is_subset(hopeful) || hopeful.len() < quorum(protocol) {
                        push(Step::AbortNotApplied(id));
                    }
                } else if hopeful.union(ballot.committed).len() < quorum(protocol)
                    || (ballot.committed.is_empty()
                        && !prepared_quorum(protocol, ballot)
                        && !ballot.primary.is_subset(hopeful))
                {
                    push(Step::AbortInDoubt(id));
                }
            }
            Stage::Recorded => {
                if write.awaits.is_empty() {
                    push(Step::Acknowledge(id));
                }
            }
            Stage::Acknowledged | Stage::Refused | Stage::Unknown => {}
        }
    }
}

pub(crate) fn take(protocol: &Protocol, state: &mut State, step: Step) {
    match step {
        Step::Ask { write, primary } => ask(protocol, state, write, primary),
        Step::Refuse(write) => state.end_write(write, Stage::Refused),
        Step::AskAgain(write) => start_again(protocol, state, write),
        Step::Begin(write) => begin(protocol, state, write),
        Step::AnswerPrepared(id) => {
            let write = &mut state.writes[id];
            for node in write.ballot.voters.iter() {
                let part = &mut state.nodes[node].parts[id];
                if *part == Part::Prepared {
                    *part = Part::Told(write.ballot.round);
                    write.told = true;
                }
            }
        }
        Step::AnswerCommitted(id) => {
            // Who has not voted by now is cancelled and counted out of what follows.
            for node in &mut state.nodes {
                node.parts[id] = match node.parts[id] {
                    Part::Applied => Part::Asked,
                    told @ Part::Told(_) => told,
                    Part::Nothing | Part::Asked | Part::Prepared => Part::Nothing,
                };
            }
            let ballot = &mut state.writes[id].ballot;
            ballot.voters = ballot.committed;
            ballot.prepared = Set::EMPTY;
            ballot.committed = Set::EMPTY;
            ballot.round += 1;
        }
        Step::Commit { write, primary } => commit(protocol, state, write, primary),
        Step::AbortNotApplied(write) => {
            if holds_ticket(state, write) {
                state.database.ticket = None;
            }
            state.end_write(write, Stage::Refused);
        }
        Step::AbortInDoubt(write) => {
            if let Some(ticket) =
                state.database.ticket.as_mut().filter(|ticket| ticket.holder == Holder::Write(write))
            {
                ticket.in_doubt = true;
            }
            state.end_write(write, Stage::Unknown);
        }
        Step::Abandon(write) => {
            // What nobody was told, nobody has done.
            let stage = if state.writes[write].told { Stage::Unknown } else { Stage::Refused };
            state.end_write(write, stage);
        }
        Step::Acknowledge(write) => state.end_write(write, Stage::Acknowledged),
    }
}

fn ask(protocol: &Protocol, state: &mut State, id: usize, primary: usize) {
    let router = protocol.plans[id].router;
    let up = state.up();
    let usable = state.routers[router].route.filter(|route| {
        route.primary.is_subset(up) && route.nodes.intersection(up).len() >= quorum(protocol)
    });
    let route = usable.unwrap_or_else(|| {
        state.database.name_primary(primary);
        state.renew_route(router);
        state.fresh_route()
    });
    let asked = route.nodes.intersection(up);
    for node in asked.iter() {
        state.nodes[node].parts[id] = Part::Asked;
    }
    let refs = route.primary.iter().next().map_or(Refs::default(), |primary| state.nodes[primary].refs);
    let write = &mut state.writes[id];
    write.stage = Stage::Asked;
    // The client names what it saw; it does not look again.
    write.old.get_or_insert_with(|| {
        let mut old = [0; REFS];
        for &reference in protocol.plans[id].references {
            old[reference] = refs[reference];
        }
        old
    });
    write.ballot = Ballot { epoch: route.epoch, primary: route.primary, voters: asked, ..Ballot::default() };
}

/// Nothing was answered to the client: its request is sent once more, by a fresh route.
fn start_again(protocol: &Protocol, state: &mut State, id: usize) {
    let router = protocol.plans[id].router;
    state.renew_route(router);
    state.cancel_parts(id);
    state.writes[id] = Write { stage: Stage::Waiting, old: state.writes[id].old, ..Write::default() };
}

fn begin(protocol: &Protocol, state: &mut State, id: usize) {
    let ballot = &state.writes[id].ballot;
    let mut participants = hopeful(state, id);
    if protocol.has(Safeguard::EpochCheck)
        && (ballot.epoch, ballot.primary) != (state.database.epoch, state.database.primary)
    {
        return start_again(protocol, state, id);
    }
    if protocol.has(Safeguard::ParticipantsUpToDate) {
        participants = participants.intersection(state.database.up_to_date);
    }
    if participants.len() < quorum(protocol) {
        return start_again(protocol, state, id);
    }
    for node in 0..NODES {
        if !participants.contains(node) && state.nodes[node].parts[id] == Part::Asked {
            state.nodes[node].parts[id] = Part::Nothing;
        }
    }
    state.writes[id].stage = Stage::Ticketed;
    state.writes[id].ballot.voters = participants;
    // Checked, and of no more meaning.
    state.writes[id].ballot.epoch = 0;
    if protocol.has(Safeguard::Intent) {
        state.database.ticket = Some(Ticket { holder: Holder::Write(id), participants, in_doubt: false });
    }
}

fn commit(protocol: &Protocol, state: &mut State, id: usize, primary: usize) {
    let intact = holds_ticket(state, id);
    if !intact && protocol.has(Safeguard::Intent) && protocol.has(Safeguard::SettledIsSettled) {
        return state.end_write(id, Stage::Unknown);
    }
    if intact {
        state.database.ticket = None;
        for node in &mut state.nodes {
            node.seen = None;
        }
    }
    let committed = state.writes[id].ballot.committed;
    let strange_hooks = state.writes[id].ballot.primary != state.database.primary;
    let shrinks = !state.database.up_to_date.is_subset(committed);
    state.record(committed, primary);
    let waits =
        protocol.has(Safeguard::RevocationWait) && (shrinks || protocol.has(Safeguard::EarlierRevocations));
    let awaits = if waits { state.database.revoking } else { Set::EMPTY };
    state.cancel_parts(id);
    let write = &mut state.writes[id];
    write.stage = Stage::Recorded;
    write.told = false;
    write.ballot = Ballot::default();
    write.strange_hooks = strange_hooks;
    write.awaits = awaits;
}
