//! Corrupt replicas: looking for damage now, and what nodes kept aside.

use std::process::ExitCode;

use serde_json::json;
use tabularium_proto::coordinator::{
    CheckObjectsRequest, ListKeptRequest, RemoveKeptRequest, RepositoryName, StorageName,
    check_objects_response::Found, repair_service_client::RepairServiceClient,
};

use super::{request, yes_or_no};
use crate::{
    arguments::{Global, Kept},
    failure::Failure,
    output,
    target::{Signed, Target},
    views::corruption::{CheckedView, KeptListView},
};

/// Git looks at every object: it takes as long as it takes. Exit code 1 when a replica is damaged.
pub(super) async fn check(
    global: &Global,
    mut service: RepairServiceClient<Signed>,
    whom: &str,
    name: RepositoryName,
) -> Result<ExitCode, Failure> {
    let what = format!("looking through {}", name.relative_path);
    let refused = |status: tonic::Status| Failure::of_status(&what, whom, &status);
    let mut checked = CheckedView::default();
    let check = CheckObjectsRequest { name: Some(name) };
    let mut stream = service.check_objects(check).await.map_err(refused)?.into_inner();
    let mut ended = false;
    while let Some(next) = stream.message().await.map_err(refused)? {
        match next.found {
            Some(Found::Replica(replica)) => checked.replicas.push(replica.into()),
            Some(Found::Outcome(outcome)) => {
                checked.made_again = outcome.made_again;
                ended = true;
            }
            None => {}
        }
    }
    if !ended {
        let stopped = tonic::Status::unavailable("the coordinator stopped before all was looked through");
        return Err(refused(stopped));
    }
    checked.replicas.sort_by(|one, other| one.storage.cmp(&other.storage));
    output::print(global.json, &checked, output::corruption::checked)?;
    Ok(yes_or_no(!checked.replicas.iter().any(|replica| replica.state == "damaged")))
}

pub(super) async fn kept(global: &Global, command: Kept) -> Result<ExitCode, Failure> {
    let (mut service, whom) = Target::resolve(global)?.repair().await?;
    let virtual_storage = global.virtual_storage.clone();
    match command {
        Kept::List { storage } => {
            let list = ListKeptRequest { virtual_storage, storage: storage.unwrap_or_default() };
            let listed = service.list_kept(request(list)).await;
            let listed =
                listed.map_err(|status| Failure::of_status("listing what is kept", &whom, &status))?;
            let listed = KeptListView::from(listed.into_inner());
            output::print(global.json, &listed, output::corruption::kept)?;
            Ok(yes_or_no(listed.unread.is_empty()))
        }
        Kept::Remove { storage, id } => {
            let what = format!("removing {id} on {storage}");
            let storage = Some(StorageName { virtual_storage, storage });
            let remove = RemoveKeptRequest { storage, kept_id: id.clone() };
            let removed = service.remove_kept(request(remove)).await;
            removed.map_err(|status| Failure::of_status(&what, &whom, &status))?;
            output::print(global.json, &json!({ "removed": id }), |_| format!("{id} is removed"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
