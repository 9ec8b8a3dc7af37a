//! Tells a subscribed site what changed, one event after the other. The first that is not taken ends the run, so that a
//! site sees the events of a repository in order; how far it got is reported either way, and nothing else is kept.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use secrecy::{ExposeSecret as _, SecretString};
use tabularium_common::{
    VERSION,
    ids::SiteName,
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tabularium_proto::coordinator::{GeoEvent, NotifyWork};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{failure::Failure, hook, http_client::HttpClient};

/// How long one event may take, GitLab's own bound.
const HOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// How much of an answer's body is read, so that its connection can be used again.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// Where a site's events go, and its token.
pub(crate) struct Address {
    pub(crate) url: Uri,
    pub(crate) token: SecretString,
}

/// Posts events to subscribed sites.
pub(crate) struct Notifier {
    client: HttpClient,
    sites: HashMap<SiteName, Address>,
    external_url: Option<String>,
}

/// How far a run got.
pub(crate) struct Progress {
    /// Position of the last event delivered, if one was.
    pub(crate) reached: Option<i64>,
    /// Why it ended before the last event.
    pub(crate) failure: Option<Failure>,
}

impl Notifier {
    pub(crate) fn new(
        client: HttpClient,
        sites: HashMap<SiteName, Address>,
        external_url: Option<String>,
    ) -> Self {
        Self { client, sites, external_url }
    }

    /// Delivers the events in the order of their positions.
    pub(crate) async fn notify(&self, work: &NotifyWork, correlation_id: &CorrelationId) -> Progress {
        let mut progress = Progress { reached: None, failure: None };
        let address = work.site.parse::<SiteName>().ok().and_then(|name| self.sites.get(&name));
        let Some(address) = address else {
            progress.failure =
                Some(Failure::refused(format!("no [[subscriber]] named {:?} is configured here", work.site)));
            return progress;
        };
        let mut events: Vec<&GeoEvent> = work.events.iter().collect();
        events.sort_by_key(|event| event.position);
        for event in events {
            if let Err(failure) = self.deliver(&work.site, address, event, correlation_id).await {
                progress.failure = Some(failure);
                return progress;
            }
            progress.reached = Some(event.position);
        }
        progress
    }

    async fn deliver(
        &self,
        site: &str,
        address: &Address,
        event: &GeoEvent,
        correlation_id: &CorrelationId,
    ) -> Result<(), Failure> {
        let position = event.position;
        let body = hook::body(event, self.external_url.as_deref(), OffsetDateTime::now_utc());
        let Some(body) = body else {
            return Err(Failure::refused(format!("event {position} is of an unknown kind ({})", event.kind)));
        };
        let key = format!("{site}-{position}");
        let request = self.request(address, &key, body.to_string(), correlation_id)?;
        let exchange = async {
            let response = self.client.request(request).await?;
            let status = response.status();
            // What it says is of no interest, and neither is whether all of it arrives.
            let _ = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            Ok::<_, hyper_util::client::legacy::Error>(status)
        };
        match tokio::time::timeout(HOOK_TIMEOUT, exchange).await {
            Ok(Ok(status)) if status.is_success() => Ok(()),
            Ok(Ok(status)) => Err(refusal(site, position, status)),
            Ok(Err(error)) => Err(Failure::unreachable(format!(
                "event {position}: site {site} not reached: {}",
                root(&error)
            ))),
            Err(_) => Err(Failure::unreachable(format!(
                "event {position}: site {site} did not answer within {} s",
                HOOK_TIMEOUT.as_secs()
            ))),
        }
    }

    fn request(
        &self,
        address: &Address,
        key: &str,
        body: String,
        correlation_id: &CorrelationId,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let mut token = HeaderValue::from_str(address.token.expose_secret())
            .map_err(|_| Failure::refused("the hook's token cannot be sent in a header"))?;
        token.set_sensitive(true);
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(address.url.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, format!("Tabularium/{VERSION}"))
            .header("X-Gitlab-Event", hook::SYSTEM_HOOK)
            .header("X-Gitlab-Token", token)
            .header("Idempotency-Key", key)
            .header("X-Gitlab-Event-UUID", Uuid::new_v5(&Uuid::NAMESPACE_OID, key.as_bytes()).to_string())
            .header("X-Gitlab-Webhook-UUID", Uuid::new_v4().to_string());
        if let Some(value) = correlation_id.header() {
            request = request.header(CORRELATION_ID, value);
        }
        if let Some(base) = &self.external_url {
            request = request.header("X-Gitlab-Instance", base);
        }
        request
            .body(Full::from(body))
            .map_err(|error| Failure::refused(format!("the hook's request cannot be formed: {error}")))
    }
}

/// Only 2xx means taken. A site that says it is busy or down is as good as unreachable; the rest wants an operator.
fn refusal(site: &str, position: i64, status: StatusCode) -> Failure {
    let passing = matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    );
    let message = format!("event {position}: site {site} answered {status}");
    if passing { Failure::unreachable(message) } else { Failure::refused(message) }
}

/// The innermost cause: the outer ones only say that a request failed.
pub(crate) fn root(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_that_is_busy_is_tried_for_ever_and_one_that_says_no_is_not() {
        for (status, passing) in
            [(503, true), (429, true), (401, false), (404, false), (302, false), (500, false)]
        {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(refusal("oslo", 3, status).unreachable, passing, "{status}");
        }
    }
}
