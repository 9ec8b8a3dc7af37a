//! Shows that the checker would notice: with each safety step switched off in turn, it has to find a breach.

use anyhow::Result;
use tabularium_common::faults::SafetyStep;

use crate::session::{self, Options};

/// Harm that makes the lack of a step felt, and for how many seconds.
fn plan(step: SafetyStep) -> (&'static [&'static str], u64) {
    match step {
        SafetyStep::RouterTicket => (&["kill-router", "stop-node"], 40),
        SafetyStep::RouterQuorum => (&["kill-primary", "stop-primary", "swallow-node"], 40),
        SafetyStep::RouterRecordBeforeAnswer => (&["crash-router.before_record", "kill-primary"], 40),
        SafetyStep::RouterRouteLease => {
            (&["swallow-coordinator", "swallow-answers-coordinator", "stop-node"], 40)
        }
        SafetyStep::RouterWriteFence => (&["stop-router", "swallow-coordinator"], 40),
        SafetyStep::CoordinatorRevocation => (&["stop-node", "swallow-node", "kill-node"], 40),
        SafetyStep::CoordinatorCommittedOnly => (&["stop-node", "kill-node", "swallow-node"], 40),
        SafetyStep::NodeVote => (&["kill-router", "stop-router", "kill-primary"], 40),
    }
}

/// Answers whether the lack of every step was noticed.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let mut unnoticed = Vec::new();
    for step in SafetyStep::ALL {
        let (only, seconds) = plan(*step);
        println!("--- without {}", step.name());
        let violations = session::run(&Options {
            seconds,
            only: only.iter().map(|name| (*name).to_owned()).collect(),
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
