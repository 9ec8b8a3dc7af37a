//! A multiplexed connection of one worker to one node: writes go out on it, the node's votes come back. Reads that have a
//! sidechannel go over another, so that no vote stands behind a pack.
//!
//! It is dialled when it is first needed and again when it was lost. That a node was killed is known at once, by the
//! kernel's word, and fails every request that is under way on it.

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use tabularium_common::{
    grpc::Address,
    lifecycle::Tasks,
    multiplex::{
        self, Way,
        sidechannel::{Offer, Sidechannels},
    },
};
use tonic::service::Routes;

use super::pool::{SendError, Slot};

/// The body of a write to one of its participants.
pub(crate) type WriteBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;
/// A write to one of its participants.
pub(crate) type OutgoingWrite = http::Request<WriteBody>;

pub(super) struct Multiplexed {
    slot: Slot<WriteBody>,
    back: Way,
    tasks: Tasks,
}

impl Multiplexed {
    /// Nothing is dialled yet. `votes` is served to the node on the streams that it opens.
    pub(super) fn new(votes: Routes, tasks: Tasks) -> Self {
        let back = Way { services: Some(votes), sidechannels: Sidechannels::default() };
        Self { slot: Slot::default(), back, tasks }
    }

    /// Offers the node a sidechannel, to be named in the request that is sent next. `None`: too many are offered.
    pub(super) fn offer(&self) -> Option<Offer> {
        self.back.sidechannels.offer()
    }

    /// See [`Slot::send`].
    pub(super) async fn send(
        &self,
        address: &Address,
        request: OutgoingWrite,
    ) -> Result<http::Response<Incoming>, SendError<OutgoingWrite>> {
        let dial = multiplex::dial(address, self.back.clone(), &self.tasks);
        self.slot.send(&self.tasks, dial, request).await
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "what a test starts ends with its runtime")]
mod tests {
    use std::{convert::Infallible, path::Path, sync::Arc, time::Duration};

    use futures::StreamExt as _;
    use http_body_util::{BodyExt as _, Full};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use prometheus_client::registry::Registry;
    use tabularium_common::{
        auth::NodeTokens,
        grpc::{ListenAddress, Listener},
        multiplex::{Backchannel, Incoming as Connections},
    };
    use tabularium_proto::coordinator::{Storage, Topology, VirtualStorage};
    use tokio_util::sync::CancellationToken;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;
    use crate::{
        metrics::Metrics,
        nodes::{Node, Nodes},
    };

    /// A node that asks back while it is at a request: it answers `/ask` with what it was told, and `/hang` never.
    async fn listen(socket: &Path, life: &CancellationToken) {
        let listener = Listener::bind(&ListenAddress::Unix(socket.to_owned())).await.unwrap();
        let life = life.clone();
        tokio::spawn(async move {
            let tasks = Tasks::new();
            let mut connections = Connections::new(listener, tasks.clone());
            let serve = async {
                while let Some(connection) = connections.next().await {
                    let connection = connection.unwrap();
                    let back = connection.backchannel().unwrap().clone();
                    let service = hyper::service::service_fn(move |request| answer(request, back.clone()));
                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(connection), service);
                    tasks.spawn("served", server);
                }
            };
            tokio::select! {
                () = serve => {}
                () = life.cancelled() => {}
            }
            drop(connections);
            tasks.drain(Duration::from_secs(5)).await.unwrap();
        });
    }

    async fn answer(
        request: http::Request<Incoming>,
        back: Backchannel,
    ) -> Result<http::Response<Full<Bytes>>, Infallible> {
        let told = HealthClient::new(back.channel()).check(HealthCheckRequest::default()).await;
        if request.uri().path() == "/hang" {
            std::future::pending::<()>().await;
        }
        let told = told.map_or_else(|status| status.code() as i32, |answer| answer.get_ref().status);
        Ok(http::Response::new(Full::from(told.to_string())))
    }

    fn node(socket: &Path, tasks: &Tasks) -> Arc<Node> {
        let (_, health) = tonic_health::server::health_reporter();
        let metrics = Arc::new(Metrics::new(&mut Registry::default()));
        let nodes = Nodes::new(1, NodeTokens::default(), Routes::new(health), tasks.clone(), metrics);
        let address = format!("unix:{}", socket.display());
        let storage = Storage { name: "s".to_owned(), address, ..Storage::default() };
        nodes.update(Topology {
            virtual_storages: vec![VirtualStorage { name: "v".to_owned(), storages: vec![storage] }],
            ..Topology::default()
        });
        let directory = nodes.directory();
        Arc::clone(&directory.storages("v").unwrap()[0])
    }

    fn write(path: &str) -> OutgoingWrite {
        let body = Full::from("pack").map_err(|never| match never {});
        http::Request::post(format!("http://node{path}")).body(body.boxed_unsync()).unwrap()
    }

    async fn told(node: &Node) -> Bytes {
        let answer = node.send_write(0, write("/ask")).await.unwrap();
        answer.into_body().collect().await.unwrap().to_bytes()
    }

    #[tokio::test]
    async fn the_node_is_answered_while_it_is_at_a_write_and_a_lost_connection_is_dialled_again() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let (life, tasks) = (CancellationToken::new(), Tasks::new());
        listen(&socket, &life).await;
        let node = node(&socket, &tasks);
        assert_eq!(told(&node).await, "1");

        let (hanging, ()) = tokio::join!(node.send_write(0, write("/hang")), async {
            // A second exchange on the connection: the first is under way by now.
            assert_eq!(told(&node).await, "1");
            life.cancel();
        });
        assert!(matches!(hanging, Err(SendError::Lost(_))), "{hanging:?}");
        assert!(!node.healthy(), "a broken connection tells at once: {hanging:?}");

        listen(&socket, &CancellationToken::new()).await;
        assert_eq!(told(&node).await, "1");
    }

    #[tokio::test]
    async fn a_write_that_cannot_be_sent_is_handed_back_whole() {
        let directory = tempfile::tempdir().unwrap();
        let node = node(&directory.path().join("nobody"), &Tasks::new());
        let Err(SendError::Unsent { request, .. }) = node.send_write(0, write("/ask")).await else {
            panic!("sent to nobody");
        };
        assert_eq!(request.uri().path(), "/ask");
        assert_eq!(request.into_body().collect().await.unwrap().to_bytes(), "pack");
        assert!(!node.healthy());
    }
}
