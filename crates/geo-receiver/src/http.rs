//! The one endpoint. The order of its checks is that of their cost to us: who is calling comes before anything the caller
//! sent is read.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body as RequestBody,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::post,
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tabularium_common::{
    duties::{BODY_VERSION, SyncMessage},
    ids::{SiteName, VirtualStorageName},
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::{
    event::{Asked, Body, EventError},
    metrics::{Metrics, Outcome},
    publish::{PublishFault, Publisher},
    tokens::Tokens,
};

/// How long a caller may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// What every request needs.
pub(crate) struct Shared {
    pub(crate) tokens: Tokens,
    pub(crate) publisher: Publisher,
    pub(crate) virtual_storage: VirtualStorageName,
    pub(crate) max_body_bytes: usize,
    pub(crate) slots: Semaphore,
    pub(crate) metrics: Metrics,
}

/// The routes.
pub(crate) fn routes(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/api/v4/geo/receive_events", post(receive_events))
        .fallback(|| async { message(StatusCode::NOT_FOUND, "404 Not Found") })
        .method_not_allowed_fallback(|| async {
            message(StatusCode::METHOD_NOT_ALLOWED, "405 Method Not Allowed")
        })
        .with_state(shared)
}

/// Why an event is not taken.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("too many requests at once")]
    Overloaded,
    #[error("no home site has this token")]
    Unauthorized,
    #[error("Content-Type must be application/json")]
    ContentType,
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    #[error("the body did not arrive within {} s", BODY_TIMEOUT.as_secs())]
    Slow,
    #[error("the body broke off")]
    BrokeOff,
    #[error("the body is not a JSON object of an event: {0}")]
    Json(String),
    #[error("the event {0}")]
    Event(#[from] EventError),
    #[error(transparent)]
    Bus(#[from] PublishFault),
}

impl Refusal {
    /// What the caller is told, and how it is counted. Nothing of the body is repeated.
    fn answer(&self) -> (StatusCode, String, Outcome) {
        let bad_request = |outcome| (StatusCode::BAD_REQUEST, format!("400 Bad Request: {self}"), outcome);
        match self {
            Self::Overloaded => {
                (StatusCode::SERVICE_UNAVAILABLE, "503 Service Unavailable".to_owned(), Outcome::Overloaded)
            }
            Self::Unauthorized => {
                (StatusCode::UNAUTHORIZED, "401 Unauthorized".to_owned(), Outcome::Unauthorized)
            }
            Self::ContentType => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                format!("415 Unsupported Media Type: {self}"),
                Outcome::Malformed,
            ),
            Self::TooLarge(_) => {
                (StatusCode::PAYLOAD_TOO_LARGE, format!("413 Payload Too Large: {self}"), Outcome::Malformed)
            }
            Self::Slow => {
                (StatusCode::REQUEST_TIMEOUT, format!("408 Request Timeout: {self}"), Outcome::Malformed)
            }
            Self::BrokeOff | Self::Json(_) | Self::Event(EventError::Unnamed) => {
                bad_request(Outcome::Malformed)
            }
            Self::Event(EventError::Absent { .. } | EventError::Path { .. }) => (
                StatusCode::UNPROCESSABLE_ENTITY,
                format!("422 Unprocessable Entity: {self}"),
                Outcome::BadPath,
            ),
            // What is wrong with our bus is no business of the caller's.
            Self::Bus(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "503 Service Unavailable".to_owned(), Outcome::BusLost)
            }
        }
    }
}

async fn receive_events(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let correlation_id = CorrelationId::of(&parts.headers);
    let in_flight = shared.metrics.begin();
    let mut response = match shared.receive(&parts.headers, body, &correlation_id).await {
        Ok(outcome) => {
            shared.metrics.count(outcome);
            match outcome {
                Outcome::Ignored => message(StatusCode::OK, "200 OK"),
                _ => message(StatusCode::CREATED, "201 Created"),
            }
        }
        Err(refusal) => {
            let (status, text, outcome) = refusal.answer();
            shared.metrics.count(outcome);
            tracing::warn!(%correlation_id, status = status.as_u16(), error = %refusal, "event not taken");
            let mut response = message(status, &text);
            if status == StatusCode::SERVICE_UNAVAILABLE {
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            response
        }
    };
    drop(in_flight);
    if let Some(value) = correlation_id.header() {
        response.headers_mut().insert(CORRELATION_ID, value);
    }
    response
}

impl Shared {
    async fn receive(
        &self,
        headers: &HeaderMap,
        body: RequestBody,
        correlation_id: &CorrelationId,
    ) -> Result<Outcome, Refusal> {
        let _slot = self.slots.try_acquire().map_err(|_| Refusal::Overloaded)?;
        let token = headers.get("x-gitlab-token").ok_or(Refusal::Unauthorized)?;
        let site = self.tokens.site(token.as_bytes()).ok_or(Refusal::Unauthorized)?;
        if !is_json(headers) {
            return Err(Refusal::ContentType);
        }
        let bytes = self.read(headers, body).await?;
        let body: Body = serde_json::from_slice(&bytes).map_err(|error| Refusal::Json(place(&error)))?;
        let Asked::Sync { relative_path, event } = body.asked()? else {
            tracing::debug!(%correlation_id, %site, "event passed over");
            return Ok(Outcome::Ignored);
        };
        let event_id = event_id(site, headers, &bytes);
        let event = SyncMessage {
            version: BODY_VERSION,
            event_id,
            home_site: site.clone(),
            virtual_storage: self.virtual_storage.clone(),
            relative_path,
            event,
        };
        let duplicate = self.publisher.publish(&event, correlation_id).await?;
        let relative_path = &event.relative_path;
        tracing::info!(%correlation_id, %site, %relative_path, event = ?event.event, %event_id, duplicate, "event taken");
        Ok(if duplicate { Outcome::Duplicate } else { Outcome::Accepted })
    }

    async fn read(&self, headers: &HeaderMap, body: RequestBody) -> Result<bytes::Bytes, Refusal> {
        let limit = self.max_body_bytes;
        let announced =
            headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > limit as u64) {
            return Err(Refusal::TooLarge(limit));
        }
        let read = tokio::time::timeout(BODY_TIMEOUT, axum::body::to_bytes(body, limit));
        read.await.map_err(|_| Refusal::Slow)?.map_err(|error| {
            let too_large = std::error::Error::source(&error)
                .is_some_and(|source| source.to_string().contains("length limit exceeded"));
            if too_large { Refusal::TooLarge(limit) } else { Refusal::BrokeOff }
        })
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = given.and_then(|value| value.split(';').next()).map(str::trim);
    essence.is_some_and(|essence| essence.eq_ignore_ascii_case("application/json"))
}

/// Where parsing failed and how, without what stood there.
fn place(error: &serde_json::Error) -> String {
    let what = match error.classify() {
        serde_json::error::Category::Syntax => "syntax error",
        serde_json::error::Category::Data => "a field of another type than expected",
        serde_json::error::Category::Eof | serde_json::error::Category::Io => "it ends too early",
    };
    format!("{what} at line {} column {}", error.line(), error.column())
}

/// The event's id: equal for repeated deliveries of one event, different for different events, and never shared by two
/// sites.
///
/// GitLab's `Idempotency-Key` says exactly that, where it is sent. `X-Gitlab-Event-UUID` alone does not: the events of a
/// chain share it; with the whole body it does. Without either every delivery counts as an event of its own, which costs
/// one needless look at the home site.
fn event_id(site: &SiteName, headers: &HeaderMap, body: &[u8]) -> Uuid {
    let mut hash = Sha256::new_with_prefix(site.as_str());
    if let Some(key) = headers.get("idempotency-key") {
        hash.update(b"\0key\0");
        hash.update(key.as_bytes());
    } else if let Some(uuid) = headers.get("x-gitlab-event-uuid") {
        hash.update(b"\0event\0");
        hash.update(uuid.as_bytes());
        hash.update(b"\0");
        hash.update(body);
    } else {
        return Uuid::now_v7();
    }
    Uuid::new_v5(&Uuid::NAMESPACE_OID, &hash.finalize())
}

fn message(status: StatusCode, text: &str) -> Response {
    (status, Json(json!({ "message": text }))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(site: &str, headers: &[(&'static str, &str)], body: &str) -> Uuid {
        let headers =
            headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        event_id(&site.parse().unwrap(), &headers, body.as_bytes())
    }

    #[test]
    fn an_event_keeps_its_id_and_two_events_never_share_one() {
        let key = [("idempotency-key", "k"), ("x-gitlab-event-uuid", "u")];
        assert_eq!(id("a", &key, "1"), id("a", &key, "2"), "a resend");
        assert_ne!(id("a", &key, "1"), id("b", &key, "1"), "keys belong to a site");
        let chain = [("x-gitlab-event-uuid", "u")];
        assert_eq!(id("a", &chain, "1"), id("a", &chain, "1"));
        assert_ne!(id("a", &chain, "1"), id("a", &chain, "2"), "two events of one chain");
        assert_ne!(id("a", &[], "1"), id("a", &[], "1"), "nothing tells them apart: both count");
    }

    #[test]
    fn a_parse_error_repeats_nothing() {
        let error = serde_json::from_str::<Body>("{\"event_name\": 5 }").unwrap_err();
        assert_eq!(place(&error), "a field of another type than expected at line 1 column 16");
        let error = serde_json::from_str::<Body>("{\"event_name\": hunter2").unwrap_err();
        assert!(!place(&error).contains("hunter2") && place(&error).starts_with("syntax error"));
    }
}
