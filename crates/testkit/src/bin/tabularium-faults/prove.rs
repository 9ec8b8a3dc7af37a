//! Shows that the checker would notice: with each safety step switched off in turn, it has to find a breach.

use anyhow::Result;
use tabularium_common::faults::SafetyStep;

use crate::session::{self, Options};

/// Harm that makes the lack of a step felt.
struct Plan {
    only: &'static [&'static str],
    /// How long; harm that has begun is brought to its end.
    seconds: u64,
    /// So many of 256 pushes bring many references.
    many: u8,
}

/// A window may be missed; one that is missed so often is not there.
const TRIES: u64 = 3;
/// Pushes of many references are as frequent as all others.
const HALF: u8 = 128;
/// A window has to be looked through.
const READERS: u64 = 4;

fn plan(step: SafetyStep) -> Plan {
    let (only, seconds, many): (&[_], _, _) = match step {
        // What no coordinator heard of was done by some replicas and not by others.
        SafetyStep::RouterTicket => (&["late-votes"], 10, 0),
        // Coordinators do not count either, see `Site::switch_off`.
        SafetyStep::RouterQuorum => (&["lone-primary"], 10, 0),
        // What was answered can be read elsewhere, where nobody knows yet that a replica lacks it.
        SafetyStep::RouterRecordBeforeAnswer => (&["late-record"], 10, 0),
        // A replica was left behind, and one router cannot be told, nor asked.
        SafetyStep::RouterRouteLease | SafetyStep::CoordinatorRevocation => (&["old-route"], 10, 0),
        // A router goes on with a write that was settled without it.
        SafetyStep::RouterWriteFence => (&["late-votes"], 10, HALF),
        SafetyStep::CoordinatorCommittedOnly => (&["stop-node", "late-record"], 15, 0),
        // A hook of the primary refuses what the others could do.
        SafetyStep::NodeVote => (&["kill-replicator"], 10, 0),
    };
    Plan { only, seconds, many }
}

/// Answers whether the lack of every step was noticed.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let mut unnoticed = Vec::new();
    for step in SafetyStep::ALL.iter().filter(|step| options.off.is_none_or(|chosen| chosen == **step)) {
        if !notices(*step, options).await? {
            unnoticed.push(step.name());
        }
    }
    println!("not noticed: {unnoticed:?}");
    Ok(unnoticed.is_empty())
}

async fn notices(step: SafetyStep, options: &Options) -> Result<bool> {
    let Plan { only, seconds, many } = plan(step);
    for number in 0..TRIES {
        println!("--- without {}", step.name());
        let violations = session::run(&Options {
            seed: options.seed.wrapping_add(number),
            seconds,
            many,
            readers: READERS,
            only: only.iter().map(|name| (*name).to_owned()).collect(),
            together: false,
            off: Some(step),
            directory: options.directory.join(format!("{}-{number}", step.name())),
            ..options.clone()
        })
        .await?;
        if violations.iter().any(|violation| violation.broken.is_promised()) {
            return Ok(true);
        }
    }
    Ok(false)
}
