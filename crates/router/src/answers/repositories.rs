//! `WalkRepos`: the repositories of a virtual storage by the names that clients know. On a node's disk they have others.

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tabularium_common::telemetry::CorrelationId;
use tabularium_proto::{
    coordinator::{ListRepositoriesRequest, operator_service_client::OperatorServiceClient},
    gitaly::{WalkReposRequest, WalkReposResponse, internal_gitaly_server::InternalGitaly},
};
use tonic::{Request, Response, Status, codegen::BoxStream};

use crate::{coordinator::Coordinators, limits::COMMIT_CALL_TIMEOUT, refusal::Refusal};

/// Repositories on one page of a coordinator's.
const PAGE: u32 = 1000;

/// The service, as far as it is answered here.
#[derive(Clone)]
pub(crate) struct Repositories {
    /// Who knows them.
    pub(crate) coordinators: Coordinators,
}

#[tonic::async_trait]
impl InternalGitaly for Repositories {
    async fn walk_repos(
        &self,
        request: Request<WalkReposRequest>,
    ) -> Result<Response<BoxStream<WalkReposResponse>>, Status> {
        let correlation = CorrelationId::of(request.metadata().as_ref()).header();
        let virtual_storage = request.into_inner().storage_name;
        if virtual_storage.is_empty() {
            return Err(Refusal::StorageNotSet.status());
        }
        let first = ListRepositoriesRequest {
            virtual_storage,
            page_size: PAGE,
            ..ListRepositoriesRequest::default()
        };
        let coordinators = self.coordinators.clone();
        let pages = stream::try_unfold(Some(first), move |request| {
            let (coordinators, correlation) = (coordinators.clone(), correlation.clone());
            async move {
                let Some(request) = request else { return Ok(None) };
                let ask = |link, request| async move {
                    OperatorServiceClient::new(link).list_repositories(request).await
                };
                let page = coordinators
                    .call_other(correlation.as_ref(), COMMIT_CALL_TIMEOUT, request.clone(), ask)
                    .await?;
                let token = page.next_page_token;
                let next =
                    (!token.is_empty()).then_some(ListRepositoriesRequest { page_token: token, ..request });
                let names = page.repositories.into_iter().filter_map(|details| details.route?.name);
                // When one was changed is known to each node alone.
                let walked: Vec<_> = names
                    .map(|name| {
                        Ok(WalkReposResponse { relative_path: name.relative_path, ..Default::default() })
                    })
                    .collect();
                Ok::<_, Status>(Some((stream::iter(walked), next)))
            }
        });
        Ok(Response::new(pages.try_flatten().boxed()))
    }
}
