//! The command line of operators, and whole clusters on one machine.
//!
//! The binary `tabularium` is for people: it asks the services over the same gRPC that they use among each other and
//! prints tables or JSON. The library half, [`local`], starts real processes of every service with a Postgres and a
//! NATS server of their own; `tabularium up` and the tests of the other crates share it, so that what the tests run is
//! what people run.
//!
//! It must not know SQL (only the coordinator does; `sql-ping` and `sql-migrate` run the coordinator's program), nor
//! link a service: it meets them in `proto/`, in their configuration files and in their announcements.
//!
//! A command enters at [`run`]: `arguments` says what can be asked, `target` finds whom to ask, `commands` asks,
//! `views` are the stable shapes that `--json` prints and the tables are made of.
//!
//! Run the tests with `cargo test -p tabularium-cli`; those of whole clusters are in `crates/testkit`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line talks to its user")]

mod arguments;
mod commands;
mod demo;
mod failure;
pub mod local;
mod output;
mod target;
mod up;
mod views;

use std::process::ExitCode;

use clap::Parser as _;

/// Reads the command line, does what it says, and tells by the exit code how it went.
pub async fn run() -> ExitCode {
    let arguments = arguments::Arguments::parse();
    match commands::dispatch(arguments).await {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("tabularium: {failure}");
            failure.exit_code()
        }
    }
}
