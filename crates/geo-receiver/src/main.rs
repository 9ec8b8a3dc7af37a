//! `tabularium-geo-receiver`: its arguments, and what runs under them.

use std::{path::Path, process::ExitCode};

use clap::Parser;
use tabularium_common::{lifecycle::stop_signal, program};
use tabularium_geo_receiver::{config::GeoReceiverConfig, run};

const PROGRAM: &str = "tabularium-geo-receiver";

/// Takes the events of home sites and makes them durable.
#[derive(Parser)]
#[command(name = PROGRAM, version)]
struct Arguments {
    #[command(flatten)]
    service: program::ServiceArguments,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { service } = Arguments::parse();
    let serve =
        async |config: GeoReceiverConfig, announce: Option<&Path>| run(config, announce, stop_signal()).await;
    program::run(PROGRAM, &service, serve).await
}
