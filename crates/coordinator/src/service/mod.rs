//! The gRPC services: they parse what callers send, call what does the work, and map what it says.

mod corruption;
mod duty;
mod import;
mod losses;
mod operator;
mod peer;
mod rebuild;
mod routing;
mod storages;

use std::{str::FromStr, sync::Arc};

use tabularium_common::{
    auth::RequireToken,
    ids::{ParseIdError, RelativePath, StorageName, VirtualStorageName},
    telemetry::CorrelationId,
};
use tabularium_proto::{
    DESCRIPTORS,
    coordinator::{
        self as wire, duty_service_server::DutyServiceServer, import_service_server::ImportServiceServer,
        operator_service_server::OperatorServiceServer, peer_service_server::PeerServiceServer,
        rebuild_service_server::RebuildServiceServer, repair_service_server::RepairServiceServer,
        routing_service_server::RoutingServiceServer, storage_service_server::StorageServiceServer,
    },
};
use tonic::{
    Request, Status,
    service::interceptor::InterceptedService,
    transport::{Server, server::Router},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{app::Shared, error::NameError, repository::RepositoryKey};

pub(crate) use corruption::CHECKS_AT_ONCE;
pub(crate) use operator::{status, subject};

/// Adds all services, each behind the token.
pub(crate) fn add(
    mut server: Server,
    shared: &Arc<Shared>,
    require: &RequireToken,
) -> Result<Router, tonic_reflection::server::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    follow_readiness(shared, reporter);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let require = || require.clone();
    Ok(server
        .add_service(InterceptedService::new(health, require()))
        .add_service(InterceptedService::new(reflection, require()))
        .add_service(RoutingServiceServer::with_interceptor(routing::Routing(Arc::clone(shared)), require()))
        .add_service(DutyServiceServer::with_interceptor(duty::Duties(Arc::clone(shared)), require()))
        .add_service(OperatorServiceServer::with_interceptor(
            operator::Operator(Arc::clone(shared)),
            require(),
        ))
        .add_service(StorageServiceServer::with_interceptor(
            storages::Storages(Arc::clone(shared)),
            require(),
        ))
        .add_service(RepairServiceServer::with_interceptor(losses::Repair(Arc::clone(shared)), require()))
        .add_service(RebuildServiceServer::with_interceptor(rebuild::Rebuilds(Arc::clone(shared)), require()))
        .add_service(ImportServiceServer::with_interceptor(import::Imports(Arc::clone(shared)), require()))
        .add_service(PeerServiceServer::with_interceptor(peer::Peer(Arc::clone(shared)), require())))
}

/// Callers see over gRPC that we stop, too.
fn follow_readiness(shared: &Arc<Shared>, reporter: HealthReporter) {
    let stopping = shared.tasks.stopping();
    shared.tasks.spawn("health", async move {
        stopping.cancelled().await;
        reporter.set_service_status("", ServingStatus::NotServing).await;
    });
}

fn key(name: Option<&wire::RepositoryName>) -> Result<RepositoryKey, NameError> {
    let name = name.ok_or(NameError::RepositoryNotSet)?;
    match (name.virtual_storage.is_empty(), name.relative_path.is_empty()) {
        (true, true) => return Err(NameError::RepositoryNotSet),
        (true, false) => return Err(NameError::StorageNotSet),
        (false, true) => return Err(NameError::PathNotSet),
        (false, false) => {}
    }
    Ok(RepositoryKey {
        virtual_storage: virtual_storage(&name.virtual_storage)?,
        relative_path: relative_path(&name.relative_path)?,
    })
}

fn virtual_storage(text: &str) -> Result<VirtualStorageName, NameError> {
    text.parse().map_err(|_| NameError::UnknownVirtualStorage)
}

fn relative_path(text: &str) -> Result<RelativePath, NameError> {
    text.parse().map_err(|error| match error {
        ParseIdError::Escapes => NameError::Escapes,
        ParseIdError::Empty => NameError::PathNotSet,
        other => NameError::Malformed(other.to_string()),
    })
}

fn storages(texts: &[String]) -> Result<Vec<StorageName>, Status> {
    texts.iter().map(|text| argument("storage", text)).collect()
}

/// Parses a value that only our own services send.
fn argument<T>(what: &str, text: &str) -> Result<T, Status>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error| Status::invalid_argument(format!("{what} `{text}`: {error}")))
}

fn correlation_id<T>(request: &Request<T>) -> CorrelationId {
    CorrelationId::of(&request.metadata().clone().into_headers())
}

/// Where a worker reaches a storage; without an address when that is not configured any more.
pub(crate) fn storage_address(
    shared: &Shared,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
) -> wire::StorageAddress {
    let topology = shared.topology.get();
    wire::StorageAddress {
        storage: storage.to_string(),
        address: topology.address(virtual_storage, storage).map(ToString::to_string).unwrap_or_default(),
    }
}
