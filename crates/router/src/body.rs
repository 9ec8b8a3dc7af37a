//! The bodies that travel through the router. Each wrapper does one thing and is tested alone.
//!
//! * [`Spliced`]: towards a node: the rewritten first message, then the untouched rest of the client's stream.
//! * [`Graceful`]: from a node: a connection that is lost becomes a status instead of a reset.
//! * [`Driven`]: from the task that drives a write, which decides what the client is told and when.
//! * [`Deadline`]: to a client: the whole exchange ends when the client's time is up.
//! * [`Accounted`]: to a client: metrics and the log line at the end, however it ends.

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use tokio::{
    sync::{mpsc, oneshot},
    time::Sleep,
};
use tonic::Code;

use crate::{
    account::Account,
    refusal::{Refusal, code_of},
    relay::GENERATION,
};

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Ties a request to its answer: when this is dropped, the request is reset if it has not ended by itself.
///
/// HTTP/2 does not do that: an answer that nobody reads any more leaves the request open, and the node would go on, and
/// take the client's half-close for its word.
#[derive(Debug)]
pub(crate) struct Tether(#[expect(dead_code, reason = "being dropped is what it does")] oneshot::Sender<()>);

/// The rewritten first message, and the rest of the client's stream.
#[derive(Debug)]
pub(crate) struct Spliced<B> {
    head: Option<Bytes>,
    rest: Option<(B, oneshot::Receiver<()>)>,
}

impl<B> Spliced<B> {
    /// A whole request: `head` is all of it.
    pub(crate) fn whole(head: Bytes) -> Self {
        Self { head: Some(head), rest: None }
    }

    /// A request whose stream goes on behind `head`.
    pub(crate) fn stream(head: Bytes, rest: B) -> (Self, Tether) {
        let (tether, untied) = oneshot::channel();
        (Self { head: Some(head), rest: Some((rest, untied)) }, Tether(tether))
    }
}

impl<B> Body for Spliced<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(bytes) = self.head.take() {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        let Some((rest, untied)) = &mut self.rest else {
            return Poll::Ready(None);
        };
        if Pin::new(untied).poll(cx).is_ready() {
            self.rest = None;
            return Poll::Ready(Some(Err(cancelled())));
        }
        match ready!(Pin::new(&mut *rest).poll_frame(cx)) {
            Some(Ok(frame)) => Poll::Ready(Some(Ok(frame))),
            Some(Err(error)) => {
                self.rest = None;
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                // A stream that was reset can end like one that was closed. The node must not take what it has for the
                // whole request.
                let whole = rest.is_end_stream();
                self.rest = None;
                if whole { Poll::Ready(None) } else { Poll::Ready(Some(Err(cancelled()))) }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.head.is_none() && self.rest.as_ref().is_none_or(|(rest, _)| rest.is_end_stream())
    }
}

/// Ends a request as reset, so that the node does not take what it has for the whole of it.
pub(crate) fn cancelled() -> BoxError {
    h2::Error::from(h2::Reason::CANCEL).into()
}

/// A node's answer that always ends with a status.
pub(crate) struct Graceful<B> {
    /// What has been read of it already.
    held: VecDeque<Frame<Bytes>>,
    inner: Option<(B, Option<Tether>)>,
    storage: std::sync::Arc<str>,
}

impl<B> Graceful<B> {
    /// Wraps the answer of a storage, and holds what ties the request to it.
    pub(crate) fn new(inner: B, tether: Option<Tether>, storage: std::sync::Arc<str>) -> Self {
        Self { held: VecDeque::new(), inner: Some((inner, tether)), storage }
    }

    /// The same behind frames that have been read already.
    pub(crate) fn behind(mut self, held: VecDeque<Frame<Bytes>>) -> Self {
        self.held = held;
        self
    }

    fn give_up(&mut self) -> Frame<Bytes> {
        self.inner = None;
        Frame::trailers(Refusal::Lost(self.storage.to_string()).trailers())
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Graceful<B> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        let Some((inner, _)) = &mut this.inner else {
            return Poll::Ready(None);
        };
        let frame = match this.held.pop_front() {
            Some(held) => Some(Ok(held)),
            None => ready!(Pin::new(inner).poll_frame(cx)),
        };
        match frame {
            Some(Ok(frame)) if frame.is_trailers() => {
                self.inner = None;
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Ok(frame)) => Poll::Ready(Some(Ok(frame))),
            Some(Err(_)) | None => Poll::Ready(Some(Ok(self.give_up()))),
        }
    }
}

/// A write's answer, frame by frame, from the task that drives the write.
pub(crate) struct Driven {
    frames: Option<mpsc::Receiver<Frame<Bytes>>>,
}

impl Driven {
    /// The sender is the task's.
    pub(crate) fn new(frames: mpsc::Receiver<Frame<Bytes>>) -> Self {
        Self { frames: Some(frames) }
    }
}

impl Body for Driven {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(frames) = &mut self.frames else {
            return Poll::Ready(None);
        };
        let frame = ready!(frames.poll_recv(cx)).unwrap_or_else(|| {
            // A task that ends always says how; this one was ended.
            Frame::trailers(Refusal::Abandoned.trailers())
        });
        if frame.is_trailers() {
            self.frames = None;
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

/// Ends the exchange with `DEADLINE_EXCEEDED` when the client's time is up, whatever the rest of it does.
pub(crate) struct Deadline<B> {
    inner: Option<B>,
    expiry: Option<Pin<Box<Sleep>>>,
}

impl<B> Deadline<B> {
    /// `expiry`: `None` for a client that waits for ever.
    pub(crate) fn new(inner: B, expiry: Option<Pin<Box<Sleep>>>) -> Self {
        Self { inner: Some(inner), expiry }
    }
}

impl<B: Body<Data = Bytes, Error = Infallible> + Unpin> Body for Deadline<B> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        let Some(inner) = &mut this.inner else {
            return Poll::Ready(None);
        };
        // First of all, or a stream that always has something to say would never be asked for the time.
        if let Some(expiry) = &mut this.expiry
            && expiry.as_mut().poll(cx).is_ready()
        {
            this.inner = None;
            return Poll::Ready(Some(Ok(Frame::trailers(Refusal::DeadlineExceeded.trailers()))));
        }
        Pin::new(inner).poll_frame(cx)
    }
}

/// Closes the account of the RPC with the status that the client was sent, and says how new the repository is.
pub(crate) struct Accounted<B> {
    inner: B,
    account: Account,
}

impl<B> Accounted<B> {
    /// Takes over the account.
    pub(crate) fn new(inner: B, account: Account) -> Self {
        Self { inner, account }
    }
}

impl<B: Body<Data = Bytes, Error = Infallible> + Unpin> Body for Accounted<B> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let mut frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            if let Some(generation) = self.account.generation() {
                trailers.insert(GENERATION, generation);
            }
            self.account.close(code_of(trailers).unwrap_or(Code::Unknown));
        }
        Poll::Ready(frame)
    }
}

/// What a node's answer is wrapped in.
pub(crate) type Relayed<B> = Accounted<Deadline<Graceful<B>>>;

/// What the router answers with.
pub(crate) enum Reply {
    /// A node's answer.
    Relayed(Relayed<hyper::body::Incoming>),
    /// The answer to a write.
    Driven(Accounted<Deadline<Driven>>),
    /// One of the typed services.
    Typed(tonic::body::Body),
    /// Known in full: at most one message, then trailers.
    Whole {
        /// With its prefix.
        message: Option<Bytes>,
        /// Not there when the status stands in the headers.
        trailers: Option<HeaderMap>,
    },
}

impl Body for Reply {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        match self.get_mut() {
            Self::Relayed(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Self::Driven(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Self::Typed(body) => Pin::new(body).poll_frame(cx),
            Self::Whole { message, trailers } => Poll::Ready(
                message.take().map(Frame::data).or_else(|| trailers.take().map(Frame::trailers)).map(Ok),
            ),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Relayed(_) | Self::Driven(_) => false,
            Self::Typed(body) => body.is_end_stream(),
            Self::Whole { message, trailers } => message.is_none() && trailers.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::{BodyExt as _, StreamBody};

    use super::*;

    type Frames = Vec<Result<Frame<Bytes>, BoxError>>;

    fn body(frames: Frames) -> impl Body<Data = Bytes, Error = BoxError> + Unpin {
        StreamBody::new(futures::stream::iter(frames))
    }

    fn data(text: &'static str) -> Frame<Bytes> {
        Frame::data(Bytes::from_static(text.as_bytes()))
    }

    fn status(code: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(
            http::HeaderName::from_static("grpc-status"),
            http::HeaderValue::from_static(code),
        )])
    }

    async fn codes(mut body: impl Body<Data = Bytes, Error = Infallible> + Unpin) -> (String, Option<Code>) {
        let (mut text, mut code) = (String::new(), None);
        while let Some(frame) = body.frame().await {
            match frame.unwrap().into_data() {
                Ok(data) => text.push_str(std::str::from_utf8(&data).unwrap()),
                Err(frame) => code = code_of(frame.trailers_ref().unwrap()),
            }
        }
        (text, code)
    }

    #[tokio::test]
    async fn a_splice_keeps_the_order_and_so_does_what_was_read_ahead() {
        let rest = http_body_util::Full::new(Bytes::from_static(b"c"));
        let (spliced, _tether) = Spliced::stream(Bytes::from_static(b"a"), rest);
        assert_eq!(spliced.collect().await.unwrap().to_bytes(), "ac");
        let rest = body(vec![Ok(data("b")), Ok(Frame::trailers(status("0")))]);
        let begun = Graceful::new(rest, None, "s".into()).behind([data("a")].into());
        assert_eq!(codes(begun).await, ("ab".into(), Some(Code::Ok)));
    }

    fn reset(error: &BoxError) -> Option<h2::Reason> {
        error.downcast_ref::<h2::Error>().unwrap().reason()
    }

    #[tokio::test]
    async fn a_request_that_is_cut_off_is_not_passed_off_as_whole() {
        // A stream body never claims to have ended by the peer's word.
        let (spliced, _tether) = Spliced::stream(Bytes::from_static(b"a"), body(vec![Ok(data("b"))]));
        assert_eq!(reset(&spliced.collect().await.unwrap_err()), Some(h2::Reason::CANCEL));
    }

    #[tokio::test]
    async fn a_request_does_not_outlive_its_answer() {
        let open = StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, BoxError>>());
        let (mut spliced, tether) = Spliced::stream(Bytes::from_static(b"a"), open);
        assert!(spliced.frame().await.unwrap().is_ok());
        drop(Graceful::new(body(vec![]), Some(tether), "s".into()));
        assert_eq!(reset(&spliced.frame().await.unwrap().unwrap_err()), Some(h2::Reason::CANCEL));
    }

    #[tokio::test]
    async fn a_lost_node_is_unavailable_and_a_status_of_its_own_is_kept() {
        let lost = Graceful::new(body(vec![Ok(data("a")), Err("gone".into())]), None, "s".into());
        assert_eq!(codes(lost).await, ("a".into(), Some(Code::Unavailable)));
        let silent = Graceful::new(body(vec![Ok(data("a"))]), None, "s".into());
        assert_eq!(codes(silent).await, ("a".into(), Some(Code::Unavailable)));
        let own =
            Graceful::new(body(vec![Ok(data("a")), Ok(Frame::trailers(status("5")))]), None, "s".into());
        assert_eq!(codes(own).await, ("a".into(), Some(Code::NotFound)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_whole_exchange_is_bounded() {
        let hanging = StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, Infallible>>());
        let expiry = Box::pin(tokio::time::sleep(Duration::from_millis(200)));
        let started = tokio::time::Instant::now();
        let deadline = Deadline::new(hanging, Some(expiry));
        assert_eq!(codes(deadline).await, (String::new(), Some(Code::DeadlineExceeded)));
        assert_eq!(started.elapsed().as_millis() / 10, 20);
    }
}
