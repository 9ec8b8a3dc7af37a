//! Coming from Praefect: its commands under their old names, its records, and what lies on disks.

use std::{collections::BTreeMap, ffi::OsString, os::unix::process::CommandExt as _, process::ExitCode};

use indicatif::{ProgressBar, ProgressStyle};
use tabularium_proto::coordinator::{
    ImportPraefectRequest, ListUntrackedRequest, RepositoryName, TrackRepositoryRequest,
    import_praefect_response::Message,
};

use super::{request, yes_or_no};
use crate::{
    arguments::{Global, ImportPraefect, TrackUntracked},
    failure::Failure,
    output,
    target::Target,
    views::takeover::{ImportView, TrackedView, UntakenView},
};

/// The program that sits in Praefect's seat; it is installed beside this one.
const PRAEFECT: &str = "tabularium-praefect";

/// Becomes the program in Praefect's seat. Comes back only with why it could not.
pub(crate) fn praefect(arguments: Vec<OsString>) -> Failure {
    let here = std::env::current_exe().unwrap_or_default();
    let program = here.with_file_name(PRAEFECT);
    let error = std::process::Command::new(&program).args(arguments).exec();
    Failure::Unreachable(format!("cannot start {}: {error}", program.display()))
}

fn progress(what: &'static str, length: u64) -> Result<ProgressBar, Failure> {
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos} of {len}, {eta} left");
    bar.set_style(style.map_err(|error| Failure::Internal(error.to_string()))?);
    bar.set_prefix(what);
    Ok(bar)
}

/// `import-praefect`. Exit code 1 when something is left out.
pub(crate) async fn import(global: &Global, options: ImportPraefect) -> Result<ExitCode, Failure> {
    let (mut service, whom) = Target::resolve(global)?.imports().await?;
    let failed = |status| Failure::of_status("taking over Praefect's records", &whom, &status);
    let import = ImportPraefectRequest {
        database_url: options.dsn.unwrap_or_default(),
        schema: options.schema,
        dry_run: options.dry_run,
    };
    // Without a deadline: it takes as long as there are rows.
    let mut answers = service.import_praefect(import).await.map_err(failed)?.into_inner();
    let bar = progress("reading", 0)?;
    let mut view = ImportView { dry_run: options.dry_run, ..ImportView::default() };
    let mut whole = false;
    while let Some(answer) = answers.message().await.map_err(failed)? {
        match answer.message {
            Some(Message::Progress(progress)) => {
                bar.set_length(progress.repositories.unsigned_abs());
                bar.set_position(progress.read.unsigned_abs());
            }
            Some(Message::Finding(finding)) => view.findings.push(finding.into()),
            Some(Message::Sum(sum)) => {
                whole = true;
                view.sum(&sum);
            }
            None => {}
        }
    }
    bar.finish_and_clear();
    if !whole {
        return Err(Failure::Internal(format!("{whom} did not say what it has done")));
    }
    output::print(global.json, &view, output::takeover::imported)?;
    Ok(yes_or_no(view.left_out == 0))
}

/// `track-untracked`: every repository that one storage alone has, or that the storage named is to be believed about.
/// Exit code 1 when something is left out.
pub(crate) async fn track_untracked(global: &Global, options: TrackUntracked) -> Result<ExitCode, Failure> {
    let (mut service, whom) = Target::resolve(global)?.repair().await?;
    let failed = |status| Failure::of_status("looking for repositories", &whom, &status);
    let list = ListUntrackedRequest {
        virtual_storage: global.virtual_storage.clone(),
        older_than_seconds: options.older_than,
    };
    // Walks every storage: it takes as long as it takes.
    let mut listed = service.list_untracked(list).await.map_err(failed)?.into_inner();
    let looking = ProgressBar::new_spinner();
    looking.set_prefix("looking");
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    while let Some(next) = listed.message().await.map_err(failed)? {
        found.entry(next.replica_path).or_default().push(next.storage);
        looking.tick();
    }
    looking.finish_and_clear();
    let mut view = TrackedView { dry_run: options.dry_run, ..TrackedView::default() };
    let bar = progress("tracking", found.len() as u64)?;
    for (path, storages) in found {
        let believed = choose(&storages, options.authoritative_storage.as_deref());
        let tracked = match believed {
            Err(what) => Err(what),
            Ok(_) if options.dry_run => Ok(()),
            Ok(storage) => {
                let track = TrackRepositoryRequest {
                    name: Some(RepositoryName {
                        virtual_storage: global.virtual_storage.clone(),
                        relative_path: path.clone(),
                    }),
                    replica_path: path.clone(),
                    authoritative_storage: storage.to_owned(),
                };
                let tracked = service.track_repository(request(track)).await;
                tracked.map(drop).map_err(|status| status.message().to_owned())
            }
        };
        match tracked {
            Ok(()) => view.tracked += 1,
            Err(what) => view.left_out.push(UntakenView { replica_path: path, storages, what }),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    output::print(global.json, &view, output::takeover::tracked)?;
    Ok(yes_or_no(view.left_out.is_empty()))
}

/// The storage whose copy counts.
fn choose<'s>(storages: &'s [String], authoritative: Option<&str>) -> Result<&'s str, String> {
    match (storages, authoritative) {
        ([only], None) => Ok(only),
        (_, None) => {
            Err("several storages have it; --authoritative-storage says which one counts".to_owned())
        }
        (storages, Some(wanted)) => storages
            .iter()
            .find(|storage| *storage == wanted)
            .map(String::as_str)
            .ok_or_else(|| format!("{wanted} does not have it")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_believed_who_is_not_alone_or_named() {
        let storages = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(choose(&storages(&["a"]), None), Ok("a"));
        assert_eq!(choose(&storages(&["a", "b"]), Some("b")), Ok("b"));
        assert!(choose(&storages(&["a", "b"]), None).is_err());
        assert!(choose(&storages(&["a"]), Some("b")).unwrap_err().contains("b does not have it"));
    }
}
