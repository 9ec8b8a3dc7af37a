//! One node is asked to serve a read, and its answer is held until it is known how it begins: whole, if it is small.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use tabularium_common::{
    multiplex::sidechannel::{self, SidechannelId},
    records::{EXPECTED_REPLICA, NODE_INSTANCE},
};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::{Code, Status};

use super::{
    Relay,
    request::{self, Call},
};
use crate::{
    body::Tether,
    limits::{ANSWER_HOLD_BYTES, STREAM_HEAD_HOLD},
    nodes::{Node, SendError},
    refusal::{Refusal, code_of},
    replay::Replay,
    routing::judgement::{Judgement, judge},
};

/// A node's answer.
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    /// What has been read of its body.
    pub(super) held: VecDeque<Frame<Bytes>>,
    /// Of a request whose stream may go on.
    pub(super) tether: Option<Tether>,
    pub(super) storage: Arc<str>,
}

impl Answer {
    /// The status, if it is there already.
    fn status(&self) -> Option<&HeaderMap> {
        let trailers = self.held.back().and_then(Frame::trailers_ref);
        trailers.or_else(|| code_of(self.response.headers()).map(|_| self.response.headers()))
    }

    /// It begins with a message, and ends well if it has ended.
    pub(super) fn is_well(&self) -> bool {
        self.status().and_then(code_of).is_none_or(|code| code == Code::Ok)
    }
}

/// What came of asking one node.
pub(super) enum Heard {
    /// An answer for the client.
    Answer(Answer),
    /// Nothing that another node could not do better.
    Elsewhere {
        /// What the client is told if none does.
        word: Result<Answer, Refusal>,
        /// What speaks against the replica.
        suspicion: Option<String>,
    },
}

impl Heard {
    pub(super) fn refused(refusal: Refusal) -> Self {
        Self::Elsewhere { word: Err(refusal), suspicion: None }
    }
}

impl Relay {
    /// Sends a request that starts with `head` and goes on with `replay`. `expected`: what is known of the replica.
    pub(super) async fn attempt(
        &self,
        call: &Call,
        node: &Node,
        head: Bytes,
        replay: Option<&Replay<Incoming>>,
        expected: Option<HeaderValue>,
    ) -> Result<Answer, Refusal> {
        let (body, tether) = request::body(head, replay);
        let mut request = call.request(node.token(self.worker), body)?;
        if let Some(expected) = expected {
            request.headers_mut().insert(EXPECTED_REPLICA, expected);
        }
        answered(node, node.send(self.worker, call.traffic, request).await, tether)
    }

    /// Asks a node, and judges how its answer begins.
    pub(super) async fn hear(
        &self,
        call: &Call,
        node: &Node,
        head: Bytes,
        replay: Option<&Replay<Incoming>>,
        expected: Option<HeaderValue>,
    ) -> Heard {
        let answer = self.attempt(call, node, head, replay, expected).await;
        self.meet(node, weigh(answer, replay, self.shared.hold_answers).await)
    }

    /// The same over a connection on which the node can open the sidechannel `id`.
    pub(super) async fn hear_beside(
        &self,
        call: &Call,
        node: &Node,
        head: Bytes,
        expected: Option<HeaderValue>,
        id: SidechannelId,
    ) -> Heard {
        let body = Full::new(head).map_err(|never| match never {}).boxed_unsync();
        let sent = async {
            let mut request = call.request(node.token(self.worker), body)?;
            request.headers_mut().insert(sidechannel::METADATA, id.header());
            if let Some(expected) = expected {
                request.headers_mut().insert(EXPECTED_REPLICA, expected);
            }
            answered(node, node.send_beside(self.worker, request).await, None)
        };
        self.meet(node, weigh(sent.await, None, self.shared.hold_answers).await)
    }

    /// A node that was started since it was asked about says so, and is known from then on.
    fn meet(&self, node: &Node, heard: Heard) -> Heard {
        let Heard::Elsewhere { word: Ok(answer), .. } = &heard else { return heard };
        let instance = answer.status().and_then(|status| status.get(NODE_INSTANCE));
        let Some(instance) = instance.and_then(|value| value.to_str().ok()) else { return heard };
        node.is_instance(instance, || self.shared.routes.forget());
        Heard::refused(Refusal::StartedAnew(node.storage.to_string()))
    }
}

fn answered<R>(
    node: &Node,
    sent: Result<Response<Incoming>, SendError<R>>,
    tether: Option<Tether>,
) -> Result<Answer, Refusal> {
    let response = match sent {
        Ok(response) => response,
        Err(SendError::Unsent { .. } | SendError::Refused) => {
            return Err(Refusal::Unreachable(node.storage.to_string()));
        }
        Err(SendError::Lost(error)) => {
            tracing::debug!(storage = %node.storage, %error, "no answer from a node");
            return Err(Refusal::Lost(node.storage.to_string()));
        }
    };
    if response.status() == http::StatusCode::OK {
        Ok(Answer { response, held: VecDeque::new(), tether, storage: Arc::clone(&node.storage) })
    } else {
        Err(Refusal::NotGrpc(node.storage.to_string()))
    }
}

/// Waits for the beginning of an answer, and judges it.
async fn weigh(answer: Result<Answer, Refusal>, replay: Option<&Replay<Incoming>>, hold: Duration) -> Heard {
    let mut answer = match answer {
        Ok(answer) => answer,
        Err(refusal) => return Heard::refused(refusal),
    };
    if let Err(refusal) = begin(&mut answer, replay, hold).await {
        return Heard::refused(refusal);
    }
    let Some(status) = answer.status().and_then(Status::from_header_map) else {
        return Heard::Answer(answer);
    };
    match judge(status.code(), status.message()) {
        Judgement::Answered => Heard::Answer(answer),
        Judgement::Unavailable => Heard::Elsewhere { word: Ok(answer), suspicion: None },
        Judgement::Suspicious => Heard::Elsewhere {
            word: Ok(answer),
            suspicion: Some(format!("{}: {}", status.code(), status.message())),
        },
    }
}

/// Waits for the first frame, and holds the next ones for a moment: until the answer is whole, if it is small. A client
/// that has not said all may wait for the head of the answer before it goes on, so that is not held for long.
async fn begin(
    answer: &mut Answer,
    replay: Option<&Replay<Incoming>>,
    hold: Duration,
) -> Result<(), Refusal> {
    if code_of(answer.response.headers()).is_some() {
        return Ok(());
    }
    let storage = Arc::clone(&answer.storage);
    let lost = || Refusal::Lost(storage.to_string());
    let body = answer.response.body_mut();
    let first = match replay {
        Some(replay) if !replay.has_ended() => match timeout(STREAM_HEAD_HOLD, body.frame()).await {
            Ok(frame) => frame,
            Err(_) if replay.has_ended() => body.frame().await,
            Err(_) => return Ok(()),
        },
        _ => body.frame().await,
    };
    let mut next = first.and_then(Result::ok).ok_or_else(lost)?;
    let until = Instant::now() + hold;
    let mut bytes = 0;
    loop {
        let ended = next.is_trailers();
        bytes += next.data_ref().map_or(0, Bytes::len);
        answer.held.push_back(next);
        let enough = hold.is_zero() || bytes >= ANSWER_HOLD_BYTES;
        if ended || enough || !replay.is_none_or(Replay::can_begin_again) {
            return Ok(());
        }
        match timeout_at(until, body.frame()).await {
            Ok(frame) => next = frame.and_then(Result::ok).ok_or_else(lost)?,
            Err(_) => return Ok(()),
        }
    }
}
