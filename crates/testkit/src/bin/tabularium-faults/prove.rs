//! Shows that the checker would notice: with each safety step switched off in turn, it has to find a breach.

use anyhow::Result;
use tabularium_common::faults::SafetyStep;

use crate::session::{self, Options};

/// Harm that makes the lack of a step felt.
struct Plan {
    only: &'static [&'static str],
    /// All of it at once.
    together: bool,
}

const SECONDS: u64 = 40;

fn plan(step: SafetyStep) -> Plan {
    let (only, together): (&[_], _) = match step {
        SafetyStep::RouterTicket => (&["kill-router", "stop-node"], false),
        SafetyStep::RouterQuorum => (&["kill-primary", "stop-primary", "swallow-node"], false),
        // A node is left behind, and nobody is told that it is.
        SafetyStep::RouterRecordBeforeAnswer => (&["delay-node", "crash-router.before_record"], true),
        // The same, and one router cannot be told.
        SafetyStep::RouterRouteLease => (&["isolate-router", "delay-node"], true),
        SafetyStep::RouterWriteFence => (&["isolate-router", "stop-router", "swallow-node"], false),
        SafetyStep::CoordinatorRevocation => (&["stop-node", "swallow-node", "delay-node"], false),
        SafetyStep::CoordinatorCommittedOnly => (&["stop-node", "kill-node", "delay-node"], false),
        SafetyStep::NodeVote => (&["kill-router", "stop-router", "kill-primary"], false),
    };
    Plan { only, together }
}

/// Answers whether the lack of every step was noticed.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let mut unnoticed = Vec::new();
    for step in SafetyStep::ALL {
        let Plan { only, together } = plan(*step);
        println!("--- without {}", step.name());
        let violations = session::run(&Options {
            seconds: SECONDS,
            only: only.iter().map(|name| (*name).to_owned()).collect(),
            together,
            off: Some(*step),
            directory: options.directory.join(step.name()),
            ..options.clone()
        })
        .await?;
        if violations.is_empty() {
            unnoticed.push(step.name());
        }
    }
    println!("not noticed: {unnoticed:?}");
    Ok(unnoticed.is_empty())
}
