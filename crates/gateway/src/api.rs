//! The JSON API: repositories are created, listed, shown and removed.
//!
//! | request | answer |
//! | --- | --- |
//! | `POST /api/v1/repositories` `{"path", "default_branch"?, "object_format"?}` | 201 `{"path", "clone_url"}` |
//! | `GET /api/v1/repositories?prefix=&page_size=&page_token=` | 200 `{"repositories", "next_page_token"}` |
//! | `GET /api/v1/repositories/<path>` | 200, one repository |
//! | `DELETE /api/v1/repositories/<path>` | 204 |
//!
//! Errors are `{"error": "<sentence>"}`.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts};
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use tabularium_proto::{
    coordinator::{
        ListRepositoriesRequest, RepositoryDetails, operator_service_client::OperatorServiceClient,
    },
    gitaly::{
        CreateRepositoryRequest, ObjectFormat, RemoveRepositoryRequest, Repository,
        repository_service_client::RepositoryServiceClient,
    },
};
use tonic::{Status, transport::Channel};

use crate::{
    answer::Reply,
    failure::Failure,
    gateway::Gateway,
    limits::{API_BODY_BYTES, API_TIMEOUT, MAX_PAGE_SIZE},
    mirror,
    path::{ALLOWED_PATHS, RepositoryPath, query_value},
    record::Record,
    request_body::{Encoding, RequestBody},
    upstream::{repeats_read, repeats_write},
};

/// Content type of requests and answers.
pub(crate) const JSON: &str = "application/json";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    path: String,
    #[serde(default)]
    default_branch: Option<String>,
    #[serde(default)]
    object_format: Option<Format>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    Sha1,
    Sha256,
}

#[derive(Serialize)]
struct Created<'a> {
    path: &'a str,
    clone_url: String,
}

#[derive(Serialize)]
struct Page {
    repositories: Vec<Shown>,
    next_page_token: Option<String>,
}

#[derive(Serialize)]
struct Shown {
    path: String,
    clone_url: String,
    relative_path: String,
    repository_id: i64,
    primary: String,
    generation: i64,
    epoch: i64,
    replicas: Vec<ShownReplica>,
    created_at: Option<String>,
    written_at: Option<String>,
    mirror: Option<ShownMirror>,
}

#[derive(Serialize)]
struct ShownReplica {
    storage: String,
    generation: i64,
    up_to_date: bool,
}

#[derive(Serialize)]
struct ShownMirror {
    home_site: String,
    home_url: String,
    state: String,
    last_error: Option<String>,
    synced_at: Option<String>,
}

/// `POST /api/v1/repositories`
pub(crate) async fn create(
    gateway: &Gateway,
    head: &Parts,
    body: Incoming,
    record: &Record,
) -> Result<Reply, Failure> {
    let wanted: Create = read_json(head, body, record).await?;
    let path = creatable(&wanted.path)?;
    if wanted.default_branch.as_deref().is_some_and(|branch| !is_branch_name(branch)) {
        return Err(bad("default_branch is not the name of a branch, such as \"main\""));
    }
    let format = match wanted.object_format {
        None => ObjectFormat::Unspecified,
        Some(Format::Sha1) => ObjectFormat::Sha1,
        Some(Format::Sha256) => ObjectFormat::Sha256,
    };
    let message = CreateRepositoryRequest {
        repository: Some(repository(gateway, &path)),
        default_branch: wanted.default_branch.unwrap_or_default().into_bytes(),
        object_format: format.into(),
    };
    let (routers, id) = (&gateway.routers, record.correlation_id());
    let call = |channel: Channel| {
        let request = routers.request(message.clone(), id, Some(API_TIMEOUT));
        async move { RepositoryServiceClient::new(channel).create_repository(request).await }
    };
    let created = routers.call(Some(API_TIMEOUT), repeats_write, call).await;
    created.map_err(|status| failed(&status, Some(&path), record))?;

    let clone_url = clone_url(gateway, &head.headers, &path);
    let location = format!("/api/v1/repositories/{}", path.name());
    let mut reply = json(StatusCode::CREATED, &Created { path: path.name(), clone_url })?;
    if let (Reply::Whole { header, .. }, Ok(value)) = (&mut reply, HeaderValue::from_str(&location)) {
        *header = Some((header::LOCATION, value));
    }
    Ok(reply)
}

/// `GET /api/v1/repositories`
pub(crate) async fn list(gateway: &Gateway, head: &Parts, record: &Record) -> Result<Reply, Failure> {
    let query = head.uri.query().unwrap_or_default();
    let page_size = match query_value(query, "page_size") {
        None => 0,
        Some(text) => match text.parse() {
            Ok(size @ 1..=MAX_PAGE_SIZE) => size,
            _ => return Err(bad(format!("page_size is {text:?}; allowed: 1 to {MAX_PAGE_SIZE}"))),
        },
    };
    let message = ListRepositoriesRequest {
        virtual_storage: gateway.config.virtual_storage.to_string(),
        prefix: query_value(query, "prefix").unwrap_or_default(),
        page_size,
        page_token: query_value(query, "page_token").unwrap_or_default(),
    };
    let (coordinators, id) = (&gateway.coordinators, record.correlation_id());
    let call = |channel: Channel| {
        let request = coordinators.request(message.clone(), id, Some(API_TIMEOUT));
        async move { OperatorServiceClient::new(channel).list_repositories(request).await }
    };
    let answer = coordinators
        .call(Some(API_TIMEOUT), repeats_read, call)
        .await
        .map_err(|status| failed(&status, None, record))?
        .into_inner();
    let repositories =
        answer.repositories.into_iter().map(|details| shown(gateway, &head.headers, details)).collect();
    let next_page_token = Some(answer.next_page_token).filter(|token| !token.is_empty());
    json(StatusCode::OK, &Page { repositories, next_page_token })
}

/// `GET /api/v1/repositories/<path>`
pub(crate) async fn show(
    gateway: &Gateway,
    head: &Parts,
    path: &RepositoryPath,
    record: &Record,
) -> Result<Reply, Failure> {
    let details = mirror::details(gateway, path, record.correlation_id(), API_TIMEOUT)
        .await
        .map_err(|status| failed(&status, Some(path), record))?;
    json(StatusCode::OK, &shown(gateway, &head.headers, details))
}

/// `DELETE /api/v1/repositories/<path>`
pub(crate) async fn remove(
    gateway: &Gateway,
    path: &RepositoryPath,
    record: &Record,
) -> Result<Reply, Failure> {
    let message = RemoveRepositoryRequest { repository: Some(repository(gateway, path)) };
    let (routers, id) = (&gateway.routers, record.correlation_id());
    let call = |channel: Channel| {
        let request = routers.request(message.clone(), id, Some(API_TIMEOUT));
        async move { RepositoryServiceClient::new(channel).remove_repository(request).await }
    };
    let removed = routers.call(Some(API_TIMEOUT), repeats_write, call).await;
    removed.map_err(|status| failed(&status, Some(path), record))?;
    Ok(Reply::Whole { status: StatusCode::NO_CONTENT, content_type: JSON, bytes: Bytes::new(), header: None })
}

fn failed(status: &Status, path: Option<&RepositoryPath>, record: &Record) -> Failure {
    tracing::warn!(
        grpc_code = ?status.code(),
        error = status.message(),
        relative_path = path.map(RepositoryPath::relative_path),
        correlation_id = %record.correlation_id(),
        "call failed"
    );
    Failure::of(status, path, record.correlation_id())
}

async fn read_json<T: serde::de::DeserializeOwned>(
    head: &Parts,
    body: Incoming,
    record: &Record,
) -> Result<T, Failure> {
    let content_type = head.headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    if !essence.eq_ignore_ascii_case(JSON.as_bytes()) || head.headers.contains_key(header::CONTENT_ENCODING) {
        let text = format!("the Content-Type must be {JSON}, without a Content-Encoding");
        return Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text));
    }
    let limit = Some(API_BODY_BYTES as u64);
    let body = RequestBody::new(body, Encoding::Identity, limit, record.traffic().clone());
    let bytes = tokio::time::timeout(API_TIMEOUT, body.collect()).await.map_err(|_| Failure::stalled())??;
    serde_json::from_slice(&bytes).map_err(|error| bad(format!("the body is not what is expected: {error}")))
}

fn creatable(text: &str) -> Result<RepositoryPath, Failure> {
    let refused = || bad(format!("path {text:?} is not allowed; allowed: {ALLOWED_PATHS}"));
    let path = RepositoryPath::parse(text).map_err(|_| refused())?;
    if path.may_be_created() { Ok(path) } else { Err(refused()) }
}

/// Rough; the node has git's own rules.
fn is_branch_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 255
        && !text.starts_with(['-', '/'])
        && !text.ends_with(['/', '.'])
        && !text.contains("..")
        && !text.chars().any(|c| c.is_control() || c.is_whitespace() || "~^:?*[\\".contains(c))
}

fn bad(text: impl Into<String>) -> Failure {
    Failure::new(StatusCode::BAD_REQUEST, text)
}

fn repository(gateway: &Gateway, path: &RepositoryPath) -> Repository {
    Repository {
        storage_name: gateway.config.virtual_storage.to_string(),
        relative_path: path.relative_path().to_owned(),
        gl_project_path: path.name().to_owned(),
        ..Repository::default()
    }
}

fn clone_url(gateway: &Gateway, headers: &HeaderMap, path: &RepositoryPath) -> String {
    if let Some(url) = &gateway.config.external_url {
        return format!("{}/{}", url.trim_end_matches('/'), path.relative_path());
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    format!("{}://{host}/{}", gateway.config.scheme(), path.relative_path())
}

fn shown(gateway: &Gateway, headers: &HeaderMap, details: RepositoryDetails) -> Shown {
    let home = mirror::home(&details).map(|(site, url)| (site.to_owned(), url.to_owned()));
    let route = details.route.unwrap_or_default();
    let relative_path = route.name.unwrap_or_default().relative_path;
    let path = relative_path.strip_suffix(".git").unwrap_or(&relative_path).to_owned();
    let clone_url = RepositoryPath::parse(&relative_path)
        .map(|path| clone_url(gateway, headers, &path))
        .unwrap_or_default();
    let generation = route.generation;
    let replicas = route
        .replicas
        .into_iter()
        .map(|replica| ShownReplica {
            up_to_date: replica.generation == generation,
            storage: replica.storage,
            generation: replica.generation,
        })
        .collect();
    let mirror = home.map(|(home_site, home_url)| {
        let state = details.mirror.unwrap_or_default();
        ShownMirror {
            home_site,
            home_url,
            state: state.state,
            last_error: Some(state.last_error).filter(|error| !error.is_empty()),
            synced_at: state.synced_at.map(|time| time.to_string()),
        }
    });
    Shown {
        path,
        clone_url,
        relative_path,
        repository_id: route.repository_id,
        primary: route.primary,
        generation,
        epoch: route.epoch,
        replicas,
        created_at: details.created_at.map(|time| time.to_string()),
        written_at: details.written_at.map(|time| time.to_string()),
        mirror,
    }
}

fn json(status: StatusCode, value: &impl Serialize) -> Result<Reply, Failure> {
    let bytes = serde_json::to_vec(value)
        .map_err(|error| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    Ok(Reply::Whole { status, content_type: JSON, bytes: bytes.into(), header: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_path_names_what_is_allowed() {
        for path in ["", "/", "../x", "a\0b", "a b", "api/v1"] {
            let failure = creatable(path).unwrap_err();
            assert_eq!(failure.status, StatusCode::BAD_REQUEST);
            assert!(failure.text.contains(ALLOWED_PATHS), "{}", failure.text);
        }
        assert_eq!(creatable("group/project.git").unwrap().name(), "group/project");
    }

    #[test]
    fn branch_names() {
        assert!(is_branch_name("main") && is_branch_name("feature/x"));
        for bad in ["", "-x", "a b", "a..b", "a:b", "a\n", "x/"] {
            assert!(!is_branch_name(bad), "{bad:?}");
        }
    }
}
