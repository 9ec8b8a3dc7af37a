//! `tabularium-replicator`: arguments, configuration, telemetry, exit code.

use std::process::ExitCode;

use clap::Parser;
use tabularium_common::{lifecycle::stop_signal, program, telemetry};
use tabularium_replicator::{RunError, config::ReplicatorConfig, run};

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
    let config = match service.load::<ReplicatorConfig>(PROGRAM) {
        Ok(config) => config,
        Err(code) => return code,
    };
    match serve(config, &service).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ RunError::Config(_)) => program::exit(PROGRAM, program::BAD_CONFIG, &error),
        Err(error) => program::exit(PROGRAM, program::FAILED, &error),
    }
}

async fn serve(config: ReplicatorConfig, service: &program::ServiceArguments) -> Result<(), RunError> {
    if service.check_config {
        return config.read_secrets().map(drop).map_err(RunError::from);
    }
    let _telemetry = telemetry::start(PROGRAM, &config.telemetry)?;
    run(config, service.announce.as_deref(), stop_signal()).await
}
