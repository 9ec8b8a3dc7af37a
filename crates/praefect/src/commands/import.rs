//! `import-praefect`: what Praefect's own tables say, in the same database.

use tabularium_proto::coordinator::{
    ImportFinding, ImportPraefectRequest, ImportSum, import_praefect_response::Message,
    import_service_client::ImportServiceClient,
};

use super::{Failure, Out, client::dial};
use crate::{arguments::ImportPraefect, file::File};

/// `import-praefect`.
pub(super) async fn import(file: &File, how: ImportPraefect, out: Out<'_>) -> Result<(), Failure> {
    let mut client = ImportServiceClient::new(dial(file).await?);
    let request =
        ImportPraefectRequest { database_url: String::new(), schema: how.schema, dry_run: how.dry_run };
    let mut answers = client.import_praefect(request).await?.into_inner();
    while let Some(answer) = answers.message().await? {
        match answer.message {
            Some(Message::Finding(finding)) => show_finding(&finding, out)?,
            Some(Message::Sum(sum)) => show_sum(&sum, how.dry_run, out)?,
            Some(Message::Progress(_)) | None => {}
        }
    }
    Ok(())
}

fn show_finding(finding: &ImportFinding, out: Out<'_>) -> std::io::Result<()> {
    let left_out = if finding.left_out { " (left out)" } else { "" };
    let ImportFinding { repository_id, virtual_storage, relative_path, what, .. } = finding;
    writeln!(out, "repository {repository_id}, {virtual_storage}:{relative_path}{left_out}: {what}")
}

fn show_sum(sum: &ImportSum, dry_run: bool, out: Out<'_>) -> std::io::Result<()> {
    let done = if dry_run { "would be taken over" } else { "taken over" };
    writeln!(out, "{} repositories with {} replicas {done}.", sum.repositories, sum.replicas)?;
    writeln!(
        out,
        "{} replicas are behind or have to be made; {} repositories were known before; {} are left out.",
        sum.replicas_behind, sum.known_before, sum.left_out
    )?;
    writeln!(out, "New repositories get ids above {}.", sum.last_repository_id)
}
