//! `storage`: storages that come and go.

use std::{process::ExitCode, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tabularium_proto::coordinator::{
    AcceptStorageRequest, AddStorageRequest, DrainStorageRequest, ListStoragesRequest, RemoveStorageRequest,
    StorageDetails, StorageName, UndrainStorageRequest, storage_service_client::StorageServiceClient,
};

use super::{request, yes_or_no};
use crate::{
    arguments::{Global, Storage},
    failure::Failure,
    output,
    target::{Signed, Target},
    views::placement::StorageDetailsView,
};

/// How often the progress of a drain is asked for.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

struct Storages<'a> {
    global: &'a Global,
    service: StorageServiceClient<Signed>,
    whom: String,
}

/// `storage ...`.
pub(crate) async fn run(global: &Global, command: Storage) -> Result<ExitCode, Failure> {
    let (service, whom) = Target::resolve(global)?.storages().await?;
    let mut storages = Storages { global, service, whom };
    match command {
        Storage::List => storages.list().await,
        Storage::Add { name, address } => storages.add(name, address.to_string()).await,
        Storage::Drain { name, allow_fewer_replicas, no_wait } => {
            storages.drain(name, allow_fewer_replicas, !no_wait).await
        }
        Storage::Undrain { name } => storages.undrain(name).await,
        Storage::Remove { name, force_lost } => storages.remove(name, force_lost).await,
        Storage::Accept { name, force_lost } => storages.accept(name, force_lost).await,
    }
}

impl Storages<'_> {
    fn name(&self, storage: &str) -> StorageName {
        let virtual_storage = self.global.virtual_storage.clone();
        StorageName { virtual_storage, storage: storage.to_owned() }
    }

    async fn listed(&mut self) -> Result<Vec<StorageDetails>, Failure> {
        let list = ListStoragesRequest { virtual_storage: self.global.virtual_storage.clone() };
        let listed = self.service.list_storages(request(list)).await;
        let listed = listed.map_err(|status| Failure::of_status("listing storages", &self.whom, &status))?;
        Ok(listed.into_inner().storages)
    }

    async fn list(&mut self) -> Result<ExitCode, Failure> {
        let storages: Vec<StorageDetailsView> = self.listed().await?.into_iter().map(Into::into).collect();
        output::print(self.global.json, &storages, output::placement::storages)?;
        Ok(yes_or_no(storages.iter().all(|storage| storage.healthy)))
    }

    fn show(&self, storage: Option<StorageDetails>, said: String) -> Result<ExitCode, Failure> {
        let view: StorageDetailsView = storage.unwrap_or_default().into();
        output::print(self.global.json, &view, |_| said)?;
        Ok(ExitCode::SUCCESS)
    }

    async fn add(&mut self, name: String, address: String) -> Result<ExitCode, Failure> {
        let add = AddStorageRequest { storage: Some(self.name(&name)), address };
        let added = self.service.add_storage(request(add)).await;
        let what = format!("adding storage {name}");
        let added = added.map_err(|status| Failure::of_status(&what, &self.whom, &status))?;
        self.show(
            added.into_inner().storage,
            format!("{name} is a storage now; replicas go there from here on"),
        )
    }

    async fn drain(&mut self, name: String, allow_fewer: bool, wait: bool) -> Result<ExitCode, Failure> {
        let already = self.listed().await?;
        let draining = already.iter().any(|storage| storage.name == name && storage.state == "draining");
        if !draining {
            let drain =
                DrainStorageRequest { storage: Some(self.name(&name)), allow_fewer_replicas: allow_fewer };
            let drained = self.service.drain_storage(request(drain)).await;
            let what = format!("draining storage {name}");
            drained.map_err(|status| Failure::of_status(&what, &self.whom, &status))?;
        }
        let storage = if wait { self.follow(&name).await? } else { self.one(&name).await? };
        let said = if storage.replicas == 0 {
            format!("{name} is empty; remove it with `tabularium storage remove {name}`")
        } else {
            format!("{name} is being drained; `tabularium storage drain {name}` follows it")
        };
        self.show(Some(storage), said)
    }

    async fn one(&mut self, name: &str) -> Result<StorageDetails, Failure> {
        let found = self.listed().await?.into_iter().find(|storage| storage.name == name);
        found.ok_or_else(|| Failure::No(format!("there is no storage {name}")))
    }

    /// Shows how replicas move away until none is left. Interrupting it stops nothing but the showing.
    async fn follow(&mut self, name: &str) -> Result<StorageDetails, Failure> {
        let mut storage = self.one(name).await?;
        let mut most = storage.replicas;
        let bar = ProgressBar::new(most.unsigned_abs());
        let style =
            ProgressStyle::with_template("{prefix} {wide_bar} {pos} of {len} moved, {msg}, {eta} left");
        bar.set_style(style.map_err(|error| Failure::Internal(error.to_string()))?);
        bar.set_prefix(format!("draining {name}"));
        while storage.replicas > 0 {
            if storage.state != "draining" {
                bar.abandon();
                return Err(Failure::No(format!("{name} is not drained any more: it is {}", storage.state)));
            }
            most = most.max(storage.replicas);
            bar.set_length(most.unsigned_abs());
            bar.set_position((most - storage.replicas).unsigned_abs());
            bar.set_message(format!("{} on their way", storage.leaving));
            tokio::time::sleep(PROGRESS_INTERVAL).await;
            storage = self.one(name).await?;
        }
        bar.finish_and_clear();
        Ok(storage)
    }

    async fn undrain(&mut self, name: String) -> Result<ExitCode, Failure> {
        let undrain = UndrainStorageRequest { storage: Some(self.name(&name)) };
        let undrained = self.service.undrain_storage(request(undrain)).await;
        let what = format!("keeping storage {name}");
        let undrained = undrained.map_err(|status| Failure::of_status(&what, &self.whom, &status))?;
        self.show(undrained.into_inner().storage, format!("{name} takes replicas again"))
    }

    async fn remove(&mut self, name: String, force_lost: bool) -> Result<ExitCode, Failure> {
        let remove = RemoveStorageRequest { storage: Some(self.name(&name)), force_lost };
        let removed = self.service.remove_storage(request(remove)).await;
        let what = format!("removing storage {name}");
        let removed = removed.map_err(|status| Failure::of_status(&what, &self.whom, &status))?.into_inner();
        let answer = json!({
            "name": name,
            "removed": true,
            "lost_replicas": removed.lost_replicas,
            "lost_repositories": removed.lost_repositories,
        });
        output::print(self.global.json, &answer, |_| {
            lost(format!("{name} is removed"), removed.lost_replicas, removed.lost_repositories)
        })?;
        Ok(ExitCode::SUCCESS)
    }

    async fn accept(&mut self, name: String, force_lost: bool) -> Result<ExitCode, Failure> {
        let accept = AcceptStorageRequest { storage: Some(self.name(&name)), force_lost };
        let accepted = self.service.accept_storage(request(accept)).await;
        let what = format!("accepting the disk of {name}");
        let accepted =
            accepted.map_err(|status| Failure::of_status(&what, &self.whom, &status))?.into_inner();
        let answer = json!({
            "name": name,
            "old_filesystem_id": accepted.old_filesystem_id,
            "new_filesystem_id": accepted.new_filesystem_id,
            "replicas": accepted.replicas,
            "lost_repositories": accepted.lost_repositories,
        });
        output::print(self.global.json, &answer, |_| {
            let said =
                format!("{name} is used with its new disk; {} replicas are made again", accepted.replicas);
            lost(said, 0, accepted.lost_repositories)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

fn lost(said: String, replicas: i64, repositories: i64) -> String {
    let given_up = (replicas > 0).then(|| format!("; {replicas} replicas were given up"));
    let lost = (repositories > 0).then(|| {
        format!(
            "\n{repositories} repositories have lost their newest state: `tabularium dataloss --unavailable`, then \
             `tabularium accept-dataloss`"
        )
    });
    [Some(said), given_up, lost].into_iter().flatten().collect()
}
