//! Arguments, configuration, telemetry, exit code; everything else is in the library.
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "what cannot be logged yet is told to whoever started us"
)]

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use tabularium_common::telemetry;
use tabularium_coordinator::{Config, RunError, migrate, ping, run};

/// Exit code for a configuration that cannot be used (sysexits).
const EX_CONFIG: u8 = 78;
/// Exit code for a database that cannot be reached (sysexits).
const EX_UNAVAILABLE: u8 = 69;
/// Exit code for a failure while running (sysexits).
const EX_SOFTWARE: u8 = 70;

/// Keeps in Postgres where every repository is.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file (TOML).
    #[arg(long)]
    config: PathBuf,
    /// Where to write the addresses once every listener is bound.
    #[arg(long)]
    announce: Option<PathBuf>,
    /// Checks the configuration and exits.
    #[arg(long)]
    check_config: bool,
    /// Brings the database's schema up to date and exits.
    #[arg(long, conflicts_with = "check_config")]
    migrate_only: bool,
    /// Exits with 0 when the database answers and has our schema, with 69 when it cannot be reached.
    #[arg(long, conflicts_with_all = ["check_config", "migrate_only"])]
    sql_ping: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config: Config = match tabularium_common::config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return exit(EX_CONFIG, &error),
    };
    if arguments.check_config {
        println!("{}: ok", arguments.config.display());
        return ExitCode::SUCCESS;
    }
    let _telemetry = match telemetry::start("tabularium-coordinator", &config.telemetry) {
        Ok(guard) => guard,
        Err(error) => return exit(EX_CONFIG, &error),
    };
    let outcome = if arguments.sql_ping {
        ping(&config).await
    } else if arguments.migrate_only {
        migrate(&config).await
    } else {
        run(config, arguments.announce.as_deref()).await
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ RunError::Unreachable(_)) => exit(EX_UNAVAILABLE, &error),
        Err(error) => exit(EX_SOFTWARE, &error),
    }
}

fn exit(code: u8, error: &dyn std::error::Error) -> ExitCode {
    eprintln!("tabularium-coordinator: {error}");
    ExitCode::from(code)
}
