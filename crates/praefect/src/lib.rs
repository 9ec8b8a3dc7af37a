//! Praefect's seat: whoever starts `praefect` can start this in its place.
//!
//! * `praefect -config FILE` serves: [`mod@file`] is Praefect's configuration file as its operators have it, [`translation`]
//!   says what it means to our services ([`private_key`] is for a key that stands in it), and [`process`] runs them beside
//!   each other in one process: router, coordinator and replicator. On SIGHUP [`handover`] puts a new process in its place.
//! * `praefect -config FILE COMMAND` does what Praefect's command of that name does, with its flags and its output:
//!   [`arguments`] reads the command line as Go's programs do, [`commands`] ask the process that serves, or the storage
//!   nodes, or have the coordinator's library look at the database.
//!
//! This is the one crate that links services. They are linked and not started as programs because a process that is put
//! in the place of another has to be one: one id that is signalled, one set of sockets that changes hands, one log. They
//! still meet as elsewhere, over gRPC, and none of them knows that the others are near.
//!
//! It must not know SQL, nor what the services do.
//!
//! Tests: `cargo test -p tabularium-praefect`; those in `tests/it` start the program against a real Postgres.

#![allow(clippy::print_stderr, reason = "a command line talks to its user")]

mod arguments;
mod commands;
mod file;
mod handover;
mod metrics;
mod private_key;
mod process;
mod translation;

use std::{ffi::OsString, process::ExitCode};

/// Does what the command line says, whose first word is the program's name.
pub fn run(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    match arguments::parse(words) {
        Ok(arguments) => commands::run(arguments),
        Err(code) => code,
    }
}
