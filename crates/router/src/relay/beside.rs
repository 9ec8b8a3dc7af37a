//! Reads that have a sidechannel: a fetch's bytes go beside the RPC, from stream to stream as they are.
//!
//! The node is offered a sidechannel of the router's own. When it opens that, the router opens the one that the client
//! offers, agrees, and moves what comes, in both directions, until the node has finished; then the client hears how the RPC
//! ended. Nobody looks into it: packets, their ends and half-closes are between the client and the node. Each direction
//! holds one piece in hand and takes the next when that has gone on, so whoever is slow slows the other down.
//!
//! As long as nothing that a node said has gone to the client, another replica can take over: what the client has said is
//! kept while it is little. A client that asks for it hears on its sidechannel first how new the replica is. Whoever gives
//! up waiting, the client or its deadline, drops both streams, which resets them.

use std::{
    io,
    pin::pin,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tabularium_common::multiplex::{
    Stream,
    sidechannel::{self, OpenError, Opened, SidechannelId},
};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::Status;

use super::{
    Outcome, Relay,
    attempt::{Answer, Heard},
    read::{Ended, Search, Sofar},
    request::{self, Call},
};
use crate::{
    account::Account,
    limits::{ANSWER_HOLD_BYTES, HEALTH_GLANCE, LAST_RESORT_WAIT, REPLAY_BYTES, SIDECHANNEL_LAST_WORD},
    nodes::Node,
    refusal::Refusal,
    routing,
    table::Entry,
};

/// The client's end.
pub(super) struct Front {
    id: SidechannelId,
    /// Once a node has wanted it.
    stream: Option<Stream>,
    /// Something that a node said has gone to the client.
    begun: AtomicBool,
    said: Mutex<Said>,
}

/// The front of what the client said.
struct Said {
    kept: Vec<Bytes>,
    bytes: usize,
    complete: bool,
    ended: bool,
}

impl Front {
    /// The one that a client's call offers.
    pub(super) fn offered(call: &Call, entry: &Entry) -> Result<Self, Refusal> {
        let refused = |error: &OpenError| not_opened(&entry.method.name, error);
        let id = call.sidechannel().map_err(|error| refused(&error))?;
        if call.back.is_none() {
            return Err(refused(&OpenError::NotMultiplexed));
        }
        let said = Said { kept: Vec::new(), bytes: 0, complete: true, ended: false };
        Ok(Self { id, stream: None, begun: AtomicBool::new(false), said: Mutex::new(said) })
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing has gone to the client, and all that it said is kept.
    pub(super) fn can_begin_again(&self) -> bool {
        !self.begun.load(Ordering::Relaxed) && self.said().complete
    }

    /// What the client says next, that which was read before included; `None` at its end. `next` counts the pieces.
    async fn read(&self, stream: &Stream, next: &mut usize) -> io::Result<Option<Bytes>> {
        let kept = self.said().kept.get(*next).cloned();
        if kept.is_some() {
            *next += 1;
            return Ok(kept);
        }
        if self.said().ended {
            return Ok(None);
        }
        let piece = stream.read_piece().await?;
        let begun = self.begun.load(Ordering::Relaxed);
        let mut said = self.said();
        match &piece {
            None => said.ended = true,
            Some(piece) if said.complete => {
                said.bytes += piece.len();
                said.complete = !begun && said.bytes <= REPLAY_BYTES;
                if said.complete {
                    said.kept.push(piece.clone());
                    *next += 1;
                } else {
                    said.kept = Vec::new();
                    *next = 0;
                }
            }
            Some(_) => {}
        }
        Ok(piece)
    }
}

/// How a node came to be asked.
#[derive(Clone, Copy)]
enum Asked<'n> {
    /// It is believed to be well.
    InTurn(&'n Node),
    /// It is believed to be down, and nobody else has answered.
    AtLast(&'n Node),
}

impl<'n> Asked<'n> {
    fn node(self) -> &'n Node {
        let (Self::InTurn(node) | Self::AtLast(node)) = self;
        node
    }

    /// It need not be waited for any longer to begin.
    fn is_in_vain(self, since: Instant) -> bool {
        match self {
            Self::InTurn(node) => !node.healthy(),
            Self::AtLast(_) => since.elapsed() >= LAST_RESORT_WAIT,
        }
    }
}

/// Why moving bytes ended before the node had finished.
enum Stopped {
    /// The client's stream broke.
    Client(io::Error),
    /// The node's did.
    Node(io::Error),
}

/// What came of one node.
enum Exchanged {
    /// It said nothing that has gone to the client; this is its answer.
    Heard(Heard),
    /// There is no way back.
    Over(Result<Answer, Refusal>),
}

impl Relay {
    pub(super) async fn read_beside(
        &self,
        search: &Search<'_>,
        sofar: &mut Sofar,
        front: &mut Front,
        entry: &Entry,
        account: &mut Account,
    ) -> Ended {
        let refused = |error: &OpenError| not_opened(&entry.method.name, error);
        let refusal = loop {
            let node = match search.next(sofar) {
                Ok(node) => node,
                Err(refusal) => break refusal,
            };
            if sofar.tried.len() > 1 {
                self.shared.metrics.retries.inc();
            }
            account.storage = Some(std::sync::Arc::clone(&node.storage));
            match self.exchange(search, front, Asked::InTurn(&node), &refused).await {
                Exchanged::Over(answer) => return Ended::Answered(answer.map(Outcome::Node)),
                Exchanged::Heard(heard) => {
                    if let Some(answer) = search.note(sofar, &node, heard) {
                        finish(front);
                        return Ended::Answered(Ok(self.found(search, sofar, answer, account)));
                    }
                }
            }
            if !front.can_begin_again() {
                break Refusal::Lost(node.storage.to_string());
            }
        };
        while front.can_begin_again()
            && let Some(node) = search.last_resort(sofar)
        {
            match self.exchange(search, front, Asked::AtLast(&node), &refused).await {
                Exchanged::Over(answer) => return Ended::Answered(answer.map(Outcome::Node)),
                Exchanged::Heard(Heard::Answer(answer)) => {
                    finish(front);
                    return Ended::Answered(Ok(self.found(search, sofar, answer, account)));
                }
                Exchanged::Heard(Heard::Elsewhere { word, .. }) => sofar.meet(&word),
            }
        }
        Ended::Unanswered(refusal)
    }

    async fn exchange(
        &self,
        search: &Search<'_>,
        front: &mut Front,
        asked: Asked<'_>,
        refused: &(impl Fn(&OpenError) -> Refusal + Sync),
    ) -> Exchanged {
        let (node, begun_at) = (asked.node(), Instant::now());
        let lost = || Refusal::Lost(node.storage.to_string());
        let Some(mut offer) = node.offer(self.worker) else {
            let text = "too many sidechannels wait for this node";
            return Exchanged::Heard(Heard::refused(Refusal::Status(Status::unavailable(text))));
        };
        let route = &search.route;
        let head =
            match request::rewritten(&search.message, search.target, &node.storage, &route.replica_path) {
                Ok(head) => head,
                Err(refusal) => return Exchanged::Over(Err(refusal)),
            };
        let expected = search.expected(&node.storage);
        let mut hearing = pin!(self.hear_beside(search.call, node, head, expected, offer.id()));
        let opened = loop {
            tokio::select! {
                biased;
                opened = offer.opened() => break opened,
                heard = &mut hearing => return Exchanged::Heard(heard),
                () = sleep(HEALTH_GLANCE) => {
                    if asked.is_in_vain(begun_at) {
                        return Exchanged::Heard(Heard::refused(lost()));
                    }
                }
            }
        };
        let side = match agree(search, front, opened).await {
            Ok(side) => side,
            Err(Disagreement::Client(error)) => return Exchanged::Over(Err(refused(&error))),
            Err(Disagreement::Node) => return Exchanged::Heard(Heard::refused(lost())),
        };
        let Some(client) = &front.stream else { return Exchanged::Heard(Heard::refused(lost())) };

        let mut heard = None;
        let moved = {
            let preface = search
                .call
                .freshness
                .preface
                .then(|| sidechannel::generation::preface(routing::generation_of(route, &node.storage)));
            let mut moving = pin!(carry(front, client, &side, preface, self.shared.hold_answers));
            loop {
                tokio::select! {
                    biased;
                    moved = &mut moving => break moved,
                    answer = &mut hearing, if heard.is_none() => heard = Some(answer),
                    () = sleep(HEALTH_GLANCE), if !front.begun.load(Ordering::Relaxed) => {
                        if asked.is_in_vain(begun_at) && front.can_begin_again() {
                            return Exchanged::Heard(Heard::refused(lost()));
                        }
                    }
                }
            }
        };
        let begun = front.begun.load(Ordering::Relaxed);
        let verdict = match moved {
            Ok(()) => {
                // The client need not wait for the status to see the end.
                if begun {
                    client.finish();
                }
                side.finish();
                None
            }
            Err(stopped) => {
                drop(side);
                Some(stopped)
            }
        };
        let heard = match (heard, &verdict) {
            (Some(heard), _) => Some(heard),
            (None, None) => Some(hearing.await),
            // The node says why, if it still can.
            (None, Some(_)) => timeout(SIDECHANNEL_LAST_WORD, hearing).await.ok(),
        };
        conclude(begun, verdict, heard, lost)
    }
}

/// What the client is told, when the bytes have stopped to move.
fn conclude(
    begun: bool,
    stopped: Option<Stopped>,
    heard: Option<Heard>,
    lost: impl Fn() -> Refusal,
) -> Exchanged {
    let failed = |error: &io::Error| {
        Refusal::Status(Status::internal(format!("sidechannel: proxy callback: {error}")))
    };
    match (stopped, heard) {
        (None, Some(heard)) if !begun => Exchanged::Heard(heard),
        (None, Some(heard)) => Exchanged::Over(word(heard)),
        (Some(Stopped::Node(_)), Some(heard)) if !begun && !is_well(&heard) => Exchanged::Heard(heard),
        (Some(Stopped::Node(_)), None) if !begun => Exchanged::Heard(Heard::refused(lost())),
        (None | Some(Stopped::Node(_)), None) => Exchanged::Over(Err(lost())),
        (Some(Stopped::Node(error) | Stopped::Client(error)), Some(heard)) => {
            // An RPC that failed says more than that its bytes did not arrive.
            Exchanged::Over(if is_well(&heard) { Err(failed(&error)) } else { word(heard) })
        }
        (Some(Stopped::Client(error)), None) => Exchanged::Over(Err(failed(&error))),
    }
}

fn word(heard: Heard) -> Result<Answer, Refusal> {
    match heard {
        Heard::Answer(answer) => Ok(answer),
        Heard::Elsewhere { word, .. } => word,
    }
}

fn is_well(heard: &Heard) -> bool {
    matches!(heard, Heard::Answer(answer) if answer.is_well())
}

/// The last word to a client whose sidechannel was opened and nothing said on it.
fn finish(front: &Front) {
    if let Some(stream) = &front.stream {
        stream.finish();
    }
}

enum Disagreement {
    Client(OpenError),
    Node,
}

/// Opens the client's end, unless it is open, and then agrees with the node.
async fn agree(search: &Search<'_>, front: &mut Front, opened: Opened) -> Result<Stream, Disagreement> {
    if front.stream.is_none() {
        let stream = sidechannel::open(search.call.back.as_ref(), front.id).await;
        front.stream = Some(stream.map_err(Disagreement::Client)?);
    }
    opened.accept().await.map_err(|_| Disagreement::Node)
}

/// Moves what the node says to the client, to its end, and what the client says to the node meanwhile. `preface`: what goes
/// before that.
async fn carry(
    front: &Front,
    client: &Stream,
    side: &Stream,
    preface: Option<Bytes>,
    hold: Duration,
) -> Result<(), Stopped> {
    let down = async {
        let opening = opening(front, side, hold).await.map_err(Stopped::Node)?;
        // An answer without bytes is told by the RPC alone.
        let preface = preface.filter(|_| !opening.is_empty());
        for piece in preface.into_iter().chain(opening) {
            front.begun.store(true, Ordering::Relaxed);
            client.write_piece(piece).await.map_err(Stopped::Client)?;
        }
        while let Some(piece) = side.read_piece().await.map_err(Stopped::Node)? {
            client.write_piece(piece).await.map_err(Stopped::Client)?;
        }
        Ok(())
    };
    let up = async {
        let mut next = 0;
        while let Some(piece) = front.read(client, &mut next).await.map_err(Stopped::Client)? {
            if side.write_piece(piece).await.is_err() {
                // It wants no more, or is gone: the other direction tells.
                return Ok(());
            }
        }
        side.finish();
        Ok(())
    };
    let (mut down, mut up) = (pin!(down), pin!(up));
    let mut up_ended = false;
    loop {
        tokio::select! {
            biased;
            ended = &mut down => return ended,
            ended = &mut up, if !up_ended => {
                ended?;
                up_ended = true;
            }
        }
    }
}

/// What the node says first, held for a moment: until that is all, if it is little.
async fn opening(front: &Front, side: &Stream, hold: Duration) -> io::Result<Vec<Bytes>> {
    let mut held = Vec::new();
    let Some(first) = side.read_piece().await? else { return Ok(held) };
    let until = Instant::now() + hold;
    let mut bytes = first.len();
    held.push(first);
    while !hold.is_zero() && bytes < ANSWER_HOLD_BYTES && front.can_begin_again() {
        match timeout_at(until, side.read_piece()).await {
            Ok(piece) => match piece? {
                Some(piece) => {
                    bytes += piece.len();
                    held.push(piece);
                }
                None => break,
            },
            Err(_) => break,
        }
    }
    Ok(held)
}

/// As Gitaly's handlers say that there is no sidechannel; one of them misspells it.
fn not_opened(method: &str, error: &OpenError) -> Refusal {
    let opening = if method == "SSHUploadPackWithSidechannel" { "opennig" } else { "open" };
    Refusal::Status(Status::internal(format!("{opening} sidechannel: {error}")))
}
