//! Commands about the database. The coordinator's library knows it; here are only the words.

use tabularium_coordinator::{Config, migrate as bring_up_to_date, migrations};

use super::{Failure, Out, placement::go_time};
use crate::{
    arguments::{SqlMigrate, SqlMigrateDown},
    file::File,
    translation::coordinator_config,
};

/// A configuration for looking at the database only.
pub(super) fn config(file: &File) -> Result<Config, Failure> {
    Ok(coordinator_config(file, "127.0.0.1:0")?)
}

/// `sql-ping`: whether it can be reached, whatever is in it.
pub(super) async fn ping(file: &File, out: Out<'_>) -> Result<(), Failure> {
    migrations(&config(file)?).await.map_err(|error| Failure::Told(format!("sql open: {error}")))?;
    Ok(writeln!(out, "praefect sql-ping: OK")?)
}

/// `sql-migrate`.
pub(super) async fn migrate(file: &File, how: &SqlMigrate, out: Out<'_>) -> Result<(), Failure> {
    let mut config = config(file)?;
    // Whoever runs this wants to know now.
    config.timing.database_start = tabularium_common::config::ConfigDuration::from_secs(30);
    let before = migrations(&config).await?;
    if how.ignore_unknown == "false"
        && let Some(unknown) = before.iter().find(|migration| migration.unknown)
    {
        return Err(Failure::Told(format!("unknown migration in database: {}", unknown.name)));
    }
    let missing: Vec<_> = before.iter().filter(|migration| migration.applied_at.is_none()).collect();
    if missing.is_empty() {
        return Ok(writeln!(out, "praefect sql-migrate: all migrations are up")?);
    }
    writeln!(out, "praefect sql-migrate: migrations to apply: {}\n", missing.len())?;
    bring_up_to_date(&config).await?;
    for migration in &missing {
        writeln!(out, "== {}: applied", migration.name)?;
        if how.verbose {
            writeln!(out, "\t{}", migration.sql)?;
        }
    }
    Ok(writeln!(out, "\npraefect sql-migrate: OK (applied {} migrations)", missing.len())?)
}

/// `sql-migrate-down`. There is no way down: every migration is safe with the program before it.
pub(super) fn migrate_down(how: &SqlMigrateDown) -> Result<(), Failure> {
    let Some(count) = how.migrations.as_deref() else {
        return Err(Failure::Told("sql-migrate-down requires a single positional argument".to_owned()));
    };
    let count: i64 = count
        .parse()
        .map_err(|_| Failure::Told(format!("strconv.Atoi: parsing {count:?}: invalid syntax")))?;
    if count < 1 {
        return Err(Failure::Told("number of migrations to roll back must be 1 or more".to_owned()));
    }
    Err(Failure::Told(
        "migrations go forward only, and each of them is safe with the version before it: nothing has to be rolled back"
            .to_owned(),
    ))
}

/// `sql-migrate-status`.
pub(super) async fn migrate_status(file: &File, out: Out<'_>) -> Result<(), Failure> {
    let found = migrations(&config(file)?).await?;
    let rows: Vec<(String, String)> = found
        .into_iter()
        .map(|migration| {
            let applied = match migration.applied_at {
                _ if migration.unknown => "unknown migration".to_owned(),
                Some(at) => go_time(at.to_offset(time::UtcOffset::UTC)),
                None => "no".to_owned(),
            };
            (migration.name, applied)
        })
        .collect();
    let first = rows.iter().map(|row| row.0.len()).max().unwrap_or(0).max("MIGRATION".len());
    let second = rows.iter().map(|row| row.1.len()).max().unwrap_or(0).max("APPLIED".len());
    let rule = format!("+{}+{}+", "-".repeat(first + 2), "-".repeat(second + 2));
    writeln!(out, "{rule}\n| {:^first$} | {:^second$} |\n{rule}", "MIGRATION", "APPLIED")?;
    for (name, applied) in rows {
        writeln!(out, "| {name:first$} | {applied:second$} |")?;
    }
    Ok(writeln!(out, "{rule}")?)
}
