//! Copies to replicas that are behind: rounds beside the writes, the last one under the ticket.

use crate::{
    protocol::{Protocol, Safeguard, Step as AnyStep},
    state::{Copying, Holder, LateCopy, NODES, Part, Progress, Refs, Set, State, Ticket},
    writing,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A worker starts the duty of this target.
    Start(usize),
    /// The target sees the attempt and reads the source.
    Read { source: usize },
    /// The target is made equal to what was read.
    Write,
    /// `FinishDuty`: the target is up to date.
    Finish,
    /// `FinishDuty`: written to meanwhile; another round, with the ticket.
    LastRound,
    /// `FinishDuty`: failed.
    Fail,
    /// The worker stops; its duty is another's, and the ticket it held is free.
    LoseWorker,
    /// A copy that nobody waits for reads the source.
    LateRead { source: usize },
    /// It writes to the target.
    LateWrite,
}

pub(crate) fn open(protocol: &Protocol, state: &State, steps: &mut Vec<AnyStep>) {
    let mut push = |step| steps.push(AnyStep::Repair(step));
    let sources = state.in_reach();
    if let Some(late) = &state.late
        && state.is_up(late.target)
        && !late.superseded
    {
        match late.read {
            None => sources
                .iter()
                .filter(|&source| source != late.target)
                .for_each(|source| push(Step::LateRead { source })),
            Some(refs) if can_write(protocol, state, late.target, refs) => push(Step::LateWrite),
            Some(_) => {}
        }
    }
    let Some(copying) = &state.repair else {
        if !sources.is_empty() {
            for target in
                (0..NODES).filter(|&node| state.is_up(node) && !state.database.up_to_date.contains(node))
            {
                push(Step::Start(target));
            }
        }
        return;
    };
    match copying.progress {
        Progress::Failed => push(Step::Fail),
        _ if !state.is_up(copying.target) => push(Step::Fail),
        Progress::Started if sources.is_empty() => push(Step::Fail),
        Progress::Started => sources.iter().for_each(|source| push(Step::Read { source })),
        Progress::Read(refs) if can_write(protocol, state, copying.target, refs) => push(Step::Write),
        Progress::Read(_) => {}
        Progress::Written => {
            let free = state.database.ticket.is_none();
            let unchanged = copying.generation == state.database.generation;
            if copying.under_ticket || (free && unchanged) || !protocol.has(Safeguard::RepairTicket) {
                push(Step::Finish);
            } else if free {
                push(Step::LastRound);
            }
        }
    }
}

pub(crate) fn mishaps(state: &State, steps: &mut Vec<AnyStep>) {
    let runs = matches!(&state.repair, Some(copying) if matches!(copying.progress, Progress::Started | Progress::Read(_)));
    if runs && state.late.is_none() && state.left.lost_workers > 0 {
        steps.push(AnyStep::Repair(Step::LoseWorker));
    }
}

/// A transaction that waits for its answer at the target holds the lock of a reference that is to be written.
fn can_write(protocol: &Protocol, state: &State, target: usize, refs: Refs) -> bool {
    state.nodes[target].parts.iter().enumerate().all(|(write, part)| {
        let round = match part {
            Part::Prepared => state.writes[write].ballot.round,
            Part::Told(round) => *round,
            Part::Nothing | Part::Asked | Part::Applied => return true,
        };
        let reference = writing::reference(protocol, write, round);
        refs[reference] == state.nodes[target].refs[reference]
    })
}

/// What waits at the target for an answer ends before the copy begins. It is enough to do so once: nobody answers votes of
/// a replica that is behind, and an answer that was under way when it fell behind finds nothing to go on with.
fn quieten(protocol: &Protocol, state: &mut State, target: usize) {
    if protocol.has(Safeguard::QuietTarget) {
        for part in &mut state.nodes[target].parts {
            if matches!(part, Part::Prepared | Part::Told(_)) {
                *part = Part::Nothing;
            }
        }
    }
}

pub(crate) fn take(protocol: &Protocol, state: &mut State, step: Step) {
    match step {
        Step::Start(target) => {
            let generation = state.database.generation;
            state.repair =
                Some(Copying { target, generation, under_ticket: false, progress: Progress::Started });
        }
        Step::LateRead { source } => {
            let refs = state.nodes[source].refs;
            let Some(late) = &mut state.late else { return };
            late.read = Some(refs);
            let target = late.target;
            quieten(protocol, state, target);
        }
        Step::LateWrite => {
            if let Some(LateCopy { target, read: Some(refs), .. }) = state.late.take() {
                state.nodes[target].refs = refs;
            }
        }
        Step::LoseWorker => {
            state.left.lost_workers -= 1;
            if let Some(copying) = give_up(state) {
                let read = match copying.progress {
                    Progress::Read(refs) => Some(refs),
                    _ => None,
                };
                state.late = Some(LateCopy { target: copying.target, read, superseded: false });
            }
        }
        Step::Fail => {
            give_up(state);
        }
        Step::Finish => {
            if let Some(copying) = give_up(state) {
                state.database.up_to_date.insert(copying.target);
            }
        }
        Step::LastRound => {
            let generation = state.database.generation;
            if let Some(copying) = &mut state.repair {
                copying.generation = generation;
                copying.under_ticket = true;
                copying.progress = Progress::Started;
                state.database.ticket =
                    Some(Ticket { holder: Holder::Repair, participants: Set::EMPTY, in_doubt: false });
            }
        }
        Step::Read { source } => {
            let refs = state.nodes[source].refs;
            let Some(copying) = &mut state.repair else { return };
            copying.progress = Progress::Read(refs);
            let target = copying.target;
            if protocol.has(Safeguard::AttemptFence)
                && let Some(late) = &mut state.late
                && late.target == target
            {
                // One that was under way is ended first; one that comes is refused.
                late.superseded = true;
                late.read = None;
            }
            quieten(protocol, state, target);
        }
        Step::Write => {
            let Some(copying) = &mut state.repair else { return };
            if let Progress::Read(refs) = copying.progress {
                copying.progress = Progress::Written;
                state.nodes[copying.target].refs = refs;
            }
        }
    }
}

/// The duty is nobody's, and the ticket, if it was the duty's, is free.
fn give_up(state: &mut State) -> Option<Copying> {
    let copying = state.repair.take()?;
    if copying.under_ticket {
        state.database.ticket = None;
    }
    Some(copying)
}

/// A copy that runs on a node ends with it; one that has not reached it does not.
pub(crate) fn target_crashed(protocol: &Protocol, state: &mut State, node: usize) {
    if let Some(copying) = &mut state.repair
        && copying.target == node
        && matches!(copying.progress, Progress::Read(_))
    {
        copying.progress = Progress::Failed;
    }
    if let Some(late) = &mut state.late
        && late.target == node
    {
        if late.read.is_some() {
            state.late = None;
        } else if !protocol.has(Safeguard::AttemptOnDisk) {
            late.superseded = false;
        }
    }
}
