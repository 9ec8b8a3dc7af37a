//! The client's end of a write: where the task that drives it leaves the answer.

use bytes::Bytes;
use http::{HeaderMap, response::Parts};
use http_body::Frame;
use tokio::sync::{mpsc, oneshot};

use crate::refusal::Refusal;

/// Frames on their way to the client. More wait in HTTP/2's own buffers.
const FRAMES: usize = 2;

/// An answer that has begun.
#[derive(Debug)]
pub(super) enum Started {
    /// It goes on in frames.
    Stream(Parts, mpsc::Receiver<Frame<Bytes>>),
    /// It is nothing but a status.
    Whole(Parts),
}

enum State {
    Waiting(oneshot::Sender<Result<Started, Refusal>>),
    Answered(mpsc::Sender<Frame<Bytes>>),
    Done,
}

/// The client, as the driving task sees it.
pub(super) struct Client {
    state: State,
    /// The head of an answer that has not begun.
    head: Option<Parts>,
}

impl Client {
    /// Nothing is answered yet. What is received is the answer's beginning.
    pub(super) fn new() -> (Self, oneshot::Receiver<Result<Started, Refusal>>) {
        let (sender, receiver) = oneshot::channel();
        (Self { state: State::Waiting(sender), head: None }, receiver)
    }

    /// Something has been told to it, so that another node's answer cannot replace it.
    pub(super) fn is_answered(&self) -> bool {
        !matches!(self.state, State::Waiting(_))
    }

    /// It does not listen any more.
    pub(super) fn is_gone(&self) -> bool {
        match &self.state {
            State::Waiting(sender) => sender.is_closed(),
            State::Answered(frames) => frames.is_closed(),
            State::Done => true,
        }
    }

    /// Waits until it does not listen any more.
    pub(super) async fn gone(&mut self) {
        match &mut self.state {
            State::Waiting(sender) => sender.closed().await,
            State::Answered(frames) => frames.closed().await,
            State::Done => {}
        }
    }

    /// How the answer will begin once there is something in it.
    pub(super) fn head(&mut self, head: Parts) {
        self.head = Some(head);
    }

    /// Forgets the head of an answer that is given up.
    pub(super) fn begin_again(&mut self) {
        self.head = None;
    }

    fn start(&mut self) {
        let State::Waiting(_) = &self.state else { return };
        let Some(head) = self.head.take() else { return };
        let (frames, receiver) = mpsc::channel(FRAMES);
        let before = std::mem::replace(&mut self.state, State::Answered(frames));
        if let State::Waiting(sender) = before {
            // A client that has gone is noticed where it is waited for.
            let _ = sender.send(Ok(Started::Stream(head, receiver)));
        }
    }

    /// Tells the next frame. Cancellation-safe: a frame that was not told stays in its place.
    pub(super) async fn tell(&mut self, frame: &mut Option<Frame<Bytes>>) {
        self.start();
        let State::Answered(frames) = &self.state else {
            *frame = None;
            return;
        };
        if let Ok(place) = frames.reserve().await
            && let Some(frame) = frame.take()
        {
            place.send(frame);
        }
        *frame = None;
    }

    /// Ends the answer as the node ended it.
    pub(super) async fn end(&mut self, trailers: HeaderMap) {
        let mut frame = Some(Frame::trailers(trailers));
        self.tell(&mut frame).await;
        self.state = State::Done;
    }

    /// Ends the answer with a status and nothing else.
    pub(super) fn whole(&mut self, parts: Parts) {
        if let State::Waiting(sender) = std::mem::replace(&mut self.state, State::Done) {
            let _ = sender.send(Ok(Started::Whole(parts)));
        }
    }

    /// Ends the answer with a status of the router's own.
    pub(super) async fn refuse(&mut self, refusal: Refusal) {
        if let State::Waiting(_) = &self.state {
            if let State::Waiting(sender) = std::mem::replace(&mut self.state, State::Done) {
                let _ = sender.send(Err(refusal));
            }
        } else {
            self.end(refusal.trailers()).await;
        }
    }
}
