//! A stand-in for another site: takes hooks, and advertises refs as a gateway does.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    extract::{Path, State as Shared},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tabularium_common::pktline;

use crate::node::Refs;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) hooks: Vec<(HeaderMap, serde_json::Value)>,
    /// Answers to hooks; 201 when there is none.
    pub(crate) answers: VecDeque<u16>,
    /// Repositories by path, with the branch HEAD points at.
    pub(crate) repositories: BTreeMap<String, (String, Refs)>,
    pub(crate) asked: Vec<(String, HeaderMap)>,
    /// Answers every question about a repository with this status.
    pub(crate) status: Option<u16>,
}

pub(crate) struct Site {
    pub(crate) url: String,
    pub(crate) state: Arc<Mutex<State>>,
}

impl Site {
    pub(crate) async fn start() -> Self {
        let state: Arc<Mutex<State>> = Arc::default();
        let app = Router::new()
            .route("/api/v4/geo/receive_events", post(take_hook))
            .route("/{*path}", get(advertise))
            .with_state(Arc::clone(&state));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tabularium_common::lifecycle::Tasks::new()
            .spawn("site", async move { axum::serve(listener, app).await.unwrap() });
        Self { url, state }
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock().unwrap())
    }

    pub(crate) fn put(&self, path: &str, head: &str, refs: &[(&str, &str)]) {
        let refs = refs.iter().map(|(name, id)| ((*name).to_owned(), (*id).to_owned())).collect();
        self.with(|state| state.repositories.insert(path.to_owned(), (head.to_owned(), refs)));
    }
}

async fn take_hook(Shared(state): Shared<Arc<Mutex<State>>>, headers: HeaderMap, body: Bytes) -> Response {
    let mut state = state.lock().unwrap();
    let status = StatusCode::from_u16(state.answers.pop_front().unwrap_or(201)).unwrap();
    state.hooks.push((headers, serde_json::from_slice(&body).unwrap()));
    (status, [(header::LOCATION, "/elsewhere")]).into_response()
}

async fn advertise(
    Shared(state): Shared<Arc<Mutex<State>>>,
    Path(path): Path<String>,
    headers: HeaderMap,
) -> Response {
    let mut state = state.lock().unwrap();
    let path = path.strip_suffix("/info/refs").unwrap().to_owned();
    state.asked.push((path.clone(), headers));
    if let Some(status) = state.status {
        return StatusCode::from_u16(status).unwrap().into_response();
    }
    let Some((head, refs)) = state.repositories.get(&path) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let mut body = BytesMut::new();
    pktline::encode(b"# service=git-upload-pack\n", &mut body).unwrap();
    body.extend_from_slice(pktline::FLUSH);
    let mut capabilities = format!("\0ofs-delta symref=HEAD:{head} object-format=sha1");
    let head = refs.get(head).map(|id| ("HEAD", id.as_str()));
    for (name, id) in head.into_iter().chain(refs.iter().map(|(name, id)| (name.as_str(), id.as_str()))) {
        pktline::encode(format!("{id} {name}{capabilities}\n").as_bytes(), &mut body).unwrap();
        capabilities.clear();
    }
    body.extend_from_slice(pktline::FLUSH);
    body.freeze().into_response()
}

/// Status and text of a GET.
pub(crate) async fn get_text(url: &str) -> (u16, String) {
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let response = client.get(url.parse().unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}
