//! `tabularium-gateway`: its arguments, and what runs under them.

use std::process::ExitCode;

use clap::Parser;
use tabularium_common::program;
use tabularium_gateway::run;

const PROGRAM: &str = "tabularium-gateway";

/// Git over smart HTTP for ordinary clients.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {
    #[command(flatten)]
    service: program::ServiceArguments,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { service } = Arguments::parse();
    program::run(PROGRAM, &service, run).await
}
