//! `tabularium-node`: arguments, configuration, telemetry, exit code.

use std::{path::Path, process::ExitCode};

use clap::{Parser, Subcommand};
use tabularium_common::{lifecycle, program, telemetry, tls};
use tabularium_node::{
    config::{Config, Surroundings},
    fetch_proxy, lfs_filter, server,
};

const PROGRAM: &str = "tabularium-node";

/// Gitaly-compatible storage node over the system git.
#[derive(Parser)]
#[command(name = PROGRAM, version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(arg_required_else_help = true)]
struct Arguments {
    #[command(flatten)]
    service: Option<program::ServiceArguments>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run by git in the place of ssh; not for people.
    FetchProxy(fetch_proxy::Arguments),
    /// Run by git for files in archives; not for people.
    LfsFilter(lfs_filter::Arguments),
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(command) = arguments.command {
        let code = match command {
            Command::FetchProxy(arguments) => fetch_proxy::run(&arguments).await,
            Command::LfsFilter(arguments) => lfs_filter::run(&arguments).await,
        };
        // Not by returning: a read of standard input cannot be cancelled, so the runtime would wait for git to close it,
        // and git for us to end.
        std::process::exit(code.into());
    }
    let Some(service) = arguments.service else {
        return ExitCode::from(program::FAILED);
    };
    let config = match service.load::<Config>(PROGRAM) {
        Ok(config) => config,
        Err(code) => return code,
    };
    if service.check_config {
        return ExitCode::SUCCESS;
    }
    match run(config, service.announce.as_deref()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => program::exit(PROGRAM, program::FAILED, error.as_ref()),
    }
}

async fn run(config: Config, announce: Option<&Path>) -> anyhow::Result<()> {
    let _telemetry = telemetry::start(PROGRAM, &config.telemetry)?;
    tls::install(&config.tls);
    let mut running = server::start(config, Surroundings::of_this_process()?).await?;
    if let Some(path) = announce {
        running.announcement().write(path)?;
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
