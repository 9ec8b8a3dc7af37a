//! Pushes to a mirror are refused before git sends anything, with a sentence that says where to push instead.
//!
//! The coordinator is asked because it knows the home site's URL. When no coordinator answers, the push goes on to the
//! router, which refuses it by itself at the latest when it would write.

use tabularium_common::telemetry::CorrelationId;
use tabularium_proto::coordinator::{
    GetRepositoryRequest, RepositoryDetails, RepositoryName, operator_service_client::OperatorServiceClient,
};
use tonic::{Code, Status, transport::Channel};

use crate::{
    failure::Failure,
    gateway::Gateway,
    limits::{API_TIMEOUT, MIRROR_TIMEOUT},
    path::RepositoryPath,
    upstream::repeats_read,
};

/// Fails when the repository is written at another site.
pub(crate) async fn refuse_push(
    gateway: &Gateway,
    path: &RepositoryPath,
    correlation_id: &CorrelationId,
) -> Result<(), Failure> {
    let details = match details(gateway, path, correlation_id, MIRROR_TIMEOUT).await {
        Ok(details) => details,
        // The router says so in its own time.
        Err(status) if status.code() == Code::NotFound => return Ok(()),
        Err(status) => {
            tracing::warn!(
                grpc_code = ?status.code(),
                error = status.message(),
                relative_path = path.relative_path(),
                %correlation_id,
                "no coordinator says whether this is a mirror; the router decides"
            );
            return Ok(());
        }
    };
    match home(&details) {
        Some((site, url)) => Err(Failure::mirror(site, url)),
        None => Ok(()),
    }
}

/// Site of a mirror's home, and the URL that the repository has there.
pub(crate) fn home(details: &RepositoryDetails) -> Option<(&str, &str)> {
    let mirror = details.mirror.as_ref();
    let of_route = details.route.as_ref().map(|route| route.home_site.as_str());
    let site = of_route
        .filter(|site| !site.is_empty())
        .or_else(|| mirror.map(|mirror| mirror.home_site.as_str()).filter(|site| !site.is_empty()))?;
    Some((site, mirror.map(|mirror| mirror.home_url.as_str()).unwrap_or_default()))
}

/// What the coordinator knows about a repository. Bounded by `deadline`, at most [`API_TIMEOUT`].
pub(crate) async fn details(
    gateway: &Gateway,
    path: &RepositoryPath,
    correlation_id: &CorrelationId,
    deadline: std::time::Duration,
) -> Result<RepositoryDetails, Status> {
    let deadline = deadline.min(API_TIMEOUT);
    let coordinators = &gateway.coordinators;
    let message = GetRepositoryRequest {
        name: Some(RepositoryName {
            virtual_storage: gateway.config.virtual_storage.to_string(),
            relative_path: path.relative_path().to_owned(),
        }),
    };
    let call = |channel: Channel| {
        let request = coordinators.request(message.clone(), correlation_id, Some(deadline));
        async move { OperatorServiceClient::new(channel).get_repository(request).await }
    };
    let answer = coordinators.call(Some(deadline), repeats_read, call).await?;
    answer.into_inner().repository.ok_or_else(|| Status::internal("an answer without a repository"))
}
