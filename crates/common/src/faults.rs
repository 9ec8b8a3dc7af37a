//! Crash points and switched-off safety steps: how tests strike at one chosen moment.
//!
//! Compiled in always, so that what is tested is what ships, and inert unless [`VARIABLE`] names a directory. Then a
//! process that passes a [`CrashPoint`] whose name is a file in that directory removes the file and aborts, as `kill -9`
//! would; and a [`SafetyStep`] whose name is a file there is left out while the file exists. The second exists for one
//! purpose: to show that a test would notice if the step were missing.
//!
//! A service that listens beyond the loopback interface refuses to start with the variable set (exit code 78): on a
//! machine that serves others, no environment may take a promise away. [`crate::program::ServiceArguments::load`] asks.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use crate::grpc::ListenAddress;

/// Names the directory in which crash points are armed and safety steps are switched off.
pub const VARIABLE: &str = "TABULARIUM_TEST_FAULTS";

/// Set once, before the service starts. Never set in a service that nobody tests.
static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();

macro_rules! names {
    ($(#[$attribute:meta])* $kind:ident { $($(#[$doc:meta])* $variant:ident => $name:literal,)* }) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $kind {
            $($(#[$doc])* $variant,)*
        }

        impl $kind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The name of its file: the service, a dot, the moment.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The service that has it.
            pub fn service(self) -> &'static str {
                self.name().split('.').next().unwrap_or_default()
            }
        }
    };
}

names! {
    /// A moment at which a process may be made to die.
    CrashPoint {
        /// The coordinator has promised the write, nobody has been told to go on.
        RouterAfterTicket => "router.after_ticket",
        /// The votes of the quorum have been answered; the nodes apply the change now.
        RouterAfterVote => "router.after_vote",
        /// The nodes have applied the change, the coordinator does not know.
        RouterBeforeRecord => "router.before_record",
        /// The change is recorded, the client does not know.
        RouterAfterRecord => "router.after_record",
        /// The intent is in the database, the router does not know.
        CoordinatorAfterBegin => "coordinator.after_begin",
        /// A commit has been asked for, nothing is in the database.
        CoordinatorBeforeCommit => "coordinator.before_commit",
        /// The commit is in the database; nothing has been revoked, nobody has been told.
        CoordinatorAfterCommit => "coordinator.after_commit",
        /// The routes are revoked, the router does not know.
        CoordinatorAfterRevocation => "coordinator.after_revocation",
        /// A settlement is decided, nothing is in the database.
        CoordinatorBeforeSettlement => "coordinator.before_settlement",
    }
}

names! {
    /// A step without which a promise is broken.
    SafetyStep {
        /// Writes without taking the repository's ticket.
        RouterTicket => "router.ticket",
        /// Answers votes however few nodes have cast the same one. Coordinators have this step too and record the write
        /// however few storages have it: left out in routers alone, their count would stand in for it.
        RouterQuorum => "router.quorum",
        /// Lets the client's answer go before the write is recorded.
        RouterRecordBeforeAnswer => "router.record_before_answer",
        /// Uses a cached route though the session's lease has run out.
        RouterRouteLease => "router.route_lease",
        /// Answers votes though the write's lease has run out.
        RouterWriteFence => "router.write_fence",
        /// Confirms a write before cached routes to replicas it left behind are revoked.
        CoordinatorRevocation => "coordinator.revocation",
        /// Counts everybody who took part as up to date, whatever they voted.
        CoordinatorCommittedOnly => "coordinator.committed_only",
        /// Applies a change though the vote was refused.
        NodeVote => "node.vote",
        /// Answers from a replica that is older than the database knows it to be.
        NodeExpectation => "node.expectation",
    }
}

/// Why the variable is refused.
#[derive(Debug, thiserror::Error)]
#[error(
    "{VARIABLE} is set, but `{key}` is `{value}`; with it, a service listens on the loopback interface only"
)]
pub struct Refused {
    key: String,
    value: String,
}

/// Reads the variable, once. `config` is the service's configuration file, which has to be that of a test.
pub fn prepare(config: &Path) -> Result<(), Refused> {
    let Some(directory) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) else { return Ok(()) };
    // A file that cannot be read or parsed is refused by whoever reads it next, with a better text.
    let text = fs::read_to_string(config).unwrap_or_default();
    if let Some((key, value)) = listens_beyond_loopback(&text.parse().unwrap_or_default()) {
        return Err(Refused { key, value });
    }
    // Set before: by an earlier call with the same variable.
    let _ = DIRECTORY.set(directory.into());
    Ok(())
}

fn listens_beyond_loopback(config: &toml::Table) -> Option<(String, String)> {
    let within = |value: &toml::Value| {
        let address = value.as_str().and_then(|text| text.parse::<ListenAddress>().ok());
        address.is_some_and(|address| match address {
            ListenAddress::Tcp(address) | ListenAddress::Tls(address) => address.ip().is_loopback(),
            ListenAddress::Unix(_) => true,
        })
    };
    config.iter().filter(|(key, _)| key.ends_with("listen")).find_map(|(key, value)| {
        let allowed = value.as_array().map_or_else(|| within(value), |all| all.iter().all(within));
        (!allowed).then(|| (key.clone(), value.to_string()))
    })
}

/// Ends the process here, at once and without a word to anybody, if a test has armed this point.
pub fn crash_point(point: CrashPoint) {
    if let Some(directory) = DIRECTORY.get()
        && armed(directory, point)
    {
        tracing::error!(point = point.name(), "a test ends this process here");
        std::process::abort();
    }
}

/// Whether a test has switched this step off.
pub fn is_off(step: SafetyStep) -> bool {
    DIRECTORY.get().is_some_and(|directory| directory.join(step.name()).exists())
}

/// Of several processes and threads that pass the point at once, the one that removes the file is struck.
fn armed(directory: &Path, point: CrashPoint) -> bool {
    match fs::remove_file(directory.join(point.name())) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => {
            tracing::warn!(%error, point = point.name(), "a crash point cannot be disarmed; passed");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_armed_point_strikes_once() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!armed(directory.path(), CrashPoint::RouterAfterTicket));
        fs::write(directory.path().join("router.after_ticket"), "").unwrap();
        assert!(!armed(directory.path(), CrashPoint::RouterAfterVote));
        assert!(armed(directory.path(), CrashPoint::RouterAfterTicket));
        assert!(!armed(directory.path(), CrashPoint::RouterAfterTicket));
    }

    #[test]
    fn nothing_is_armed_without_the_variable() {
        assert!(DIRECTORY.get().is_none());
        for point in CrashPoint::ALL {
            crash_point(*point);
        }
        assert!(SafetyStep::ALL.iter().all(|step| !is_off(*step)));
    }

    #[test]
    fn a_service_that_others_reach_is_refused() {
        let beyond = |text: &str| listens_beyond_loopback(&text.parse().unwrap());
        assert_eq!(beyond("listen = \"127.0.0.1:1\"\nadmin_listen = \"[::1]:0\""), None);
        assert_eq!(beyond("listen = [\"tcp://127.0.0.1:1\", \"tls://[::1]:2\", \"unix:/run/a\"]"), None);
        assert_eq!(beyond("listen = [\"tcp://127.0.0.1:1\", \"tls://10.0.0.1:2\"]").unwrap().0, "listen");
        assert_eq!(beyond("listen = \"0.0.0.0:2305\"").unwrap().0, "listen");
        assert_eq!(
            beyond("listen = \"127.0.0.1:1\"\nadmin_listen = \"10.0.0.1:9\"").unwrap().0,
            "admin_listen"
        );
        assert!(beyond("listen = 7").is_some());
    }

    #[test]
    fn names_say_the_service_and_are_unique() {
        let names = CrashPoint::ALL.iter().map(|point| point.name());
        let names: Vec<_> = names.chain(SafetyStep::ALL.iter().map(|step| step.name())).collect();
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        assert_eq!(CrashPoint::CoordinatorAfterBegin.service(), "coordinator");
    }
}
