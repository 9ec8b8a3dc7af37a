//! `tabularium-router`: arguments, configuration, telemetry, exit code.

use std::process::ExitCode;

use clap::Parser;
use tabularium_common::{lifecycle, program, telemetry, tls};
use tabularium_router::{Config, RunError, run};

const PROGRAM: &str = "tabularium-router";

/// Stateless Gitaly proxy in front of the storage nodes.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {
    #[command(flatten)]
    service: program::ServiceArguments,
}

/// Calls are relayed on threads of their own; this one waits for them.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Arguments { service } = Arguments::parse();
    let config = match service.load::<Config>(PROGRAM) {
        Ok(config) => config,
        Err(code) => return code,
    };
    if service.check_config {
        return ExitCode::SUCCESS;
    }
    let _telemetry = match telemetry::start(PROGRAM, &config.telemetry) {
        Ok(guard) => guard,
        Err(error) => return program::exit(PROGRAM, program::FAILED, &error),
    };
    tls::install(&config.tls);
    match run(config, service.announce, lifecycle::stop_signal()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ RunError::Config(_)) => program::exit(PROGRAM, program::BAD_CONFIG, &error),
        Err(error) => program::exit(PROGRAM, program::FAILED, &error),
    }
}
