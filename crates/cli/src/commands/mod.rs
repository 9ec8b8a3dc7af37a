//! One module per family of commands; each asks the services and prints what they answer.

mod check;
mod cluster;
mod corruption;
mod losses;
mod rebuild;
pub(crate) mod repository;
mod sql;
mod storage;
pub(crate) mod takeover;

use std::process::ExitCode;

use losses::Losses;

use crate::{
    arguments::{Arguments, Command, Duties, Global, Repo},
    demo,
    failure::Failure,
    target::{CALL_DEADLINE, Target},
    up,
};

/// Exit code of an answer that is no.
pub(crate) const NO: u8 = 1;

pub(crate) fn yes_or_no(yes: bool) -> ExitCode {
    if yes { ExitCode::SUCCESS } else { ExitCode::from(NO) }
}

/// Does what the command line says.
pub(crate) async fn dispatch(arguments: Arguments) -> Result<ExitCode, Failure> {
    let Arguments { global, command } = arguments;
    match command {
        Command::Up(options) => up::run(&global, &options).await,
        Command::Demo(options) => demo::run(&global, &options).await,
        Command::Repo(command) => repo(&global, command).await,
        Command::Storage(command) => storage::run(&global, command).await,
        Command::Dataloss { unavailable } => Losses::of(&global).await?.dataloss(unavailable).await,
        Command::AcceptDataloss(options) => Losses::accept(&global, options).await,
        Command::Metadata(options) => Losses::of(&global).await?.metadata(options).await,
        Command::Reconcile => Losses::of(&global).await?.reconcile().await,
        Command::Verify(options) => Losses::of(&global).await?.verify(options).await,
        Command::Kept(command) => corruption::kept(&global, command).await,
        Command::TrackRepository(options) => Losses::of(&global).await?.track(options).await,
        Command::ListUntracked { older_than } => Losses::of(&global).await?.list_untracked(older_than).await,
        Command::Praefect { arguments } => Err(takeover::praefect(arguments)),
        Command::ImportPraefect(options) => takeover::import(&global, options).await,
        Command::TrackUntracked(options) => takeover::track_untracked(&global, options).await,
        Command::Rebuild(options) => rebuild::run(&global, &options).await,
        Command::Status => cluster::status(&Target::resolve(&global)?, global.json).await,
        Command::Duties(Duties::List { state, limit }) => {
            cluster::duties(&Target::resolve(&global)?, state.unwrap_or_default(), limit, global.json).await
        }
        Command::Duties(Duties::Retry { id }) => {
            cluster::retry(&Target::resolve(&global)?, id, global.json).await
        }
        Command::SqlPing(options) => {
            let words = ("--sql-ping", "the database answers");
            sql::run(&Target::resolve(&global)?, &options, words, global.json).await
        }
        Command::SqlMigrate(options) => {
            let words = ("--migrate-only", "the database's tables are up to date");
            sql::run(&Target::resolve(&global)?, &options, words, global.json).await
        }
        Command::DialNodes => cluster::dial_nodes(&Target::resolve(&global)?, global.json).await,
        Command::Check => check::run(&Target::resolve(&global)?, global.json).await,
    }
}

async fn repo(global: &Global, command: Repo) -> Result<ExitCode, Failure> {
    let target = Target::resolve(global)?;
    let repositories = repository::Repositories { target: &target, global };
    let done = match command {
        Repo::Create { path, default_branch } => repositories.create(&path, &default_branch).await,
        Repo::List { prefix, limit } => repositories.list(&prefix, limit).await,
        Repo::Show { path } => repositories.show(&path).await,
        Repo::Remove { path, yes } => repositories.remove(&path, yes).await,
        Repo::Rename { path, new_path } => repositories.rename(&path, &new_path).await,
        Repo::SetReplicationFactor { path, factor } => {
            return Losses::of(global).await?.set_replication_factor(&path, factor).await;
        }
        Repo::SetWriteQuorum { path, policy } => {
            return Losses::of(global).await?.set_write_quorum(&path, policy).await;
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// A request that gives up after [`CALL_DEADLINE`].
pub(crate) fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_DEADLINE);
    request
}
