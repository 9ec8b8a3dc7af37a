//! Reads: one up-to-date replica, or any storage, and another one when the first cannot be had.

use std::sync::Arc;

use bytes::Bytes;
use http::Response;
use hyper::body::Incoming;
use tonic::Code;

use super::{
    Outcome, Relay,
    request::{self, Call, Rest},
};
use crate::{
    account::Account,
    body::Tether,
    limits::READ_ATTEMPTS,
    nodes::{Node, SendError, is_healthy, named},
    refusal::{Refusal, code_of},
    routes::is_unknown,
    routing::{self, Reader},
    wire,
};

/// A node's answer.
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    /// Of a request whose stream may go on.
    pub(super) tether: Option<Tether>,
    pub(super) storage: Arc<str>,
}

/// A node that did not answer.
pub(super) struct Failure {
    pub(super) refusal: Refusal,
    /// Nothing that matters has happened: another node may be asked.
    pub(super) again: bool,
}

impl Relay {
    /// Sends a request that starts with `head`. After a failure `rest` is back where it was if the request is unsent.
    pub(super) async fn attempt(
        &self,
        call: &Call,
        node: &Node,
        head: Bytes,
        rest: &mut Rest,
    ) -> Result<Answer, Failure> {
        let (body, tether) = rest.behind(head);
        let request = call.request(&self.token, body).map_err(|refusal| Failure { refusal, again: false })?;
        let response = match node.send(self.worker, call.traffic, request).await {
            Ok(response) => response,
            Err(SendError::Unsent { request, .. }) => {
                rest.restore(*request);
                let refusal = Refusal::Unreachable(node.storage.to_string());
                return Err(Failure { refusal, again: true });
            }
            Err(SendError::Refused) => {
                let refusal = Refusal::Unreachable(node.storage.to_string());
                return Err(Failure { refusal, again: rest.whole() });
            }
            Err(SendError::Lost(error)) => {
                tracing::debug!(storage = %node.storage, %error, "no answer from a node");
                let refusal = Refusal::Lost(node.storage.to_string());
                return Err(Failure { refusal, again: rest.whole() });
            }
        };
        if response.status() == http::StatusCode::OK {
            Ok(Answer { response, tether, storage: Arc::clone(&node.storage) })
        } else {
            let refusal = Refusal::NotGrpc(node.storage.to_string());
            Err(Failure { refusal, again: rest.whole() })
        }
    }

    pub(super) async fn read(
        &self,
        call: &Call,
        target: &[u32],
        reader: Reader,
        body: Incoming,
        account: &mut Account,
    ) -> Result<Outcome, Refusal> {
        let (message, mut rest) = request::first(body, call).await?;
        let repository = request::repository(&message, target)?;
        let directory = self.shared.nodes.directory();
        let storages = Self::storages(&directory, repository.virtual_storage)?;
        let route = self
            .shared
            .routes
            .resolve(repository.virtual_storage, repository.relative_path, Some(&call.correlation))
            .await
            .map_err(|refusal| {
                if is_unknown(&refusal) {
                    Refusal::RepositoryNotFound { prefix: "accessor call: route repository accessor: " }
                } else {
                    refusal
                }
            })?;
        account.route = Some(Arc::clone(&route));

        let reader = if call.primary_only { Reader::Primary } else { reader };
        let spread = self.spread();
        let mut tried = Vec::new();
        let mut last = None;
        for _ in 0..READ_ATTEMPTS {
            let healthy = |storage: &str| is_healthy(storages, storage);
            let chosen = match routing::reader(&route, reader, healthy, &tried, spread) {
                Ok(storage) => storage,
                Err(refusal) => return last.unwrap_or(Err(refusal)),
            };
            let Some(node) = named(storages, chosen) else {
                return Err(Refusal::NoSuitableNode);
            };
            let head = request::rewritten(&message, target, chosen, &route.replica_path)?;
            account.storage = Some(Arc::clone(&node.storage));
            match self.try_read(call, node, head, &mut rest).await {
                Ok(outcome) => return Ok(outcome),
                Err(Tried { outcome, again: false }) => return outcome,
                Err(Tried { outcome, .. }) => last = Some(outcome),
            }
            tried.push(chosen.to_owned());
        }
        last.unwrap_or(Err(Refusal::NoSuitableNode))
    }

    pub(super) async fn read_storage(
        &self,
        call: &Call,
        within: &[u32],
        name: u32,
        body: Incoming,
        account: &mut Account,
    ) -> Result<Outcome, Refusal> {
        let (message, mut rest) = request::first(body, call).await?;
        let holder = wire::message_at(&message, within)?.ok_or(Refusal::TargetStorage)?;
        let virtual_storage = wire::text(holder, name)?;
        if virtual_storage.is_empty() {
            return Err(Refusal::TargetStorage);
        }
        let directory = self.shared.nodes.directory();
        let storages = Self::storages(&directory, virtual_storage)?;
        let spread = self.spread();
        let mut usable: Vec<bool> = storages.iter().map(|node| node.healthy()).collect();
        let mut last = None;
        for _ in 0..READ_ATTEMPTS {
            let place = match routing::any_storage(&usable, spread) {
                Ok(place) => place,
                Err(refusal) => return last.unwrap_or(Err(refusal)),
            };
            let node = &storages[place];
            let head = request::restored(&message, within, name, &node.storage)?;
            account.storage = Some(Arc::clone(&node.storage));
            match self.try_read(call, node, head, &mut rest).await {
                Ok(outcome) => return Ok(outcome),
                Err(Tried { outcome, again: false }) => return outcome,
                Err(Tried { outcome, .. }) => last = Some(outcome),
            }
            usable[place] = false;
        }
        last.unwrap_or(Err(Refusal::NoHealthyNodes))
    }

    async fn try_read(
        &self,
        call: &Call,
        node: &Arc<Node>,
        head: Bytes,
        rest: &mut Rest,
    ) -> Result<Outcome, Tried> {
        match self.attempt(call, node, head, rest).await {
            Ok(answer) => {
                let unavailable = code_of(answer.response.headers()) == Some(Code::Unavailable);
                let outcome = Outcome::Node(answer);
                if unavailable && rest.whole() {
                    self.shared.metrics.retries.inc();
                    return Err(Tried { outcome: Ok(outcome), again: true });
                }
                Ok(outcome)
            }
            Err(failure) => {
                if failure.again {
                    self.shared.metrics.retries.inc();
                }
                Err(Tried { outcome: Err(failure.refusal), again: failure.again })
            }
        }
    }
}

/// What the client gets if no other node does better.
struct Tried {
    outcome: Result<Outcome, Refusal>,
    again: bool,
}
