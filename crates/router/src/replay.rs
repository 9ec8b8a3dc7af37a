//! The client's stream behind its first message, kept while it is little, so that a read can begin again on another node
//! without its client noticing.
//!
//! One node reads it at a time: whoever begins again takes the stream away from the one before.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame};

use crate::{
    body::{BoxError, cancelled},
    limits::REPLAY_BYTES,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The client has said all it wanted to.
    Whole,
    /// It has gone away, or has not.
    Cut,
}

#[derive(Debug)]
struct Source<B> {
    body: B,
    ended: Option<End>,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    /// All that was read is kept.
    complete: bool,
    /// The tail that may read.
    reader: u64,
}

/// The stream.
#[derive(Debug)]
pub(crate) struct Replay<B>(Arc<Mutex<Source<B>>>);

fn lock<B>(source: &Mutex<Source<B>>) -> MutexGuard<'_, Source<B>> {
    source.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B> Replay<B> {
    /// `leftover`: what was read past the first message.
    pub(crate) fn new(leftover: Option<Bytes>, body: B) -> Self {
        let kept_bytes = leftover.as_ref().map_or(0, Bytes::len);
        Self(Arc::new(Mutex::new(Source {
            body,
            ended: None,
            kept: leftover.into_iter().collect(),
            kept_bytes,
            complete: true,
            reader: 0,
        })))
    }

    /// All of it from the beginning. Whoever read it before is cut off.
    pub(crate) fn tail(&self) -> Tail<B> {
        let mut source = lock(&self.0);
        source.reader += 1;
        Tail { source: Arc::clone(&self.0), reader: source.reader, next: 0 }
    }

    /// Nothing of it is lost yet.
    pub(crate) fn can_begin_again(&self) -> bool {
        let source = lock(&self.0);
        source.complete && source.ended != Some(End::Cut)
    }

    /// The client has said all that it wanted to.
    pub(crate) fn has_ended(&self) -> bool {
        lock(&self.0).ended == Some(End::Whole)
    }

    /// It will not begin again: no more of it is kept.
    pub(crate) fn settle(&self) {
        lock(&self.0).complete = false;
    }
}

/// The stream as one node gets it.
#[derive(Debug)]
pub(crate) struct Tail<B> {
    source: Arc<Mutex<Source<B>>>,
    reader: u64,
    /// Place in what is kept.
    next: usize,
}

impl<B> Body for Tail<B>
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
        let this = &mut *self;
        let source = &mut *lock(&this.source);
        if source.reader != this.reader {
            return Poll::Ready(Some(Err(cancelled())));
        }
        if let Some(chunk) = source.kept.get(this.next) {
            this.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        match source.ended {
            Some(End::Whole) => return Poll::Ready(None),
            Some(End::Cut) => return Poll::Ready(Some(Err(cancelled()))),
            None => {}
        }
        match ready!(Pin::new(&mut source.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                if let Some(chunk) = frame.data_ref().filter(|_| source.complete) {
                    source.kept_bytes += chunk.len();
                    source.complete = source.kept_bytes <= REPLAY_BYTES;
                    if source.complete {
                        source.kept.push(chunk.clone());
                        this.next += 1;
                    }
                }
                if source.body.is_end_stream() {
                    source.ended = Some(End::Whole);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                source.ended = Some(End::Cut);
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                // A stream that was reset can end like one that was closed.
                let whole = source.body.is_end_stream();
                source.ended = Some(if whole { End::Whole } else { End::Cut });
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let source = lock(&self.source);
        self.next >= source.kept.len()
            && (source.ended == Some(End::Whole) || source.ended.is_none() && source.body.is_end_stream())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::FutureExt as _;
    use http_body_util::{BodyExt as _, Full, StreamBody};
    use proptest::prelude::*;

    use super::*;

    fn chunks(sizes: &[usize]) -> impl Body<Data = Bytes, Error = Infallible> + Unpin + use<> {
        let frames: Vec<_> = sizes
            .iter()
            .zip(0_u8..)
            .map(|(size, byte)| Ok(Frame::data(Bytes::from(vec![byte; *size]))))
            .collect();
        StreamBody::new(futures::stream::iter(frames))
    }

    async fn read<B>(tail: &mut Tail<B>, frames: usize) -> Vec<u8>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        let mut read = Vec::new();
        for _ in 0..frames {
            match tail.frame().await {
                Some(Ok(frame)) => read.extend(frame.into_data().unwrap()),
                _ => break,
            }
        }
        read
    }

    #[tokio::test]
    async fn who_begins_again_gets_all_of_it_and_who_read_before_nothing_more() {
        let replay = Replay::new(Some(Bytes::from_static(b"a")), Full::new(Bytes::from_static(b"bc")));
        let mut first = replay.tail();
        assert_eq!(read(&mut first, 1).await, b"a");
        let second = replay.tail();
        assert!(first.frame().await.unwrap().is_err());
        assert_eq!(second.collect().await.unwrap().to_bytes(), "abc");
        assert!(replay.has_ended() && replay.can_begin_again());
        let mut third = replay.tail();
        assert_eq!(read(&mut third, 9).await, b"abc");
        assert!(third.is_end_stream());
    }

    #[test]
    fn a_stream_that_is_cut_off_does_not_begin_again() {
        // A stream body never claims to have ended by the peer's word.
        let replay = Replay::new(None, chunks(&[1]));
        let mut tail = replay.tail();
        assert_eq!(read(&mut tail, 9).now_or_never().unwrap(), [0]);
        assert!(!replay.can_begin_again() && !replay.has_ended() && !tail.is_end_stream());
    }

    proptest! {
        #[test]
        fn what_can_begin_again_has_lost_nothing(
            sizes in prop::collection::vec(0..REPLAY_BYTES / 3, 0..8), stop in 0_usize..8,
        ) {
            let all: Vec<u8> =
                sizes.iter().zip(0_u8..).flat_map(|(size, byte)| vec![byte; *size]).collect();
            let replay = Replay::new(None, chunks(&sizes));
            let mut first = replay.tail();
            let before = read(&mut first, stop.min(sizes.len())).now_or_never().unwrap();
            prop_assert!(all.starts_with(&before));
            prop_assert_eq!(replay.can_begin_again(), before.len() <= REPLAY_BYTES);
            if replay.can_begin_again() {
                prop_assert_eq!(read(&mut replay.tail(), sizes.len()).now_or_never().unwrap(), all);
            } else {
                let rest = read(&mut first, sizes.len()).now_or_never().unwrap();
                prop_assert_eq!([before, rest].concat(), all);
            }
        }
    }
}
