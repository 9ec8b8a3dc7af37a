//! `tabularium-router`: arguments, configuration, telemetry, exit code.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use tabularium_common::{config, lifecycle, telemetry};
use tabularium_router::{Config, run};

/// Exit code for a configuration that cannot be used (`EX_CONFIG`).
const BAD_CONFIG: u8 = 78;
/// Exit code for a router that could not run (`EX_SOFTWARE`).
const FAILED: u8 = 70;

/// Stateless Gitaly proxy in front of the storage nodes.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Where to write the addresses once they are bound.
    #[arg(long, value_name = "FILE")]
    announce: Option<PathBuf>,
    /// Check the configuration and exit.
    #[arg(long)]
    check_config: bool,
}

#[allow(clippy::print_stderr, reason = "logging is not up yet, or is what failed")]
fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("tabularium-router: {error}");
    ExitCode::from(code)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config: Config = match config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return fail(BAD_CONFIG, &error),
    };
    if arguments.check_config {
        return ExitCode::SUCCESS;
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILED, &error),
    };
    runtime.block_on(async {
        let _telemetry = match telemetry::start("tabularium-router", &config.telemetry) {
            Ok(guard) => guard,
            Err(error) => return fail(FAILED, &error),
        };
        match run(config, arguments.announce, lifecycle::stop_signal()).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error @ tabularium_router::RunError::Config(_)) => fail(BAD_CONFIG, &error),
            Err(error) => fail(FAILED, &error),
        }
    })
}
