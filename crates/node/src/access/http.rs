//! Calls to GitLab's internal API (wire reference, section i.3): one connection each, never followed elsewhere, never
//! repeated.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, de::DeserializeOwned};
use tabularium_common::{VERSION, auth::unix_now, config::ConfigError};
use tokio::{net::UnixStream, time::timeout};
use tower::util::BoxCloneSyncService;

use super::{token::token, trust};
use crate::{
    config::{GitlabConfig, Place},
    metrics::{GitlabOutcome, Metrics},
};

/// What stands before every path.
const API: &str = "/api/v4/internal";
/// Carries the token.
const TOKEN: HeaderName = HeaderName::from_static("gitlab-shell-api-request");
/// Where the change comes from; GitLab checks addresses.
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Longest answer that is read.
const MAX_ANSWER_BYTES: usize = 4 * 1024 * 1024;

/// Why GitLab cannot be called at all.
#[derive(Debug, thiserror::Error)]
pub enum GitlabError {
    /// The secret cannot be read.
    #[error(transparent)]
    Secret(#[from] ConfigError),
    /// Certificates cannot be used.
    #[error(transparent)]
    Trust(#[from] trust::TrustError),
    /// The URL names no place; the configuration's check says so too.
    #[error("gitlab.url names no place")]
    Url,
    /// User or password cannot be sent.
    #[error("gitlab.http-settings: user and password cannot be sent in a header")]
    Credentials,
}

/// Why a call has no usable answer. The texts are Gitaly's, and users see some of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum CallError {
    /// No answer, or none in time.
    #[error("Internal API unreachable")]
    Unreachable,
    /// GitLab says no, and why.
    #[error("{0}")]
    Refused(String),
    /// GitLab is asked too often. Gitaly leaves out what it says about that.
    #[error("rate limited")]
    RateLimited,
    /// GitLab fails, and does not say why.
    #[error("Internal API error ({0})")]
    Failed(u16),
    /// An answer of a kind that cannot be read.
    #[error("{endpoint} endpoint respond with unsupported content type: {found}")]
    ContentType {
        /// What was called.
        endpoint: &'static str,
        /// What came.
        found: String,
    },
    /// An answer that is not what it should be.
    #[error("decoding response from {endpoint} endpoint: {problem}")]
    Answer {
        /// What was called.
        endpoint: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// Neither yes nor no.
    #[error("{call}: {status}")]
    Status {
        /// In Gitaly's words.
        call: &'static str,
        /// Of HTTP.
        status: u16,
    },
}

/// What a call needs to know of the one it is made for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Caller {
    /// The address that the change comes from.
    pub(crate) remote_ip: Option<HeaderValue>,
    /// The request that the change is part of.
    pub(crate) correlation_id: Option<HeaderValue>,
}

/// An answer that is neither a refusal nor a failure.
pub(super) struct Answer {
    endpoint: &'static str,
    pub(super) status: StatusCode,
    content_type: String,
    body: Bytes,
}

impl Answer {
    /// What the body says, which must be JSON.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T, CallError> {
        let kind = self.content_type.split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/json") {
            let found = if kind.is_empty() { "mime: no media type" } else { kind };
            return Err(CallError::ContentType { endpoint: self.endpoint, found: found.to_owned() });
        }
        self.json_of_any_type()
    }

    /// The same, whatever the headers say.
    pub(super) fn json_of_any_type<T: DeserializeOwned>(&self) -> Result<T, CallError> {
        serde_json::from_slice(&self.body)
            .map_err(|error| CallError::Answer { endpoint: self.endpoint, problem: error.to_string() })
    }
}

type Connector = BoxCloneSyncService<Uri, TokioIo<UnixStream>, std::io::Error>;

/// The two ways there.
enum Transport {
    Web(Client<HttpsConnector<HttpConnector>, Full<Bytes>>),
    Unix(Client<Connector, Full<Bytes>>),
}

/// Where GitLab is, and with which secret it is called.
pub(super) struct Http {
    transport: Transport,
    /// Before the path of every call.
    base: String,
    secret: SecretString,
    credentials: Option<HeaderValue>,
    patience: Duration,
    metrics: Metrics,
}

impl Http {
    pub(super) fn new(config: &GitlabConfig, metrics: Metrics) -> Result<Self, GitlabError> {
        let secret = config.secret_file.read()?;
        let (transport, base) = match config.place().ok_or(GitlabError::Url)? {
            Place::Web(url) => (web(config, &url)?, url),
            // The host is not looked at by anybody.
            Place::Unix { socket, root } => (unix(socket), format!("http://unix{root}")),
        };
        let settings = &config.http_settings;
        let credentials = match (settings.user.as_str(), settings.password.expose_secret()) {
            ("", "") => None,
            (user, password) => {
                let encoded = STANDARD.encode(format!("{user}:{password}"));
                let value = HeaderValue::try_from(format!("Basic {encoded}"));
                let mut value = value.map_err(|_| GitlabError::Credentials)?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        Ok(Self { transport, base, secret, credentials, patience: settings.patience(), metrics })
    }

    pub(super) async fn get(&self, endpoint: &'static str) -> Result<Answer, CallError> {
        self.call(Method::GET, endpoint, Bytes::new(), &Caller::default()).await
    }

    pub(super) async fn post(
        &self,
        endpoint: &'static str,
        body: &serde_json::Value,
        caller: &Caller,
    ) -> Result<Answer, CallError> {
        self.call(Method::POST, endpoint, body.to_string().into(), caller).await
    }

    /// The body of the answer to a GET, piece by piece, however long it is; `None` if GitLab neither refuses nor has it.
    pub(super) async fn open(&self, endpoint: &'static str, query: &str) -> Result<Option<Body>, CallError> {
        let path = format!("{endpoint}?{query}");
        let request = self.request(Method::GET, &path, Bytes::new(), &Caller::default());
        let opening = self.in_time(endpoint, request, |response| async move {
            if response.status().as_u16() < 400 {
                return Ok(Ok(response));
            }
            let answer = answer(endpoint, response).await?;
            Ok(Err(refusal(&answer).unwrap_or(CallError::Unreachable)))
        });
        let response = opening.await?;
        let found = response.status() == StatusCode::OK;
        let rest = response.into_body().map_err(BoxError::from).boxed_unsync();
        Ok(found.then(|| Body { rest, patience: self.patience }))
    }

    async fn call(
        &self,
        method: Method,
        endpoint: &'static str,
        body: Bytes,
        caller: &Caller,
    ) -> Result<Answer, CallError> {
        let request = self.request(method, endpoint, body, caller);
        let calling = self.in_time(endpoint, request, |response| async move {
            let answer = answer(endpoint, response).await?;
            Ok(refusal(&answer).map_or(Ok(answer), Err))
        });
        calling.await
    }

    /// One call, counted and timed: in time there is an answer, and all of it that `read` reads.
    async fn in_time<T, Reading: Future<Output = Result<Result<T, CallError>, BoxError>>>(
        &self,
        endpoint: &'static str,
        request: Result<Request<Full<Bytes>>, http::Error>,
        read: impl FnOnce(Response<Incoming>) -> Reading,
    ) -> Result<T, CallError> {
        let unreachable = |problem: &dyn std::fmt::Display| {
            tracing::error!(endpoint, %problem, "Internal API unreachable");
            CallError::Unreachable
        };
        let request = request.map_err(|error| unreachable(&error))?;
        let began = Instant::now();
        let calling = async { read(self.send(request).await?).await };
        let called = match timeout(self.patience, calling).await {
            Ok(Ok(called)) => called,
            Ok(Err(problem)) => Err(unreachable(&problem)),
            Err(_) => Err(unreachable(&format!("no answer within {} s", self.patience.as_secs()))),
        };
        self.metrics.gitlab_called(endpoint, outcome(called.as_ref().err()), began.elapsed());
        called
    }

    fn request(
        &self,
        method: Method,
        endpoint: &str,
        body: Bytes,
        caller: &Caller,
    ) -> Result<Request<Full<Bytes>>, http::Error> {
        let mut token = HeaderValue::try_from(token(&self.secret, unix_now()))?;
        token.set_sensitive(true);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{API}{endpoint}", self.base))
            .header(TOKEN, token)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, format!("gitaly/{VERSION}"))
            .header(header::CONNECTION, "close");
        let optional = [
            (header::AUTHORIZATION, &self.credentials),
            (FORWARDED_FOR, &caller.remote_ip),
            (HeaderName::from_static("x-request-id"), &caller.correlation_id),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                request = request.header(name, value.clone());
            }
        }
        request.body(Full::new(body))
    }

    async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, hyper_util::client::legacy::Error> {
        match &self.transport {
            Transport::Web(client) => client.request(request).await,
            Transport::Unix(client) => client.request(request).await,
        }
    }
}

/// The whole of an answer.
async fn answer(endpoint: &'static str, response: Response<Incoming>) -> Result<Answer, BoxError> {
    let (head, body) = response.into_parts();
    let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await?.to_bytes();
    let content_type = head.headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let content_type = String::from_utf8_lossy(content_type.unwrap_or_default()).into_owned();
    Ok(Answer { endpoint, status: head.status, content_type, body })
}

fn outcome(error: Option<&CallError>) -> GitlabOutcome {
    match error {
        None => GitlabOutcome::Answered,
        Some(CallError::Unreachable) => GitlabOutcome::Unreachable,
        Some(_) => GitlabOutcome::Refused,
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A body that comes piece by piece.
pub(crate) struct Body {
    rest: UnsyncBoxBody<Bytes, BoxError>,
    /// For each piece.
    patience: Duration,
}

impl Body {
    /// The next piece; `None` at the end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, BodyError> {
        loop {
            let frame = timeout(self.patience, self.rest.frame()).await.map_err(|_| BodyError::Late)?;
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|error| BodyError::Broken(error.to_string()))?;
            if let Ok(piece) = frame.into_data() {
                return Ok(Some(piece));
            }
        }
    }

    /// Of these pieces.
    #[cfg(test)]
    pub(crate) fn of(pieces: Vec<Result<Bytes, ()>>) -> Self {
        let frame = |piece: Result<Bytes, ()>| {
            piece.map(http_body::Frame::data).map_err(|()| BoxError::from("broken"))
        };
        let frames = futures::stream::iter(pieces.into_iter().map(frame));
        let rest = http_body_util::StreamBody::new(frames).boxed_unsync();
        Self { rest, patience: Duration::from_secs(1) }
    }
}

/// Why a body is not whole.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// Nothing more came in time.
    #[error("nothing more came in time")]
    Late,
    /// It broke off.
    #[error("{0}")]
    Broken(String),
}

/// What an answer outside of 200 to 399 says.
fn refusal(answer: &Answer) -> Option<CallError> {
    #[derive(Deserialize)]
    struct Said {
        #[serde(default)]
        message: String,
    }
    let status = answer.status.as_u16();
    if (200..400).contains(&status) {
        return None;
    }
    if answer.status == StatusCode::TOO_MANY_REQUESTS {
        return Some(CallError::RateLimited);
    }
    Some(match answer.json_of_any_type::<Said>() {
        Ok(Said { message }) => CallError::Refused(message),
        Err(_) => CallError::Failed(status),
    })
}

fn web(config: &GitlabConfig, url: &str) -> Result<Transport, GitlabError> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    let builder = HttpsConnectorBuilder::new();
    let builder = if url.starts_with("https") {
        builder.with_tls_config(trust::settings(&config.http_settings)?)
    } else {
        // Never used, so nobody needs to be trusted.
        builder.with_tls_config(trust::nobody().map_err(trust::TrustError::from)?)
    };
    let connector = builder.https_or_http().enable_http1().wrap_connector(tcp);
    Ok(Transport::Web(Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector)))
}

fn unix(socket: PathBuf) -> Transport {
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let connector = BoxCloneSyncService::new(connect);
    Transport::Unix(Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector))
}
