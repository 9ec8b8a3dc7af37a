//! One client stream for several nodes.
//!
//! Each node has a [`Branch`], the body of its request, with a queue of its own; the bytes in the queues are shared. The
//! stream is read only while every queue has room, so that memory is bounded. The primary may hold up the stream for as
//! long as it likes, and so may a secondary without which no quorum is left; any other only for so long, then it is cut
//! off. The front of the stream is kept while it is small, so that the write can begin again on other nodes.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body::{Body, Frame};
use hyper::body::Incoming;
use tokio::time::timeout_at;

use crate::{
    body::{BoxError, cancelled},
    limits::{FAN_OUT_BYTES, REPLAY_BYTES, SHORTEST_COMMAND_BYTES, STALL_GLANCE, STALL_GRACE},
};

/// How a branch ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// As the client ended its stream.
    Whole,
    /// Short of that: the node must not take what it has for the whole.
    Cut,
}

#[derive(Debug, Default)]
struct Queue {
    chunks: VecDeque<Bytes>,
    bytes: usize,
    end: Option<End>,
    /// Nobody reads any more.
    closed: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The body of one node's request.
#[derive(Debug)]
pub(super) struct Branch(Arc<Mutex<Queue>>);

impl Body for Branch {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut queue = lock(&self.0);
        if queue.end == Some(End::Cut) {
            return Poll::Ready(Some(Err(cancelled())));
        }
        if let Some(chunk) = queue.chunks.pop_front() {
            queue.bytes -= chunk.len();
            if let Some(writer) = queue.writer.take() {
                writer.wake();
            }
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        if queue.end.is_some() {
            return Poll::Ready(None);
        }
        queue.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        let queue = lock(&self.0);
        queue.end == Some(End::Whole) && queue.chunks.is_empty()
    }
}

impl Drop for Branch {
    fn drop(&mut self) {
        let mut queue = lock(&self.0);
        queue.closed = true;
        queue.chunks.clear();
        if let Some(writer) = queue.writer.take() {
            writer.wake();
        }
    }
}

/// The end of a branch that the stream flows into. Dropped, it cuts the node's request off unless that was whole.
#[derive(Debug)]
pub(super) struct Feed(Arc<Mutex<Queue>>);

impl Feed {
    fn push(&self, chunk: Bytes) {
        let mut queue = lock(&self.0);
        if !queue.closed {
            queue.bytes += chunk.len();
            queue.chunks.push_back(chunk);
        }
        if let Some(reader) = queue.reader.take() {
            reader.wake();
        }
    }

    fn end(&self, end: End) {
        let mut queue = lock(&self.0);
        if queue.end != Some(End::Cut) && !(end == End::Cut && queue.closed) {
            queue.end = Some(end);
        }
        if let Some(reader) = queue.reader.take() {
            reader.wake();
        }
    }

    fn queued(&self) -> usize {
        lock(&self.0).bytes
    }

    /// Somebody is at the other end.
    fn is_read(&self) -> bool {
        !lock(&self.0).closed
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut queue = lock(&self.0);
        if queue.closed || queue.bytes < FAN_OUT_BYTES {
            Poll::Ready(())
        } else {
            queue.writer = Some(cx.waker().clone());
            Poll::Pending
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        // Also one whose stream was whole: whoever drops it does not want the answer, and a request that nobody wants
        // is reset.
        self.end(End::Cut);
    }
}

struct Fed {
    feed: Feed,
    /// How long it has held up the others, over all.
    stalled: Duration,
}

/// What became of one step of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// It went on.
    On,
    /// It has ended, and everybody knows.
    Ended,
    /// The client cut it off. Nobody was told.
    Lost,
    /// This secondary holds up the others for too long.
    Stalled(usize),
}

/// The client's stream behind its first message.
pub(super) struct Upload {
    source: Option<Incoming>,
    /// Read, and not in the queues yet.
    next: Option<Bytes>,
    ended: Option<End>,
    /// All that was passed on, while it is little.
    replay: Option<Vec<Bytes>>,
    /// How much was passed on, be it kept or not.
    passed_bytes: usize,
    feeds: Vec<Option<Fed>>,
    /// As many branches as are not cut off for being slow.
    needed: usize,
    started: Instant,
    /// Since when somebody has no room.
    waiting: Option<Instant>,
}

impl Upload {
    /// `leftover`: what was read past the first message; `source`: what comes behind it, if anything does.
    pub(super) fn new(leftover: Option<Bytes>, source: Option<Incoming>) -> Self {
        let ended = source.is_none().then_some(End::Whole);
        Self {
            source,
            next: leftover,
            ended,
            replay: Some(Vec::new()),
            passed_bytes: 0,
            feeds: Vec::new(),
            needed: 0,
            started: Instant::now(),
            waiting: None,
        }
    }

    /// The stream can be sent to other nodes from its beginning.
    pub(super) fn can_begin_again(&self) -> bool {
        self.replay.is_some() && self.ended != Some(End::Cut)
    }

    /// Begins, or begins again, with one branch for each head, of which `needed` make a quorum.
    pub(super) fn branches(&mut self, heads: Vec<Bytes>, needed: usize) -> Vec<Branch> {
        self.feeds.clear();
        self.needed = needed;
        self.started = Instant::now();
        let mut branches = Vec::with_capacity(heads.len());
        for head in heads {
            let queue = Arc::new(Mutex::new(Queue::default()));
            let feed = Feed(Arc::clone(&queue));
            feed.push(head);
            for chunk in self.replay.iter().flatten() {
                feed.push(chunk.clone());
            }
            if self.next.is_none()
                && let Some(end) = self.ended
            {
                feed.end(end);
            }
            branches.push(Branch(queue));
            self.feeds.push(Some(Fed { feed, stalled: Duration::ZERO }));
        }
        branches
    }

    /// What was passed on is long enough to ask for a change of a reference; a client that only asks whether it may push, or
    /// finds that there is nothing to push, sends less.
    pub(super) fn can_name_a_change(&self) -> bool {
        self.passed_bytes >= SHORTEST_COMMAND_BYTES
    }

    /// Cuts one branch off.
    pub(super) fn cut(&mut self, branch: usize) {
        if let Some(feed) = self.feeds.get_mut(branch) {
            *feed = None;
        }
    }

    /// Cuts all of them off.
    pub(super) fn cut_all(&mut self) {
        self.feeds.clear();
    }

    /// The secondary that is the next to be cut off, and when, if the primary goes on and it does not.
    fn patience(&self) -> Option<(Instant, usize)> {
        if self.feeds.iter().flatten().filter(|fed| fed.feed.is_read()).count() <= self.needed {
            return None;
        }
        let budget = STALL_GRACE + self.started.elapsed() / 10;
        let secondaries = self.feeds.iter().enumerate().skip(1);
        secondaries
            .filter_map(|(branch, fed)| {
                let fed =
                    fed.as_ref().filter(|fed| fed.feed.is_read() && fed.feed.queued() >= FAN_OUT_BYTES)?;
                Some((Instant::now() + budget.saturating_sub(fed.stalled), branch))
            })
            .min()
    }

    /// Moves the stream on by one step. Cancellation-safe: what was read stays here.
    pub(super) async fn step(&mut self) -> Flow {
        if self.next.is_none() && self.ended.is_none() {
            self.read().await;
            if self.ended == Some(End::Cut) {
                return Flow::Lost;
            }
        }
        if self.next.is_some() {
            if let Some(stalled) = self.room().await {
                return Flow::Stalled(stalled);
            }
            if let Some(chunk) = self.next.take() {
                for fed in self.feeds.iter().flatten() {
                    fed.feed.push(chunk.clone());
                }
                self.keep(chunk);
            }
            if self.ended.is_none() {
                return Flow::On;
            }
        }
        for fed in self.feeds.iter().flatten() {
            fed.feed.end(End::Whole);
        }
        Flow::Ended
    }

    /// Tells all nodes that the client has gone.
    pub(super) fn pass_on_the_loss(&mut self) {
        for fed in self.feeds.iter().flatten() {
            fed.feed.end(End::Cut);
        }
    }

    fn keep(&mut self, chunk: Bytes) {
        self.passed_bytes += chunk.len();
        if self.passed_bytes > REPLAY_BYTES {
            self.replay = None;
        } else if let Some(replay) = &mut self.replay {
            replay.push(chunk);
        }
    }

    async fn read(&mut self) {
        let Some(source) = &mut self.source else { return };
        match poll_fn(|cx| Pin::new(&mut *source).poll_frame(cx)).await {
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data()
                    && !data.is_empty()
                {
                    self.next = Some(data);
                }
            }
            Some(Err(_)) => self.ended = Some(End::Cut),
            // A stream that was reset can end like one that was closed.
            None => self.ended = Some(if source.is_end_stream() { End::Whole } else { End::Cut }),
        }
        if self.ended.is_some() {
            self.source = None;
        }
    }

    /// Waits until everybody has room; answers a secondary that takes too long.
    async fn room(&mut self) -> Option<usize> {
        loop {
            let feeds = &self.feeds;
            let all = poll_fn(|cx| {
                let mut all = Poll::Ready(());
                for fed in feeds.iter().flatten() {
                    if fed.feed.poll_room(cx).is_pending() {
                        all = Poll::Pending;
                    }
                }
                all
            });
            let mut all = std::pin::pin!(all);
            let at_once = poll_fn(|cx| Poll::Ready(all.as_mut().poll(cx))).await;
            if at_once.is_ready() {
                self.settle_waiting();
                return None;
            }
            self.waiting.get_or_insert_with(Instant::now);
            let patience = self.patience();
            let glance = Instant::now() + STALL_GLANCE;
            let until = patience.map_or(glance, |(until, _)| until.min(glance));
            if timeout_at(until.into(), all).await.is_ok() {
                continue;
            }
            self.settle_waiting();
            self.waiting = Some(Instant::now());
            if let Some((until, branch)) = patience
                && until <= Instant::now()
            {
                return Some(branch);
            }
        }
    }

    /// Books the time that was waited to those who have been waited for: while the primary has room, the others.
    fn settle_waiting(&mut self) {
        let Some(since) = self.waiting.take() else { return };
        let waited = since.elapsed();
        let primary = self.feeds.first().and_then(Option::as_ref);
        if primary.is_some_and(|primary| primary.feed.queued() >= FAN_OUT_BYTES) {
            return;
        }
        for fed in self.feeds.iter_mut().skip(1).flatten() {
            // Whoever has more in its queue than half has only just made room.
            if fed.feed.queued() >= FAN_OUT_BYTES / 2 {
                fed.stalled += waited;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use http_body_util::BodyExt as _;

    use super::*;

    fn upload(chunks: &[&'static [u8]], count: usize) -> (Upload, Vec<Branch>) {
        let mut upload = Upload::new(Some(Bytes::from_static(chunks[0])), None);
        let heads = vec![Bytes::from_static(b"head "); count];
        let branches = upload.branches(heads, 1);
        (upload, branches)
    }

    #[tokio::test]
    async fn everybody_gets_the_whole_stream_and_again() {
        let (mut subject, branches) = upload(&[b"rest"], 3);
        assert_eq!(subject.step().await, Flow::Ended);
        for branch in branches {
            assert_eq!(branch.collect().await.unwrap().to_bytes(), "head rest");
        }
        assert!(subject.can_begin_again());
        for branch in subject.branches(vec![Bytes::from_static(b"new ")], 1) {
            assert_eq!(branch.collect().await.unwrap().to_bytes(), "new rest");
        }
    }

    #[tokio::test]
    async fn a_branch_that_is_cut_off_is_not_whole() {
        let (mut subject, mut branches) = upload(&[b"rest"], 2);
        assert_eq!(subject.step().await, Flow::Ended);
        subject.cut(1);
        assert!(branches.remove(1).collect().await.is_err());
        assert_eq!(branches.remove(0).collect().await.unwrap().to_bytes(), "head rest");
    }

    #[tokio::test]
    async fn a_secondary_holds_up_the_others_only_for_so_long() {
        let (mut subject, mut branches) = upload(&[b"rest"], 2);
        subject.feeds[1].as_ref().unwrap().feed.push(Bytes::from(vec![0; FAN_OUT_BYTES]));
        assert_eq!(subject.step().now_or_never(), None);
        let started = Instant::now();
        assert_eq!(subject.step().await, Flow::Stalled(1));
        assert!(started.elapsed() >= STALL_GRACE / 2);
        subject.cut(1);
        assert_eq!(subject.step().await, Flow::Ended);
        assert_eq!(branches.remove(0).collect().await.unwrap().to_bytes(), "head rest");
    }

    #[tokio::test]
    async fn a_secondary_without_which_there_is_no_quorum_is_waited_for() {
        let (mut subject, mut branches) = upload(&[b"rest"], 3);
        subject.needed = 2;
        for slow in [1, 2] {
            subject.feeds[slow].as_ref().unwrap().feed.push(Bytes::from(vec![0; FAN_OUT_BYTES]));
        }
        let Flow::Stalled(first) = subject.step().await else { panic!("one of them can be spared") };
        subject.cut(first);
        let waiting = tokio::time::timeout(STALL_GRACE * 3, subject.step()).await;
        assert!(waiting.is_err(), "the other one cannot");
        let other = branches.remove(3 - first);
        let (flow, _) = tokio::join!(subject.step(), other.collect());
        assert_eq!(flow, Flow::Ended);
    }
}
