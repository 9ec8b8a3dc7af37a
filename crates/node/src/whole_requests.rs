//! A request that was cut off must not look like one that ended.
//!
//! When a client resets its stream, tonic ends the stream of request messages as if the client had half-closed it. A
//! handler that acts on what it has got by then would commit half of what the client meant. Here the cut becomes an
//! error that tonic passes on, before any handler sees it.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::Request;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::{Status, body::Body};

/// The request with a body whose end is the client's own doing.
pub(crate) fn guard(request: Request<Body>) -> Request<Body> {
    request.map(|body| Body::new(WholeBody { inner: body }))
}

struct WholeBody<B> {
    inner: B,
}

/// Not `CANCELLED`: that is the code tonic takes for the end of the messages.
fn cut(why: &str) -> Status {
    Status::aborted(format!("the request was cut off: {why}"))
}

impl<B> HttpBody for WholeBody<B>
where
    B: HttpBody<Data = Bytes, Error = Status> + Unpin,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match Pin::new(&mut self.inner).poll_frame(cx) {
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(cut(error.message())))),
            // A reset without an error code also stops the body, but does not end its stream.
            Poll::Ready(None) if !self.inner.is_end_stream() => {
                Poll::Ready(Some(Err(cut("the stream was reset"))))
            }
            other => other,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use http_body_util::BodyExt as _;

    use super::*;

    /// Frames, and whether the stream has ended when they are used up.
    struct Scripted(VecDeque<Result<&'static [u8], Status>>, bool);

    impl HttpBody for Scripted {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            let next = self.0.pop_front();
            Poll::Ready(next.map(|frame| frame.map(|data| Frame::data(Bytes::from_static(data)))))
        }

        fn is_end_stream(&self) -> bool {
            self.0.is_empty() && self.1
        }
    }

    async fn read(frames: Vec<Result<&'static [u8], Status>>, ended: bool) -> Result<Bytes, Status> {
        let body = WholeBody { inner: Scripted(frames.into(), ended) };
        body.collect().await.map(http_body_util::Collected::to_bytes)
    }

    #[tokio::test]
    async fn only_an_end_is_an_end() {
        assert_eq!(read(vec![Ok(b"a"), Ok(b"b")], true).await.unwrap(), "ab");
        let reset = read(vec![Ok(b"a"), Err(Status::cancelled("reset"))], false).await.unwrap_err();
        assert_eq!((reset.code(), reset.message()), (tonic::Code::Aborted, "the request was cut off: reset"));
        assert_eq!(read(vec![Ok(b"a")], false).await.unwrap_err().code(), tonic::Code::Aborted);
    }
}
