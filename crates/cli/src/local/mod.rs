//! A whole cluster on one machine: Postgres, NATS and every service as real processes.
//!
//! Whoever starts a process here also guards it: [`process::Guarded`] sees to it that a child never outlives this
//! process, however it ends.

pub mod cluster;
pub mod git;
pub(crate) mod http;
pub mod nats;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod recipe;
pub mod record;
pub mod service;
mod tokens;
pub mod transport;

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why something local could not be started or steered.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// A program that has to be installed.
    #[error("{program} was not found; {hint}")]
    MissingProgram {
        /// Its name.
        program: String,
        /// How to get it.
        hint: String,
    },
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A process ended or did not become ready in time.
    #[error("{process} {problem}; the end of {}:\n{tail}", log.display())]
    Process {
        /// Its name.
        process: String,
        /// What it did or did not do.
        problem: String,
        /// Its log.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// Anything that the caller asked for and cannot have.
    #[error("{0}")]
    Refused(String),
}

/// Adds what was tried to an error of the operating system.
pub(crate) fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> LocalError {
    let what = what.into();
    move |source| LocalError::Io { what, source }
}

/// The program of that name on `PATH`.
pub(crate) fn find_on_path(name: &str) -> Option<PathBuf> {
    // Where servers are kept, though seldom on the path of an ordinary user.
    let usual = ["/usr/sbin", "/usr/local/sbin", "/usr/local/bin"].map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(usual)
        .map(|directory| directory.join(name))
        .find(|file| is_program(file))
}

pub(crate) fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}
