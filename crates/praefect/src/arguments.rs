//! Praefect's command line. Flags have one dash or two, as in Go's programs; `-config` stands before the command.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand, error::ErrorKind};

use crate::file::duration::GoDuration;

/// The version of Praefect whose place is taken. Clients of Gitaly look at no other.
pub(crate) const VERSION: &str =
    concat!("Praefect, version 16.11.0 (Tabularium ", env!("CARGO_PKG_VERSION"), ")");

/// Praefect's seat: router, coordinator and replicator in one process, with Praefect's file and Praefect's commands.
#[derive(Debug, Parser)]
#[command(name = "praefect", disable_help_subcommand = true)]
pub(crate) struct Arguments {
    /// Load configuration from FILE.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Print the version.
    #[arg(long, short = 'v')]
    pub(crate) version: bool,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// What to do; nothing: serve.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the process.
    Serve,
    /// Look at the configuration.
    #[command(subcommand)]
    Configuration(Configuration),
    /// Accept potential data loss in a repository.
    AcceptDataloss(AcceptDataloss),
    /// Run startup checks.
    Check(Check),
    /// Identify potential data loss in repositories.
    Dataloss(Dataloss),
    /// Check connections.
    DialNodes(DialNodes),
    /// List physical storages for virtual storages.
    ListStorages(ListStorages),
    /// List untracked repositories.
    ListUntrackedRepositories(ListUntracked),
    /// Track a repository.
    TrackRepository(TrackRepository),
    /// Track the repositories that a file lists, one JSON object a line.
    TrackRepositories(TrackRepositories),
    /// Mark repository replicas as unverified.
    Verify(Verify),
    /// Show metadata about a repository.
    Metadata(Metadata),
    /// Owe whatever is missing its copy, now.
    Reconcile(Reconcile),
    /// Check that the database can be reached.
    SqlPing,
    /// Apply outstanding SQL migrations.
    SqlMigrate(SqlMigrate),
    /// Apply revert SQL migrations.
    SqlMigrateDown(SqlMigrateDown),
    /// Show the state of SQL migrations.
    SqlMigrateStatus,
    /// Remove a repository.
    RemoveRepository(RemoveRepository),
    /// Set a replication factor for a repository.
    SetReplicationFactor(SetReplicationFactor),
    /// Take over what Praefect's own tables in the same database say.
    ImportPraefect(ImportPraefect),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Configuration {
    /// Validate the configuration that is given on standard input.
    Validate,
}

/// A repository as clients name it.
#[derive(Debug, Args)]
pub(crate) struct Repository {
    /// Name of the repository's virtual storage.
    #[arg(long)]
    pub(crate) virtual_storage: String,
    /// Relative path of the repository on the virtual storage.
    #[arg(long, alias = "repository")]
    pub(crate) relative_path: String,
}

#[derive(Debug, Args)]
pub(crate) struct AcceptDataloss {
    #[command(flatten)]
    pub(crate) repository: Repository,
    /// Physical storage whose replica becomes authoritative.
    #[arg(long)]
    pub(crate) authoritative_storage: String,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Do not print verbose output for each check.
    #[arg(short)]
    pub(crate) q: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Dataloss {
    /// Only this virtual storage.
    #[arg(long, default_value = "")]
    pub(crate) virtual_storage: String,
    /// Include repositories that are available but some assigned replicas are not.
    #[arg(long)]
    pub(crate) partially_unavailable: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DialNodes {
    /// Timeout for dialing Gitaly nodes.
    #[arg(long, default_value = "0s")]
    pub(crate) timeout: GoDuration,
}

#[derive(Debug, Args)]
pub(crate) struct ListStorages {
    /// Only this virtual storage.
    #[arg(long, default_value = "")]
    pub(crate) virtual_storage: String,
}

#[derive(Debug, Args)]
pub(crate) struct ListUntracked {
    /// String used as a delimiter in output.
    #[arg(long, default_value = "\n", hide_default_value = true)]
    pub(crate) delimiter: String,
    /// Only include repositories created before this duration.
    #[arg(long, default_value = "6h")]
    pub(crate) older_than: GoDuration,
}

#[derive(Debug, Args)]
pub(crate) struct TrackRepository {
    #[command(flatten)]
    pub(crate) repository: Repository,
    /// Path of the repository on the physical storage.
    #[arg(long)]
    pub(crate) replica_path: String,
    /// Physical storage to consider as authoritative for the repository.
    #[arg(long)]
    pub(crate) authoritative_storage: String,
    /// Wait until it is replicated.
    #[arg(long)]
    pub(crate) replicate_immediately: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TrackRepositories {
    /// Path to file with details of repositories to track.
    #[arg(long)]
    pub(crate) input_path: PathBuf,
    /// Wait until they are replicated.
    #[arg(long)]
    pub(crate) replicate_immediately: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The repository's id.
    #[arg(long, default_value_t = 0)]
    pub(crate) repository_id: i64,
    /// All replicas of this virtual storage.
    #[arg(long, default_value = "")]
    pub(crate) virtual_storage: String,
    /// Only those on this physical storage.
    #[arg(long, default_value = "")]
    pub(crate) storage: String,
}

#[derive(Debug, Args)]
pub(crate) struct Metadata {
    /// The repository's id.
    #[arg(long, default_value_t = 0)]
    pub(crate) repository_id: i64,
    /// The repository's virtual storage.
    #[arg(long, default_value = "")]
    pub(crate) virtual_storage: String,
    /// The repository's relative path in the virtual storage.
    #[arg(long, default_value = "")]
    pub(crate) relative_path: String,
}

/// Of Praefect 13, whose flags said what to compare. It is read from the records since.
#[derive(Debug, Args)]
pub(crate) struct Reconcile {
    /// Without effect: every virtual storage.
    #[arg(long, hide = true)]
    pub(crate) virtual_storage: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct SqlMigrate {
    /// Ignore unknown migrations.
    #[arg(long, default_value = "true", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) ignore_unknown: String,
    /// Show each migration.
    #[arg(long)]
    pub(crate) verbose: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SqlMigrateDown {
    /// Apply them.
    #[arg(short)]
    pub(crate) f: bool,
    /// How many.
    pub(crate) migrations: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RemoveRepository {
    #[command(flatten)]
    pub(crate) repository: Repository,
    /// Remove it, instead of only looking for it.
    #[arg(long)]
    pub(crate) apply: bool,
    /// Remove its records only, and leave it on disk.
    #[arg(long)]
    pub(crate) db_only: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SetReplicationFactor {
    #[command(flatten)]
    pub(crate) repository: Repository,
    /// How many storages are to hold it.
    #[arg(long)]
    pub(crate) replication_factor: u32,
}

#[derive(Debug, Args)]
pub(crate) struct ImportPraefect {
    /// Only look, and write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Schema of Praefect's tables.
    #[arg(long, default_value = "public")]
    pub(crate) schema: String,
}

/// Reads a command line whose first word is the program's name. An error has been told when the exit code comes back.
pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Arguments, ExitCode> {
    Arguments::try_parse_from(words.into_iter().map(two_dashes)).map_err(|error| tell(&error))
}

/// What Go's programs read as a flag, as clap reads it: `-config` is `--config`. A single letter is left alone.
fn two_dashes(word: OsString) -> OsString {
    match word.to_str() {
        Some(text)
            if text.starts_with('-')
                && text[1..].starts_with(|c: char| c.is_ascii_alphabetic())
                && text[1..].split('=').next().is_some_and(|name| name.len() > 1) =>
        {
            format!("-{text}").into()
        }
        _ => word,
    }
}

/// Tells of a command line that cannot be used. In Praefect's words where scripts may look for them.
fn tell(error: &clap::Error) -> ExitCode {
    if error.kind() == ErrorKind::DisplayHelp {
        // Standard output; whoever closed it does not want to be told.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let _ = error.print();
    if let Some(missing) = missing_flags(error) {
        eprintln!("{missing}");
    }
    ExitCode::FAILURE
}

fn missing_flags(error: &clap::Error) -> Option<String> {
    use clap::error::{ContextKind, ContextValue};
    if error.kind() != ErrorKind::MissingRequiredArgument {
        return None;
    }
    let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg) else { return None };
    let names: Vec<_> = missing
        .iter()
        .map(|text| text.trim_start_matches('-').split(' ').next().unwrap_or_default())
        .collect();
    let plural = if names.len() == 1 { "" } else { "s" };
    Some(format!("Required flag{plural} {:?} not set", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn read(line: &str) -> Result<Arguments, clap::Error> {
        let words = line.split(' ').map(|word| two_dashes(word.into()));
        Arguments::try_parse_from(std::iter::once("praefect".into()).chain(words))
    }

    #[test]
    fn flags_have_one_dash_or_two() {
        Arguments::command().debug_assert();
        for line in [
            "-config F dataloss -partially-unavailable -virtual-storage v",
            "--config=F dataloss --partially-unavailable --virtual-storage=v",
            "-config=F dataloss -partially-unavailable -virtual-storage=v",
        ] {
            let arguments = read(line).unwrap();
            assert_eq!(arguments.config.as_deref(), Some(std::path::Path::new("F")), "{line}");
            let Some(Command::Dataloss(dataloss)) = arguments.command else { panic!("{line}") };
            assert!(dataloss.partially_unavailable && dataloss.virtual_storage == "v", "{line}");
        }
        assert!(read("-config F").unwrap().command.is_none());
        assert!(read("-version").unwrap().version && read("-v").unwrap().version);
        let Some(Command::Check(check)) = read("-config F check -q").unwrap().command else { panic!() };
        assert!(check.q);
        let migrate = read("-config F sql-migrate -ignore-unknown=false").unwrap().command;
        assert!(
            matches!(migrate, Some(Command::SqlMigrate(SqlMigrate { ignore_unknown, .. })) if ignore_unknown == "false")
        );
    }

    #[test]
    fn missing_flags_are_told_as_praefect_tells_them() {
        let error = read("-config F track-repository -replica-path p").unwrap_err();
        assert_eq!(
            missing_flags(&error).unwrap(),
            r#"Required flags "virtual-storage, relative-path, authoritative-storage" not set"#
        );
        let error = read("-config F track-repositories").unwrap_err();
        assert_eq!(missing_flags(&error).unwrap(), r#"Required flag "input-path" not set"#);
        assert!(missing_flags(&read("-config F nonsense").unwrap_err()).is_none());
    }
}
