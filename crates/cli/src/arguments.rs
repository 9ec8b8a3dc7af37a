//! What can be asked on the command line.

use std::{ffi::OsString, path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand, ValueEnum};
use tabularium_common::grpc::Address;

/// Runs and looks after Tabularium clusters.
///
/// Exit codes: 0 yes; 1 the answer is no (not found, not healthy, refused); 2 the command line makes no sense;
/// 69 a service cannot be reached; 70 anything else.
///
/// Global options can be set in the environment too: TABULARIUM_STATE_DIR, TABULARIUM_COORDINATOR, TABULARIUM_ROUTER,
/// TABULARIUM_GATEWAY, TABULARIUM_COORDINATOR_TOKEN_FILE and TABULARIUM_ROUTER_TOKEN_FILE, and TABULARIUM_TLS_CA_PATH,
/// TABULARIUM_TLS_CERTIFICATE_PATH and TABULARIUM_TLS_KEY_PATH.
#[derive(Debug, Parser)]
#[command(name = "tabularium", version, arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Whom to ask, and how to answer.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Where `tabularium up` keeps everything
    ///
    /// The cluster that runs there is asked unless addresses are given.
    #[arg(long, global = true, value_name = "DIRECTORY", env = "TABULARIUM_STATE_DIR", hide_env = true)]
    #[arg(default_value = ".tabularium")]
    pub(crate) state_dir: PathBuf,
    /// Which site of that cluster.
    #[arg(long, global = true, value_name = "NAME", default_value = "home")]
    pub(crate) site: String,
    /// Coordinator to ask: tcp://host:port, tls://host:port, dns:host:port or unix:/path
    ///
    /// May be given several times; the first that answers is used.
    #[arg(
        long,
        global = true,
        value_name = "ADDRESS",
        env = "TABULARIUM_COORDINATOR",
        hide_env = true,
        value_delimiter = ','
    )]
    pub(crate) coordinator: Vec<Address>,
    /// File with the secret for coordinators.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "TABULARIUM_COORDINATOR_TOKEN_FILE",
        hide_env = true
    )]
    pub(crate) coordinator_token_file: Option<PathBuf>,
    /// Router to ask.
    #[arg(
        long,
        global = true,
        value_name = "ADDRESS",
        env = "TABULARIUM_ROUTER",
        hide_env = true,
        value_delimiter = ','
    )]
    pub(crate) router: Vec<Address>,
    /// File with the secret for routers.
    #[arg(long, global = true, value_name = "FILE", env = "TABULARIUM_ROUTER_TOKEN_FILE", hide_env = true)]
    pub(crate) router_token_file: Option<PathBuf>,
    /// Base URL of the gateway, for the URLs shown.
    #[arg(long, global = true, value_name = "URL", env = "TABULARIUM_GATEWAY", hide_env = true)]
    pub(crate) gateway: Option<String>,
    /// Authorities (PEM) that are believed at tls:// addresses, beside the system's.
    #[arg(long, global = true, value_name = "FILE", env = "TABULARIUM_TLS_CA_PATH", hide_env = true)]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Certificate (PEM) that is shown to services that ask for one.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "TABULARIUM_TLS_CERTIFICATE_PATH",
        hide_env = true,
        requires = "tls_key"
    )]
    pub(crate) tls_certificate: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "TABULARIUM_TLS_KEY_PATH",
        hide_env = true,
        requires = "tls_certificate"
    )]
    pub(crate) tls_key: Option<PathBuf>,
    /// Virtual storage of the repositories.
    #[arg(long, global = true, value_name = "NAME", default_value = "default")]
    pub(crate) virtual_storage: String,
    /// Print JSON instead of tables.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine until Ctrl-C: Postgres, NATS, every service, and a mirror site.
    Up(Up),
    /// Show the main job by itself: push, clone, equal replicas, equal mirror; then leave nothing running.
    #[command(hide = true)]
    Demo(Demo),
    /// Repositories.
    #[command(subcommand)]
    Repo(Repo),
    /// The cluster as its coordinator sees it. Exit code 1 when something is wrong.
    Status,
    /// Storages that come and go.
    #[command(subcommand)]
    Storage(Storage),
    /// Repositories of which a replica is behind, or that nobody can serve. Exit code 1 when one cannot be served.
    Dataloss {
        /// Only what nobody can serve.
        #[arg(long)]
        unavailable: bool,
    },
    /// Make one replica of a repository the truth; what only the others have is lost.
    AcceptDataloss(AcceptDataLoss),
    /// All that is known of one repository's replicas.
    Metadata(Metadata),
    /// Owe whatever is missing its copy, now.
    Reconcile,
    /// Have replicas compared with each other again soon, or git look through their objects. Exit code 1 when one is damaged.
    Verify(Verify),
    /// Corrupt replicas that nodes kept aside when they were made again.
    #[command(subcommand)]
    Kept(Kept),
    /// Make a repository known that is on a storage and in no record.
    TrackRepository(TrackRepository),
    /// Repositories on storages that are in no record.
    ListUntracked {
        /// Only what has not changed for so many seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 6 * 3600)]
        older_than: u32,
    },
    /// Praefect's commands, with its configuration file: praefect -config FILE COMMAND
    ///
    /// Without a command it serves, in Praefect's place. `tabularium -config FILE [COMMAND]` is the same.
    #[command(disable_help_flag = true)]
    Praefect {
        /// As for the praefect program.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
        arguments: Vec<OsString>,
    },
    /// Take over what Praefect's database says: repositories, replicas, assignments. Exit code 1 when one is left out.
    ImportPraefect(ImportPraefect),
    /// Track every repository on storages that is in no record, under the name that its path is. Exit code 1 when one is
    /// left out.
    TrackUntracked(TrackUntracked),
    /// Make a lost database anew from what nodes keep beside their replicas. Exit code 1 when something is to be looked at.
    Rebuild(Rebuild),
    /// Work that is owed: copies, removals, notifications.
    #[command(subcommand)]
    Duties(Duties),
    /// Check that the database answers, with the coordinator's own configuration.
    SqlPing(Sql),
    /// Bring the database's tables up to date, and do nothing else.
    SqlMigrate(Sql),
    /// Ask every storage node for its health, now. Exit code 1 when one is not well.
    DialNodes,
    /// Check everything, each with a hint when it fails. Exit code 1 when anything does.
    Check,
}

/// `tabularium up`.
#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Storage nodes of the home site.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=9))]
    pub(crate) nodes: u16,
    /// Coordinators of the home site.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=9))]
    pub(crate) coordinators: u16,
    /// Routers of the home site.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=9))]
    pub(crate) routers: u16,
    /// Replicators of the home site.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=9))]
    pub(crate) replicators: u16,
    /// Without the mirror site.
    #[arg(long)]
    pub(crate) no_mirror: bool,
    /// Listen on consecutive ports from this one; 0 lets the kernel choose. Default: the documented port of each
    /// service (router 2305, gateway 8080, ...).
    #[arg(long, value_name = "PORT")]
    pub(crate) base_port: Option<u16>,
    /// What services speak over. tls: with --tls-certificate, --tls-key and --tls-ca, which have to be good for 127.0.0.1.
    #[arg(long, value_name = "TRANSPORT", value_enum, default_value_t)]
    pub(crate) over: Over,
    /// What services log, in `tracing` filter syntax.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub(crate) log_filter: String,
}

/// What the services of `tabularium up` speak over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Over {
    /// TCP.
    #[default]
    Tcp,
    /// TLS, HTTP too.
    Tls,
    /// Socket files; HTTP is TCP.
    Sockets,
}

/// `tabularium demo`.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Checkout whose history is pushed.
    #[arg(long, value_name = "DIRECTORY", default_value = ".")]
    pub(crate) source: PathBuf,
}

/// `tabularium repo`.
#[derive(Debug, Subcommand)]
pub(crate) enum Repo {
    /// Create an empty repository.
    Create {
        /// `group/project`; `.git` is added.
        path: String,
        /// Branch that HEAD names.
        #[arg(long, value_name = "BRANCH", default_value = "main")]
        default_branch: String,
    },
    /// List repositories by name.
    List {
        /// Only names that start with this.
        #[arg(default_value = "")]
        prefix: String,
        /// At most so many.
        #[arg(long, value_name = "N", default_value_t = 1000)]
        limit: u32,
    },
    /// Show one repository with all of its replicas.
    Show {
        /// `group/project`.
        path: String,
    },
    /// Remove a repository for good, with all of its replicas.
    Remove {
        /// `group/project`.
        path: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Change a repository's name. No data moves.
    Rename {
        /// `group/project`.
        path: String,
        /// `group/other`.
        new_path: String,
    },
    /// Set how many storages hold a repository; replicas come and go while clients work.
    SetReplicationFactor {
        /// `group/project`.
        path: String,
        /// 1 or more, all, or default: as the virtual storage says.
        factor: Factor,
    },
    /// Set how many replicas must have a write before it is acknowledged.
    SetWriteQuorum {
        /// `group/project`.
        path: String,
        /// majority, available (one is enough), or default: as the virtual storage says.
        #[arg(value_parser = ["majority", "available", "default"])]
        policy: String,
    },
}

/// How many storages are to hold a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Factor {
    /// All of them.
    All,
    /// As the virtual storage says.
    Default,
    /// So many.
    Of(u16),
}

impl FromStr for Factor {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            "default" => Ok(Self::Default),
            text => match text.parse() {
                Ok(count) if count > 0 => Ok(Self::Of(count)),
                _ => Err("allowed: 1 or more, all, default".to_owned()),
            },
        }
    }
}

/// `tabularium storage`.
#[derive(Debug, Subcommand)]
pub(crate) enum Storage {
    /// List storages with what they hold and what moves. Exit code 1 when one is not healthy.
    List,
    /// Make a storage known to routers, and a place for replicas.
    Add {
        /// As its node calls it.
        name: String,
        /// Where its node is reached: tcp://host:port or unix:/path
        #[arg(long, value_name = "ADDRESS")]
        address: Address,
    },
    /// Move everything away from a storage, a few replicas at a time, and follow it.
    Drain {
        /// Its name.
        name: String,
        /// Also when repositories will have fewer replicas than they should.
        #[arg(long)]
        allow_fewer_replicas: bool,
        /// Do not follow it.
        #[arg(long)]
        no_wait: bool,
    },
    /// Keep a storage that was to be drained.
    Undrain {
        /// Its name.
        name: String,
    },
    /// Forget a storage that holds nothing.
    Remove {
        /// Its name.
        name: String,
        /// Also when it holds something, which is given up for lost.
        #[arg(long)]
        force_lost: bool,
    },
    /// Use a storage with the disk that is in it now, and make its replicas again there.
    Accept {
        /// Its name.
        name: String,
        /// Also when only the disk before had the newest state of something, which is given up for lost.
        #[arg(long)]
        force_lost: bool,
    },
}

/// `tabularium accept-dataloss`.
#[derive(Debug, Args)]
pub(crate) struct AcceptDataLoss {
    /// `group/project`.
    pub(crate) path: String,
    /// Storage whose replica becomes the truth.
    #[arg(long, value_name = "STORAGE")]
    pub(crate) authoritative_storage: String,
    /// Do not ask.
    #[arg(long)]
    pub(crate) yes: bool,
}

/// `tabularium import-praefect`.
#[derive(Debug, Args)]
pub(crate) struct ImportPraefect {
    /// Praefect's database: postgres://user:password@host:port/database, as the coordinator reaches it
    ///
    /// Absent: it is the coordinator's own.
    #[arg(long, value_name = "URL", env = "TABULARIUM_PRAEFECT_DSN", hide_env_values = true)]
    pub(crate) dsn: Option<String>,
    /// Schema of Praefect's tables.
    #[arg(long, value_name = "NAME", default_value = "public")]
    pub(crate) schema: String,
    /// Only look, and write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// `tabularium track-untracked`.
#[derive(Debug, Args)]
pub(crate) struct TrackUntracked {
    /// Only what has not changed for so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 6 * 3600)]
    pub(crate) older_than: u32,
    /// Storage whose copy counts, of what several have.
    #[arg(long, value_name = "STORAGE")]
    pub(crate) authoritative_storage: Option<String>,
    /// Only look, and write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// `tabularium rebuild`.
#[derive(Debug, Args)]
pub(crate) struct Rebuild {
    /// Only look, and write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Add what is missing to a database that is not empty.
    #[arg(long)]
    pub(crate) add_missing: bool,
    /// Go on without storages that cannot be read. What only they have is not found.
    #[arg(long)]
    pub(crate) without_unreachable: bool,
}

/// `tabularium metadata`.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Metadata {
    /// `group/project`.
    pub(crate) path: Option<String>,
    /// The repository's id instead.
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<i64>,
}

/// `tabularium verify`.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    #[command(flatten)]
    pub(crate) which: Replicas,
    /// Look through all objects
    ///
    /// Of one repository now, and what is damaged is made again; of a storage, or of all, as soon as their turn comes.
    #[arg(long)]
    pub(crate) fsck: bool,
}

/// Which replicas.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Replicas {
    /// `group/project`.
    pub(crate) path: Option<String>,
    /// All replicas of one storage instead.
    #[arg(long, value_name = "STORAGE")]
    pub(crate) storage: Option<String>,
    /// All replicas.
    #[arg(long)]
    pub(crate) all: bool,
}

/// `tabularium kept`.
#[derive(Debug, Subcommand)]
pub(crate) enum Kept {
    /// List them, with why they were made again and where they are. Exit code 1 when a storage cannot be asked.
    List {
        /// Only of one storage.
        #[arg(long, value_name = "STORAGE")]
        storage: Option<String>,
    },
    /// Remove one.
    Remove {
        /// Its storage.
        storage: String,
        /// Its id, from `kept list`.
        id: String,
    },
}

/// `tabularium track-repository`.
#[derive(Debug, Args)]
pub(crate) struct TrackRepository {
    /// `group/project`, as clients are to know it.
    pub(crate) path: String,
    /// Where it is below the storage.
    #[arg(long, value_name = "PATH")]
    pub(crate) replica_path: String,
    /// Storage that has it.
    #[arg(long, value_name = "STORAGE")]
    pub(crate) authoritative_storage: String,
}

/// `tabularium duties`.
#[derive(Debug, Subcommand)]
pub(crate) enum Duties {
    /// List what is owed, or what is in one state.
    List {
        /// pending, published, started, done or parked.
        #[arg(long, value_parser = ["pending", "published", "started", "done", "parked"])]
        state: Option<String>,
        /// At most so many.
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: u32,
    },
    /// Put a parked duty back to work.
    Retry {
        /// Its id, from `duties list --state parked`.
        id: String,
    },
}

/// `tabularium sql-ping` and `sql-migrate`.
#[derive(Debug, Args)]
pub(crate) struct Sql {
    /// The coordinator's configuration file. Default: that of the local cluster.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn global_options_may_follow_the_command() {
        let arguments =
            Arguments::try_parse_from(["tabularium", "status", "--json", "--coordinator", "tcp://a:1"])
                .unwrap();
        assert!(arguments.global.json);
        assert_eq!(arguments.global.coordinator, [Address::Tcp("a:1".into())]);
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        for line in [
            &["tabularium", "status", "--coordinator", "a:1"][..],
            &["tabularium", "up", "--nodes", "0"],
            &["tabularium", "duties", "list", "--state", "lost"],
            &["tabularium", "repo", "show"],
            &["tabularium", "repo", "set-replication-factor", "a", "0"],
            &["tabularium", "repo", "set-write-quorum", "a", "some"],
            &["tabularium", "storage", "add", "n"],
            &["tabularium", "verify"],
            &["tabularium", "verify", "--fsck"],
            &["tabularium", "verify", "a", "--all"],
            &["tabularium", "kept", "remove", "node-1"],
            &["tabularium", "metadata", "a", "--id", "1"],
        ] {
            let error = Arguments::try_parse_from(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line:?}");
        }
    }
}
