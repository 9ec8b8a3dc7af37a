//! MigrateReferenceBackend: how references are kept on disk.
//!
//! Here they are kept in files, one each, or many in one. Replicas take part in pushes by them without git
//! (`crate::following`), so a repository is not moved to another format.

use std::time::Instant;

use tabularium_proto::gitaly::{
    MigrateReferenceBackendRequest, MigrateReferenceBackendResponse,
    migrate_reference_backend_request::ReferenceBackend,
};
use tonic::Status;

use crate::{
    node::Node,
    votes::{Voter, agreed, ballot},
};

pub(super) async fn migrate(
    node: &Node,
    request: &MigrateReferenceBackendRequest,
    voter: &Voter,
) -> Result<MigrateReferenceBackendResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let began = Instant::now();
    match request.target_reference_backend() {
        ReferenceBackend::Unspecified => Err(Status::invalid_argument("target reference backend not set")),
        ReferenceBackend::Reftable => {
            Err(Status::failed_precondition("migration failed: this node keeps references in files"))
        }
        ReferenceBackend::Files => {
            // Nothing changes, and replicas agree that nothing does.
            let nothing = async { Ok::<_, Status>(()) };
            let subject = ballot(b"reference backend files");
            agreed(&node.sections, voter, &repository.path, subject.into(), nothing).await?;
            Ok(MigrateReferenceBackendResponse { time: began.elapsed().try_into().ok() })
        }
    }
}
