//! A GitLab that only has its internal API, and answers as a test wants it to.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    response::Response,
};
use futures::future::BoxFuture;
use serde_json::{Value, json};
use tabularium_common::config::SecretFile;
use tabularium_node::config::{GitlabConfig, HttpSettings};

pub(crate) const SECRET: &str = "a secret of GitLab's\n";

/// A call that came.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

impl Call {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The end of the path.
    pub(crate) fn endpoint(&self) -> &str {
        self.path.rsplit('/').next().unwrap()
    }
}

/// What it is answered.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) content_type: &'static str,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(status: u16, body: &Value) -> Self {
        Self { status, content_type: "application/json; charset=utf-8", body: body.to_string() }
    }
}

type Decide = dyn Fn(Call) -> BoxFuture<'static, Option<Reply>> + Send + Sync;

struct Shared {
    calls: Mutex<Vec<Call>>,
    decide: Box<Decide>,
}

/// GitLab. What the test says nothing about it agrees to.
#[derive(Clone)]
pub(crate) struct Gitlab(Arc<Shared>);

impl Gitlab {
    pub(crate) fn agreeing() -> Self {
        Self::deciding(|_| None)
    }

    pub(crate) fn deciding(decide: impl Fn(Call) -> Option<Reply> + Send + Sync + 'static) -> Self {
        Self::thinking(move |call| Box::pin(std::future::ready(decide(call))))
    }

    /// One that does something before it answers.
    pub(crate) fn thinking(
        decide: impl Fn(Call) -> BoxFuture<'static, Option<Reply>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Shared { calls: Mutex::default(), decide: Box::new(decide) }))
    }

    /// Answers this at one endpoint.
    pub(crate) fn answering(endpoint: &'static str, reply: Reply) -> Self {
        Self::deciding(move |call| (call.endpoint() == endpoint).then(|| reply.clone()))
    }

    pub(crate) fn app(&self) -> Router {
        Router::new().fallback(answer).with_state(self.clone())
    }

    /// Serves until the test ends; the URL.
    pub(crate) async fn serve(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = self.app();
        #[allow(clippy::disallowed_methods, reason = "ends with the test's runtime")]
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        format!("http://{address}")
    }

    /// The same at a socket.
    pub(crate) fn serve_at(&self, socket: &Path) {
        let listener = tokio::net::UnixListener::bind(socket).unwrap();
        let app = self.app();
        #[allow(clippy::disallowed_methods, reason = "ends with the test's runtime")]
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    }

    /// All calls but those that only ask who is there.
    pub(crate) fn calls(&self) -> Vec<Call> {
        let calls = self.0.calls.lock().unwrap();
        calls.iter().filter(|call| call.endpoint() != "check").cloned().collect()
    }

    /// How often GitLab was asked who it is.
    pub(crate) fn checks(&self) -> usize {
        let calls = self.0.calls.lock().unwrap();
        calls.iter().filter(|call| call.endpoint() == "check").count()
    }

    /// The ends of their paths.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        self.calls().iter().map(|call| call.endpoint().to_owned()).collect()
    }
}

async fn answer(State(gitlab): State<Gitlab>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body: Bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    let path = head.uri.path().to_owned();
    let query = head.uri.query().unwrap_or_default().to_owned();
    let call = Call { method: head.method, path, query, headers: head.headers, body };
    gitlab.0.calls.lock().unwrap().push(call.clone());
    let reply = match (gitlab.0.decide)(call.clone()).await {
        Some(reply) => reply,
        None => agree(&call),
    };
    let response = Response::builder().status(StatusCode::from_u16(reply.status).unwrap());
    response.header(header::CONTENT_TYPE, reply.content_type).body(Body::from(reply.body)).unwrap()
}

fn agree(call: &Call) -> Reply {
    let body = match (call.method.as_str(), call.endpoint()) {
        ("POST", "allowed") => json!({"status": true}),
        ("POST", "pre_receive") => json!({"reference_counter_increased": true}),
        ("POST", "post_receive") => json!({"reference_counter_decreased": true, "messages": []}),
        ("GET", "check") => {
            json!({"api_version": "v4", "gitlab_version": "18.0.0", "gitlab_rev": "abc", "redis": true})
        }
        _ => return Reply::json(404, &json!({"message": "404 Not Found"})),
    };
    Reply::json(200, &body)
}

/// The configuration that leads to GitLab at this URL.
pub(crate) fn config(url: &str, directory: &Path) -> GitlabConfig {
    let secret = directory.join("gitlab-secret");
    std::fs::write(&secret, SECRET).unwrap();
    GitlabConfig {
        url: url.to_owned(),
        relative_url_root: String::new(),
        secret_file: SecretFile(secret),
        http_settings: HttpSettings::default(),
    }
}
