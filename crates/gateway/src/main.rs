//! `tabularium-gateway`: arguments, configuration, telemetry, exit code.

use std::process::ExitCode;

use clap::Parser;
use tabularium_common::{program, telemetry};
use tabularium_gateway::{config::Config, run};

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
    let config = match service.load::<Config>(PROGRAM) {
        Ok(config) => config,
        Err(code) => return code,
    };
    if let Err(error) = config.check_secrets() {
        return program::exit(PROGRAM, program::BAD_CONFIG, &error);
    }
    if service.check_config {
        return ExitCode::SUCCESS;
    }
    let _telemetry = match telemetry::start(PROGRAM, &config.telemetry) {
        Ok(guard) => guard,
        Err(error) => return program::exit(PROGRAM, program::FAILED, &error),
    };
    match run(config, service.announce.as_deref()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => program::exit(PROGRAM, program::FAILED, &error),
    }
}
