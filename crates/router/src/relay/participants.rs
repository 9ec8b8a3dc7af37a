//! The nodes that take part in a write: how each is asked, and what comes back.

use std::{future::poll_fn, pin::Pin, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Response, StatusCode, response::Parts};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tonic::Code;

use super::{
    fan_out::Branch,
    request::{Call, TRANSACTION},
};
use crate::{
    nodes::{Node, OutgoingWrite, SendError},
    refusal::{Refusal, code_of},
};

/// The transaction of a write, as one node is told of it.
pub(super) fn introduction(id: u64, storage: &str, primary: bool) -> Result<HeaderValue, Refusal> {
    let text = serde_json::json!({ "id": id, "node": storage, "primary": primary }).to_string();
    HeaderValue::try_from(STANDARD.encode(text))
        .map_err(|error| Refusal::Status(tonic::Status::internal(error.to_string())))
}

/// The request for one participant; without an introduction it does not vote.
pub(super) fn request(
    call: &Call,
    token: Option<HeaderValue>,
    introduction: Option<HeaderValue>,
    branch: Branch,
) -> Result<OutgoingWrite, Refusal> {
    let mut request = call.request(token, branch.boxed_unsync())?;
    if let Some(introduction) = introduction {
        request.headers_mut().insert(TRANSACTION, introduction);
    }
    Ok(request)
}

/// How a secondary's part ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// With this status.
    Status(Code),
    /// Without any: the node, or the way to it, is gone.
    Lost,
}

/// Runs a secondary's part to its end. What it answers is nobody's business but for the status.
pub(super) async fn secondary(node: Arc<Node>, worker: usize, request: OutgoingWrite) -> Part {
    let response = match node.send_write(worker, request).await {
        Ok(response) => response,
        Err(error) => {
            tracing::debug!(storage = %node.storage, %error, "no answer from a secondary");
            return Part::Lost;
        }
    };
    let (parts, mut body) = response.into_parts();
    if let Some(code) = code_of(&parts.headers) {
        return Part::Status(code);
    }
    while let Some(Ok(frame)) = body.frame().await {
        if let Some(code) = frame.trailers_ref().and_then(code_of) {
            return Part::Status(code);
        }
    }
    Part::Lost
}

/// What the primary said next.
#[derive(Debug)]
pub(super) enum Said {
    /// Its answer begins.
    Head(Parts),
    /// It goes on.
    Data(Frame<Bytes>),
    /// It ends.
    Trailers(HeaderMap, Code),
    /// It is nothing but a status.
    Whole(Parts, Code),
    /// There is none, or no end of it.
    Lost(Refusal),
}

enum State {
    Waiting(BoxFuture<'static, Result<Response<Incoming>, SendError<OutgoingWrite>>>),
    Flowing(Incoming),
    Over,
}

/// The primary's answer.
pub(super) struct Primary {
    storage: Arc<str>,
    state: State,
}

impl Primary {
    /// Asks it.
    pub(super) fn ask(node: &Arc<Node>, worker: usize, request: OutgoingWrite) -> Self {
        let storage = Arc::clone(&node.storage);
        let node = Arc::clone(node);
        let send = async move { node.send_write(worker, request).await };
        Self { storage, state: State::Waiting(send.boxed()) }
    }

    /// Listens to it no longer.
    pub(super) fn abandon(&mut self) {
        self.state = State::Over;
    }

    fn lost(&mut self) -> Said {
        self.state = State::Over;
        Said::Lost(Refusal::Lost(self.storage.to_string()))
    }

    /// The next thing that it says; never, once it has ended. Cancellation-safe.
    pub(super) async fn next(&mut self) -> Said {
        match &mut self.state {
            State::Over => std::future::pending().await,
            State::Waiting(sending) => match sending.await {
                Ok(response) => self.begin(response),
                Err(error) => {
                    tracing::debug!(storage = %self.storage, %error, "no answer from a primary");
                    if let SendError::Lost(_) = error {
                        return self.lost();
                    }
                    self.state = State::Over;
                    Said::Lost(Refusal::Unreachable(self.storage.to_string()))
                }
            },
            State::Flowing(body) => match poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await {
                Some(Ok(frame)) => match frame.into_trailers() {
                    Err(data) => Said::Data(data),
                    Ok(trailers) => match code_of(&trailers) {
                        None => self.lost(),
                        Some(code) => {
                            self.state = State::Over;
                            Said::Trailers(trailers, code)
                        }
                    },
                },
                Some(Err(_)) | None => self.lost(),
            },
        }
    }

    fn begin(&mut self, response: Response<Incoming>) -> Said {
        let (parts, body) = response.into_parts();
        self.state = State::Over;
        if parts.status != StatusCode::OK {
            return Said::Lost(Refusal::NotGrpc(self.storage.to_string()));
        }
        if let Some(code) = code_of(&parts.headers) {
            return Said::Whole(parts, code);
        }
        self.state = State::Flowing(body);
        Said::Head(parts)
    }
}
