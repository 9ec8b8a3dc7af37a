//! What operators ask of a coordinator.

use tabularium_coordinator::Coordinator;
use tabularium_proto::coordinator::{
    self as wire, repair_service_client::RepairServiceClient, storage_service_client::StorageServiceClient,
};
use tonic::transport::Channel;

use crate::support::*;

pub(crate) struct Operators {
    pub(crate) storages: StorageServiceClient<Channel>,
    pub(crate) repair: RepairServiceClient<Channel>,
    pub(crate) routing: Routing,
}

pub(crate) fn operators(coordinator: &Coordinator) -> Operators {
    let channel = tabularium_common::grpc::channel(coordinator.grpc_address());
    Operators {
        storages: StorageServiceClient::new(channel.clone()),
        repair: RepairServiceClient::new(channel.clone()),
        routing: Routing::new(channel),
    }
}

pub(crate) fn storage(name: &str) -> wire::StorageName {
    wire::StorageName { virtual_storage: "default".into(), storage: name.into() }
}

impl Operators {
    pub(crate) async fn replicas(&mut self, path: &str) -> wire::RepositoryReplicas {
        let repository = Some(wire::get_replicas_request::Repository::Name(name(path)));
        let answer = self.repair.get_replicas(wire::GetReplicasRequest { repository }).await;
        answer.unwrap().into_inner().repository.unwrap()
    }

    pub(crate) async fn set_factor(
        &mut self,
        path: &str,
        factor: u32,
    ) -> Result<wire::RepositoryReplicas, tonic::Status> {
        let request = wire::SetReplicationFactorRequest {
            name: Some(name(path)),
            replication_factor: factor,
            default: false,
        };
        let answer = self.repair.set_replication_factor(request).await?;
        Ok(answer.into_inner().repository.unwrap())
    }

    pub(crate) async fn listed(&mut self, name: &str) -> Option<wire::StorageDetails> {
        let request = wire::ListStoragesRequest { virtual_storage: "default".into() };
        let storages = self.storages.list_storages(request).await.unwrap().into_inner().storages;
        storages.into_iter().find(|storage| storage.name == name)
    }

    pub(crate) async fn drain(
        &mut self,
        name: &str,
        allow_fewer_replicas: bool,
    ) -> Result<(), tonic::Status> {
        let request = wire::DrainStorageRequest { storage: Some(storage(name)), allow_fewer_replicas };
        self.storages.drain_storage(request).await.map(drop)
    }

    pub(crate) async fn losses(&mut self, only_unavailable: bool) -> Vec<wire::RepositoryReplicas> {
        let mut found = Vec::new();
        let mut page_token = String::new();
        loop {
            let virtual_storage = "default".to_owned();
            let request =
                wire::DataLossRequest { virtual_storage, only_unavailable, page_size: 2, page_token };
            let page = self.repair.data_loss(request).await.unwrap().into_inner();
            found.extend(page.repositories);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return found;
            }
        }
    }
}

pub(crate) fn operators_clone(operators: &Operators) -> Operators {
    Operators {
        storages: operators.storages.clone(),
        repair: operators.repair.clone(),
        routing: operators.routing.clone(),
    }
}

/// The coordinator knows a storage's disk: from now on it notices another one.
pub(crate) async fn disk_known(operators: &Operators, storage: &str) {
    eventually("the disk is known", || {
        let mut operators = operators_clone(operators);
        async move {
            let known = operators.listed(storage).await.unwrap().filesystem_id;
            (known == format!("disk of {storage}")).then_some(())
        }
    })
    .await;
}
