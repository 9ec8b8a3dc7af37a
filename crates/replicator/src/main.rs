//! `tabularium-replicator`: see the library.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use tabularium_common::{config, lifecycle::stop_signal, telemetry};
use tabularium_replicator::{RunError, config::ReplicatorConfig};

/// Workers that copy, clean up, notify and sync.
#[derive(Parser)]
#[command(name = "tabularium-replicator", version)]
struct Arguments {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Writes the addresses listened on to this file once they are bound.
    #[arg(long, value_name = "FILE")]
    announce: Option<PathBuf>,
    /// Checks the configuration and ends.
    #[arg(long)]
    check_config: bool,
}

const BAD_CONFIG: u8 = 78;
const FAILED: u8 = 70;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (error, code) = match serve(&arguments).await {
        Ok(()) => return ExitCode::SUCCESS,
        Err(error @ RunError::Config(_)) => (anyhow::Error::new(error), BAD_CONFIG),
        Err(error) => (anyhow::Error::new(error), FAILED),
    };
    #[expect(clippy::print_stderr, reason = "the last word, when logging may not have started")]
    {
        eprintln!("tabularium-replicator: {error:#}");
    }
    ExitCode::from(code)
}

async fn serve(arguments: &Arguments) -> Result<(), RunError> {
    let config: ReplicatorConfig = config::load(&arguments.config)?;
    if arguments.check_config {
        return config.read_secrets().map(drop).map_err(RunError::from);
    }
    let _telemetry = telemetry::start("tabularium-replicator", &config.telemetry)?;
    tabularium_replicator::run(config, arguments.announce.as_deref(), stop_signal()).await
}
