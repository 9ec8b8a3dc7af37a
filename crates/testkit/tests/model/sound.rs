//! The protocol as it is: no path breaks a property, and what is worth checking does happen.

use std::time::Instant;

use stateright::{Checker, Model};

use crate::{
    properties::possible,
    protocol::{Plan, Protocol},
    state::Mishaps,
};

pub(crate) const THREADS: usize = 2;

pub(crate) const FIRST: &[usize] = &[0];
pub(crate) const SECOND: &[usize] = &[1];
pub(crate) const BOTH: &[usize] = &[0, 1];

pub(crate) fn plan(router: usize, references: &'static [usize]) -> Plan {
    Plan { router, references }
}

fn holds(name: &str, protocol: Protocol, happens: &[&'static str]) {
    let begun = Instant::now();
    let checker = protocol.checker().threads(THREADS).spawn_bfs().join();
    println!(
        "{name}: {} states, {} of them different, {} steps deep, {:.1?}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed()
    );
    let discoveries = checker.discoveries();
    for property in checker.model().properties() {
        let found = discoveries.get(property.name);
        if property.expectation.discovery_is_failure() {
            if let Some(path) = found {
                let steps: Vec<String> =
                    path.clone().into_actions().iter().map(|step| format!("{step:?}")).collect();
                panic!("{}: broken by\n  {}\n{:#?}", property.name, steps.join("\n  "), path.last_state());
            }
        } else if happens.contains(&property.name) {
            assert!(found.is_some(), "it never happens: {}", property.name);
        }
    }
    assert!(checker.is_done());
}

#[test]
fn a_node_crashes_while_writes_race() {
    let mishaps = Mishaps { node_crashes: 1, ..Mishaps::NONE };
    holds(
        "a node",
        Protocol {
            plans: vec![plan(0, FIRST), plan(1, FIRST), plan(1, SECOND)],
            mishaps,
            behind: 0,
            repairs: false,
            without: None,
        },
        &[possible::BARE_MAJORITY, possible::PRIMARY_MOVES],
    );
}

#[test]
fn two_nodes_crash() {
    let mishaps = Mishaps { node_crashes: 2, ..Mishaps::NONE };
    holds(
        "two nodes",
        Protocol {
            plans: vec![plan(0, FIRST), plan(1, FIRST)],
            mishaps,
            behind: 0,
            repairs: false,
            without: None,
        },
        &[possible::SETTLED_AS_WRITTEN, possible::SETTLED_AS_NOT_WRITTEN],
    );
}

#[test]
fn routers_crash_and_stop() {
    let mishaps = Mishaps { router_crashes: 1, router_stops: 1, ..Mishaps::NONE };
    holds(
        "routers",
        Protocol {
            plans: vec![plan(0, FIRST), plan(1, FIRST)],
            mishaps,
            behind: 0,
            repairs: false,
            without: None,
        },
        &[possible::SETTLED_AS_WRITTEN, possible::SETTLED_AS_NOT_WRITTEN],
    );
}

#[test]
fn both_routers_stop() {
    let mishaps = Mishaps { router_stops: 2, ..Mishaps::NONE };
    holds(
        "both routers",
        Protocol {
            plans: vec![plan(0, FIRST), plan(1, FIRST)],
            mishaps,
            behind: 0,
            repairs: false,
            without: None,
        },
        &[possible::SETTLED_AS_WRITTEN, possible::SETTLED_AS_NOT_WRITTEN],
    );
}

#[test]
fn a_router_stops_and_a_node_crashes() {
    let mishaps = Mishaps { router_stops: 1, node_crashes: 1, ..Mishaps::NONE };
    holds(
        "router and node",
        Protocol {
            plans: vec![plan(0, FIRST), plan(1, SECOND)],
            mishaps,
            behind: 0,
            repairs: false,
            without: None,
        },
        &[possible::SETTLED_AS_WRITTEN, possible::SETTLED_AS_NOT_WRITTEN],
    );
}

#[test]
fn a_router_and_a_node_crash() {
    let mishaps = Mishaps { router_crashes: 1, node_crashes: 1, ..Mishaps::NONE };
    holds(
        "router and node crash",
        Protocol {
            plans: vec![plan(0, FIRST), plan(1, SECOND)],
            mishaps,
            behind: 0,
            repairs: false,
            without: None,
        },
        &[possible::SETTLED_AS_WRITTEN, possible::SETTLED_AS_NOT_WRITTEN],
    );
}

#[test]
fn a_write_is_settled_although_a_replica_is_not_heard() {
    let mishaps = Mishaps { router_stops: 1, coordinator_crashes: 1, unheard: 1, ..Mishaps::NONE };
    holds(
        "unheard",
        Protocol {
            plans: vec![plan(0, FIRST), plan(1, FIRST)],
            mishaps,
            behind: 0,
            repairs: false,
            without: None,
        },
        &[possible::SETTLED_AS_WRITTEN, possible::SETTLED_AS_NOT_WRITTEN],
    );
}

#[test]
fn two_references_that_are_not_moved_atomically() {
    let mishaps = Mishaps { router_stops: 1, ..Mishaps::NONE };
    holds(
        "two references",
        Protocol {
            plans: vec![plan(0, BOTH), plan(1, SECOND)],
            mishaps,
            behind: 0,
            repairs: false,
            without: None,
        },
        &[possible::SETTLED_AS_WRITTEN, possible::SETTLED_AS_NOT_WRITTEN],
    );
}

#[test]
fn two_references_and_a_node_that_crashes() {
    let mishaps = Mishaps { router_stops: 1, node_crashes: 1, ..Mishaps::NONE };
    holds(
        "two references, node",
        Protocol { plans: vec![plan(0, BOTH)], mishaps, behind: 0, repairs: false, without: None },
        &[possible::SETTLED_AS_WRITTEN, possible::SETTLED_AS_NOT_WRITTEN],
    );
}

#[test]
fn copies_beside_writes() {
    let mishaps = Mishaps { node_crashes: 0, ..Mishaps::NONE };
    holds(
        "copies",
        Protocol {
            plans: vec![plan(0, FIRST), plan(1, FIRST), plan(1, SECOND)],
            mishaps,
            behind: 1,
            repairs: true,
            without: None,
        },
        &[possible::LAST_ROUND, possible::LEVEL_AGAIN],
    );
}

#[test]
fn copies_and_a_node_that_crashes() {
    let mishaps = Mishaps { node_crashes: 1, ..Mishaps::NONE };
    holds(
        "copies, node",
        Protocol {
            plans: vec![plan(0, FIRST), plan(1, FIRST)],
            mishaps,
            behind: 1,
            repairs: true,
            without: None,
        },
        &[possible::LAST_ROUND, possible::LEVEL_AGAIN],
    );
}

#[test]
fn late_copies() {
    let mishaps = Mishaps { lost_workers: 1, ..Mishaps::NONE };
    holds(
        "late copies",
        Protocol {
            plans: vec![plan(0, FIRST), plan(1, FIRST)],
            mishaps,
            behind: 1,
            repairs: true,
            without: None,
        },
        &[possible::LAST_ROUND, possible::LEVEL_AGAIN],
    );
}

#[test]
fn late_copies_and_a_node_that_crashes() {
    let mishaps = Mishaps { lost_workers: 1, node_crashes: 1, ..Mishaps::NONE };
    holds(
        "late copies, node",
        Protocol { plans: vec![plan(0, FIRST)], mishaps, behind: 1, repairs: true, without: None },
        &[possible::LAST_ROUND, possible::LEVEL_AGAIN],
    );
}

#[test]
fn what_a_stopped_router_leaves_is_repaired() {
    let mishaps = Mishaps { router_stops: 1, unheard: 1, ..Mishaps::NONE };
    holds(
        "leftovers",
        Protocol { plans: vec![plan(0, FIRST)], mishaps, behind: 0, repairs: true, without: None },
        &[possible::LEVEL_AGAIN],
    );
}
