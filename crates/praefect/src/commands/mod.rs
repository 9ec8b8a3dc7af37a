//! Praefect's commands: its flags, its texts, its exit codes.
//!
//! Those about repositories ask the process that serves, at the address that the file has; those about the database have
//! the coordinator's library look at it; those about nodes ask the nodes.

mod check;
mod client;
mod configuration;
mod database;
mod import;
mod nodes;
mod placement;
mod tracking;

use std::{io::Write, path::Path, process::ExitCode};

use tabularium_common::tls::{self, TlsConfig};
use tabularium_coordinator::RunError;
use tonic::Status;

use crate::{
    arguments::{Arguments, Command, Configuration, VERSION},
    file::{
        faults,
        read::{self, Read, ReadError},
    },
    process,
    translation::TranslationError,
};

/// Why a command did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// As it is to be told.
    #[error("{0}")]
    Told(String),
    /// A call was refused.
    #[error("{what}rpc error: code = {code:?} desc = {message}")]
    Refused { what: String, code: tonic::Code, message: String },
    /// What was found cannot be written to where it is wanted.
    #[error(transparent)]
    Output(#[from] std::io::Error),
    /// Everything has been told; only the exit code is left.
    #[error("")]
    Code(u8),
}

impl From<TranslationError> for Failure {
    fn from(error: TranslationError) -> Self {
        Self::Told(error.to_string())
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        Self::Told(error.to_string())
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        refused("")(status)
    }
}

/// A refused call, after the words for what was tried.
fn refused(what: &str) -> impl Fn(Status) -> Failure {
    let what = if what.is_empty() { String::new() } else { format!("{what}: ") };
    move |status| Failure::Refused {
        what: what.clone(),
        code: status.code(),
        message: status.message().to_owned(),
    }
}

/// Where a command writes what it found.
type Out<'a> = &'a mut (dyn Write + Send);

/// Reads the file and refuses one that Praefect would not start with.
pub(crate) fn read(path: &Path) -> Result<Read, String> {
    let read = read::read(path).map_err(|error: ReadError| format!("error reading config file: {error}"))?;
    match faults::fatal(&read.file) {
        Some(fault) => Err(format!("validating config: {fault}")),
        None => Ok(read),
    }
}

/// Does what the command line says.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    match dispatch(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Code(code)) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("praefect: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: Arguments) -> Result<(), Failure> {
    let mut out = std::io::stdout();
    if arguments.version {
        return Ok(writeln!(out, "{VERSION}")?);
    }
    let command = arguments.command.unwrap_or(Command::Serve);
    if let Command::Configuration(Configuration::Validate) = command {
        return configuration::validate(std::io::stdin().lock(), &mut out);
    }
    if matches!(command, Command::Serve) {
        let Some(path) = arguments.config else {
            eprintln!("Required flag \"config\" not set");
            return Err(Failure::Code(2));
        };
        return process::run(&path).map_err(Failure::Told);
    }
    let path = arguments.config.unwrap_or_default();
    let read = read(&path).map_err(Failure::Told)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            done = command_of(command, &read, &mut out) => done,
            // The exit code of a program that was interrupted.
            _ = tokio::signal::ctrl_c() => Err(Failure::Code(130)),
        }
    })
}

async fn command_of(command: Command, read: &Read, out: Out<'_>) -> Result<(), Failure> {
    let file = &read.file;
    tls::install(&TlsConfig::NONE);
    match command {
        // Done before.
        Command::Serve | Command::Configuration(_) => Ok(()),
        Command::ListStorages(which) => configuration::list_storages(file, &which, out),
        Command::SqlPing => database::ping(file, out).await,
        Command::SqlMigrate(how) => database::migrate(file, &how, out).await,
        Command::SqlMigrateDown(how) => database::migrate_down(&how),
        Command::SqlMigrateStatus => database::migrate_status(file, out).await,
        Command::DialNodes(how) => nodes::dial(file, &how, out).await,
        Command::Check(how) => check::check(file, &how, out).await,
        Command::Dataloss(which) => placement::dataloss(file, &which, out).await,
        Command::AcceptDataloss(which) => placement::accept_dataloss(file, which).await,
        Command::SetReplicationFactor(which) => placement::set_replication_factor(file, which, out).await,
        Command::Metadata(which) => placement::metadata(file, which, out).await,
        Command::Verify(which) => placement::verify(file, which, out).await,
        Command::Reconcile(_) => placement::reconcile(file, out).await,
        Command::TrackRepository(which) => tracking::track(file, which, out).await,
        Command::TrackRepositories(which) => tracking::track_several(file, &which, out).await,
        Command::ListUntrackedRepositories(which) => tracking::list_untracked(file, &which, out).await,
        Command::RemoveRepository(which) => tracking::remove(file, which, out).await,
        Command::ImportPraefect(how) => import::import(file, how, out).await,
    }
}
