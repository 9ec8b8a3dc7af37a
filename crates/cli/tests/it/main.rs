//! The program as its users run it. Tests of `up` need the programs of all services: `cargo build --bins`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod answers;
mod compose;
mod up;

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

/// The program, blind to the environment's addresses, with its state directory.
fn tabularium(state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tabularium"));
    for variable in
        ["TABULARIUM_STATE_DIR", "TABULARIUM_COORDINATOR", "TABULARIUM_ROUTER", "TABULARIUM_GATEWAY"]
    {
        command.env_remove(variable);
    }
    command.arg("--state-dir").arg(state).stdin(Stdio::null());
    command
}

fn run(state: &Path, arguments: &[&str]) -> (i32, Output) {
    let output = tabularium(state).args(arguments).output().unwrap();
    (output.status.code().unwrap(), output)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
