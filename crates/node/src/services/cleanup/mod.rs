//! `gitaly.CleanupService`: histories that are rewritten, here ([`rewrite_history`]) or elsewhere ([`object_map`]).

mod object_map;
mod rewrite_history;

use std::sync::Arc;

use tabularium_proto::gitaly::{
    ApplyBfgObjectMapStreamRequest, ApplyBfgObjectMapStreamResponse, RewriteHistoryRequest,
    RewriteHistoryResponse, cleanup_service_server::CleanupService,
};
use tonic::{Request, Response, Status, Streaming};

use self::object_map::ObjectMap;
use super::{listing, streams::ResponseStream};
use crate::{node::Node, votes::Voter};

/// The service.
pub(crate) struct CleanupServer(Arc<Node>);

impl CleanupServer {
    /// On this node.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

#[tonic::async_trait]
impl CleanupService for CleanupServer {
    async fn apply_bfg_object_map_stream(
        &self,
        request: Request<Streaming<ApplyBfgObjectMapStreamRequest>>,
    ) -> Result<Response<ResponseStream<ApplyBfgObjectMapStreamResponse>>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        let mut requests = request.into_inner();
        let Some(first) = requests.message().await? else {
            return Err(Status::internal("EOF"));
        };
        let repository = self.0.storages.open(first.repository.as_ref())?;
        let node = Arc::clone(&self.0);
        Ok(listing::stream(&self.0.tasks, "ApplyBfgObjectMapStream", |messages| async move {
            let map = ObjectMap::new(first.object_map, requests);
            object_map::apply(&node, &repository, map, &voter, &messages).await
        }))
    }

    async fn rewrite_history(
        &self,
        request: Request<Streaming<RewriteHistoryRequest>>,
    ) -> Result<Response<RewriteHistoryResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        rewrite_history::rewrite(&self.0, request.into_inner(), &voter).await.map(Response::new)
    }
}
