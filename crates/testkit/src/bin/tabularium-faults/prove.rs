//! Shows that the checker would notice: with each safety step switched off in turn, it has to find a breach.

use std::time::{Duration, Instant};

use anyhow::Result;
use tabularium_common::faults::SafetyStep;

use crate::{
    checker::Broken,
    scenes::Scene,
    session::{self, Options},
};

/// A scene needs its processes to be in time, which a busy machine may not let them be.
const TRIES: u64 = 5;

/// How the lack of a step was noticed.
struct Noticed {
    step: SafetyStep,
    /// Nothing: it was not.
    broken: Option<Broken>,
    tries: u64,
    took: Duration,
}

/// The scene in which nothing else stands between a client and harm.
fn scene(step: SafetyStep) -> Scene {
    match step {
        SafetyStep::RouterTicket => Scene::Unasked,
        // Coordinators do not count either, see `Site::switch_off`.
        SafetyStep::RouterQuorum => Scene::Alone,
        SafetyStep::RouterRecordBeforeAnswer => Scene::LateRecord,
        SafetyStep::RouterRouteLease | SafetyStep::CoordinatorRevocation => Scene::OldRoute,
        SafetyStep::RouterWriteFence => Scene::LateVotes,
        SafetyStep::CoordinatorCommittedOnly => Scene::LeftBehind,
        SafetyStep::NodeVote => Scene::Refused,
        SafetyStep::NodeExpectation => Scene::OldDisk,
    }
}

/// Settings under which the step matters.
fn timing(step: SafetyStep) -> Vec<(String, String)> {
    match step {
        // A router notices within a second that its session is dead, and forgets what it learned in it. Only a lease that
        // ends earlier than that makes a difference to a router that runs.
        SafetyStep::RouterRouteLease => vec![("router_lease".to_owned(), "300ms".to_owned())],
        _ => Vec::new(),
    }
}

/// Answers whether the lack of every step was noticed.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let chosen = SafetyStep::ALL.iter().filter(|step| options.off.is_none_or(|chosen| chosen == **step));
    let mut all = Vec::new();
    for step in chosen {
        all.push(look(*step, options).await?);
    }
    println!("{:<32}{:<20}{:<24}{:>6}{:>9}", "without", "scene", "found", "tries", "s");
    for Noticed { step, broken, tries, took } in &all {
        let found = broken.map_or("NOTHING", Broken::name);
        let scene = scene(*step).name();
        println!("{:<32}{scene:<20}{found:<24}{tries:>6}{:>9.1}", step.name(), took.as_secs_f64());
    }
    Ok(all.iter().all(|noticed| noticed.broken.is_some()))
}

async fn look(step: SafetyStep, options: &Options) -> Result<Noticed> {
    let began = Instant::now();
    for number in 0..TRIES {
        println!("--- without {}", step.name());
        let violations = session::run(&Options {
            seed: options.seed.wrapping_add(number),
            // One scene; what has begun is brought to its end.
            seconds: 1,
            // The scene has clients of its own, and nobody is to come in between.
            writers: 0,
            readers: 0,
            only: vec![scene(step).name().to_owned()],
            together: false,
            off: Some(step),
            timing: timing(step),
            directory: options.directory.join(format!("{}-{number}", step.name())),
            ..options.clone()
        })
        .await?;
        let broken = violations.iter().map(|violation| violation.broken).find(|broken| broken.is_promised());
        if broken.is_some() {
            return Ok(Noticed { step, broken, tries: number + 1, took: began.elapsed() });
        }
    }
    Ok(Noticed { step, broken: None, tries: TRIES, took: began.elapsed() })
}
