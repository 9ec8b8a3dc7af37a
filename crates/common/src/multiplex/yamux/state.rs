//! What one end of a session knows: its streams, how much each may send, and what is to leave next. No I/O, no clock.

use std::{
    collections::{HashMap, VecDeque},
    io,
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};

use super::{
    frame::{ACK, FIN, Header, Kind, RST, SYN, Violation},
    outbox::{Outbox, Outgoing},
};

/// The window that every stream begins with, either way.
pub(crate) const INITIAL_WINDOW: u32 = 256 * 1024;

/// What a session allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Receive window of a stream: what may lie here unread.
    pub(crate) window: u32,
    /// Streams that the peer may have open; one more is reset.
    pub(crate) inbound: usize,
    /// Streams that we may have open; whoever wants one more waits.
    pub(crate) outbound: usize,
    /// What may wait of one stream to be sent.
    pub(crate) queue: usize,
    /// Largest payload of a frame that we send.
    pub(crate) frame: usize,
    /// What is said on a [bulky](State::expect_much) stream without a word from the peer goes on its way at once up to here.
    pub(crate) prompt: usize,
    /// And then when so much has come together.
    pub(crate) gather: usize,
}

/// Which end this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The one that dialled: its streams have odd numbers.
    Client,
    /// The other.
    Server,
}

/// Pieces below this are gathered: each on its own would keep a whole read buffer alive.
const SMALL_PIECE: usize = 8 * 1024;

/// What follows a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Payload {
    /// For this stream; for none, it is thrown away.
    pub(crate) stream: Option<u32>,
    /// So many bytes.
    pub(crate) left: usize,
    /// After which the peer says no more on the stream.
    ends: bool,
}

/// What a header leads to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Received {
    /// The peer opened a stream.
    pub(crate) arrived: Option<u32>,
    /// Bytes that follow.
    pub(crate) payload: Option<Payload>,
}

#[derive(Debug, Default)]
struct Entry {
    /// Received and not read, behind it the small pieces.
    unread: VecDeque<Bytes>,
    small: BytesMut,
    /// What the peer may still send.
    window: u32,
    /// Read, but not given back to the peer's allowance yet.
    consumed: u32,
    /// What we may still send.
    credit: u32,
    /// Bytes of it that wait to be sent.
    queued: usize,
    /// Much is said on it, and nobody waits for each piece.
    bulky: bool,
    /// What has been said since the peer last said something.
    unanswered: usize,
    finished: bool,
    peer_finished: bool,
    reset: bool,
    /// Nobody here has it any more.
    abandoned: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Entry {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    fn keep(&mut self, piece: Bytes) {
        if piece.len() < SMALL_PIECE {
            self.small.extend_from_slice(&piece);
        } else {
            self.gather();
            self.unread.push_back(piece);
        }
    }

    fn gather(&mut self) {
        if !self.small.is_empty() {
            let gathered = self.small.split().freeze();
            self.unread.push_back(gathered);
        }
    }
}

/// One end of a session.
#[derive(Debug)]
pub(crate) struct State {
    side: Side,
    limits: Limits,
    next: u32,
    streams: HashMap<u32, Entry>,
    inbound: usize,
    outbound: usize,
    outbox: Outbox,
    /// The number of our last ping, and of the peer's last answer to one.
    pings: (u32, u32),
    pinger: Option<Waker>,
    /// The peer takes no more streams.
    peer_leaves: bool,
    /// The session is over.
    over: bool,
    driver: Option<Waker>,
    openers: Vec<Waker>,
    /// Streams that were finished here and left before the peer did the same.
    left: Vec<u32>,
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the multiplexed connection ended")
}

fn was_reset() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the stream was reset")
}

impl State {
    /// A session in which nothing has happened yet.
    pub(crate) fn new(side: Side, limits: Limits) -> Self {
        Self {
            side,
            limits,
            next: if side == Side::Client { 1 } else { 2 },
            streams: HashMap::new(),
            inbound: 0,
            outbound: 0,
            outbox: Outbox::new(limits.gather),
            pings: (0, 0),
            pinger: None,
            peer_leaves: false,
            over: false,
            driver: None,
            openers: Vec::new(),
            left: Vec::new(),
        }
    }

    fn ours(&self, stream: u32) -> bool {
        (stream % 2 == 1) == (self.side == Side::Client)
    }

    fn entry(&self) -> Entry {
        Entry { window: self.limits.window, credit: INITIAL_WINDOW, ..Entry::default() }
    }

    /// What the peer may send beyond the window that streams begin with.
    fn extra(&self) -> u32 {
        self.limits.window.saturating_sub(INITIAL_WINDOW)
    }

    fn update(&mut self, stream: u32, flags: u16, length: u32) {
        self.outbox.push_control(Header { kind: Kind::WindowUpdate, flags, stream, length });
        self.wake_driver();
    }

    fn wake_driver(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    // === For whoever has a stream ===

    /// Opens a stream. The peer hears of it at once.
    pub(crate) fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<u32>> {
        if self.over || self.peer_leaves {
            let text = "the multiplexed connection ended";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::NotConnected, text)));
        }
        let Some(after) = self.next.checked_add(2) else {
            return Poll::Ready(Err(io::Error::other("the multiplexed connection ran out of streams")));
        };
        if self.outbound >= self.limits.outbound {
            self.openers.push(cx.waker().clone());
            return Poll::Pending;
        }
        let stream = std::mem::replace(&mut self.next, after);
        self.outbound += 1;
        let entry = self.entry();
        self.streams.insert(stream, entry);
        self.update(stream, SYN, self.extra());
        Poll::Ready(Ok(stream))
    }

    /// The next piece, at most so long; `None` at the end.
    pub(crate) fn poll_read(
        &mut self,
        stream: u32,
        most: usize,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Option<Bytes>>> {
        let over = self.over;
        let Some(entry) = self.streams.get_mut(&stream) else { return Poll::Ready(Err(gone())) };
        if entry.reset && !entry.peer_finished {
            return Poll::Ready(Err(was_reset()));
        }
        if entry.unread.is_empty() {
            entry.gather();
        }
        let Some(piece) = entry.unread.front_mut() else {
            if entry.peer_finished {
                return Poll::Ready(Ok(None));
            }
            if over {
                return Poll::Ready(Err(gone()));
            }
            entry.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let piece = if piece.len() > most {
            piece.split_to(most)
        } else {
            entry.unread.pop_front().unwrap_or_default()
        };
        // A piece is never longer than the window, which is 32 bits wide.
        entry.consumed = entry.consumed.saturating_add(u32::try_from(piece.len()).unwrap_or(u32::MAX));
        if entry.consumed >= self.limits.window / 2 && !entry.peer_finished {
            let allowed = std::mem::take(&mut entry.consumed);
            entry.window += allowed;
            self.update(stream, 0, allowed);
        }
        Poll::Ready(Ok(Some(piece)))
    }

    /// How much may be written now; never nothing.
    pub(crate) fn poll_room(&mut self, stream: u32, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let (over, limits) = (self.over, self.limits);
        let Some(entry) = self.streams.get_mut(&stream) else { return Poll::Ready(Err(gone())) };
        if over {
            return Poll::Ready(Err(gone()));
        }
        if entry.reset {
            return Poll::Ready(Err(was_reset()));
        }
        if entry.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = limits.queue.saturating_sub(entry.queued).min(entry.credit as usize).min(limits.frame);
        if room == 0 {
            entry.writer = Some(cx.waker().clone());
            // What the peer has yet to allow cannot be waited for.
            if self.outbox.gathers() {
                self.outbox.hurry();
                self.wake_driver();
            }
            return Poll::Pending;
        }
        Poll::Ready(Ok(room))
    }

    /// Sends a piece for which there is room.
    pub(crate) fn write(&mut self, stream: u32, payload: Bytes) {
        let Some(entry) = self.streams.get_mut(&stream) else { return };
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        entry.credit = entry.credit.saturating_sub(length);
        entry.queued += payload.len();
        entry.unanswered = entry.unanswered.saturating_add(payload.len());
        let patient = entry.bulky && entry.unanswered > self.limits.prompt;
        let frame = Outgoing { header: Header { kind: Kind::Data, flags: 0, stream, length }, payload };
        let gathered = self.outbox.gathers();
        if patient {
            self.outbox.push_patient(frame);
        } else {
            self.outbox.push(frame);
        }
        // Of what is gathered the driver knows since its first piece.
        if !(gathered && self.outbox.gathers()) {
            self.wake_driver();
        }
    }

    /// Much is going to be said on the stream, in pieces of which nobody waits for each: once it is more than an answer, it
    /// may leave together.
    pub(crate) fn expect_much(&mut self, stream: u32) {
        if let Some(entry) = self.streams.get_mut(&stream) {
            entry.bulky = true;
        }
    }

    /// Nothing more will be written.
    pub(crate) fn finish(&mut self, stream: u32) {
        let over = self.over;
        let Some(entry) = self.streams.get_mut(&stream) else { return };
        if over || entry.reset || std::mem::replace(&mut entry.finished, true) {
            return;
        }
        // Behind all data.
        let header = Header { kind: Kind::WindowUpdate, flags: FIN, stream, length: 0 };
        self.outbox.push_last(header);
        self.wake_driver();
    }

    /// Nobody here has the stream any more. One that was not finished is reset; one that only the peer has not finished yet
    /// is left to it for a while (see [`State::take_left`]): a reset would make it throw away what it has not read.
    pub(crate) fn abandon(&mut self, stream: u32) {
        let over = self.over;
        let Some(entry) = self.streams.get_mut(&stream) else { return };
        entry.abandoned = true;
        if over || entry.reset || entry.finished && entry.peer_finished {
            self.remove(stream);
        } else if entry.finished {
            entry.unread.clear();
            entry.small = BytesMut::new();
            self.left.push(stream);
            self.wake_driver();
        } else {
            self.reset(stream);
        }
    }

    /// Asks the peer whether it is there; answers the number of the ping.
    pub(crate) fn ping(&mut self) -> u32 {
        self.pings.0 = self.pings.0.wrapping_add(1);
        let ping = Header { kind: Kind::Ping, flags: SYN, stream: 0, length: self.pings.0 };
        self.outbox.push_control(ping);
        self.wake_driver();
        self.pings.0
    }

    /// Waits for the answer to a ping; for one at a time.
    pub(crate) fn poll_pong(&mut self, ping: u32, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.pings.1 == ping {
            return Poll::Ready(Ok(()));
        }
        if self.over {
            return Poll::Ready(Err(gone()));
        }
        self.pinger = Some(cx.waker().clone());
        Poll::Pending
    }

    // === For the driver ===

    /// Who is woken when there is something to send.
    pub(crate) fn driven_by(&mut self, waker: &Waker) {
        if !self.driver.as_ref().is_some_and(|driver| driver.will_wake(waker)) {
            self.driver = Some(waker.clone());
        }
    }

    /// Takes note of a header.
    pub(crate) fn receive(&mut self, header: Header) -> Result<Received, Violation> {
        match header.kind {
            Kind::Ping => {
                if header.has(SYN) {
                    self.outbox.push_control(Header { flags: ACK, ..header });
                } else {
                    self.pings.1 = header.length;
                    self.pinger.take().into_iter().for_each(Waker::wake);
                }
                Ok(Received::default())
            }
            Kind::GoAway if header.length == super::frame::NORMAL => {
                self.peer_leaves = true;
                self.wake_openers();
                Ok(Received::default())
            }
            Kind::GoAway => Err(Violation::GaveUp(header.length)),
            Kind::Data | Kind::WindowUpdate => self.receive_for_stream(header),
        }
    }

    fn receive_for_stream(&mut self, header: Header) -> Result<Received, Violation> {
        let stream = header.stream;
        let arrived = if header.has(SYN) { self.arrive(stream)? } else { None };
        let limit = self.streams.get(&stream).map(|entry| entry.window);
        let payload = match (header.kind, limit) {
            (Kind::Data, Some(window)) if header.length > window => {
                return Err(Violation::Window(header.length - window, stream));
            }
            (Kind::Data, known) => Some(Payload {
                stream: known.map(|_| stream),
                left: header.length as usize,
                ends: header.has(FIN),
            }),
            _ => None,
        };
        let Some(entry) = self.streams.get_mut(&stream) else { return Ok(Received { arrived, payload }) };
        if header.has(RST) {
            entry.reset = true;
            entry.wake();
            self.outbox.forget(stream);
            self.forget_if_left(stream);
            return Ok(Received { arrived, payload });
        }
        if header.kind == Kind::Data {
            entry.window -= header.length;
        } else {
            entry.credit = entry.credit.saturating_add(header.length);
            if let Some(writer) = entry.writer.take() {
                writer.wake();
            }
            if header.has(FIN) {
                self.peer_finished(stream);
            }
        }
        Ok(Received { arrived, payload })
    }

    /// A stream that is not taken is reset and forgotten; what comes for it is thrown away.
    fn arrive(&mut self, stream: u32) -> Result<Option<u32>, Violation> {
        if stream == 0 || self.ours(stream) {
            return Err(Violation::Foreign(stream));
        }
        if self.streams.contains_key(&stream) {
            return Err(Violation::Twice(stream));
        }
        if self.over || self.inbound >= self.limits.inbound {
            self.update(stream, RST, 0);
            return Ok(None);
        }
        self.inbound += 1;
        let entry = self.entry();
        self.streams.insert(stream, entry);
        // At once: HashiCorp's side ends the session when a stream is not acknowledged for long.
        self.update(stream, ACK, self.extra());
        Ok(Some(stream))
    }

    /// A piece of a payload.
    pub(crate) fn receive_piece(&mut self, payload: &mut Payload, piece: Bytes) {
        payload.left -= piece.len();
        let Some(stream) = payload.stream else { return };
        if let Some(entry) = self.streams.get_mut(&stream)
            && !entry.abandoned
            && !entry.reset
        {
            entry.keep(piece);
            entry.unanswered = 0;
            if let Some(reader) = entry.reader.take() {
                reader.wake();
            }
        }
    }

    /// A payload is complete.
    pub(crate) fn received(&mut self, payload: Payload) {
        if let (Some(stream), true) = (payload.stream, payload.ends) {
            self.peer_finished(stream);
        }
    }

    fn peer_finished(&mut self, stream: u32) {
        if let Some(entry) = self.streams.get_mut(&stream) {
            entry.peer_finished = true;
            if let Some(reader) = entry.reader.take() {
                reader.wake();
            }
            self.forget_if_left(stream);
        }
    }

    fn forget_if_left(&mut self, stream: u32) {
        if self.streams.get(&stream).is_some_and(|entry| entry.abandoned) {
            self.remove(stream);
        }
    }

    /// What leaves next, in this order: a batch of about so many bytes. `waited`: what [gathers](State::gathers) has done so
    /// for long enough.
    pub(crate) fn take_batch(
        &mut self,
        bytes: usize,
        frames: usize,
        waited: bool,
        batch: &mut VecDeque<Outgoing>,
    ) {
        self.outbox.take(bytes, frames, waited, batch);
    }

    /// Data waits to be sent until there is more of it.
    pub(crate) fn gathers(&self) -> bool {
        self.outbox.gathers()
    }

    /// A frame is on its way.
    pub(crate) fn sent(&mut self, header: Header) {
        if header.kind == Kind::Data
            && let Some(entry) = self.streams.get_mut(&header.stream)
        {
            entry.queued = entry.queued.saturating_sub(header.length as usize);
            if let Some(writer) = entry.writer.take() {
                writer.wake();
            }
        }
    }

    /// So many answers wait to be sent that no more questions should be taken.
    pub(crate) fn is_flooded(&self, limit: usize) -> bool {
        self.outbox.control() >= limit
    }

    /// Streams that were left since this was last asked; each is to be [`State::reset`] if it is still there after a while.
    pub(crate) fn take_left(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.left)
    }

    /// Ends a stream at once, both ways.
    pub(crate) fn reset(&mut self, stream: u32) {
        let Some(entry) = self.streams.get_mut(&stream) else { return };
        entry.reset = true;
        entry.wake();
        let abandoned = entry.abandoned;
        self.outbox.forget(stream);
        self.update(stream, RST, 0);
        if abandoned {
            self.remove(stream);
        }
    }

    /// The last word to the peer.
    pub(crate) fn say_goodbye(&mut self, code: u32) {
        self.outbox.push_last(Header { kind: Kind::GoAway, flags: 0, stream: 0, length: code });
    }

    /// The session is over: whoever waits learns of it. What was received can still be read.
    pub(crate) fn end(&mut self) {
        self.over = true;
        self.streams.values_mut().for_each(Entry::wake);
        self.pinger.take().into_iter().for_each(Waker::wake);
        self.streams.retain(|_, entry| !entry.abandoned);
        self.wake_openers();
    }

    fn remove(&mut self, stream: u32) {
        if self.streams.remove(&stream).is_some() {
            if self.ours(stream) {
                self.outbound -= 1;
                self.wake_openers();
            } else {
                self.inbound -= 1;
            }
        }
    }

    fn wake_openers(&mut self) {
        self.openers.drain(..).for_each(Waker::wake);
    }
}
