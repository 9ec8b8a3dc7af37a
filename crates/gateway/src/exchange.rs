//! The three requests of smart HTTP: the advertisement, the fetch and the push, each one gRPC call to a router.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _, TryFutureExt as _, stream};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use hyper::body::Incoming;
use tabularium_common::pktline;
use tabularium_proto::{
    gitaly::{
        InfoRefsRequest, PostReceivePackRequest, PostReceivePackResponse,
        PostUploadPackWithSidechannelRequest, Repository, smart_http_service_client::SmartHttpServiceClient,
    },
    node::{UploadPackRequest, UploadPackResponse, upload_pack_response},
};
use tonic::{Status, Streaming, transport::Channel};
use tonic_prost::ProstDecoder;
use tower::{Service as _, ServiceExt as _};

use crate::{
    access::Caller,
    answer::{Chunk, Download, Ended, Messages, Reply, opening},
    failure::{Failure, is_told_in_protocol},
    freshness::Freshness,
    gateway::Gateway,
    git_protocol,
    limits::{ADVERTISEMENT_TIMEOUT, PUSH_ANSWER_BYTES, PUSH_ANSWER_HOLD},
    mirror,
    path::{GitService, RepositoryPath},
    record::Record,
    request_body::{BodyFault, Encoding, RequestBody},
    traffic::StallClock,
    upload::{Slot, Upload, framed},
    upstream::{Peer, is_lost, repeats_read, repeats_write},
};

const UPLOAD_PACK: &str = "/tabularium.node.v1.UploadPackService/UploadPack";
const RECEIVE_PACK: &str = "/gitaly.SmartHTTPService/PostReceivePack";
const RECEIVE_PACK_RESULT: &str = "application/x-git-receive-pack-result";
/// Field `data` of the request messages.
const UPLOAD_PACK_DATA: u32 = 5;
const RECEIVE_PACK_DATA: u32 = 2;

/// `GET …/info/refs`. The bytes are passed on as they come, for protocol v2 too.
pub(crate) async fn advertise(
    gateway: &Gateway,
    headers: &HeaderMap,
    path: &RepositoryPath,
    service: GitService,
    record: &Record,
) -> Result<Reply, Failure> {
    let git_protocol = protocol(headers)?;
    let id = record.correlation_id();
    if service == GitService::ReceivePack {
        mirror::refuse_push(gateway, path, id).await?;
    }
    let message = InfoRefsRequest {
        repository: Some(repository(gateway, path)),
        git_config_options: Vec::new(),
        git_protocol,
    };
    let (routers, hold) = (&gateway.routers, gateway.config.hold_answers.0);
    let call = |channel: Channel| {
        let mut request = routers.request(message.clone(), id, None);
        request.metadata_mut().as_mut().extend(record.freshness().asked());
        async move {
            let mut client = SmartHttpServiceClient::new(channel);
            let answer = match service {
                GitService::UploadPack => client.info_refs_upload_pack(request).await?,
                GitService::ReceivePack => client.info_refs_receive_pack(request).await?,
            };
            record.freshness().learn(answer.metadata().as_ref());
            let messages = answer.into_inner();
            let mut messages =
                messages.map(|message| message.map(|message| Chunk::Output(message.data))).fuse();
            let held = opening(&mut messages, hold).await?;
            Ok((held, messages))
        }
    };
    let (held, messages) =
        routers.call(Some(ADVERTISEMENT_TIMEOUT), repeats_read, call).await.map_err(|status| {
            log_failure(&status, path, "", record);
            Failure::of(&status, Some(path), id)
        })?;
    let messages = stream::iter(held.into_iter().map(Ok)).chain(messages).boxed();
    let content_type = match service {
        GitService::UploadPack => "application/x-git-upload-pack-advertisement",
        GitService::ReceivePack => "application/x-git-receive-pack-advertisement",
    };
    begin(gateway, messages, None, content_type, None, path, record).await
}

/// `POST …/git-upload-pack` and `POST …/git-receive-pack`.
pub(crate) async fn exchange(
    gateway: &Gateway,
    headers: &HeaderMap,
    body: Incoming,
    path: &RepositoryPath,
    service: GitService,
    caller: &Caller,
    record: &Record,
) -> Result<Reply, Failure> {
    let (request_type, content_type) = match service {
        GitService::UploadPack => {
            ("application/x-git-upload-pack-request", "application/x-git-upload-pack-result")
        }
        GitService::ReceivePack => ("application/x-git-receive-pack-request", RECEIVE_PACK_RESULT),
    };
    require_content_type(headers, request_type)?;
    let git_protocol = protocol(headers)?;
    if service == GitService::ReceivePack {
        mirror::refuse_push(gateway, path, record.correlation_id()).await?;
    }
    let limit = match service {
        GitService::UploadPack => Some(gateway.config.max_negotiation_bytes),
        GitService::ReceivePack => gateway.config.max_push_bytes,
    };
    let mut body = open_body(headers, body, limit, record)?;
    if is_probe(gateway, headers, &mut body).await? {
        return Ok(result(content_type, Bytes::new()));
    }

    let (slot, ends) = Slot::new(body);
    let messages = match service {
        GitService::UploadPack => fetch(gateway, path, git_protocol, slot, record),
        GitService::ReceivePack => push(gateway, path, git_protocol, caller, slot, record),
    };
    let told_in_protocol = (service == GitService::UploadPack).then_some(content_type);
    begin(gateway, messages, Some(ends), content_type, told_in_protocol, path, record).await
}

/// Waits for the first output, while a failure can still be told by a status; or, to a fetch, inside git's protocol as
/// an answer of type `told_in_protocol`.
async fn begin(
    gateway: &Gateway,
    messages: Messages,
    ends: Option<crate::upload::Ends>,
    content_type: &'static str,
    told_in_protocol: Option<&'static str>,
    path: &RepositoryPath,
    record: &Record,
) -> Result<Reply, Failure> {
    let stall = StallClock::new(record.traffic().clone(), gateway.config.stall_timeout.0);
    let mut download = Download::new(messages, ends, stall);
    match download.output().await {
        Some(Ok(first)) if content_type == RECEIVE_PACK_RESULT => {
            Ok(hold(content_type, first, download).await)
        }
        Some(Ok(first)) => Ok(Reply::Output { content_type, first, rest: download }),
        None => Ok(result(content_type, Bytes::new())),
        Some(Err(Ended::Request(fault))) => Err(fault.into()),
        Some(Err(Ended::Stalled)) => Err(Failure::stalled()),
        Some(Err(Ended::Call(status))) => {
            log_failure(&status, path, &download.stderr(), record);
            let id = record.correlation_id();
            let failure = if content_type == RECEIVE_PACK_RESULT {
                Failure::of_push(&status, path, id)
            } else {
                Failure::of(&status, Some(path), id)
            };
            match told_in_protocol {
                Some(content_type) if is_told_in_protocol(&status) => {
                    Ok(result(content_type, error_packet(&failure.text)))
                }
                _ => Err(failure),
            }
        }
    }
}

/// Waits a moment for the end of a push's answer, whose generation is known only then: git reports to its user before the
/// push is recorded.
async fn hold(content_type: &'static str, first: Bytes, mut download: Download) -> Reply {
    let until = tokio::time::Instant::now() + PUSH_ANSWER_HOLD;
    let mut held = BytesMut::from(first);
    while held.len() <= PUSH_ANSWER_BYTES {
        match tokio::time::timeout_at(until, download.output()).await {
            Ok(Some(Ok(more))) => held.extend_from_slice(&more),
            Ok(None) => return result(content_type, held.freeze()),
            Ok(Some(Err(ended))) => {
                download.put_back(ended);
                break;
            }
            Err(_) => break,
        }
    }
    Reply::Output { content_type, first: held.freeze(), rest: download }
}

fn result(content_type: &'static str, bytes: Bytes) -> Reply {
    Reply::Whole { status: StatusCode::OK, content_type, bytes, header: None }
}

/// Git prints it as `remote error: <text>`.
fn error_packet(text: &str) -> Bytes {
    let mut packet = BytesMut::new();
    // Texts are bounded by MAX_ERROR_TEXT_BYTES, far below the longest packet.
    let _ = pktline::encode(format!("ERR {text}\n").as_bytes(), &mut packet);
    packet.freeze()
}

fn log_failure(status: &Status, path: &RepositoryPath, stderr: &str, record: &Record) {
    tracing::warn!(
        grpc_code = ?status.code(),
        error = status.message(),
        stderr,
        relative_path = path.relative_path(),
        correlation_id = %record.correlation_id(),
        "call failed"
    );
}

fn fetch(
    gateway: &Gateway,
    path: &RepositoryPath,
    git_protocol: String,
    slot: Slot,
    record: &Record,
) -> Messages {
    let head = framed(&UploadPackRequest {
        repository: Some(repository(gateway, path)),
        git_protocol: git_protocol.clone(),
        git_config_options: Vec::new(),
        stateless_rpc: true,
        data: Bytes::new(),
    });
    let beside = PostUploadPackWithSidechannelRequest {
        repository: Some(repository(gateway, path)),
        git_protocol,
        git_config_options: Vec::new(),
    };
    let (again, hold, tag) = (repeats_read, gateway.config.hold_answers.0, UPLOAD_PACK_DATA);
    let request = Request { method: UPLOAD_PACK, head, tag, beside: Some(beside), again, hold };
    call(gateway, request, slot, record, |message: UploadPackResponse| match message.output {
        Some(upload_pack_response::Output::Stdout(bytes)) => Chunk::Output(bytes),
        Some(upload_pack_response::Output::Stderr(bytes)) => Chunk::Error(bytes),
        None => Chunk::Output(Bytes::new()),
    })
}

fn push(
    gateway: &Gateway,
    path: &RepositoryPath,
    git_protocol: String,
    caller: &Caller,
    slot: Slot,
    record: &Record,
) -> Messages {
    let head = framed(&PostReceivePackRequest {
        repository: Some(repository(gateway, path)),
        data: Bytes::new(),
        gl_id: caller.id(),
        gl_repository: gl_repository(path),
        gl_username: caller.name().to_owned(),
        git_protocol,
        git_config_options: Vec::new(),
    });
    // What has been said of a push stands, whatever becomes of the rest.
    let (again, hold, tag) = (repeats_write, Duration::ZERO, RECEIVE_PACK_DATA);
    let request = Request { method: RECEIVE_PACK, head, tag, beside: None, again, hold };
    call(gateway, request, slot, record, |message: PostReceivePackResponse| Chunk::Output(message.data))
}

/// What a streaming call begins with.
struct Request {
    method: &'static str,
    /// The first message.
    head: Bytes,
    /// The field of later messages that the body goes into.
    tag: u32,
    /// What is asked for instead where the body can go beside the call.
    beside: Option<PostUploadPackWithSidechannelRequest>,
    /// Whether it may be made again after such a failure.
    again: fn(&Status) -> bool,
    /// How long its answer is held so that it may.
    hold: Duration,
}

/// Makes a streaming call, with one router after the other until an answer begins. Written below tonic's clients because a
/// body must be able to fail, and because its bytes go out as they came in.
fn call<T>(
    gateway: &Gateway,
    request: Request,
    slot: Slot,
    record: &Record,
    chunk: impl Fn(T) -> Chunk + Send + Sync + 'static,
) -> Messages
where
    T: prost::Message + Default + 'static,
{
    let routers = gateway.routers.clone();
    let mut headers = routers.headers(record.correlation_id());
    let freshness = record.freshness().clone();
    headers.extend(freshness.asked());
    let chunk = Arc::new(chunk);
    let open = async move {
        let Request { method, head, tag, beside, again, hold } = request;
        let attempt = |peer: Arc<Peer>| {
            let (head, slot, headers, message) =
                (head.clone(), slot.clone(), headers.clone(), beside.as_ref());
            let (freshness, chunk) = (freshness.clone(), Arc::clone(&chunk));
            async move {
                let beside = match (&peer.beside, message) {
                    (Some(beside), Some(message)) => {
                        beside.fetch(message, headers.clone(), slot.clone(), &freshness).await
                    }
                    _ => None,
                };
                let messages = if let Some(messages) = beside {
                    messages?
                } else {
                    let (channel, upload) = (peer.channel.clone(), Upload::new(head, tag, slot));
                    let messages = open_call::<T>(channel, method, headers, upload, &freshness).await?;
                    let messages = until_trailers(messages, freshness);
                    messages.map(move |message| message.map(|message| chunk(message))).boxed()
                };
                // One that is empty is asked for its end twice.
                let mut messages = messages.fuse();
                let held = opening(&mut messages, hold).await?;
                Ok((held, messages))
            }
        };
        let again = |status: &Status| {
            (again(status) || is_lost(status) && slot.is_untouched()) && slot.can_be_sent_again()
        };
        // Without a deadline: the clock that watches the transfer ends it when nothing moves.
        let (held, messages) = routers.attempts(again, attempt).await?;
        slot.keep_no_more();
        Ok::<_, Status>(stream::iter(held.into_iter().map(Ok)).chain(messages))
    };
    open.try_flatten_stream().boxed()
}

/// The messages; what stands in the trailers is learned when they have come.
fn until_trailers<T: Send + 'static>(
    messages: Streaming<T>,
    freshness: Freshness,
) -> impl Stream<Item = Result<T, Status>> + Send {
    stream::unfold((messages, freshness), |(mut messages, freshness)| async move {
        let message = messages.message().await.transpose();
        if message.is_none()
            && let Ok(Some(trailers)) = messages.trailers().await
        {
            freshness.learn(trailers.as_ref());
        }
        message.map(|message| (message, (messages, freshness)))
    })
}

async fn open_call<T>(
    mut channel: Channel,
    method: &'static str,
    mut headers: HeaderMap,
    upload: Upload,
    freshness: &Freshness,
) -> Result<Streaming<T>, Status>
where
    T: prost::Message + Default + 'static,
{
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let mut request = http::Request::new(tonic::body::Body::new(upload));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(method);
    *request.headers_mut() = headers;

    let failed = |error: tonic::transport::Error| Status::from_error(Box::new(error));
    let response = channel.ready().await.map_err(failed)?.call(request).await.map_err(failed)?;
    freshness.learn(response.headers());
    let status = response.status();
    let decoder = ProstDecoder::<T>::default();
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() != tonic::Code::Ok => Err(status),
        Some(_) => Ok(Streaming::new_empty(decoder, response.into_body())),
        None => Ok(Streaming::new_response(decoder, response.into_body(), status, None, None)),
    }
}

fn repository(gateway: &Gateway, path: &RepositoryPath) -> Repository {
    Repository {
        storage_name: gateway.config.virtual_storage.to_string(),
        relative_path: path.relative_path().to_owned(),
        gl_repository: gl_repository(path),
        gl_project_path: path.name().to_owned(),
        ..Repository::default()
    }
}

/// `project-<path without .git>`: the same for a repository as long as it keeps its name.
fn gl_repository(path: &RepositoryPath) -> String {
    format!("project-{}", path.name())
}

fn protocol(headers: &HeaderMap) -> Result<String, Failure> {
    let header = headers.get(git_protocol::HEADER).map(HeaderValue::as_bytes);
    git_protocol::parse(header)
        .map(str::to_owned)
        .map_err(|error| Failure::new(StatusCode::BAD_REQUEST, error.to_string()))
}

fn require_content_type(headers: &HeaderMap, wanted: &'static str) -> Result<(), Failure> {
    let given = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let essence = given.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    if essence.eq_ignore_ascii_case(wanted.as_bytes()) {
        return Ok(());
    }
    Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("the Content-Type must be {wanted}")))
}

fn open_body(
    headers: &HeaderMap,
    body: Incoming,
    limit: Option<u64>,
    record: &Record,
) -> Result<RequestBody, Failure> {
    let encoding = Encoding::of(headers)
        .map_err(|error| Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, error.to_string()))?;
    if let (Some(limit), Some(length), Encoding::Identity) = (limit, content_length(headers), encoding)
        && length > limit
    {
        return Err(BodyFault::TooLarge(limit).into());
    }
    Ok(RequestBody::new(body, encoding, limit, record.traffic().clone()))
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Before a body that it cannot send twice, git sends a lone flush packet to learn whether it must authenticate. It asks
/// git for nothing, so no node is bothered, and a push does not count as a write before it begins.
async fn is_probe(gateway: &Gateway, headers: &HeaderMap, body: &mut RequestBody) -> Result<bool, Failure> {
    if content_length(headers) != Some(pktline::FLUSH.len() as u64)
        || headers.contains_key(header::CONTENT_ENCODING)
    {
        return Ok(false);
    }
    let mut start = BytesMut::new();
    let read = async {
        while let Some(chunk) = body.chunk().await {
            start.extend_from_slice(&chunk?);
        }
        Ok::<_, BodyFault>(())
    };
    tokio::time::timeout(gateway.config.stall_timeout.0, read).await.map_err(|_| Failure::stalled())??;
    if start == pktline::FLUSH {
        return Ok(true);
    }
    body.put_back(start.freeze());
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_packet_is_a_pkt_line() {
        assert_eq!(error_packet("no"), Bytes::from_static(b"000bERR no\n"));
    }

    #[test]
    fn content_types_are_compared_without_parameters() {
        let wanted = "application/x-git-upload-pack-request";
        let check = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, value.parse().unwrap());
            require_content_type(&headers, wanted).is_ok()
        };
        assert!(check(wanted));
        assert!(check("Application/x-git-upload-pack-request ; charset=utf-8"));
        assert!(!check("application/x-git-receive-pack-request"));
        assert!(require_content_type(&HeaderMap::new(), wanted).is_err());
    }
}
