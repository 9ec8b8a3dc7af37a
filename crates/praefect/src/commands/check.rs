//! `check`: whether everything is as it has to be for a start.

use std::time::Duration;

use tabularium_coordinator::{migrations, read_write};
use tabularium_proto::gitaly::{DatalossRequest, praefect_info_service_client::PraefectInfoServiceClient};

use super::{Failure, Out, client::dial_within, database, nodes};
use crate::{arguments::Check, file::File};

/// How long one check may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How much of it may go by until something listens where the process would serve: before it has started nothing does.
const FOR_DIALLING: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Severity {
    Warning,
    Fatal,
}

impl Severity {
    fn name(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Fatal => "fatal",
        }
    }
}

#[derive(Clone, Copy)]
enum What {
    Migrations,
    Nodes,
    Database,
    Repositories,
}

const CHECKS: [(What, &str, &str, Severity); 4] = [
    (
        What::Migrations,
        "praefect migrations",
        "confirms whether or not all praefect migrations have run",
        Severity::Fatal,
    ),
    (
        What::Nodes,
        "gitaly node connectivity & disk access",
        "confirms if praefect can reach all of its gitaly nodes, and whether or not the gitaly nodes can read/write from and to its storages.",
        Severity::Fatal,
    ),
    (
        What::Database,
        "database read/write",
        "checks if praefect can write/read to and from the database",
        Severity::Fatal,
    ),
    (
        What::Repositories,
        "unavailable repositories",
        "lists repositories that are missing a valid primary, hence rendering them unavailable",
        Severity::Warning,
    ),
];

/// `check`.
pub(super) async fn check(file: &File, how: &Check, out: Out<'_>) -> Result<(), Failure> {
    let (mut failed, mut fatal) = (0, false);
    for (what, name, description, severity) in CHECKS {
        let severity_name = severity.name();
        if how.q {
            write!(out, "Checking {name}...")?;
        } else {
            writeln!(out, "Checking {name} - {description} [{severity_name}]")?;
        }
        let checked = tokio::time::timeout(PATIENCE, run(what, file, how.q, out)).await;
        let outcome = checked.unwrap_or_else(|_| Err(Failure::Told("context deadline exceeded".to_owned())));
        match outcome {
            Ok(()) => writeln!(out, "Passed")?,
            Err(error @ Failure::Output(_)) => return Err(error),
            Err(error) => {
                failed += 1;
                fatal |= severity == Severity::Fatal;
                writeln!(out, "Failed ({severity_name}) error: {error}")?;
            }
        }
    }
    writeln!(out)?;
    if fatal {
        writeln!(out, "{failed} check(s) failed, at least one was fatal.")?;
        return Err(Failure::Told("checks failed".to_owned()));
    }
    if failed > 0 {
        writeln!(out, "{failed} check(s) failed, but none are fatal.")?;
    } else {
        writeln!(out, "All checks passed.")?;
    }
    Ok(())
}

async fn run(what: What, file: &File, quiet: bool, out: Out<'_>) -> Result<(), Failure> {
    let mut tell = |line: String| if quiet { Ok(()) } else { writeln!(out, "{line}") };
    match what {
        What::Migrations => {
            let found = migrations(&database::config(file)?).await?;
            match found.iter().filter(|migration| migration.applied_at.is_none()).count() {
                0 => Ok(()),
                missing => Err(Failure::Told(format!("{missing} migrations have not been run"))),
            }
        }
        What::Nodes => nodes::ping_all(file, PATIENCE, &mut tell).await,
        What::Database => {
            read_write(&database::config(file)?).await?;
            tell("successfully read from database".to_owned())?;
            Ok(tell("successfully wrote to database".to_owned())?)
        }
        What::Repositories => {
            let mut client =
                PraefectInfoServiceClient::new(dial_within(FOR_DIALLING, file, "error dialing").await?);
            let mut any = false;
            for known in &file.virtual_storages {
                let request = DatalossRequest {
                    virtual_storage: known.name.clone(),
                    include_partially_replicated: false,
                };
                let mut answers = client.dataloss(request).await?.into_inner();
                let mut unavailable = 0;
                while let Some(answer) = answers.message().await? {
                    unavailable += answer.repositories.iter().filter(|found| found.unavailable).count();
                }
                if unavailable > 0 {
                    any = true;
                    let noun = if unavailable == 1 { "repository that is" } else { "repositories that are" };
                    tell(format!("virtual-storage {:?} has {unavailable} {noun} unavailable.", known.name))?;
                }
            }
            if any {
                return Err(Failure::Told("repositories unavailable".to_owned()));
            }
            Ok(tell("All repositories are available.".to_owned())?)
        }
    }
}
