//! The gateway's process: arguments, configuration, telemetry, run, exit code.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use tabularium_gateway::config::Config;

/// The configuration cannot be used (`EX_CONFIG` of sysexits.h).
const BAD_CONFIG: u8 = 78;
/// The service failed while starting or running (`EX_SOFTWARE`).
const FAILED: u8 = 70;

/// Git over smart HTTP for ordinary clients.
#[derive(Parser)]
#[command(name = "tabularium-gateway", version)]
struct Arguments {
    /// Configuration file (TOML).
    #[arg(long)]
    config: PathBuf,
    /// File to write the bound addresses to, as JSON, once every listener is bound.
    #[arg(long)]
    announce: Option<PathBuf>,
    /// Check the configuration and exit.
    #[arg(long)]
    check_config: bool,
}

#[tokio::main]
#[expect(clippy::print_stderr, reason = "nothing else can say why a process does not start")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match tabularium_common::config::load::<Config>(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("tabularium-gateway: {error}");
            return ExitCode::from(BAD_CONFIG);
        }
    };
    if arguments.check_config {
        return ExitCode::SUCCESS;
    }
    match run(config, arguments.announce).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tabularium-gateway: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

async fn run(config: Config, announce: Option<PathBuf>) -> anyhow::Result<()> {
    let _telemetry = tabularium_common::telemetry::start("tabularium-gateway", &config.telemetry)?;
    tabularium_gateway::run(config, announce.as_deref()).await?;
    Ok(())
}
