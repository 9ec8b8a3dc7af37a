//! Maintenance: every replica, side by side. One answer goes back, and only if none of them failed.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;
use http::HeaderMap;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use tonic::{Code, Status};

use super::{
    Outcome, Relay, ok,
    request::{self, Call},
};
use crate::{
    account::Account,
    limits::MAINTENANCE_ANSWER_BYTES,
    nodes::{Node, is_healthy, named},
    refusal::{Refusal, code_of},
    routes::not_found,
    routing,
};

impl Relay {
    pub(super) async fn maintain(
        &self,
        mut call: Call,
        target: &[u32],
        body: Incoming,
        account: &mut Account,
    ) -> Result<Outcome, Refusal> {
        let (message, rest) = request::first(body, &call).await?;
        if !rest.whole() {
            return Err(Refusal::NotBuilt("a maintenance RPC with a request stream".to_owned()));
        }
        let repository = request::repository(&message, target)?;
        call.say_virtual_storage(repository.virtual_storage);
        let call = &call;
        let directory = self.shared.nodes.directory();
        let storages = Self::storages(&directory, repository.virtual_storage)?;
        let route = self
            .shared
            .routes
            .resolve(repository.virtual_storage, repository.relative_path, Some(&call.correlation))
            .await
            .map_err(not_found)?;
        account.route = Some(Arc::clone(&route));
        let chosen = routing::maintained(&route, |storage| is_healthy(storages, storage))?;
        let mut asked = Vec::with_capacity(chosen.len());
        for storage in chosen {
            let node = named(storages, storage).ok_or(Refusal::NoHealthyNodes)?;
            let head = request::rewritten(&message, target, storage, &route.replica_path)?;
            asked.push(self.ask_replica(call, node, head));
        }
        // All run to their end before the first failure counts.
        let answers = join_all(asked).await;
        let mut first = None;
        for answer in answers {
            let (headers, message) = answer?;
            first.get_or_insert((headers, message));
        }
        let (headers, message) = first.ok_or(Refusal::NoHealthyNodes)?;
        Ok(Outcome::Whole(ok(headers, message)))
    }

    async fn ask_replica(
        &self,
        call: &Call,
        node: &Node,
        head: Bytes,
    ) -> Result<(HeaderMap, Bytes), Refusal> {
        let answer = self.attempt(call, node, head, None, None).await?;
        let (parts, body) = answer.response.into_parts();
        let collected = Limited::new(body, MAINTENANCE_ANSWER_BYTES).collect().await.map_err(|error| {
            if error.is::<http_body_util::LengthLimitError>() {
                Refusal::AnswerTooLarge(MAINTENANCE_ANSWER_BYTES)
            } else {
                Refusal::Lost(node.storage.to_string())
            }
        })?;
        let trailers = collected.trailers().cloned();
        let ended =
            trailers.as_ref().filter(|trailers| code_of(trailers).is_some()).unwrap_or(&parts.headers);
        match code_of(ended) {
            Some(Code::Ok) => Ok((parts.headers, collected.to_bytes())),
            Some(_) => {
                let status = Status::from_header_map(ended);
                Err(Refusal::Status(status.unwrap_or_else(|| Status::unknown("no status"))))
            }
            None => Err(Refusal::Lost(node.storage.to_string())),
        }
    }
}
