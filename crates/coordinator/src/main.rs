//! `tabularium-coordinator`: arguments, configuration, telemetry, exit code.

use std::process::ExitCode;

use clap::Parser;
use tabularium_common::{program, telemetry, tls};
use tabularium_coordinator::{Config, RunError, migrate, ping, run};

const PROGRAM: &str = "tabularium-coordinator";

/// Keeps in Postgres where every repository is.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {
    #[command(flatten)]
    service: program::ServiceArguments,
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
    let config = match arguments.service.load::<Config>(PROGRAM) {
        Ok(config) => config,
        Err(code) => return code,
    };
    if arguments.service.check_config {
        return ExitCode::SUCCESS;
    }
    let _telemetry = match telemetry::start(PROGRAM, &config.telemetry) {
        Ok(guard) => guard,
        Err(error) => return program::exit(PROGRAM, program::FAILED, &error),
    };
    tls::install(&config.tls);
    let outcome = if arguments.sql_ping {
        ping(&config).await
    } else if arguments.migrate_only {
        migrate(&config).await
    } else {
        run(config, arguments.service.announce.as_deref()).await
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ RunError::Unreachable(_)) => program::exit(PROGRAM, program::UNAVAILABLE, &error),
        Err(error) => program::exit(PROGRAM, program::FAILED, &error),
    }
}
