//! The multiplexed connection of one worker to one node: writes go out on it, the node's votes come back.
//!
//! It is dialled when it is first needed and again when it was lost. That a node was killed is known at once, by the
//! kernel's word, and fails every request that is under way on it.

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use tabularium_common::{grpc::Address, lifecycle::Tasks, multiplex};
use tonic::service::Routes;

use super::pool::{SendError, Slot};

/// The body of a write to one of its participants.
pub(crate) type WriteBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;
/// A write to one of its participants.
pub(crate) type OutgoingWrite = http::Request<WriteBody>;

pub(super) struct Multiplexed {
    slot: Slot<WriteBody>,
    votes: Routes,
    tasks: Tasks,
}

impl Multiplexed {
    /// Nothing is dialled yet. `votes` is served to the node on the streams that it opens.
    pub(super) fn new(votes: Routes, tasks: Tasks) -> Self {
        Self { slot: Slot::default(), votes, tasks }
    }

    /// See [`Slot::send`].
    pub(super) async fn send(
        &self,
        address: &Address,
        request: OutgoingWrite,
    ) -> Result<http::Response<Incoming>, SendError<OutgoingWrite>> {
        let dial = multiplex::dial(address, self.votes.clone(), &self.tasks);
        self.slot.send(&self.tasks, dial, request).await
    }
}
