//! The task that owns a session's connection. Reading and writing go on side by side in one poll, so that a peer which
//! reads slowly does not keep us from reading.

use std::{
    collections::VecDeque,
    future::{Future as _, poll_fn},
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
    time::{Instant, Sleep},
};
use tokio_util::{io::poll_read_buf, sync::CancellationToken};

use super::{
    frame::{HEADER_BYTES, Header, NORMAL, PROTOCOL_ERROR, Violation},
    outbox::Outgoing,
    state::{Payload, State},
};

/// Read buffer of a quiet connection, and of a busy one. The larger stays below what the allocator takes from the system
/// and gives back each time.
const READ_BYTES: (usize, usize) = (8 * 1024, 96 * 1024);
/// So many small reads in a row make a connection quiet again.
const QUIET_READS: u32 = 16;
/// What leaves in one system call.
const BATCH_BYTES: usize = 256 * 1024;
/// Frames in it; each is two pieces, and a system call takes 1024.
const BATCH_FRAMES: usize = 32;
/// Answers that may wait to be sent while questions are still read.
const MAX_ANSWERS: usize = 1024;

/// How long a session waits for its peer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// To take anything at all of what it is sent.
    pub(crate) write: Duration,
    /// To finish a stream that was finished here.
    pub(crate) finish: Duration,
    /// To take the last words.
    pub(crate) close: Duration,
    /// For more of what is to be sent together: not the peer is waited for here, but the stream's writer.
    pub(crate) gather: Duration,
}

/// Why a session ended before anybody here wanted it to.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Violation(#[from] Violation),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A session's state, shared by its driver and its streams.
#[derive(Debug)]
pub(crate) struct Shared(Mutex<State>);

impl Shared {
    pub(crate) fn new(state: State) -> Arc<Self> {
        Arc::new(Self(Mutex::new(state)))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Moves frames.
pub(crate) struct Driver<IO> {
    io: IO,
    shared: Arc<Shared>,
    arrived: mpsc::Sender<u32>,
    patience: Patience,
    input: BytesMut,
    block: usize,
    small_reads: u32,
    payload: Option<Payload>,
    batch: VecDeque<Outgoing>,
    /// Of the batch's first frame.
    sent: usize,
    unflushed: bool,
    /// What is there waits so long for more.
    gathering: Option<Pin<Box<Sleep>>>,
    stalled: Option<Pin<Box<Sleep>>>,
    left: VecDeque<(Instant, u32)>,
    next_reset: Option<Pin<Box<Sleep>>>,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Driver<IO> {
    /// `arrived` takes what the peer opens; it has room for all that the state allows.
    pub(crate) fn new(io: IO, shared: Arc<Shared>, arrived: mpsc::Sender<u32>, patience: Patience) -> Self {
        Self {
            io,
            shared,
            arrived,
            patience,
            input: BytesMut::new(),
            block: READ_BYTES.0,
            small_reads: 0,
            payload: None,
            batch: VecDeque::new(),
            sent: 0,
            unflushed: false,
            gathering: None,
            stalled: None,
            left: VecDeque::new(),
            next_reset: None,
        }
    }

    /// Runs until the session ends: by the peer, by a fault, or because `ended` or `stopping` say so.
    pub(crate) async fn run(mut self, ended: CancellationToken, stopping: CancellationToken) {
        // However this ends, a panic included, everybody who waits on a stream learns of it.
        let _guard = ended.clone().drop_guard();
        let over = EndOnDrop(Arc::clone(&self.shared));
        let outcome = tokio::select! {
            biased;
            () = ended.cancelled() => Ok(()),
            () = stopping.cancelled() => Ok(()),
            outcome = poll_fn(|cx| self.poll(cx)) => outcome,
        };
        ended.cancel();
        let code = match &outcome {
            Err(Broken::Violation(violation)) => {
                tracing::debug!(%violation, "the peer of a multiplexed connection broke the protocol");
                PROTOCOL_ERROR
            }
            Err(Broken::Io(error)) => {
                tracing::debug!(%error, "multiplexed connection ended");
                NORMAL
            }
            Ok(()) => NORMAL,
        };
        drop(over);
        if matches!(outcome, Err(Broken::Io(_))) {
            return;
        }
        self.shared.state().say_goodbye(code);
        // A peer that takes nothing is not waited for.
        let patience = self.patience.close;
        let close = async {
            poll_fn(|cx| self.poll_send(cx)).await?;
            self.io.shutdown().await
        };
        if let Ok(Err(error)) = tokio::time::timeout(patience, close).await {
            tracing::debug!(%error, "multiplexed connection was not closed in order");
        }
    }

    /// Ready when the peer has closed the connection.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.shared.state().driven_by(cx.waker());
        self.poll_timers(cx)?;
        // Ready means that nothing is left to be sent.
        let _ = self.poll_send(cx)?;
        loop {
            // A peer that asks and does not listen is not asked on.
            if self.shared.state().is_flooded(MAX_ANSWERS) {
                return Poll::Pending;
            }
            let read = self.poll_receive(cx)?;
            // What was read may have made room for what waits, or be a question.
            let _ = self.poll_send(cx)?;
            if ready!(read) == 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn poll_timers(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        if self.stalled.as_mut().is_some_and(|stalled| stalled.as_mut().poll(cx).is_ready()) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes nothing").into());
        }
        let left = self.shared.state().take_left();
        let until = Instant::now() + self.patience.finish;
        self.left.extend(left.into_iter().map(|stream| (until, stream)));
        while let Some((until, stream)) = self.left.front().copied() {
            let timer = self.next_reset.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
            if timer.as_mut().poll(cx).is_pending() {
                break;
            }
            self.next_reset = None;
            self.left.pop_front();
            // Usually it has been forgotten long since.
            self.shared.state().reset(stream);
        }
        Ok(())
    }

    /// Fills the batch, or lets what is there wait for more.
    fn take_batch(&mut self, cx: &mut Context<'_>) {
        let waited = self.gathering.as_mut().is_some_and(|until| until.as_mut().poll(cx).is_ready());
        let mut state = self.shared.state();
        state.take_batch(BATCH_BYTES, BATCH_FRAMES, waited, &mut self.batch);
        let gathers = self.batch.is_empty() && state.gathers();
        drop(state);
        if !gathers {
            self.gathering = None;
        } else if self.gathering.is_none() {
            let mut until = Box::pin(tokio::time::sleep(self.patience.gather));
            // Looked at first of all when this is polled again.
            let _ = until.as_mut().poll(cx);
            self.gathering = Some(until);
        }
    }

    /// Sends what is there and does not wait for more; ready when that is all.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.batch.is_empty() {
                self.take_batch(cx);
            }
            if self.batch.is_empty() {
                if self.unflushed {
                    ready!(Pin::new(&mut self.io).poll_flush(cx))?;
                    self.unflushed = false;
                }
                return Poll::Ready(Ok(()));
            }
            match self.poll_write_batch(cx) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => {
                    self.stalled = None;
                    self.unflushed = true;
                    self.account(count);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    let patience = self.patience.write;
                    let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
                    // Looked at first of all when this is polled again.
                    let _ = stalled.as_mut().poll(cx);
                    return Poll::Pending;
                }
            }
        }
    }

    fn poll_write_batch(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut headers = [[0; HEADER_BYTES]; BATCH_FRAMES];
        for (header, frame) in headers.iter_mut().zip(&self.batch) {
            *header = frame.header.encode();
        }
        let mut slices = [IoSlice::new(&[]); 2 * BATCH_FRAMES];
        let (mut count, mut skip) = (0, self.sent);
        for (header, frame) in headers.iter().zip(&self.batch) {
            for piece in [&header[..], &frame.payload[..]] {
                let skipped = skip.min(piece.len());
                skip -= skipped;
                if piece.len() > skipped {
                    slices[count] = IoSlice::new(&piece[skipped..]);
                    count += 1;
                }
            }
        }
        let slices = &slices[..count];
        if self.io.is_write_vectored() {
            Pin::new(&mut self.io).poll_write_vectored(cx, slices)
        } else {
            // One system call, or one TLS record, for header and payload.
            let together: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            Pin::new(&mut self.io).poll_write(cx, &together)
        }
    }

    fn account(&mut self, count: usize) {
        self.sent += count;
        while let Some(frame) = self.batch.front() {
            let length = HEADER_BYTES + frame.payload.len();
            if self.sent < length {
                break;
            }
            self.sent -= length;
            let header = frame.header;
            self.batch.pop_front();
            self.shared.state().sent(header);
        }
    }

    /// Reads once and makes of it what it is; ready with 0 at the end of the connection.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Broken>> {
        if self.input.capacity() - self.input.len() < self.block / 4 {
            self.input.reserve(self.block);
        }
        let room = self.input.capacity() - self.input.len();
        let count = ready!(poll_read_buf(Pin::new(&mut self.io), cx, &mut self.input))?;
        if count == 0 {
            // In the midst of a frame, or not: streams that have not ended learn that they were cut off.
            return Poll::Ready(Ok(0));
        }
        self.adapt(count, room);
        self.take_in()?;
        Poll::Ready(Ok(count))
    }

    fn adapt(&mut self, count: usize, room: usize) {
        if count == room {
            self.block = (2 * self.block).min(READ_BYTES.1);
            self.small_reads = 0;
        } else if count < self.block / 8 {
            self.small_reads += 1;
            if self.small_reads >= QUIET_READS {
                self.block = (self.block / 2).max(READ_BYTES.0);
                self.small_reads = 0;
            }
        } else {
            self.small_reads = 0;
        }
    }

    fn take_in(&mut self) -> Result<(), Violation> {
        loop {
            if let Some(payload) = &mut self.payload {
                let count = payload.left.min(self.input.len());
                let piece = self.input.split_to(count).freeze();
                let mut state = self.shared.state();
                if count > 0 {
                    state.receive_piece(payload, piece);
                }
                if payload.left > 0 {
                    return Ok(());
                }
                state.received(*payload);
                self.payload = None;
            }
            let Some(header) = self.input.first_chunk::<HEADER_BYTES>() else { return Ok(()) };
            let header = Header::decode(*header)?;
            let _ = self.input.split_to(HEADER_BYTES);
            let received = self.shared.state().receive(header)?;
            self.payload = received.payload;
            if let Some(stream) = received.arrived
                && self.arrived.try_send(stream).is_err()
            {
                tracing::debug!("the peer opened a stream that nobody takes; it was reset");
                let mut state = self.shared.state();
                state.abandon(stream);
            }
        }
    }
}

struct EndOnDrop(Arc<Shared>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.state().end();
    }
}
