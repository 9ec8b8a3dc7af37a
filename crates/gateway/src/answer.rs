//! The body of an answer: all of it at once, or the output of a git process as it comes. Whoever drops the body, drops
//! the call behind it, and so stops git.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream::BoxStream};
use http::{HeaderName, HeaderValue, StatusCode};
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::{
    limits::{ANSWER_HOLD_BYTES, MAX_STDERR_BYTES},
    record::Record,
    request_body::BodyFault,
    traffic::StallClock,
    upload::Ends,
};

/// What a git process says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Chunk {
    /// Standard output: the answer.
    Output(Bytes),
    /// Standard error: for the log.
    Error(Bytes),
}

impl Chunk {
    fn len(&self) -> usize {
        match self {
            Self::Output(bytes) | Self::Error(bytes) => bytes.len(),
        }
    }
}

/// The messages of a call, the making of the call included.
pub(crate) type Messages = BoxStream<'static, Result<Chunk, Status>>;

/// The beginning of an answer, held until it is whole, so large that nobody holds more, or `hold` old. An error is one of
/// the whole: nothing of it has gone to anybody.
pub(crate) async fn opening(
    messages: &mut (impl Stream<Item = Result<Chunk, Status>> + Unpin),
    hold: Duration,
) -> Result<Vec<Chunk>, Status> {
    let mut held = Vec::new();
    let Some(first) = messages.next().await.transpose()? else { return Ok(held) };
    let until = Instant::now() + hold;
    let mut bytes = first.len();
    held.push(first);
    while !hold.is_zero() && bytes < ANSWER_HOLD_BYTES {
        match timeout_at(until, messages.next()).await {
            Ok(Some(next)) => {
                let next = next?;
                bytes += next.len();
                held.push(next);
            }
            Ok(None) | Err(_) => break,
        }
    }
    Ok(held)
}

/// Why an answer ended before its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    /// The call failed.
    #[error("{}: {}", .0.code(), .0.message())]
    Call(Status),
    /// The client's part failed.
    #[error(transparent)]
    Request(#[from] BodyFault),
    /// Nothing moved either way.
    #[error("no data moved for too long")]
    Stalled,
}

/// A running call.
pub(crate) struct Download {
    messages: Messages,
    /// Present when the request has a body.
    ends: Option<Ends>,
    stall: StallClock,
    stderr: Vec<u8>,
    /// It has ended so, and whoever reads on has yet to be told.
    failed: Option<Ended>,
}

impl Download {
    pub(crate) fn new(messages: Messages, ends: Option<Ends>, stall: StallClock) -> Self {
        Self { messages, ends, stall, stderr: Vec::new(), failed: None }
    }

    /// The next piece of output; never an empty one.
    pub(crate) async fn output(&mut self) -> Option<Result<Bytes, Ended>> {
        std::future::poll_fn(|cx| self.poll_output(cx)).await
    }

    /// Puts an end back that was read ahead.
    pub(crate) fn put_back(&mut self, failed: Ended) {
        self.failed = Some(failed);
    }

    /// What the process wrote on standard error, for the log.
    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Ended>>> {
        if let Some(failed) = self.failed.take() {
            return Poll::Ready(Some(Err(failed)));
        }
        loop {
            match self.messages.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(Chunk::Output(bytes)))) if bytes.is_empty() => {}
                Poll::Ready(Some(Ok(Chunk::Output(bytes)))) => return Poll::Ready(Some(Ok(bytes))),
                Poll::Ready(Some(Ok(Chunk::Error(bytes)))) => {
                    let room = MAX_STDERR_BYTES.saturating_sub(self.stderr.len());
                    self.stderr.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
                Poll::Ready(Some(Err(status))) => {
                    // A body that fails resets the call: the fault is the cause, the status its echo.
                    let fault = self.faults().and_then(|faults| faults.try_recv().ok());
                    return Poll::Ready(Some(Err(fault.map_or(Ended::Call(status), Ended::Request))));
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => break,
            }
        }
        if let Some(faults) = self.faults()
            && let Poll::Ready(fault) = Pin::new(faults).poll(cx)
        {
            if let Some(ends) = &mut self.ends {
                ends.faults = None;
            }
            if let Ok(fault) = fault {
                return Poll::Ready(Some(Err(Ended::Request(fault))));
            }
        }
        self.stall.poll_stalled(cx).map(|()| Some(Err(Ended::Stalled)))
    }

    fn faults(&mut self) -> Option<&mut tokio::sync::oneshot::Receiver<BodyFault>> {
        self.ends.as_mut().and_then(|ends| ends.faults.as_mut())
    }
}

/// An answer without its record.
pub(crate) enum Reply {
    /// All of it is here.
    Whole {
        status: StatusCode,
        content_type: &'static str,
        bytes: Bytes,
        header: Option<(HeaderName, HeaderValue)>,
    },
    /// 200, and the output of git.
    Output { content_type: &'static str, first: Bytes, rest: Download },
}

/// The body of an answer.
pub(crate) enum Answer {
    Whole {
        bytes: Option<Bytes>,
        record: Record,
    },
    Output {
        first: Option<Bytes>,
        rest: Download,
        record: Record,
    },
    /// What came before the end has yet to be written out: it may be git's own word on why there is no more.
    Failed(Option<Ended>),
    /// The call is over, and what it held is given back.
    Over,
}

impl Answer {
    pub(crate) fn whole(bytes: Bytes, mut record: Record) -> Self {
        if bytes.is_empty() {
            // A connection does not ask for the frames of an empty body.
            record.complete();
        }
        Self::Whole { bytes: Some(bytes).filter(|bytes| !bytes.is_empty()), record }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Ended;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Ended>>> {
        let this = self.get_mut();
        match this {
            Self::Over => Poll::Ready(None),
            // An error closes the connection without the end of the body, so that git sees the truncation.
            Self::Failed(error) => Poll::Ready(error.take().map(Err)),
            Self::Whole { bytes, record } => {
                let bytes = bytes.take();
                if let Some(bytes) = &bytes {
                    record.traffic().send(bytes.len());
                    record.complete();
                }
                Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
            }
            Self::Output { first, rest, record } => {
                let output = match first.take() {
                    Some(first) => Some(Ok(first)),
                    None => std::task::ready!(rest.poll_output(cx)),
                };
                match output {
                    Some(Ok(bytes)) => {
                        record.traffic().send(bytes.len());
                        Poll::Ready(Some(Ok(Frame::data(bytes))))
                    }
                    Some(Err(error)) => {
                        tracing::warn!(
                            %error,
                            stderr = rest.stderr(),
                            correlation_id = %record.correlation_id(),
                            "answer broken off"
                        );
                        record.broken();
                        *this = Self::Failed(Some(error));
                        // A connection writes out what it has when nothing more is there, and throws it away on an error.
                        cx.waker().wake_by_ref();
                        Poll::Pending
                    }
                    None => {
                        record.complete();
                        *this = Self::Over;
                        Poll::Ready(None)
                    }
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Over | Self::Whole { bytes: None, .. })
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole { bytes, .. } => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Over => SizeHint::with_exact(0),
            Self::Output { .. } | Self::Failed(_) => SizeHint::default(),
        }
    }
}
