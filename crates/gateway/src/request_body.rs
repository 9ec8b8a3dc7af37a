//! The body of a request as it goes to git: decompressed while it streams, bounded after decompression.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use async_compression::tokio::bufread::GzipDecoder;
use bytes::Bytes;
use futures::Stream;
use http::{HeaderMap, header};
use http_body::Body as _;
use hyper::body::Incoming;
use tokio_util::io::{ReaderStream, StreamReader};

use crate::{limits::DECODED_CHUNK_BYTES, traffic::Traffic};

/// Why the rest of a request's body will not come.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BodyFault {
    /// The client closed the connection, or broke HTTP's framing.
    #[error("the request's body broke off: {0}")]
    Lost(String),
    /// `Content-Encoding: gzip`, and it is not.
    #[error("the request's body is not valid gzip: {0}")]
    Gzip(String),
    /// More than is allowed, after decompression.
    #[error("the request's body is larger than {0} bytes")]
    TooLarge(u64),
    /// The answer is over, or nobody wants it any more.
    #[error("the answer ended before the request did")]
    Abandoned,
}

/// A compression we cannot undo.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Content-Encoding {0:?} is not supported; allowed: gzip, identity")]
pub(crate) struct UnknownEncoding(String);

/// How a body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Identity,
    Gzip,
}

impl Encoding {
    /// From `Content-Encoding`.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Self, UnknownEncoding> {
        let Some(value) = headers.get(header::CONTENT_ENCODING) else { return Ok(Self::Identity) };
        match value.as_bytes().trim_ascii().to_ascii_lowercase().as_slice() {
            b"" | b"identity" => Ok(Self::Identity),
            b"gzip" | b"x-gzip" => Ok(Self::Gzip),
            other => Err(UnknownEncoding(String::from_utf8_lossy(other).into_owned())),
        }
    }
}

/// Chunks of the body, for git.
pub(crate) struct RequestBody {
    /// Read before the rest was wanted.
    ahead: Option<Bytes>,
    source: Source,
    left: u64,
    limit: u64,
}

type Decoded = ReaderStream<GzipDecoder<StreamReader<Wire, Bytes>>>;

enum Source {
    Plain(Wire),
    Gzip(Pin<Box<Decoded>>),
}

impl RequestBody {
    /// `limit` counts bytes after decompression.
    pub(crate) fn new(body: Incoming, encoding: Encoding, limit: Option<u64>, traffic: Arc<Traffic>) -> Self {
        let wire = Wire { body, traffic };
        let source = match encoding {
            Encoding::Identity => Source::Plain(wire),
            Encoding::Gzip => {
                let decoder = GzipDecoder::new(StreamReader::new(wire));
                Source::Gzip(Box::pin(ReaderStream::with_capacity(decoder, DECODED_CHUNK_BYTES)))
            }
        };
        let limit = limit.unwrap_or(u64::MAX);
        Self { ahead: None, source, left: limit, limit }
    }

    /// Puts what was read back in front.
    pub(crate) fn put_back(&mut self, bytes: Bytes) {
        self.ahead = Some(bytes).filter(|bytes| !bytes.is_empty());
    }

    /// The next chunk; never an empty one.
    pub(crate) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyFault>>> {
        if let Some(ahead) = self.ahead.take() {
            return Poll::Ready(Some(Ok(ahead)));
        }
        let chunk = match &mut self.source {
            Source::Plain(wire) => ready!(Pin::new(wire).poll_next(cx)),
            Source::Gzip(decoded) => ready!(decoded.as_mut().poll_next(cx)),
        };
        match chunk {
            None => Poll::Ready(None),
            Some(Err(error)) => Poll::Ready(Some(Err(fault_of(&error)))),
            Some(Ok(chunk)) => match self.left.checked_sub(chunk.len() as u64) {
                Some(left) => {
                    self.left = left;
                    Poll::Ready(Some(Ok(chunk)))
                }
                None => Poll::Ready(Some(Err(BodyFault::TooLarge(self.limit)))),
            },
        }
    }

    /// The next chunk.
    pub(crate) async fn chunk(&mut self) -> Option<Result<Bytes, BodyFault>> {
        std::future::poll_fn(|cx| self.poll_chunk(cx)).await
    }

    /// The whole body; the limit given to [`RequestBody::new`] bounds it.
    pub(crate) async fn collect(mut self) -> Result<Vec<u8>, BodyFault> {
        let mut whole = Vec::new();
        while let Some(chunk) = self.chunk().await {
            whole.extend_from_slice(&chunk?);
        }
        Ok(whole)
    }
}

fn fault_of(error: &io::Error) -> BodyFault {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<hyper::Error>()) {
        Some(lost) => BodyFault::Lost(lost.to_string()),
        None => BodyFault::Gzip(error.to_string()),
    }
}

/// The body as it comes over the wire, counted.
struct Wire {
    body: Incoming,
    traffic: Arc<Traffic>,
}

impl Stream for Wire {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(io::Error::other(error)))),
                Some(Ok(frame)) => frame,
            };
            // Trailers say nothing that git knows.
            if let Ok(data) = frame.into_data()
                && !data.is_empty()
            {
                self.traffic.receive(data.len());
                return Poll::Ready(Some(Ok(data)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings() {
        let of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_ENCODING, value.parse().unwrap());
            Encoding::of(&headers)
        };
        assert_eq!(Encoding::of(&HeaderMap::new()), Ok(Encoding::Identity));
        assert_eq!(of("x-GZIP"), Ok(Encoding::Gzip));
        assert_eq!(of("identity"), Ok(Encoding::Identity));
        assert!(of("br").unwrap_err().to_string().contains("allowed: gzip"));
    }
}
