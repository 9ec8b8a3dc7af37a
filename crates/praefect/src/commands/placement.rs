//! Commands about the replicas of repositories. They ask what Praefect answers over gRPC.

use tabularium_proto::{
    coordinator::{ReconcileRequest, repair_service_client::RepairServiceClient},
    gitaly::{
        DatalossRequest, GetRepositoryMetadataRequest, GetRepositoryMetadataResponse, MarkUnverifiedRequest,
        SetAuthoritativeStorageRequest, SetReplicationFactorRequest, dataloss_response,
        get_repository_metadata_request as asked, mark_unverified_request as marked,
        praefect_info_service_client::PraefectInfoServiceClient,
    },
};

use super::{
    Failure, Out,
    client::{dial, dial_as},
    refused,
};
use crate::{
    arguments::{AcceptDataloss, Dataloss, Metadata, SetReplicationFactor, Verify},
    file::File,
};

fn told<T>(text: &str) -> Result<T, Failure> {
    Err(Failure::Told(text.to_owned()))
}

/// `dataloss`.
pub(super) async fn dataloss(file: &File, which: &Dataloss, out: Out<'_>) -> Result<(), Failure> {
    let mut names = match which.virtual_storage.as_str() {
        "" => file.virtual_storages.iter().map(|known| known.name.as_str()).collect(),
        name => vec![name],
    };
    names.sort_unstable();
    let mut client = PraefectInfoServiceClient::new(dial(file).await?);
    for name in names {
        let request = DatalossRequest {
            virtual_storage: name.to_owned(),
            include_partially_replicated: which.partially_unavailable,
        };
        let answers = client.dataloss(request).await;
        // Praefect's client hears of a refusal when it asks for the first of the answers.
        writeln!(out, "Virtual storage: {name}")?;
        let mut answers = answers.map_err(refused("getting response"))?.into_inner();
        let mut found = false;
        while let Some(answer) = answers.message().await.map_err(refused("getting response"))? {
            if !answer.repositories.is_empty() {
                writeln!(out, "  Repositories:")?;
            }
            for repository in &answer.repositories {
                found = true;
                show_loss(repository, out)?;
            }
        }
        if !found {
            let all_is_well = if which.partially_unavailable {
                "All repositories are fully available on all assigned storages!"
            } else {
                "All repositories are available!"
            };
            writeln!(out, "  {all_is_well}")?;
        }
    }
    Ok(())
}

fn show_loss(repository: &dataloss_response::Repository, out: Out<'_>) -> std::io::Result<()> {
    let unavailable = if repository.unavailable { " (unavailable)" } else { "" };
    writeln!(out, "    {}{unavailable}:", repository.relative_path)?;
    let primary = if repository.primary.is_empty() { "No Primary" } else { &repository.primary };
    writeln!(out, "      Primary: {primary}")?;
    let notes = |storage: &dataloss_response::repository::Storage| {
        let assigned = if storage.assigned { ", assigned host" } else { "" };
        let unhealthy = if storage.healthy { "" } else { ", unhealthy" };
        format!("{assigned}{unhealthy}")
    };
    writeln!(out, "      In-Sync Storages:")?;
    for storage in repository.storages.iter().filter(|storage| storage.behind_by == 0) {
        writeln!(out, "        {}{}", storage.name, notes(storage))?;
    }
    writeln!(out, "      Outdated Storages:")?;
    for storage in repository.storages.iter().filter(|storage| storage.behind_by != 0) {
        let plural = if storage.behind_by > 1 { "s" } else { "" };
        let behind_by = storage.behind_by;
        writeln!(
            out,
            "        {} is behind by {behind_by} change{plural} or less{}",
            storage.name,
            notes(storage)
        )?;
    }
    Ok(())
}

/// `accept-dataloss`: silent when it is done.
pub(super) async fn accept_dataloss(file: &File, which: AcceptDataloss) -> Result<(), Failure> {
    let request = SetAuthoritativeStorageRequest {
        virtual_storage: which.repository.virtual_storage,
        relative_path: which.repository.relative_path,
        authoritative_storage: which.authoritative_storage,
    };
    let mut client = PraefectInfoServiceClient::new(dial(file).await?);
    client.set_authoritative_storage(request).await.map_err(refused("set authoritative storage"))?;
    Ok(())
}

/// `set-replication-factor`.
pub(super) async fn set_replication_factor(
    file: &File,
    which: SetReplicationFactor,
    out: Out<'_>,
) -> Result<(), Failure> {
    let request = SetReplicationFactorRequest {
        virtual_storage: which.repository.virtual_storage,
        relative_path: which.repository.relative_path,
        replication_factor: i32::try_from(which.replication_factor).unwrap_or(i32::MAX),
    };
    let mut client = PraefectInfoServiceClient::new(dial(file).await?);
    let storages = client.set_replication_factor(request).await?.into_inner().storages;
    Ok(writeln!(out, "current assignments: {}", storages.join(", "))?)
}

/// `metadata`.
pub(super) async fn metadata(file: &File, which: Metadata, out: Out<'_>) -> Result<(), Failure> {
    let (storage, path) = (which.virtual_storage, which.relative_path);
    let query = match (which.repository_id, storage.is_empty(), path.is_empty()) {
        (0, true, true) => return told("repository ID or virtual storage and relative path required"),
        (0, true, false) => return told("virtual storage is required with relative path"),
        (0, false, true) => return told("relative path is required with virtual storage"),
        (0, false, false) => {
            asked::Query::Path(asked::Path { virtual_storage: storage, relative_path: path })
        }
        (id, true, true) => asked::Query::RepositoryId(id),
        _ => return told("virtual storage and relative path can't be provided with a repository ID"),
    };
    let mut client = PraefectInfoServiceClient::new(dial_as(file, "dial").await?);
    let request = GetRepositoryMetadataRequest { query: Some(query) };
    let answer = client.get_repository_metadata(request).await.map_err(refused("get metadata"))?;
    Ok(show_metadata(&answer.into_inner(), out)?)
}

fn show_metadata(found: &GetRepositoryMetadataResponse, out: Out<'_>) -> std::io::Result<()> {
    writeln!(out, "Repository ID: {}", found.repository_id)?;
    writeln!(out, "Virtual Storage: {:?}", found.virtual_storage)?;
    writeln!(out, "Relative Path: {:?}", found.relative_path)?;
    writeln!(out, "Replica Path: {:?}", found.replica_path)?;
    writeln!(out, "Primary: {:?}", found.primary)?;
    writeln!(out, "Generation: {}", found.generation)?;
    writeln!(out, "Replicas:")?;
    for replica in &found.replicas {
        let generation = match replica.generation {
            -1 => "replica not yet created".to_owned(),
            behind if behind < found.generation => {
                format!("{behind}, behind by {} changes", found.generation - behind)
            }
            newest => format!("{newest}, fully up to date"),
        };
        let verified_at = replica.verified_at.and_then(|at| {
            let nanoseconds = i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos);
            time::OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).ok()
        });
        writeln!(out, "- Storage: {:?}", replica.storage)?;
        writeln!(out, "  Assigned: {}", replica.assigned)?;
        writeln!(out, "  Generation: {generation}")?;
        writeln!(out, "  Healthy: {}", replica.healthy)?;
        writeln!(out, "  Valid Primary: {}", replica.valid_primary)?;
        writeln!(out, "  Verified At: {}", verified_at.map_or_else(|| "unverified".to_owned(), go_time))?;
    }
    Ok(())
}

/// As Go prints a time in UTC: `2026-11-21 20:15:00.25 +0000 UTC`.
pub(super) fn go_time(at: time::OffsetDateTime) -> String {
    let fraction = format!(".{:09}", at.nanosecond());
    let fraction = fraction.trim_end_matches('0').trim_end_matches('.');
    let (date, hour, minute, second) = (at.date(), at.hour(), at.minute(), at.second());
    format!("{date} {hour:02}:{minute:02}:{second:02}{fraction} +0000 UTC")
}

/// `verify`.
pub(super) async fn verify(file: &File, which: Verify, out: Out<'_>) -> Result<(), Failure> {
    let (virtual_storage, storage) = (which.virtual_storage, which.storage);
    let selector = match (which.repository_id, virtual_storage.is_empty(), storage.is_empty()) {
        (0, true, true) => {
            return told("(repository id), (virtual storage) or (virtual storage, storage) required");
        }
        (0, true, false) => return told("virtual storage must be passed with storage"),
        (0, false, false) => marked::Selector::Storage(marked::Storage { virtual_storage, storage }),
        (0, false, true) => marked::Selector::VirtualStorage(virtual_storage),
        (id, true, true) => marked::Selector::RepositoryId(id),
        _ => return told("virtual storage and storage can't be provided with a repository ID"),
    };
    let mut client = PraefectInfoServiceClient::new(dial_as(file, "dial").await?);
    let request = MarkUnverifiedRequest { selector: Some(selector) };
    let answer = client.mark_unverified(request).await.map_err(refused("verify replicas"))?;
    Ok(writeln!(out, "{} replicas marked unverified", answer.into_inner().replicas_marked)?)
}

/// `reconcile`, of Praefect 13, which has not had it since.
pub(super) async fn reconcile(file: &File, out: Out<'_>) -> Result<(), Failure> {
    let mut client = RepairServiceClient::new(dial(file).await?);
    let owed = client.reconcile(ReconcileRequest {}).await?.into_inner().owed;
    Ok(writeln!(out, "{owed} replication jobs scheduled")?)
}

#[cfg(test)]
mod tests {
    use tabularium_proto::gitaly::{
        dataloss_response::repository::Storage, get_repository_metadata_response::Replica,
    };

    use super::*;

    fn written(write: impl FnOnce(Out<'_>) -> std::io::Result<()>) -> String {
        let mut out = Vec::new();
        write(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_loss_is_an_indented_tree() {
        let storage = |name: &str, behind_by, assigned, healthy| Storage {
            name: name.to_owned(),
            behind_by,
            assigned,
            healthy,
            valid_primary: false,
        };
        let repository = dataloss_response::Repository {
            relative_path: "@hashed/a.git".to_owned(),
            storages: vec![
                storage("gitaly-1", 0, true, false),
                storage("gitaly-2", 1, true, true),
                storage("gitaly-3", 2, false, true),
            ],
            unavailable: true,
            primary: String::new(),
        };
        assert_eq!(
            written(|out| show_loss(&repository, out)),
            "    @hashed/a.git (unavailable):\n      Primary: No Primary\n      In-Sync Storages:\n        \
             gitaly-1, assigned host, unhealthy\n      Outdated Storages:\n        \
             gitaly-2 is behind by 1 change or less, assigned host\n        gitaly-3 is behind by 2 changes or less\n"
        );
    }

    #[test]
    fn metadata_are_lines_of_keys_and_values() {
        let replica = |storage: &str, generation, verified_at| Replica {
            storage: storage.to_owned(),
            assigned: true,
            generation,
            healthy: true,
            valid_primary: generation == 7,
            verified_at,
        };
        let at = prost_types::Timestamp { seconds: 1_700_000_000, nanos: 250_000_000 };
        let found = GetRepositoryMetadataResponse {
            repository_id: 5,
            virtual_storage: "default".to_owned(),
            relative_path: "a.git".to_owned(),
            replica_path: "@cluster/repositories/x".to_owned(),
            primary: "gitaly-1".to_owned(),
            generation: 7,
            replicas: vec![
                replica("gitaly-1", 7, Some(at)),
                replica("gitaly-2", 5, None),
                replica("gitaly-3", -1, None),
            ],
        };
        let text = written(|out| show_metadata(&found, out));
        for line in [
            "Repository ID: 5\nVirtual Storage: \"default\"\nRelative Path: \"a.git\"\n",
            "Generation: 7\nReplicas:\n- Storage: \"gitaly-1\"\n  Assigned: true\n  Generation: 7, fully up to date\n",
            "  Valid Primary: true\n  Verified At: 2023-11-14 22:13:20.25 +0000 UTC\n",
            "  Generation: 5, behind by 2 changes\n",
            "  Generation: replica not yet created\n  Healthy: true\n  Valid Primary: false\n  Verified At: unverified\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
