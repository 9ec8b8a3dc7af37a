//! What other coordinators ask.

use std::sync::Arc;

use tabularium_common::ids::{Generation, RepositoryId};
use tabularium_proto::coordinator::{self as wire, peer_service_server::PeerService};
use tonic::{Request, Response, Status};

use super::key;
use crate::{app::Shared, repository::RevokedRoute};

pub(crate) struct Peer(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl PeerService for Peer {
    async fn revoke_routes(
        &self,
        request: Request<wire::RevokeRoutesRequest>,
    ) -> Result<Response<wire::RevokeRoutesResponse>, Status> {
        let request = request.into_inner();
        let me = self.0.identity.get();
        if request.coordinator_id != me {
            return Err(Status::failed_precondition(format!(
                "this is coordinator {me}, not {}",
                request.coordinator_id
            )));
        }
        let routes = request
            .routes
            .iter()
            .map(|route| {
                Ok(RevokedRoute {
                    key: key(route.name.as_ref())?,
                    id: RepositoryId(route.repository_id),
                    generation: Generation(route.generation),
                })
            })
            .collect::<Result<Vec<_>, Status>>()?;
        self.0.sessions.revoke(&routes).await;
        Ok(Response::new(wire::RevokeRoutesResponse {}))
    }
}
