//! The figures behind `script/bench NAME`: a line per figure (`name value bar ok|short`), exit code 1 when one is short.
//!
//! Everything is started here and stopped here. Both sides of a comparison are measured in the same run, turn by turn,
//! and the median of several rounds is printed: machines are noisy, and only the ratio of two neighbours means much.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "printing is what this program is for")]
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "figures, not ids")]

mod clone;
mod figures;
mod generated;
mod large;
mod process;
mod relay;
mod relay_backend;
mod sidechannel;
mod writes;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use tabularium_common::lifecycle::stop_signal;

/// Measures this checkout.
#[derive(Parser)]
#[command(name = "tabularium-bench", version)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Router against direct: unary latency and CPU, stream throughput, CPU and memory.
    Relay {
        /// How often every pair is measured.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Cloning through gateway, router and node against nginx with `git http-backend`.
    Clone {
        /// How often every pair is measured.
        #[arg(long, default_value_t = 7)]
        rounds: usize,
        /// Size of the generated repository, in MiB.
        #[arg(long, default_value_t = 200)]
        mebibytes: u64,
    },
    /// Cloning over a sidechannel: through the router against the node directly, and against the router's relay of messages.
    Sidechannel {
        /// How often every way is measured.
        #[arg(long, default_value_t = 7)]
        rounds: usize,
        /// Size of the generated repository, in MiB.
        #[arg(long, default_value_t = 512)]
        mebibytes: u64,
    },
    /// Peak memory of every service while one large repository is pushed and cloned.
    Large {
        /// Size of the pushed pack, in MiB.
        #[arg(long, default_value_t = 1024)]
        mebibytes: u64,
    },
    /// Quorum writes: latency by number of replicas, a slow or lost secondary, a hot repository, a replica that comes back.
    Writes {
        /// Only these parts.
        #[arg(long, value_delimiter = ',')]
        only: Vec<writes::Part>,
        /// Pushes of each kind whose median counts.
        #[arg(long, default_value_t = 30)]
        pushes: usize,
        /// Size of the upload that loses a secondary, in MiB.
        #[arg(long, default_value_t = 150)]
        upload_mebibytes: u64,
        /// Writes that a node misses.
        #[arg(long, default_value_t = 2000)]
        missed_writes: usize,
    },
    /// The storage node that `relay` measures with. Not for people.
    #[command(hide = true)]
    RelayBackend {
        /// Where to write the addresses.
        #[arg(long)]
        announce: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start: {error}");
            return ExitCode::from(70);
        }
    };
    let bench = async {
        match arguments.bench {
            Bench::Relay { rounds } => relay::run(rounds).await,
            Bench::Clone { rounds, mebibytes } => clone::run(rounds, mebibytes).await,
            Bench::Sidechannel { rounds, mebibytes } => sidechannel::run(rounds, mebibytes).await,
            Bench::Large { mebibytes } => large::run(mebibytes).await,
            Bench::Writes { only, pushes, upload_mebibytes, missed_writes } => {
                writes::run(writes::Extent { only, pushes, upload_mebibytes, missed_writes }).await
            }
            Bench::RelayBackend { announce } => {
                relay_backend::serve(&announce).await.map(|()| figures::Figures::new())
            }
        }
    };
    // Dropped half done, a bench stops what it started and removes its directories.
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = bench => Some(outcome),
            _signal = stop_signal() => None,
        }
    });
    let Some(outcome) = outcome else { return ExitCode::from(130) };
    match outcome {
        Ok(figures) if figures.all_reached() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench failed: {error:#}");
            ExitCode::from(70)
        }
    }
}
