//! The request's body as the messages of a gRPC call. Chunks are framed, not copied: each goes out as a small header
//! and then as the very bytes that came in.
//!
//! A stream of messages could only end; this body can fail, which resets the call. A push that breaks off must never
//! look to the node like one that ended.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body::Frame;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tokio::sync::oneshot;

use crate::{
    limits::{MESSAGE_DATA_BYTES, REPLAY_BYTES},
    request_body::{BodyFault, RequestBody},
};

/// gRPC's prefix of a message: compressed or not, and its length.
const PREFIX_BYTES: usize = 5;

/// A message with gRPC's prefix.
pub(crate) fn framed(message: &impl prost::Message) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + length);
    put_prefix(&mut frame, length);
    // A BytesMut grows; encoding into it cannot fail.
    let _ = message.encode(&mut frame);
    frame.freeze()
}

/// What precedes `data` in a message whose only field is the bytes field `tag`.
fn data_header(tag: u32, data: usize) -> Bytes {
    let length = key_len(tag) + encoded_len_varint(data as u64) + data;
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + length - data);
    put_prefix(&mut frame, length);
    encode_key(tag, WireType::LengthDelimited, &mut frame);
    encode_varint(data as u64, &mut frame);
    frame.freeze()
}

fn put_prefix(frame: &mut BytesMut, length: usize) {
    frame.put_u8(0);
    // Messages are bounded by MESSAGE_DATA_BYTES and the size of a request's headers.
    frame.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
}

/// Why a call was reset from our side. HTTP/2 says INTERNAL_ERROR then, and not CANCEL, which a tonic server would take
/// for the end of the messages.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct Reset(BodyFault);

/// The body of a request, for the calls that carry it: one after the other, of which the latest reads on. What was read is
/// kept for the next one, up to [`REPLAY_BYTES`], until the answer begins.
#[derive(Clone)]
pub(crate) struct Slot(Arc<Mutex<Shared>>);

struct Shared {
    body: RequestBody,
    /// The front of what was read.
    kept: Vec<Bytes>,
    kept_bytes: usize,
    /// It is all that was read, and what follows is kept too.
    keeps: bool,
    /// Calls that have carried it.
    calls: usize,
    faults: Option<oneshot::Sender<BodyFault>>,
    abandoned: oneshot::Receiver<()>,
}

/// The other ends of a body: whoever reads the answer keeps them.
pub(crate) struct Ends {
    /// Tells why the body failed.
    pub(crate) faults: Option<oneshot::Receiver<BodyFault>>,
    /// Dropped with the answer; what is left of the body is then not sent.
    _answer: oneshot::Sender<()>,
}

impl Slot {
    pub(crate) fn new(body: RequestBody) -> (Self, Ends) {
        let (fault_sender, faults) = oneshot::channel();
        let (answer, abandoned) = oneshot::channel();
        let shared = Shared {
            body,
            kept: Vec::new(),
            kept_bytes: 0,
            keeps: true,
            calls: 0,
            faults: Some(fault_sender),
            abandoned,
        };
        (Self(Arc::new(Mutex::new(shared))), Ends { faults: Some(faults), _answer: answer })
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No call has sent a byte of it.
    pub(crate) fn is_untouched(&self) -> bool {
        self.shared().calls == 0
    }

    /// All that was read is still here, and the body has not failed.
    pub(crate) fn can_be_sent_again(&self) -> bool {
        let shared = self.shared();
        shared.keeps && shared.faults.is_some()
    }

    /// The answer has begun.
    pub(crate) fn keep_no_more(&self) {
        self.shared().keeps = false;
    }
}

impl Shared {
    /// What follows the first `read` chunks.
    fn poll_chunk(&mut self, read: usize, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyFault>>> {
        if let Some(chunk) = self.kept.get(read) {
            return Poll::Ready(Some(Ok(chunk.clone())));
        }
        if !self.keeps {
            self.kept = Vec::new();
        }
        let chunk = ready!(self.body.poll_chunk(cx));
        match &chunk {
            None => {}
            Some(Ok(bytes)) => {
                self.kept_bytes += bytes.len();
                self.keeps &= self.kept_bytes <= REPLAY_BYTES;
                if self.keeps {
                    self.kept.push(bytes.clone());
                }
            }
            Some(Err(fault)) => {
                if let Some(faults) = self.faults.take() {
                    // Nobody listens when the answer is over; then nobody needs to know.
                    let _ = faults.send(fault.clone());
                }
            }
        }
        Poll::Ready(chunk)
    }
}

/// The body's chunks as they are, for one call.
pub(crate) struct Chunks {
    slot: Slot,
    /// Which of the slot's calls this is, from 1, once it has begun to send.
    call: usize,
    /// Chunks of the body that it has taken.
    read: usize,
}

impl Chunks {
    /// All of them from the beginning.
    pub(crate) fn new(slot: Slot) -> Self {
        Self { slot, call: 0, read: 0 }
    }

    /// Whether this call still carries the body; from its first question on no other does.
    fn poll_carries(&mut self, cx: &mut Context<'_>) -> Result<(), BodyFault> {
        let mut shared = self.slot.shared();
        if self.call == 0 {
            shared.calls += 1;
            self.call = shared.calls;
        }
        // Another call carries it now, or nobody waits for this one's answer.
        if self.call != shared.calls || Pin::new(&mut shared.abandoned).poll(cx).is_ready() {
            return Err(BodyFault::Abandoned);
        }
        Ok(())
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyFault>>> {
        if let Err(fault) = self.poll_carries(cx) {
            return Poll::Ready(Some(Err(fault)));
        }
        let chunk = ready!(self.slot.shared().poll_chunk(self.read, cx));
        if matches!(chunk, Some(Ok(_))) {
            self.read += 1;
        }
        Poll::Ready(chunk)
    }

    /// The next one.
    pub(crate) async fn next(&mut self) -> Option<Result<Bytes, BodyFault>> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }
}

/// One call's request: a first message, then the body in messages of at most [`MESSAGE_DATA_BYTES`].
pub(crate) struct Upload {
    head: Option<Bytes>,
    tag: u32,
    chunks: Chunks,
    /// Announced by a header already sent.
    announced: Option<Bytes>,
    /// The rest of a chunk that did not fit one message.
    rest: Bytes,
}

impl Upload {
    /// `head` is a framed message; the body's bytes go into field `tag` of those that follow.
    pub(crate) fn new(head: Bytes, tag: u32, slot: Slot) -> Self {
        Self { head: Some(head), tag, chunks: Chunks::new(slot), announced: None, rest: Bytes::new() }
    }

    fn announce(&mut self, mut chunk: Bytes) -> Frame<Bytes> {
        if chunk.len() > MESSAGE_DATA_BYTES {
            self.rest = chunk.split_off(MESSAGE_DATA_BYTES);
        }
        let header = data_header(self.tag, chunk.len());
        self.announced = Some(chunk);
        Frame::data(header)
    }
}

impl http_body::Body for Upload {
    type Data = Bytes;
    type Error = Reset;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Reset>>> {
        let this = self.get_mut();
        if let Err(fault) = this.chunks.poll_carries(cx) {
            return Poll::Ready(Some(Err(Reset(fault))));
        }
        if let Some(bytes) = this.head.take().or_else(|| this.announced.take()) {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        if !this.rest.is_empty() {
            let chunk = std::mem::take(&mut this.rest);
            return Poll::Ready(Some(Ok(this.announce(chunk))));
        }
        match ready!(this.chunks.poll_next(cx)) {
            None => Poll::Ready(None),
            Some(Err(fault)) => Poll::Ready(Some(Err(Reset(fault)))),
            Some(Ok(chunk)) => Poll::Ready(Some(Ok(this.announce(chunk)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Buf as _;
    use prost::Message as _;
    use tabularium_proto::{gitaly::PostReceivePackRequest, node::UploadPackRequest};

    use super::*;

    fn unframed(mut frame: Bytes) -> Bytes {
        assert_eq!(frame.get_u8(), 0);
        let length = frame.get_u32();
        assert_eq!(frame.len(), usize::try_from(length).unwrap());
        frame
    }

    #[test]
    fn data_is_framed_as_the_generated_code_would() {
        for size in [1, 127, 128, 16_384, MESSAGE_DATA_BYTES] {
            let data = Bytes::from(vec![b'x'; size]);
            let join = |tag| unframed([data_header(tag, size), data.clone()].concat().into());
            let push = PostReceivePackRequest { data: data.clone(), ..PostReceivePackRequest::default() };
            assert_eq!(PostReceivePackRequest::decode(join(2)).unwrap(), push);
            let fetch = UploadPackRequest { data: data.clone(), ..UploadPackRequest::default() };
            assert_eq!(UploadPackRequest::decode(join(5)).unwrap(), fetch);
            assert_eq!(unframed(framed(&fetch)), fetch.encode_to_vec());
        }
    }
}
