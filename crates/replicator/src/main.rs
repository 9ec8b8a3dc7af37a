//! `tabularium-replicator`: its arguments, and what runs under them.

use std::{path::Path, process::ExitCode};

use clap::Parser;
use tabularium_common::{lifecycle::stop_signal, program};
use tabularium_replicator::{config::ReplicatorConfig, run};

const PROGRAM: &str = "tabularium-replicator";

/// Workers that copy, clean up, notify and sync.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {
    #[command(flatten)]
    service: program::ServiceArguments,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { service } = Arguments::parse();
    let serve =
        async |config: ReplicatorConfig, announce: Option<&Path>| run(config, announce, stop_signal()).await;
    program::run(PROGRAM, &service, serve).await
}
