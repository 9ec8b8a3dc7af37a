//! One request from its headers to its answer: limits, access, route, and the way a failure is told.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use secrecy::SecretString;
use tabularium_common::{
    auth::SendToken,
    config::ConfigError,
    lifecycle::Tasks,
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tokio::sync::Semaphore;

use crate::{
    access,
    answer::{Answer, Reply},
    api,
    config::Config,
    exchange,
    failure::Failure,
    freshness::Freshness,
    limits::MAX_HEADER_BYTES,
    metrics::Metrics,
    path::{Route, route},
    record::Record,
    upstream::Upstreams,
};

/// Where the correlation id is answered, and taken from when GitLab's own header is absent.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PLAIN: &str = "text/plain; charset=utf-8";

/// What every request needs.
pub(crate) struct Gateway {
    pub(crate) config: Config,
    pub(crate) routers: Arc<Upstreams>,
    pub(crate) coordinators: Arc<Upstreams>,
    pub(crate) metrics: Arc<Metrics>,
    /// Own what lies below multiplexed connections; they stop when no request needs them any more.
    pub(crate) sessions: Tasks,
    access_token: Option<SecretString>,
    requests: Arc<Semaphore>,
}

impl Gateway {
    /// Reads the secrets; connects to nobody yet.
    pub(crate) fn new(config: Config, metrics: Arc<Metrics>) -> Result<Self, ConfigError> {
        let read = |file: &Option<tabularium_common::config::SecretFile>| {
            file.as_ref().map(tabularium_common::config::SecretFile::read).transpose()
        };
        let router_token = SendToken(read(&config.router_token_file)?);
        let coordinator_token = SendToken(read(&config.coordinator_token_file)?);
        let sessions = Tasks::new();
        let routers = Upstreams::new(&config.routers, router_token, metrics.clone(), Some(&sessions));
        let coordinators = Upstreams::new(&config.coordinators, coordinator_token, metrics.clone(), None);
        Ok(Self {
            routers: Arc::new(routers),
            coordinators: Arc::new(coordinators),
            sessions,
            access_token: read(&config.access_token_file)?,
            requests: Arc::new(Semaphore::new(config.max_requests)),
            metrics,
            config,
        })
    }

    /// Answers a request.
    pub(crate) async fn serve(&self, request: Request<Incoming>) -> Response<Answer> {
        let id = correlation_id(request.headers());
        let path = request.uri().path().to_owned();
        let api = path.starts_with("/api/");
        let mut record = Record::new(request.method().clone(), path, id, self.metrics.clone());
        let reply = self.reply(request, &mut record).await.unwrap_or_else(|failure| told(failure, api));
        respond(reply, record)
    }

    async fn reply(&self, request: Request<Incoming>, record: &mut Record) -> Result<Reply, Failure> {
        let (head, body) = request.into_parts();
        check_headers(&head.headers)?;
        record.ask(Freshness::of(&head.headers));
        let permit = Arc::clone(&self.requests)
            .try_acquire_owned()
            .map_err(|_| Failure::busy("too many requests are being served; try again"))?;
        record.hold(permit);
        let caller = access::caller(self.access_token.as_ref(), &head.headers)?;
        let route = route(&head.method, &head.uri)?;
        record.set_service(route.label());
        match route {
            Route::Advertise(path, service) => {
                exchange::advertise(self, &head.headers, &path, service, record).await
            }
            Route::Exchange(path, service) => {
                exchange::exchange(self, &head.headers, body, &path, service, &caller, record).await
            }
            Route::Create => api::create(self, &head, body, record).await,
            Route::List => api::list(self, &head, record).await,
            Route::Show(path) => api::show(self, &head, &path, record).await,
            Route::Remove(path) => api::remove(self, &path, record).await,
        }
    }
}

fn correlation_id(headers: &HeaderMap) -> CorrelationId {
    if headers.contains_key(CORRELATION_ID) {
        return CorrelationId::of(headers);
    }
    let mut given = HeaderMap::new();
    if let Some(id) = headers.get(REQUEST_ID) {
        given.insert(CORRELATION_ID, id.clone());
    }
    CorrelationId::of(&given)
}

fn check_headers(headers: &HeaderMap) -> Result<(), Failure> {
    // Two parties on the way could each believe another one.
    if headers.get_all(header::HOST).iter().count() > 1 {
        return Err(Failure::new(StatusCode::BAD_REQUEST, "the request has more than one Host header"));
    }
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes <= MAX_HEADER_BYTES {
        return Ok(());
    }
    let text = format!("the request's headers are larger than {MAX_HEADER_BYTES} bytes");
    Err(Failure::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, text))
}

fn told(failure: Failure, api: bool) -> Reply {
    let Failure { status, text, header } = failure;
    if api {
        let bytes = serde_json::json!({ "error": text }).to_string().into();
        Reply::Whole { status, content_type: api::JSON, bytes, header }
    } else {
        Reply::Whole { status, content_type: PLAIN, bytes: Bytes::from(text + "\n"), header }
    }
}

fn respond(reply: Reply, mut record: Record) -> Response<Answer> {
    let mut headers = HeaderMap::new();
    if let Some(id) = record.correlation_id().header() {
        headers.insert(REQUEST_ID, id);
    }
    // Answers tell the present state: nobody on the way may keep them, HTTP/1.0 proxies included.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, max-age=0, must-revalidate"));
    headers.insert(header::PRAGMA, HeaderValue::from_static("no-cache"));
    headers.insert(header::EXPIRES, HeaderValue::from_static("Fri, 01 Jan 1980 00:00:00 GMT"));
    let (status, content_type, extra) = match &reply {
        Reply::Whole { status, content_type, header, .. } => (*status, *content_type, header.clone()),
        Reply::Output { content_type, .. } => (StatusCode::OK, *content_type, None),
    };
    if status != StatusCode::NO_CONTENT {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    headers.extend(extra);
    headers.extend(record.freshness().answered());
    record.answer(status);
    let answer = match reply {
        Reply::Whole { bytes, .. } => Answer::whole(bytes, record),
        Reply::Output { first, rest, .. } => Answer::Output { first: Some(first), rest, record },
    };
    let mut response = Response::new(answer);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}
