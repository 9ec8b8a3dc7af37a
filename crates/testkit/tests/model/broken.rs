//! Each safeguard taken away: the checker finds what it was for.

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::{
    properties::name,
    protocol::{Plan, Protocol, Safeguard},
    sound::{FIRST, SECOND, plan},
    state::Mishaps,
};

const STOP: Mishaps = Mishaps { router_stops: 1, ..Mishaps::NONE };

fn breaks(without: Safeguard, plans: Vec<Plan>, mishaps: Mishaps, behind: usize, property: &'static str) {
    let protocol = Protocol { plans, mishaps, behind, repairs: true, without: Some(without) };
    let begun = Instant::now();
    let checker = protocol
        .checker()
        // One thread: the shortest way.
        .threads(1)
        .finish_when(HasDiscoveries::AnyOf([property].into()))
        .spawn_bfs()
        .join();
    let path =
        checker.discovery(property).unwrap_or_else(|| panic!("{without:?}: {property}: nothing found"));
    let steps: Vec<String> = path.into_actions().iter().map(|step| format!("{step:?}")).collect();
    println!(
        "without {without:?}: {property}: broken after {} states, {:.1?}, by\n  {}",
        checker.state_count(),
        begun.elapsed(),
        steps.join("\n  ")
    );
}

#[test]
fn without_an_intent() {
    let crash = Mishaps { router_crashes: 1, ..Mishaps::NONE };
    breaks(Safeguard::Intent, vec![plan(0, FIRST)], crash, 0, name::EQUAL);
}

#[test]
fn without_an_epoch_check() {
    let crash = Mishaps { node_crashes: 1, ..Mishaps::NONE };
    breaks(Safeguard::EpochCheck, vec![plan(0, FIRST), plan(1, FIRST)], crash, 0, name::HOOKS);
}

#[test]
fn without_a_check_of_who_takes_part() {
    breaks(
        Safeguard::ParticipantsUpToDate,
        vec![plan(0, FIRST), plan(1, SECOND)],
        Mishaps::NONE,
        0,
        name::EQUAL,
    );
}

#[test]
fn without_a_fence_for_a_router_that_was_stopped() {
    breaks(Safeguard::LeaseFence, vec![plan(0, FIRST)], STOP, 0, name::EQUAL);
}

#[test]
fn without_refusing_what_was_settled() {
    breaks(Safeguard::SettledIsSettled, vec![plan(0, FIRST), plan(1, SECOND)], STOP, 0, name::EQUAL);
}

#[test]
fn without_waiting_for_revocations() {
    breaks(Safeguard::RevocationWait, vec![plan(0, FIRST)], Mishaps::NONE, 0, name::FRESH);
}

#[test]
fn without_waiting_for_earlier_revocations() {
    breaks(
        Safeguard::EarlierRevocations,
        vec![plan(0, FIRST), plan(0, FIRST)],
        Mishaps::NONE,
        0,
        name::FRESH,
    );
}

#[test]
fn without_a_lease_on_cached_routes() {
    breaks(Safeguard::RouteLease, vec![plan(0, FIRST)], STOP, 0, name::FRESH);
}

#[test]
fn without_a_majority() {
    breaks(Safeguard::Majority, vec![plan(0, FIRST)], Mishaps::NONE, 0, name::KEPT);
}

#[test]
fn without_a_ticket_for_the_last_round() {
    breaks(Safeguard::RepairTicket, vec![plan(0, FIRST)], Mishaps::NONE, 1, name::EQUAL);
}

#[test]
fn without_an_attempt_fence() {
    let lost = Mishaps { lost_workers: 1, ..Mishaps::NONE };
    breaks(Safeguard::AttemptFence, vec![plan(0, FIRST)], lost, 1, name::EQUAL);
}

#[test]
fn without_attempts_on_disk() {
    let lost = Mishaps { lost_workers: 1, node_crashes: 1, ..Mishaps::NONE };
    breaks(Safeguard::AttemptOnDisk, vec![plan(0, FIRST)], lost, 1, name::EQUAL);
}

#[test]
fn without_quiescing_before_settling() {
    breaks(Safeguard::Quiesce, vec![plan(0, FIRST)], STOP, 0, name::EQUAL);
}

#[test]
fn without_an_end_to_votes_of_a_silent_router() {
    breaks(Safeguard::SilenceEndsVotes, vec![plan(0, FIRST), plan(1, FIRST)], STOP, 0, name::PROGRESS);
}

#[test]
fn without_quiet_at_the_target_of_a_copy() {
    let unheard = Mishaps { router_stops: 1, unheard: 1, ..Mishaps::NONE };
    breaks(Safeguard::QuietTarget, vec![plan(0, FIRST)], unheard, 0, name::EQUAL);
}
