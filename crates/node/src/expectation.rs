//! A replica that is older than it must be: the disk is not the one that the node had, but an older state of it.
//!
//! Nothing in a node remembers what its disk held before. The database does, and whoever sends a request says in its
//! metadata what it knows of the replica. By the record beside the replica ([`crate::records`]) the node sees that it has
//! less, and refuses before any service looks at the request.
//!
//! A router keeps what it was told for a while, and is not told of every write: what it knows may be as old as the disk. But a
//! disk is exchanged while its node does not run. So a router says as well which process of the node it knew when it asked,
//! and one that was started later has it ask again.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, Request, Response};
use prost::Message as _;
use tabularium_common::{
    faults::{self, SafetyStep},
    records::{EXPECTED_REPLICA, NODE_INSTANCE, is_older},
};
use tabularium_proto::{gitaly::Repository, node::ExpectedReplica};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::{node::Node, records};

/// Senders may pad binary metadata or not.
const EITHER_PADDING: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Wraps the services.
#[derive(Clone)]
pub(crate) struct ExpectationLayer(Arc<Node>);

impl ExpectationLayer {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

impl<S> Layer<S> for ExpectationLayer {
    type Service = Expectation<S>;
    fn layer(&self, inner: S) -> Expectation<S> {
        Expectation { inner, node: Arc::clone(&self.0) }
    }
}

/// See [`ExpectationLayer`].
#[derive(Clone)]
pub(crate) struct Expectation<S> {
    inner: S,
    node: Arc<Node>,
}

impl<S, B> Service<Request<B>> for Expectation<S>
where
    S: Service<Request<B>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let expected = match expected(request.headers()) {
            Ok(None) => return Box::pin(self.inner.call(request)),
            Ok(Some(expected)) => expected,
            Err(status) => return Box::pin(async move { Ok(status.into_http()) }),
        };
        // The one that is ready.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        let node = Arc::clone(&self.node);
        Box::pin(async move {
            match check(&node, expected).await {
                Ok(()) => inner.call(request).await,
                Err(status) => Ok(status.into_http()),
            }
        })
    }
}

fn expected(headers: &HeaderMap) -> Result<Option<ExpectedReplica>, Status> {
    let Some(value) = headers.get(EXPECTED_REPLICA) else { return Ok(None) };
    let bad = || Status::invalid_argument(format!("{EXPECTED_REPLICA} metadata: not a replica"));
    let bytes = EITHER_PADDING.decode(value.as_bytes()).map_err(|_| bad())?;
    ExpectedReplica::decode(&bytes[..]).map(Some).map_err(|_| bad())
}

async fn check(node: &Node, expected: ExpectedReplica) -> Result<(), Status> {
    if faults::is_off(SafetyStep::NodeExpectation) {
        return Ok(());
    }
    let ExpectedReplica { storage_name, relative_path, repository_id, generation, node_instance } = expected;
    if node_instance.is_some_and(|known| known != node.instance) {
        return Err(started_since(&node.instance));
    }
    let replica = Repository { storage_name, relative_path, ..Repository::default() };
    // What is wrong with the replica otherwise, its service finds out and says in its own words.
    let Ok(replica) = node.storages.locate(Some(&replica)) else { return Ok(()) };
    let record = records::known(&replica.path).await;
    let Some(older) = record.filter(|record| is_older(record, repository_id, generation)) else {
        return Ok(());
    };
    let text = format!("replica is of generation {}, and was of {generation} before", older.generation);
    tracing::error!(path = %replica.path.display(), "{text}: the disk is older than it was");
    Err(Status::data_loss(text))
}

fn started_since(instance: &str) -> Status {
    let mut status = Status::unavailable("the node was started since it was asked about");
    if let Ok(instance) = instance.parse() {
        status.metadata_mut().insert(NODE_INSTANCE, instance);
    }
    status
}

#[cfg(test)]
mod tests {
    use tabularium_common::records::expectation;

    use super::*;

    #[test]
    fn what_is_sent_is_understood_and_nonsense_is_refused() {
        let sent = ExpectedReplica {
            storage_name: "node-1".into(),
            relative_path: "@cluster/ä.git".into(),
            repository_id: 7,
            generation: 9,
            node_instance: Some(String::new()),
        };
        let headers = |value: &[u8]| {
            HeaderMap::from_iter([(
                http::HeaderName::from_static(EXPECTED_REPLICA),
                http::HeaderValue::from_bytes(value).unwrap(),
            )])
        };
        let encoded = expectation(&sent);
        assert_eq!(expected(&headers(encoded.as_encoded_bytes())).unwrap(), Some(sent));
        assert_eq!(expected(&HeaderMap::new()).unwrap(), None);
        for nonsense in ["%", "AAAA", "////"] {
            assert_eq!(
                expected(&headers(nonsense.as_bytes())).unwrap_err().code(),
                tonic::Code::InvalidArgument
            );
        }
    }
}
