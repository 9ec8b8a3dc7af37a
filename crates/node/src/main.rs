//! `tabularium-node --config FILE`.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use tabularium_common::{config, lifecycle, telemetry};
use tabularium_node::{
    config::{Config, Surroundings},
    fetch_proxy, server,
};

/// Gitaly-compatible storage node over the system git.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Arguments {
    /// Configuration file.
    #[arg(long, required = true)]
    config: Option<PathBuf>,
    /// Written with the bound addresses once the node listens.
    #[arg(long)]
    announce: Option<PathBuf>,
    /// Only check the configuration.
    #[arg(long)]
    check_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run by git in the place of ssh; not for people.
    FetchProxy(fetch_proxy::Arguments),
}

/// The configuration cannot be used (`EX_CONFIG`).
const BAD_CONFIG: u8 = 78;
/// The service failed (`EX_SOFTWARE`).
const FAILED: u8 = 70;

#[tokio::main]
#[expect(clippy::print_stderr, reason = "for whoever starts the program, before logs exist")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(Command::FetchProxy(arguments)) = arguments.command {
        // Not by returning: a read of standard input cannot be cancelled, so the runtime would wait for git to close it,
        // and git for us to end.
        std::process::exit(fetch_proxy::run(&arguments).await.into());
    }
    let path = arguments.config.unwrap_or_default();
    let config = match config::load::<Config>(&path) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("tabularium-node: {error}");
            return ExitCode::from(BAD_CONFIG);
        }
    };
    if arguments.check_config {
        return ExitCode::SUCCESS;
    }
    match run(config, arguments.announce).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tabularium-node: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

async fn run(config: Config, announce: Option<PathBuf>) -> anyhow::Result<()> {
    let _telemetry = telemetry::start("tabularium-node", &config.telemetry)?;
    let mut running = server::start(config, Surroundings::of_this_process()?).await?;
    if let Some(path) = announce {
        running.announcement().write(&path)?;
    }
    running.ready();
    tokio::select! {
        signal = lifecycle::stop_signal() => signal?,
        error = running.failed() => return Err(error.into()),
    }
    match running.stop().await {
        // Told to stop, it has stopped; that some calls were cut off is for the log.
        Err(server::ServerError::Drain(late)) => tracing::warn!(%late, "stopped"),
        stopped => stopped?,
    }
    Ok(())
}
