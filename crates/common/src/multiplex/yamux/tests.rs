//! The state without I/O on random schedules, and the driver against peers that misbehave.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests: what they start ends with their runtime"
)]

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use super::{
    driver::{Driver, Patience, Shared},
    frame::{ACK, FIN, HEADER_BYTES, Header, Kind, RST, SYN, Violation},
    outbox::Outgoing,
    state::{INITIAL_WINDOW, Limits, Side, State},
};

const LIMITS: Limits = Limits {
    window: 2 * INITIAL_WINDOW,
    inbound: 4,
    outbound: 4,
    queue: 256 * 1024,
    frame: 64 * 1024,
    prompt: 100 * 1024,
    gather: 128 * 1024,
};

fn cx() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

fn header(kind: Kind, flags: u16, stream: u32, length: u32) -> Header {
    Header { kind, flags, stream, length }
}

/// All that waits to be sent.
fn taken(state: &mut State) -> Vec<Outgoing> {
    take(state, true)
}

fn take(state: &mut State, waited: bool) -> Vec<Outgoing> {
    let mut batch = VecDeque::new();
    state.take_batch(usize::MAX, usize::MAX, waited, &mut batch);
    for frame in &batch {
        state.sent(frame.header);
    }
    batch.into()
}

fn deliver(frame: &Outgoing, to: &mut State, cut: usize) -> Result<Option<u32>, Violation> {
    let received = to.receive(frame.header)?;
    if let Some(mut payload) = received.payload {
        for piece in frame.payload.chunks(cut) {
            to.receive_piece(&mut payload, Bytes::copy_from_slice(piece));
        }
        to.received(payload);
    }
    Ok(received.arrived)
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Open(bool),
    Write(bool, usize, usize),
    Read(bool, usize, usize),
    Finish(bool, usize),
    ExpectMuch(bool, usize),
    Deliver { from: bool, count: usize, cut: usize, waited: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let (side, which) = (any::<bool>(), 0usize..8);
    prop_oneof![
        1 => side.prop_map(Step::Open),
        6 => (side, which.clone(), 1usize..200_000).prop_map(|(side, which, size)| Step::Write(side, which, size)),
        6 => (side, which.clone(), 1usize..200_000).prop_map(|(side, which, most)| Step::Read(side, which, most)),
        1 => (side, which.clone()).prop_map(|(side, which)| Step::Finish(side, which)),
        1 => (side, which).prop_map(|(side, which)| Step::ExpectMuch(side, which)),
        8 => (side, 1usize..6, 1usize..100_000, any::<bool>())
            .prop_map(|(from, count, cut, waited)| Step::Deliver { from, count, cut, waited }),
    ]
}

/// Both ends, what is on its way, and what each has said and heard on each stream.
struct World {
    ends: [State; 2],
    wires: [VecDeque<Outgoing>; 2],
    said: [BTreeMap<u32, Vec<u8>>; 2],
    heard: [BTreeMap<u32, Vec<u8>>; 2],
    known: [Vec<u32>; 2],
    finished: [Vec<u32>; 2],
}

impl World {
    fn new() -> Self {
        Self {
            ends: [State::new(Side::Client, LIMITS), State::new(Side::Server, LIMITS)],
            wires: Default::default(),
            said: Default::default(),
            heard: Default::default(),
            known: Default::default(),
            finished: Default::default(),
        }
    }

    fn nth(&self, end: usize, which: usize) -> Option<u32> {
        let known = &self.known[end];
        (!known.is_empty()).then(|| known[which % known.len()])
    }

    fn write(&mut self, end: usize, stream: u32, size: usize) {
        if self.finished[end].contains(&stream) {
            return;
        }
        if let Poll::Ready(room) = self.ends[end].poll_room(stream, &mut cx()) {
            let said = self.said[end].entry(stream).or_default();
            let more = size.min(room.unwrap());
            let piece: Vec<u8> = (0..=250).cycle().skip(said.len() % 251).take(more).collect();
            said.extend_from_slice(&piece);
            self.ends[end].write(stream, piece.into());
        }
    }

    fn read(&mut self, end: usize, stream: u32, most: usize) -> bool {
        match self.ends[end].poll_read(stream, most, &mut cx()) {
            Poll::Ready(Ok(Some(piece))) => {
                assert!(piece.len() <= most);
                self.heard[end].entry(stream).or_default().extend_from_slice(&piece);
                true
            }
            Poll::Ready(Ok(None)) | Poll::Pending => false,
            Poll::Ready(Err(error)) => panic!("{error}"),
        }
    }

    fn deliver(&mut self, from: usize, count: usize, cut: usize, waited: bool) -> bool {
        let sent = take(&mut self.ends[from], waited);
        self.wires[from].extend(sent);
        let count = count.min(self.wires[from].len());
        for frame in self.wires[from].drain(..count).collect::<Vec<_>>() {
            let arrived = deliver(&frame, &mut self.ends[1 - from], cut).unwrap();
            self.known[1 - from].extend(arrived);
        }
        count > 0
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Open(end) => {
                let end = usize::from(end);
                if let Poll::Ready(stream) = self.ends[end].poll_open(&mut cx()) {
                    self.known[end].push(stream.unwrap());
                }
            }
            Step::Write(end, which, size) => {
                if let Some(stream) = self.nth(end.into(), which) {
                    self.write(end.into(), stream, size);
                }
            }
            Step::Read(end, which, most) => {
                if let Some(stream) = self.nth(end.into(), which) {
                    self.read(end.into(), stream, most);
                }
            }
            Step::Finish(end, which) => {
                let end = usize::from(end);
                if let Some(stream) = self.nth(end, which) {
                    self.ends[end].finish(stream);
                    self.finished[end].push(stream);
                }
            }
            Step::ExpectMuch(end, which) => {
                if let Some(stream) = self.nth(end.into(), which) {
                    self.ends[usize::from(end)].expect_much(stream);
                }
            }
            Step::Deliver { from, count, cut, waited } => {
                self.deliver(from.into(), count, cut, waited);
            }
        }
    }

    /// Delivers and reads until nothing moves any more.
    fn settle(&mut self) {
        loop {
            let mut moved = false;
            for end in 0..2 {
                moved |= self.deliver(end, usize::MAX, 10_000, true);
                for stream in self.known[end].clone() {
                    while self.read(end, stream, usize::MAX) {
                        moved = true;
                    }
                }
            }
            if !moved {
                return;
            }
        }
    }
}

proptest! {
    #[test]
    fn what_is_said_is_heard_whatever_the_schedule(steps in prop::collection::vec(step(), 0..120)) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.settle();
        for end in 0..2 {
            prop_assert_eq!(&world.said[end], &world.heard[1 - end]);
            for stream in world.finished[end].clone() {
                let ended = world.ends[1 - end].poll_read(stream, 1, &mut cx());
                prop_assert!(matches!(ended, Poll::Ready(Ok(None))));
            }
        }
    }

    #[test]
    fn headers_are_read_as_they_were_written(flags in 0u16..16, stream: u32, length: u32) {
        for kind in [Kind::Data, Kind::WindowUpdate, Kind::Ping, Kind::GoAway] {
            let header = header(kind, flags, stream, length);
            prop_assert_eq!(Header::decode(header.encode()), Ok(header));
        }
    }

    #[test]
    fn nothing_that_comes_makes_it_panic(bytes in prop::collection::vec(any::<[u8; 12]>(), 0..50)) {
        let mut state = State::new(Side::Server, LIMITS);
        for mut bytes in bytes {
            bytes[0] = 0;
            bytes[1] %= 4;
            (bytes[4], bytes[5], bytes[6]) = (0, 0, 0);
            let _ = state.receive(Header::decode(bytes).unwrap());
        }
    }
}

#[test]
fn a_stream_is_opened_and_acknowledged_as_the_reference_says() {
    let mut client = State::new(Side::Client, Limits { window: INITIAL_WINDOW, ..LIMITS });
    assert!(matches!(client.poll_open(&mut cx()), Poll::Ready(Ok(1))));
    assert_eq!(taken(&mut client)[0].header.encode(), [0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]);
    let mut server = State::new(Side::Server, LIMITS);
    let received = server.receive(header(Kind::WindowUpdate, SYN, 1, 0)).unwrap();
    assert_eq!(received.arrived, Some(1));
    // At once, and with all of the window that is more than streams begin with.
    assert_eq!(taken(&mut server)[0].header, header(Kind::WindowUpdate, ACK, 1, INITIAL_WINDOW));
}

#[test]
fn what_breaks_the_protocol_ends_the_session() {
    let check = |headers: &[Header]| {
        let mut state = State::new(Side::Server, LIMITS);
        headers.iter().try_for_each(|header| state.receive(*header).map(drop))
    };
    let open = header(Kind::WindowUpdate, SYN, 1, 0);
    assert_eq!(check(&[open, open]), Err(Violation::Twice(1)));
    assert_eq!(check(&[header(Kind::WindowUpdate, SYN, 2, 0)]), Err(Violation::Foreign(2)));
    assert_eq!(check(&[header(Kind::WindowUpdate, SYN, 0, 0)]), Err(Violation::Foreign(0)));
    assert_eq!(check(&[header(Kind::GoAway, 0, 0, 1)]), Err(Violation::GaveUp(1)));
    let too_much = header(Kind::Data, 0, 1, LIMITS.window + 1);
    assert_eq!(check(&[open, too_much]), Err(Violation::Window(1, 1)));
    // For streams that were never there, or are no more, anything may come.
    assert_eq!(check(&[header(Kind::Data, 0, 7, u32::MAX), header(Kind::WindowUpdate, FIN, 9, 0)]), Ok(()));
    assert_eq!(Header::decode([1; 12]), Err(Violation::Version(1)));
    assert_eq!(Header::decode([0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Err(Violation::Kind(9)));
}

#[test]
fn ten_thousand_streams_cost_no_more_than_those_that_are_taken() {
    let mut state = State::new(Side::Server, LIMITS);
    let mut taken_streams = 0;
    for number in 0..10_000 {
        let stream = 2 * number + 1;
        let received = state.receive(header(Kind::Data, SYN, stream, 1000)).unwrap();
        taken_streams += usize::from(received.arrived.is_some());
        let mut payload = received.payload.unwrap();
        assert_eq!(payload.stream.is_some(), received.arrived.is_some());
        state.receive_piece(&mut payload, Bytes::from(vec![0; 1000]));
        state.received(payload);
        if state.is_flooded(1024) {
            // The driver reads on only when these have left.
            assert!(taken(&mut state).iter().all(|frame| frame.payload.is_empty()));
        }
    }
    assert_eq!(taken_streams, LIMITS.inbound);
}

#[test]
fn what_becomes_of_a_stream_that_is_left_depends_on_who_has_finished() {
    let sent = |finish: bool, peer_finishes: bool| {
        let mut state = State::new(Side::Server, LIMITS);
        state.receive(header(Kind::WindowUpdate, SYN, 1, 0)).unwrap();
        taken(&mut state);
        if peer_finishes {
            state.receive(header(Kind::WindowUpdate, FIN, 1, 0)).unwrap();
        }
        state.write(1, Bytes::from_static(b"last words"));
        if finish {
            state.finish(1);
        }
        state.abandon(1);
        let flags: Vec<u16> = taken(&mut state).iter().map(|frame| frame.header.flags).collect();
        (flags, state.take_left())
    };
    assert_eq!(sent(true, true), (vec![0, FIN], vec![]));
    assert_eq!(sent(true, false), (vec![0, FIN], vec![1]), "the peer may have yet to read");
    assert_eq!(sent(false, true), (vec![RST], vec![]));
    assert_eq!(sent(false, false), (vec![RST], vec![]));
}

#[test]
fn one_stream_too_many_waits_until_another_is_gone() {
    let mut state = State::new(Side::Client, LIMITS);
    for _ in 0..LIMITS.outbound {
        assert!(state.poll_open(&mut cx()).is_ready());
    }
    assert!(state.poll_open(&mut cx()).is_pending());
    state.abandon(1);
    assert!(state.poll_open(&mut cx()).is_ready());
    state.receive(header(Kind::GoAway, 0, 0, 0)).unwrap();
    assert!(matches!(state.poll_open(&mut cx()), Poll::Ready(Err(_))), "the peer takes no more");
}

/// A stream on which much is said, beyond what leaves at once.
fn bulky() -> State {
    let mut state = State::new(Side::Server, LIMITS);
    state.receive(header(Kind::WindowUpdate, SYN, 1, 0)).unwrap();
    state.expect_much(1);
    taken(&mut state);
    for piece in [60, 40] {
        state.write(1, vec![0; piece * 1024].into());
        assert_eq!(take(&mut state, false).len(), 1, "what answers leaves at once");
    }
    state.write(1, vec![0; 1024].into());
    assert!(state.gathers() && take(&mut state, false).is_empty());
    state
}

#[test]
fn of_much_that_is_said_pieces_leave_together() {
    let mut state = bulky();
    state.write(1, vec![0; 64 * 1024].into());
    assert!(take(&mut state, false).is_empty());
    state.write(1, vec![0; 63 * 1024].into());
    let lengths: Vec<_> = take(&mut state, false).iter().map(|frame| frame.header.length / 1024).collect();
    assert_eq!(lengths, [1, 64, 63]);
    assert!(!state.gathers());
}

#[test]
fn what_cannot_grow_or_is_asked_for_does_not_wait() {
    // The writer, for the peer's word: the first window is used up.
    let mut state = bulky();
    for piece in [64, 64, 26] {
        state.write(1, vec![0; piece * 1024].into());
        taken(&mut state);
    }
    state.write(1, vec![0; 128].into());
    assert!(state.gathers());
    let room = state.poll_room(1, &mut cx());
    assert!(matches!(room, Poll::Ready(Ok(896))));
    state.write(1, vec![0; 896].into());
    assert!(state.gathers() && state.poll_room(1, &mut cx()).is_pending());
    assert_eq!(take(&mut state, false).len(), 2);

    // The end.
    let mut state = bulky();
    state.finish(1);
    assert_eq!(take(&mut state, false).len(), 2);

    // Control, which takes along what is there.
    let mut state = bulky();
    state.receive(header(Kind::Ping, SYN, 0, 1)).unwrap();
    let kinds: Vec<_> = take(&mut state, false).iter().map(|frame| frame.header.kind).collect();
    assert_eq!(kinds, [Kind::Ping, Kind::Data]);

    // Another stream, on which not so much is said.
    let mut state = bulky();
    state.receive(header(Kind::WindowUpdate, SYN, 3, 0)).unwrap();
    assert_eq!(taken(&mut state).len(), 2);
    state.write(1, vec![0; 1024].into());
    state.write(3, vec![0; 100].into());
    state.write(1, vec![0; 1024].into());
    assert_eq!(take(&mut state, false).len(), 3);

    // The peer has asked something.
    let mut state = bulky();
    let mut payload = state.receive(header(Kind::Data, 0, 1, 4)).unwrap().payload.unwrap();
    state.receive_piece(&mut payload, Bytes::from_static(b"more"));
    state.write(1, vec![0; 1024].into());
    assert_eq!(take(&mut state, false).len(), 2);

    // A stream that is no more leaves nothing that counts.
    let mut state = bulky();
    state.reset(1);
    assert!(!state.gathers());
    assert_eq!(take(&mut state, false).len(), 1);
}

// === The driver ===

const PATIENCE: Patience = Patience {
    write: Duration::from_secs(10),
    finish: Duration::from_secs(300),
    close: Duration::from_secs(1),
    gather: Duration::from_millis(2),
};

struct Session {
    peer: DuplexStream,
    shared: Arc<Shared>,
    arrived: mpsc::Receiver<u32>,
    ended: CancellationToken,
}

/// A session whose peer is the test.
fn session() -> Session {
    let (ours, peer) = tokio::io::duplex(16 * 1024);
    let shared = Shared::new(State::new(Side::Server, LIMITS));
    let (sender, arrived) = mpsc::channel(LIMITS.inbound);
    let ended = CancellationToken::new();
    let driver = Driver::new(ours, Arc::clone(&shared), sender, PATIENCE);
    tokio::spawn(driver.run(ended.clone(), CancellationToken::new()));
    Session { peer, shared, arrived, ended }
}

async fn next(peer: &mut DuplexStream) -> Header {
    let mut bytes = [0; HEADER_BYTES];
    peer.read_exact(&mut bytes).await.unwrap();
    Header::decode(bytes).unwrap()
}

#[tokio::test(start_paused = true)]
async fn pings_are_answered_and_garbage_ends_the_session_with_a_word() {
    let mut session = session();
    session.peer.write_all(&header(Kind::Ping, SYN, 0, 77).encode()).await.unwrap();
    assert_eq!(next(&mut session.peer).await, header(Kind::Ping, ACK, 0, 77));
    session.peer.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    assert_eq!(next(&mut session.peer).await, header(Kind::GoAway, 0, 0, 1));
    session.ended.cancelled().await;
    assert_eq!(session.peer.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_asks_and_takes_no_answers_is_not_read_from_and_then_let_go() {
    let mut session = session();
    let since = tokio::time::Instant::now();
    let flood: Vec<u8> = header(Kind::Ping, SYN, 0, 1).encode().repeat(100_000);
    // It is read until so many answers wait, and not to its end.
    session.peer.write_all(&flood).await.unwrap_err();
    assert!(session.ended.is_cancelled());
    assert_eq!(since.elapsed().as_secs(), PATIENCE.write.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_peer_never_finishes_it_is_reset_in_the_end() {
    let mut session = session();
    session.peer.write_all(&header(Kind::WindowUpdate, SYN, 1, 0).encode()).await.unwrap();
    assert!(next(&mut session.peer).await.has(ACK));
    let stream = session.arrived.recv().await.unwrap();
    let since = tokio::time::Instant::now();
    session.shared.state().finish(stream);
    session.shared.state().abandon(stream);
    assert_eq!(next(&mut session.peer).await, header(Kind::WindowUpdate, FIN, 1, 0));
    // What it still says is thrown away.
    session.peer.write_all(&header(Kind::Data, 0, 1, 3).encode()).await.unwrap();
    session.peer.write_all(b"abc").await.unwrap();
    assert_eq!(next(&mut session.peer).await, header(Kind::WindowUpdate, RST, 1, 0));
    assert_eq!(since.elapsed().as_secs(), PATIENCE.finish.as_secs());
}

#[tokio::test(start_paused = true)]
async fn what_is_gathered_leaves_when_nothing_more_comes() {
    let mut session = session();
    session.peer.write_all(&header(Kind::WindowUpdate, SYN, 1, 0).encode()).await.unwrap();
    assert!(next(&mut session.peer).await.has(ACK));
    let write = |bytes: usize| session.shared.state().write(1, vec![0; bytes].into());
    session.shared.state().expect_much(1);
    write(64 * 1024);
    write(64 * 1024);
    let mut prompt = vec![0; 2 * (HEADER_BYTES + 64 * 1024)];
    session.peer.read_exact(&mut prompt).await.unwrap();
    for _ in 0..3 {
        let since = tokio::time::Instant::now();
        write(100);
        write(50);
        for length in [100, 50] {
            assert_eq!(next(&mut session.peer).await, header(Kind::Data, 0, 1, length));
            session.peer.read_exact(&mut vec![0; length as usize]).await.unwrap();
        }
        let waited = since.elapsed();
        assert!((PATIENCE.gather..2 * PATIENCE.gather).contains(&waited), "{waited:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_last_words_leave_before_the_session_ends() {
    let mut session = session();
    session.peer.write_all(&header(Kind::WindowUpdate, SYN, 1, 0).encode()).await.unwrap();
    assert!(next(&mut session.peer).await.has(ACK));
    session.shared.state().write(1, Bytes::from_static(b"abc"));
    session.ended.cancel();
    let mut rest = Vec::new();
    session.peer.read_to_end(&mut rest).await.unwrap();
    let expected =
        [&header(Kind::Data, 0, 1, 3).encode()[..], b"abc", &header(Kind::GoAway, 0, 0, 0).encode()];
    assert_eq!(rest, expected.concat());
    assert!(matches!(session.shared.state().poll_room(1, &mut cx()), Poll::Ready(Err(_))));
}
