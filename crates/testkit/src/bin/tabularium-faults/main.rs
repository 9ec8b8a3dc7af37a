//! The session behind `script/faults`: a whole cluster, clients that never rest, a nemesis with a seed, and a checker
//! that reads what the clients were told and what the disks hold in the end.
//!
//! * `cluster` starts the processes, with a relay on every call between them. `clients` push and list (`push` is one such
//!   command), and write into the `history`. `nemesis` does `harm` and takes it back; some of it are `scenes` of several
//!   faults, which bring a client of their own, or the death and `rebirth` of a repository. `clocks` jump.
//! * `witness` looks at the nodes' disks in between, `healed` afterwards. `checker` judges, and `report` prints.
//! * `prove` switches safety steps off, one by one: each time the checker has to find what that breaks.
//!
//! Exit code 0: nothing was broken. 1: something was; the directory with history and logs is printed. The faults a seed
//! leads to are the same each time, what they meet is not: the history is kept, `--check DIRECTORY` judges it again.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "printing is what this program is for")]

mod checker;
mod clients;
mod clocks;
mod cluster;
mod harm;
mod healed;
mod history;
mod nemesis;
mod prove;
mod push;
mod rebirth;
mod report;
mod scenes;
mod session;
mod witness;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use tabularium_common::{faults::SafetyStep, lifecycle::stop_signal};

use crate::{history::History, report::Report, session::Options};

/// Breaks a cluster in every way it knows, and looks whether any promise was broken.
#[derive(Parser)]
#[command(name = "tabularium-faults", version)]
struct Arguments {
    /// How long there are faults.
    #[arg(long, default_value_t = 5)]
    minutes: u64,
    /// The same, in seconds.
    #[arg(long, conflicts_with = "minutes")]
    seconds: Option<u64>,
    /// Decides which faults come, and in which order.
    #[arg(long)]
    seed: Option<u64>,
    /// Storage nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=5))]
    nodes: u16,
    /// Clients that push to hot repositories; half as many push to cold ones, and as many again read.
    #[arg(long, default_value_t = 4)]
    writers: u64,
    /// So many of 256 pushes bring many references.
    #[arg(long, default_value_t = 6)]
    many: u8,
    /// Only these faults, such as `kill-primary`.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// All of `--only` at once.
    #[arg(long, requires = "only")]
    together: bool,
    /// Switches a safety step off, such as `router.ticket`.
    #[arg(long, value_name = "STEP", value_parser = step)]
    without: Option<SafetyStep>,
    /// Keeps history and logs here. The directory must not hold a history.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Switches every safety step off in turn, and succeeds when each is missed.
    #[arg(long)]
    prove: bool,
    /// Runs nothing: judges the history in this directory again.
    #[arg(long, value_name = "DIRECTORY", conflicts_with_all = ["prove", "seed"])]
    check: Option<PathBuf>,
}

fn step(name: &str) -> Result<SafetyStep, String> {
    let found = SafetyStep::ALL.iter().find(|step| step.name() == name);
    found.copied().ok_or_else(|| {
        let names: Vec<_> = SafetyStep::ALL.iter().map(|step| step.name()).collect();
        format!("allowed: {}", names.join(", "))
    })
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::INFO).init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start: {error}");
            return ExitCode::from(70);
        }
    };
    // Dropped half done, a session stops what it started and removes its directories.
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = run(arguments) => Some(outcome),
            _signal = stop_signal() => None,
        }
    });
    match outcome {
        None => ExitCode::from(130),
        Some(Ok(true)) => ExitCode::SUCCESS,
        Some(Ok(false)) => ExitCode::FAILURE,
        Some(Err(error)) => {
            eprintln!("faults: {error:#}");
            ExitCode::from(70)
        }
    }
}

/// Answers whether all was well.
async fn run(arguments: Arguments) -> Result<bool> {
    if let Some(directory) = &arguments.check {
        let history = History::read(directory)?;
        let violations = checker::check(&history);
        print!("{}", Report::new(&history, &violations));
        return Ok(checker::promises_hold(&violations));
    }
    let seed = arguments.seed.unwrap_or_else(rand::random);
    let options = Options {
        seed,
        seconds: arguments.seconds.unwrap_or(arguments.minutes * 60),
        nodes: arguments.nodes,
        writers: arguments.writers,
        readers: arguments.writers.div_ceil(2),
        only: arguments.only,
        together: arguments.together,
        off: arguments.without,
        many: arguments.many,
        timing: Vec::new(),
        directory: arguments.directory.unwrap_or_else(|| {
            std::env::temp_dir().join(format!("tabularium-faults-{seed}-{}", std::process::id()))
        }),
    };
    if arguments.prove {
        return prove::run(&options).await;
    }
    let violations = session::run(&options).await?;
    let well = checker::promises_hold(&violations);
    if !well {
        println!("seed {seed}; history and logs: {}", options.directory.display());
    }
    Ok(well)
}
