//! The command line of operators, and whole clusters on one machine.
//!
//! The binary `tabularium` is for people: it asks the services over the same gRPC that they use among each other and
//! prints tables or JSON. The library half, [`local`], starts real processes of every service with a Postgres and a
//! NATS server of their own; `tabularium up` and the tests of the other crates share it, so that what the tests run is
//! what people run.
//!
//! It must not know SQL (only the coordinator does; `sql-ping` and `sql-migrate` run the coordinator's program), nor
//! link a service: it meets them in `proto/`, in their configuration files and in their announcements. In Praefect's
//! seat sits a program of its own, `tabularium-praefect`; this one becomes it when it is asked for Praefect's commands.
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

fn names_praefects_file(word: &str) -> bool {
    let flag = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
    flag.is_some_and(|flag| flag == "config" || flag.starts_with("config="))
}

/// Reads the command line, does what it says, and tells by the exit code how it went.
pub async fn run() -> ExitCode {
    // `tabularium -config FILE COMMAND` is Praefect's own command line.
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    if words.first().and_then(|word| word.to_str()).is_some_and(names_praefects_file) {
        let failure = commands::takeover::praefect(words);
        eprintln!("tabularium: {failure}");
        return failure.exit_code();
    }
    let arguments = arguments::Arguments::parse();
    match commands::dispatch(arguments).await {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("tabularium: {failure}");
            failure.exit_code()
        }
    }
}
