//! A lost database, made anew from what nodes keep beside their replicas.

use std::process::ExitCode;

use tabularium_proto::coordinator::{RebuildRequest, rebuild_response::Message};

use super::yes_or_no;
use crate::{
    arguments::{Global, Rebuild},
    failure::Failure,
    output,
    target::Target,
    views::rebuild::RebuildView,
};

/// Reads every storage's directories: it takes as long as it takes. Exit code 1 when something is to be looked at.
pub(crate) async fn run(global: &Global, options: &Rebuild) -> Result<ExitCode, Failure> {
    let (mut service, whom) = Target::resolve(global)?.rebuild().await?;
    let failed = |status| Failure::of_status("rebuilding the database", &whom, &status);
    // Without a deadline.
    let rebuild = RebuildRequest {
        dry_run: options.dry_run,
        add_missing: options.add_missing,
        without_unreachable: options.without_unreachable,
    };
    let mut answers = service.rebuild(rebuild).await.map_err(failed)?.into_inner();
    let mut view = RebuildView { dry_run: options.dry_run, ..RebuildView::default() };
    let mut whole = false;
    while let Some(answer) = answers.message().await.map_err(failed)? {
        match answer.message {
            Some(Message::Finding(finding)) => view.findings.push(finding.into()),
            Some(Message::Sum(sum)) => {
                whole = true;
                view.sum(&sum);
            }
            None => {}
        }
    }
    if !whole {
        return Err(Failure::Internal(format!("{whom} did not say what it has done")));
    }
    output::print(global.json, &view, output::rebuild::rebuilt)?;
    Ok(yes_or_no(view.findings.iter().all(|finding| finding.kind == "behind")))
}
