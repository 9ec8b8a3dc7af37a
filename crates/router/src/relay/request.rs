//! What is taken from a client's request, and what a node gets instead.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Uri, Version, header,
    request::Parts,
    uri::{Authority, PathAndQuery, Scheme},
};
use hyper::body::Incoming;
use prost::Message as _;
use tabularium_common::{
    methods::Method,
    multiplex::{
        Backchannel,
        sidechannel::{OpenError, SidechannelId},
    },
    records::EXPECTED_REPLICA,
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tabularium_proto::coordinator::RepositoryName;

use super::freshness::Asked;
use crate::{
    body::{Spliced, Tether},
    feature_flags::FeatureFlags,
    first_message::{FirstMessage, PREFIX_BYTES},
    nodes::Traffic,
    refusal::Refusal,
    replay::{Replay, Tail},
    table::Entry,
    wire::{self, Edit},
};

/// The site that a mirror's write comes from; for the coordinator, not for nodes.
const SYNC_FROM_SITE: HeaderName = HeaderName::from_static("tabularium-sync-from-site");
/// Tells a node that it takes part in a transaction (wire reference, section f).
pub(super) const TRANSACTION: HeaderName = HeaderName::from_static("gitaly-reference-transaction");
/// The virtual storage that a client named, for the logs of nodes.
const VIRTUAL_STORAGE: HeaderName = HeaderName::from_static("virtual_storage");
/// The repository beside which nodes that group repositories are to put a new one.
const PARTITIONING_HINT: HeaderName = HeaderName::from_static("gitaly-partitioning-hint");
const ACCESSOR_POLICY: HeaderName = HeaderName::from_static("gitaly-route-repository-accessor-policy");
const CORRELATION: HeaderName = HeaderName::from_static(CORRELATION_ID);

/// Field numbers of `gitaly.Repository`.
const STORAGE_NAME: u32 = 2;
const RELATIVE_PATH: u32 = 3;

/// A client's request, without its body.
pub(super) struct Call {
    headers: HeaderMap,
    path: Option<PathAndQuery>,
    pub(super) correlation: HeaderValue,
    pub(super) sync_from_site: String,
    pub(super) primary_only: bool,
    pub(super) freshness: Asked,
    pub(super) client_streaming: bool,
    pub(super) traffic: Traffic,
    /// The way back to the client, if it has one.
    pub(super) back: Option<Backchannel>,
}

impl Call {
    pub(super) fn new(mut parts: Parts, entry: &Entry, flags: &FeatureFlags) -> Self {
        let back = parts.extensions.remove::<Backchannel>();
        let mut headers = parts.headers;
        headers.remove(header::AUTHORIZATION);
        headers.remove(header::CONTENT_LENGTH);
        headers.remove(header::HOST);
        // What is known of a replica, and who votes, is ours to say.
        headers.remove(EXPECTED_REPLICA);
        headers.remove(TRANSACTION);
        flags.add_to(&mut headers);
        let freshness = Asked::take(&mut headers);
        let site = headers.remove(SYNC_FROM_SITE);
        let id = CorrelationId::of(&headers);
        let correlation = match headers.get(&CORRELATION) {
            Some(given) if given.as_bytes() == id.as_str().as_bytes() => given.clone(),
            _ => {
                let made = id.header().unwrap_or_else(|| HeaderValue::from_static("-"));
                headers.insert(CORRELATION, made.clone());
                made
            }
        };
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        let method = &entry.method;
        Self {
            back,
            primary_only: headers.get(&ACCESSOR_POLICY).is_some_and(|value| value == "primary-only"),
            sync_from_site: site.and_then(|value| value.to_str().map(str::to_owned).ok()).unwrap_or_default(),
            freshness,
            headers,
            path: parts.uri.into_parts().path_and_query,
            correlation,
            client_streaming: method.client_streaming,
            traffic: if method.client_streaming || method.server_streaming {
                Traffic::Stream
            } else {
                Traffic::Unary
            },
        }
    }

    /// Tells nodes which virtual storage the client named.
    pub(super) fn say_virtual_storage(&mut self, name: &str) {
        if let Ok(value) = HeaderValue::from_str(name) {
            self.headers.insert(VIRTUAL_STORAGE, value);
        }
    }

    /// The relative path that a client gave as a hint; it means nothing to a node.
    pub(super) fn take_partitioning_hint(&mut self) -> Option<HeaderValue> {
        self.headers.remove(PARTITIONING_HINT)
    }

    /// Gives nodes the hint in a form that they know.
    pub(super) fn hint_partition(&mut self, replica_path: &str) {
        if let Ok(value) = HeaderValue::from_str(replica_path) {
            self.headers.insert(PARTITIONING_HINT, value);
        }
    }

    /// The sidechannel that the client offers.
    pub(super) fn sidechannel(&self) -> Result<SidechannelId, OpenError> {
        SidechannelId::offered(&self.headers)
    }

    /// The gRPC path.
    pub(super) fn path(&self) -> &str {
        self.path.as_ref().map_or("", PathAndQuery::path)
    }

    /// The request for a node, with the token that it wants.
    pub(super) fn request<B>(&self, token: Option<HeaderValue>, body: B) -> Result<Request<B>, Refusal> {
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(Scheme::HTTP);
        // Only text in the request: where it goes is the connection's business.
        uri.authority = Some(Authority::from_static("tabularium.invalid"));
        uri.path_and_query.clone_from(&self.path);
        let uri = Uri::from_parts(uri)
            .map_err(|error| Refusal::Status(tonic::Status::internal(error.to_string())))?;
        let mut request = Request::new(body);
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = uri;
        *request.version_mut() = Version::HTTP_2;
        let mut headers = self.headers.clone();
        if let Some(value) = token {
            headers.insert(header::AUTHORIZATION, value);
        }
        *request.headers_mut() = headers;
        Ok(request)
    }
}

/// What stands behind the first message.
pub(super) struct Rest {
    leftover: Option<Bytes>,
    body: Option<Incoming>,
}

impl Rest {
    pub(super) fn new(leftover: Option<Bytes>, body: Incoming, client_streaming: bool) -> Self {
        use http_body::Body as _;
        if leftover.is_none() && (!client_streaming || body.is_end_stream()) {
            Self { leftover: None, body: None }
        } else {
            Self { leftover, body: Some(body) }
        }
    }

    /// The first message was the whole request.
    pub(super) fn whole(&self) -> bool {
        self.body.is_none()
    }

    /// What was read past the first message, and what comes behind it.
    pub(super) fn into_parts(self) -> (Option<Bytes>, Option<Incoming>) {
        (self.leftover, self.body)
    }

    /// As a stream that can begin again; `None`: the first message was the whole request.
    pub(super) fn into_replay(self) -> Option<Replay<Incoming>> {
        self.body.map(|body| Replay::new(self.leftover, body))
    }
}

/// The body of a request that starts with `head`.
pub(super) fn body(
    head: Bytes,
    replay: Option<&Replay<Incoming>>,
) -> (Spliced<Tail<Incoming>>, Option<Tether>) {
    match replay {
        None => (Spliced::whole(head), None),
        Some(replay) => {
            let (spliced, tether) = Spliced::stream(head, replay.tail());
            (spliced, Some(tether))
        }
    }
}

/// Reads the first message of a request.
pub(super) async fn first(mut body: Incoming, call: &Call) -> Result<(Bytes, Rest), Refusal> {
    let FirstMessage { message, leftover } = crate::first_message::read(&mut body).await?;
    Ok((message, Rest::new(leftover, body, call.client_streaming)))
}

/// Field paths of the repositories that are rewritten.
#[derive(Clone, Copy)]
pub(super) struct Target<'p> {
    pub(super) target: &'p [u32],
    pub(super) additional: Option<&'p [u32]>,
}

/// A repository as the client names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Named<'m> {
    pub(crate) virtual_storage: &'m str,
    pub(crate) relative_path: &'m str,
}

/// The repository at a field path, checked as section h.2 of the wire reference says.
pub(crate) fn repository<'m>(message: &'m [u8], path: &[u32]) -> Result<Named<'m>, Refusal> {
    let repository = wire::message_at(message, path)?.ok_or(Refusal::RepositoryNotSet)?;
    let named = Named {
        virtual_storage: wire::text(repository, STORAGE_NAME)?,
        relative_path: wire::text(repository, RELATIVE_PATH)?,
    };
    match (named.virtual_storage.is_empty(), named.relative_path.is_empty()) {
        (true, true) => Err(Refusal::RepositoryNotSet),
        (true, false) => Err(Refusal::StorageNotSet),
        (false, true) => Err(Refusal::PathNotSet),
        (false, false) => Ok(named),
    }
}

/// The second repository, if the request has one.
pub(super) fn additional<'m>(
    message: &'m [u8],
    path: Option<&[u32]>,
    target: Named<'_>,
) -> Result<Option<Named<'m>>, Refusal> {
    let Some(path) = path else { return Ok(None) };
    if wire::message_at(message, path)?.is_none() {
        return Ok(None);
    }
    let additional = repository(message, path)?;
    if additional.virtual_storage == target.virtual_storage {
        Ok(Some(additional))
    } else {
        Err(Refusal::AdditionalElsewhere)
    }
}

/// The repository on the same virtual storage beside which the target is to be, though nothing of it in the message is
/// rewritten: the one that the client hints at, else the one that it is a fork of.
pub(super) fn beside(
    message: &[u8],
    method: &Method,
    hint: Option<&HeaderValue>,
    target: Named<'_>,
) -> Result<Option<RepositoryName>, Refusal> {
    if method.uploads_before_it_votes() {
        return Ok(None);
    }
    if let Some(hint) = hint.and_then(|hint| hint.to_str().ok()).filter(|hint| !hint.is_empty()) {
        return super::write::name(Named { relative_path: hint, ..target }).map(Some);
    }
    let Some(path) = method.placed_beside() else { return Ok(None) };
    let Some(source) = wire::message_at(message, path)? else { return Ok(None) };
    let source = Named {
        virtual_storage: wire::text(source, STORAGE_NAME)?,
        relative_path: wire::text(source, RELATIVE_PATH)?,
    };
    let here = source.virtual_storage == target.virtual_storage && !source.relative_path.is_empty();
    here.then(|| super::write::name(source)).transpose()
}

/// Room for a message behind its prefix.
pub(crate) fn framed(length: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(PREFIX_BYTES + length);
    out.resize(PREFIX_BYTES, 0);
    out
}

/// Writes the length into the prefix.
pub(crate) fn seal(mut out: Vec<u8>) -> Result<Bytes, Refusal> {
    let length = u32::try_from(out.len() - PREFIX_BYTES)
        .map_err(|_| Refusal::Status(tonic::Status::resource_exhausted("message too large")))?;
    out[1..PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());
    Ok(out.into())
}

/// The first message as the node of `storage` gets it, with its prefix.
pub(super) fn rewritten(
    message: &[u8],
    target: &[u32],
    storage: &str,
    replica_path: &str,
) -> Result<Bytes, Refusal> {
    let mut out = framed(message.len() + replica_path.len() + storage.len());
    let edits = [
        Edit { number: STORAGE_NAME, value: storage.as_bytes() },
        Edit { number: RELATIVE_PATH, value: replica_path.as_bytes() },
    ];
    if !wire::edit(message, target, &edits, &mut out)? {
        return Err(Refusal::RepositoryNotSet);
    }
    seal(out)
}

/// The same, with a second repository on the same storage.
pub(super) fn rewritten_twice(
    message: &[u8],
    target: Target<'_>,
    storage: &str,
    replica_path: &str,
    additional_replica_path: Option<&str>,
) -> Result<Bytes, Refusal> {
    let (Some(path), Some(additional_replica_path)) = (target.additional, additional_replica_path) else {
        return rewritten(message, target.target, storage, replica_path);
    };
    let mut once = Vec::new();
    let edits = [
        Edit { number: STORAGE_NAME, value: storage.as_bytes() },
        Edit { number: RELATIVE_PATH, value: additional_replica_path.as_bytes() },
    ];
    if !wire::edit(message, path, &edits, &mut once)? {
        return Err(Refusal::RepositoryNotSet);
    }
    rewritten(&once, target.target, storage, replica_path)
}

/// The first message of a storage-scoped request as the node of `storage` gets it, with its prefix.
pub(super) fn restored(message: &[u8], within: &[u32], name: u32, storage: &str) -> Result<Bytes, Refusal> {
    let mut out = framed(message.len() + storage.len());
    if !wire::edit(message, within, &[Edit { number: name, value: storage.as_bytes() }], &mut out)? {
        return Err(Refusal::TargetStorage);
    }
    seal(out)
}

/// The same message with a time where the client gave none: nodes would each take their own.
pub(super) fn timestamped(message: Bytes, path: Option<&[u32]>, now: SystemTime) -> Result<Bytes, Refusal> {
    let Some((field, within)) = path.and_then(<[u32]>::split_last) else { return Ok(message) };
    let Some(holder) = wire::message_at(&message, within)? else { return Ok(message) };
    if wire::message_at(holder, &[*field])?.is_some() {
        return Ok(message);
    }
    let time = prost_types::Timestamp::from(now).encode_to_vec();
    let mut out = Vec::with_capacity(message.len() + time.len());
    if wire::edit(&message, within, &[Edit { number: *field, value: &time }], &mut out)? {
        Ok(out.into())
    } else {
        Ok(message)
    }
}

/// How long the router waits for what it asks a node for itself.
pub(crate) const QUESTION: Duration = crate::limits::NODE_QUESTION_TIMEOUT;

#[cfg(test)]
mod tests {
    use tabularium_proto::gitaly::{FetchIntoObjectPoolRequest, ObjectPool, Repository, WriteRefRequest};

    use super::*;

    fn named(storage: &str, path: &str) -> Repository {
        Repository { storage_name: storage.into(), relative_path: path.into(), ..Repository::default() }
    }

    fn check(repository: Option<Repository>) -> String {
        let message = WriteRefRequest { repository, ..WriteRefRequest::default() }.encode_to_vec();
        match super::repository(&message, &[1]) {
            Ok(named) => format!("{}:{}", named.virtual_storage, named.relative_path),
            Err(refusal) => refusal.to_string(),
        }
    }

    #[test]
    fn a_repository_is_checked_as_gitaly_does() {
        assert_eq!(check(None), "repository not set");
        assert_eq!(check(Some(Repository::default())), "repository not set");
        assert_eq!(check(Some(named("default", ""))), "repository path not set");
        assert_eq!(check(Some(named("", "a.git"))), "storage name not set");
        assert_eq!(check(Some(named("default", "a.git"))), "default:a.git");
    }

    #[test]
    fn both_repositories_of_a_pool_request_are_rewritten() {
        let request = FetchIntoObjectPoolRequest {
            origin: Some(named("default", "a.git")),
            object_pool: Some(ObjectPool { repository: Some(named("default", "p.git")) }),
        };
        let message = request.encode_to_vec();
        let target = Target { target: &[2, 1], additional: Some(&[1]) };
        let pool = repository(&message, target.target).unwrap();
        assert_eq!(additional(&message, target.additional, pool).unwrap().unwrap().relative_path, "a.git");
        let head =
            rewritten_twice(&message, target, "node-1", "@cluster/pools/1", Some("@cluster/repositories/2"));
        let decoded = FetchIntoObjectPoolRequest::decode(&head.unwrap()[PREFIX_BYTES..]).unwrap();
        assert_eq!(decoded.origin, Some(named("node-1", "@cluster/repositories/2")));
        assert_eq!(decoded.object_pool.unwrap().repository, Some(named("node-1", "@cluster/pools/1")));
    }

    #[test]
    fn a_time_is_filled_in_only_where_the_client_gave_none() {
        use tabularium_proto::gitaly::{UserCommitFilesRequestHeader, UserSquashRequest};
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_500);
        let bare = UserSquashRequest { repository: Some(named("default", "a.git")), ..Default::default() };
        let message = timestamped(bare.encode_to_vec().into(), Some(&[9]), now).unwrap();
        let filled = UserSquashRequest::decode(&message[..]).unwrap();
        let time = filled.timestamp.unwrap();
        assert_eq!((time.seconds, time.nanos), (1_700_000_000, 500_000_000));
        assert_eq!(filled.repository, bare.repository);
        let again = timestamped(message.clone(), Some(&[9]), now + Duration::from_secs(9)).unwrap();
        assert_eq!(again, message);

        // In a header, behind a prefix that is its own message.
        let header = UserCommitFilesRequestHeader { repository: bare.repository, ..Default::default() };
        let mut framed = vec![0x0a];
        framed.push(u8::try_from(header.encoded_len()).unwrap());
        framed.extend(header.encode_to_vec());
        let message = timestamped(framed.into(), Some(&[1, 11]), now).unwrap();
        let holder = wire::message_at(&message, &[1]).unwrap().unwrap();
        assert!(UserCommitFilesRequestHeader::decode(holder).unwrap().timestamp.is_some());
        assert!(timestamped(Bytes::new(), Some(&[1, 11]), now).unwrap().is_empty());
    }

    #[test]
    fn a_second_repository_elsewhere_is_refused() {
        let request = FetchIntoObjectPoolRequest {
            origin: Some(named("other", "a.git")),
            object_pool: Some(ObjectPool { repository: Some(named("default", "p.git")) }),
        };
        let message = request.encode_to_vec();
        let pool = repository(&message, &[2, 1]).unwrap();
        assert!(matches!(additional(&message, Some(&[1]), pool), Err(Refusal::AdditionalElsewhere)));
    }
}
