//! Replicas: what is behind, lost, different, unknown, too many or too few.

use std::process::ExitCode;

use serde_json::json;
use tabularium_common::ids::RelativePath;
use tabularium_proto::coordinator::{
    AcceptDataLossRequest, DataLossRequest, GetReplicasRequest, ListUntrackedRequest, MarkUnverifiedRequest,
    ReconcileRequest, RepositoryName, RepositoryReplicas, SetReplicationFactorRequest, SetWriteQuorumRequest,
    StorageName, TrackRepositoryRequest, get_replicas_request, repair_service_client::RepairServiceClient,
};

use super::{
    corruption,
    repository::{confirm, repository_path},
    request, yes_or_no,
};
use crate::{
    arguments::{AcceptDataLoss, Factor, Global, Metadata, TrackRepository, Verify},
    failure::Failure,
    output,
    target::{Signed, Target},
    views::placement::{RepositoryReplicasView, UntrackedView},
};

/// Repositories asked for at once.
const PAGE_SIZE: u32 = 500;

pub(crate) struct Losses<'a> {
    global: &'a Global,
    service: RepairServiceClient<Signed>,
    whom: String,
}

impl<'a> Losses<'a> {
    pub(crate) async fn of(global: &'a Global) -> Result<Self, Failure> {
        let (service, whom) = Target::resolve(global)?.repair().await?;
        Ok(Self { global, service, whom })
    }

    fn name(&self, path: &RelativePath) -> RepositoryName {
        let virtual_storage = self.global.virtual_storage.clone();
        RepositoryName { virtual_storage, relative_path: path.to_string() }
    }

    fn refused(&self, what: &str) -> impl Fn(tonic::Status) -> Failure {
        move |status| Failure::of_status(what, &self.whom, &status)
    }

    fn show(&self, repository: Option<RepositoryReplicas>) -> Result<ExitCode, Failure> {
        let view: RepositoryReplicasView = repository.unwrap_or_default().into();
        output::print(self.global.json, &view, output::placement::replicas)?;
        Ok(ExitCode::SUCCESS)
    }

    /// Exit code 1 when something cannot be served.
    pub(crate) async fn dataloss(mut self, only_unavailable: bool) -> Result<ExitCode, Failure> {
        let mut found: Vec<RepositoryReplicasView> = Vec::new();
        let mut page_token = String::new();
        loop {
            let list = DataLossRequest {
                virtual_storage: self.global.virtual_storage.clone(),
                only_unavailable,
                page_size: PAGE_SIZE,
                page_token,
            };
            let page = self.service.data_loss(request(list)).await;
            let page = page.map_err(self.refused("looking for losses"))?.into_inner();
            found.extend(page.repositories.into_iter().map(RepositoryReplicasView::from));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        output::print(self.global.json, &found, output::placement::losses)?;
        Ok(yes_or_no(!found.iter().any(|repository| repository.unavailable)))
    }

    /// Asks the human before it asks anybody else.
    pub(crate) async fn accept(global: &'a Global, options: AcceptDataLoss) -> Result<ExitCode, Failure> {
        let path = repository_path(&options.path)?;
        let storage = options.authoritative_storage;
        if !options.yes {
            confirm(
                &path,
                &format!("What only other replicas than the one on {storage} have of {path} is lost"),
            )?;
        }
        let mut losses = Self::of(global).await?;
        let accept = AcceptDataLossRequest { name: Some(losses.name(&path)), authoritative_storage: storage };
        let accepted = losses.service.accept_data_loss(request(accept)).await;
        let accepted = accepted.map_err(losses.refused(&format!("accepting the loss in {path}")))?;
        losses.show(accepted.into_inner().repository)
    }

    pub(crate) async fn metadata(mut self, options: Metadata) -> Result<ExitCode, Failure> {
        let repository = match (options.path, options.id) {
            (Some(path), _) => {
                let name = self.name(&repository_path(&path)?);
                get_replicas_request::Repository::Name(name)
            }
            (None, id) => get_replicas_request::Repository::RepositoryId(id.unwrap_or_default()),
        };
        let asked =
            self.service.get_replicas(request(GetReplicasRequest { repository: Some(repository) })).await;
        let asked = asked.map_err(self.refused("metadata"))?;
        self.show(asked.into_inner().repository)
    }

    pub(crate) async fn reconcile(mut self) -> Result<ExitCode, Failure> {
        let answer = self.service.reconcile(request(ReconcileRequest {})).await;
        let owed = answer.map_err(self.refused("reconciling"))?.into_inner().owed;
        output::print(self.global.json, &json!({ "owed": owed }), |_| match owed {
            0 => "whatever is behind is owed its copy already".to_owned(),
            1 => "1 copy is owed now".to_owned(),
            _ => format!("{owed} copies are owed now"),
        })?;
        Ok(ExitCode::SUCCESS)
    }

    pub(crate) async fn verify(mut self, options: Verify) -> Result<ExitCode, Failure> {
        let objects = options.fsck;
        let (name, storage) = match (&options.which.path, options.which.storage) {
            (Some(path), _) => (Some(self.name(&repository_path(path)?)), None),
            (None, storage) => {
                let virtual_storage = self.global.virtual_storage.clone();
                (None, Some(StorageName { virtual_storage, storage: storage.unwrap_or_default() }))
            }
        };
        if let (Some(name), true) = (&name, objects) {
            return corruption::check(self.global, self.service, &self.whom, name.clone()).await;
        }
        let mark = MarkUnverifiedRequest { name, storage, objects };
        let marked = self.service.mark_unverified(request(mark)).await;
        let replicas = marked.map_err(self.refused("verifying"))?.into_inner().replicas;
        output::print(self.global.json, &json!({ "replicas": replicas }), |_| {
            let what = if objects { "looked through" } else { "compared again" };
            format!("{replicas} replicas are to be {what}")
        })?;
        Ok(ExitCode::SUCCESS)
    }

    pub(crate) async fn set_replication_factor(
        mut self,
        path: &str,
        factor: Factor,
    ) -> Result<ExitCode, Failure> {
        let path = repository_path(path)?;
        let (replication_factor, default) = match factor {
            Factor::All => (0, false),
            Factor::Default => (0, true),
            Factor::Of(count) => (count.into(), false),
        };
        let set = SetReplicationFactorRequest { name: Some(self.name(&path)), replication_factor, default };
        let answer = self.service.set_replication_factor(request(set)).await;
        let answer = answer.map_err(self.refused(&format!("setting the replication factor of {path}")))?;
        self.show(answer.into_inner().repository)
    }

    pub(crate) async fn set_write_quorum(mut self, path: &str, policy: String) -> Result<ExitCode, Failure> {
        let path = repository_path(path)?;
        let set = SetWriteQuorumRequest { name: Some(self.name(&path)), policy };
        let answer = self.service.set_write_quorum(request(set)).await;
        let answer = answer.map_err(self.refused(&format!("setting the write quorum of {path}")))?;
        self.show(answer.into_inner().repository)
    }

    pub(crate) async fn track(mut self, options: TrackRepository) -> Result<ExitCode, Failure> {
        let path = repository_path(&options.path)?;
        let track = TrackRepositoryRequest {
            name: Some(self.name(&path)),
            replica_path: options.replica_path,
            authoritative_storage: options.authoritative_storage,
        };
        let tracked = self.service.track_repository(request(track)).await;
        let tracked = tracked.map_err(self.refused(&format!("tracking {path}")))?;
        self.show(tracked.into_inner().repository)
    }

    /// Reads every storage's directories: it takes as long as it takes.
    pub(crate) async fn list_untracked(mut self, older_than_seconds: u32) -> Result<ExitCode, Failure> {
        let virtual_storage = self.global.virtual_storage.clone();
        let list = ListUntrackedRequest { virtual_storage, older_than_seconds };
        let stream = self.service.list_untracked(list).await;
        let mut stream = stream.map_err(self.refused("walking the storages"))?.into_inner();
        let mut found: Vec<UntrackedView> = Vec::new();
        while let Some(next) = stream.message().await.map_err(self.refused("walking the storages"))? {
            found.push(next.into());
        }
        output::print(self.global.json, &found, output::placement::untracked)?;
        Ok(ExitCode::SUCCESS)
    }
}
