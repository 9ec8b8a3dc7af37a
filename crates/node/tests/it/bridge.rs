//! Git smart HTTP over the node's RPCs, just enough for git clients to push to it and fetch from it.

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use tabularium_proto::{
    gitaly::{InfoRefsRequest, PostReceivePackRequest, smart_http_service_client::SmartHttpServiceClient},
    node::{
        UploadPackRequest, upload_pack_response::Output, upload_pack_service_client::UploadPackServiceClient,
    },
};
use tonic::Status;

use crate::harness::{Client, TestNode};

#[derive(Clone)]
struct Shared {
    client: Client,
    storage: String,
    /// Required `Authorization` header, if any.
    authorization: Option<String>,
    /// Who pushes.
    gl_id: String,
    gl_repository: String,
}

/// Serves the node's repositories under the answered address until the test ends.
pub(crate) async fn serve(node: &TestNode, authorization: Option<&str>) -> String {
    serve_from(node.channel(), &node.storage, authorization).await
}

/// The same, for a node that is not in this process.
pub(crate) async fn serve_from(client: Client, storage: &str, authorization: Option<&str>) -> String {
    let (gl_id, gl_repository) = ("user-1".to_owned(), "project-1".to_owned());
    let (storage, authorization) = (storage.to_owned(), authorization.map(str::to_owned));
    serve_shared(Shared { client, storage, authorization, gl_id, gl_repository }).await
}

/// The same, for pushes by somebody to something.
pub(crate) async fn serve_as(node: &TestNode, gl_id: &str, gl_repository: &str) -> String {
    let (client, storage) = (node.channel(), node.storage.clone());
    let (gl_id, gl_repository) = (gl_id.to_owned(), gl_repository.to_owned());
    serve_shared(Shared { client, storage, authorization: None, gl_id, gl_repository }).await
}

async fn serve_shared(shared: Shared) -> String {
    let app = Router::new()
        .route("/{repository}/info/refs", get(info_refs))
        .route("/{repository}/git-receive-pack", post(receive_pack))
        .route("/{repository}/git-upload-pack", post(upload_pack))
        .with_state(shared);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    #[allow(clippy::disallowed_methods, reason = "ends with the test's runtime")]
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    format!("http://{address}")
}

impl Shared {
    fn repository(&self, name: String) -> tabularium_proto::gitaly::Repository {
        tabularium_proto::gitaly::Repository {
            storage_name: self.storage.clone(),
            relative_path: name,
            ..Default::default()
        }
    }

    fn refuse(&self, headers: &HeaderMap) -> Option<Response> {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let wanted = self.authorization.as_deref();
        (wanted.is_some() && given != wanted).then(|| StatusCode::UNAUTHORIZED.into_response())
    }
}

fn protocol(headers: &HeaderMap) -> String {
    let value = headers.get("git-protocol").and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

fn failed(status: &Status) -> Response {
    let code = match status.code() {
        tonic::Code::NotFound => StatusCode::NOT_FOUND,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (code, status.message().to_owned()).into_response()
}

#[derive(Deserialize)]
struct Service {
    service: String,
}

async fn info_refs(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    Query(Service { service }): Query<Service>,
    headers: HeaderMap,
) -> Response {
    if let Some(refusal) = shared.refuse(&headers) {
        return refusal;
    }
    let request = InfoRefsRequest {
        repository: Some(shared.repository(name)),
        git_protocol: protocol(&headers),
        ..InfoRefsRequest::default()
    };
    let mut client = SmartHttpServiceClient::new(shared.client);
    let answered = match service.as_str() {
        "git-receive-pack" => client.info_refs_receive_pack(request).await,
        _ => client.info_refs_upload_pack(request).await,
    };
    match answered {
        Ok(response) => {
            let body = Body::from_stream(response.into_inner().map_ok(|message| message.data));
            ([(header::CONTENT_TYPE, format!("application/x-{service}-advertisement"))], body).into_response()
        }
        Err(status) => failed(&status),
    }
}

fn pieces(body: Body) -> impl futures::Stream<Item = Bytes> + Send {
    body.into_data_stream().map(|piece| piece.expect("the request body"))
}

async fn receive_pack(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let first = PostReceivePackRequest {
        repository: Some(shared.repository(name)),
        gl_id: shared.gl_id.clone(),
        gl_username: "jane".to_owned(),
        gl_repository: shared.gl_repository.clone(),
        git_protocol: protocol(&headers),
        ..PostReceivePackRequest::default()
    };
    let data = pieces(body).map(|data| PostReceivePackRequest { data, ..Default::default() });
    let requests = stream::once(async { first }).chain(data);
    match SmartHttpServiceClient::new(shared.client).post_receive_pack(requests).await {
        Ok(response) => {
            let body = Body::from_stream(response.into_inner().map_ok(|message| message.data));
            ([(header::CONTENT_TYPE, "application/x-git-receive-pack-result")], body).into_response()
        }
        Err(status) => failed(&status),
    }
}

async fn upload_pack(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    assert!(!headers.contains_key(header::CONTENT_ENCODING), "tests keep their requests small");
    let first = UploadPackRequest {
        repository: Some(shared.repository(name)),
        git_protocol: protocol(&headers),
        stateless_rpc: true,
        ..UploadPackRequest::default()
    };
    let data = pieces(body).map(|data| UploadPackRequest { data, ..Default::default() });
    let requests = stream::once(async { first }).chain(data);
    match UploadPackServiceClient::new(shared.client).upload_pack(requests).await {
        Ok(response) => {
            let stdout = response.into_inner().try_filter_map(|message| async move {
                Ok(match message.output {
                    Some(Output::Stdout(data)) => Some(data),
                    Some(Output::Stderr(_)) | None => None,
                })
            });
            let content_type = [(header::CONTENT_TYPE, "application/x-git-upload-pack-result")];
            (content_type, Body::from_stream(stdout)).into_response()
        }
        Err(status) => failed(&status),
    }
}
