//! Sidechannels: what is too much for messages, on a stream beside the RPC that it belongs to (wire reference, section e).
//!
//! Whoever makes an RPC [offers](Sidechannels::offer) a sidechannel and names it in the RPC's metadata. Whoever serves the
//! RPC [opens](open) it, on the connection that the RPC came over: a stream that begins with [`MAGIC`] and the name, and is
//! answered `ok`. From there on what the client says comes in packets ([`packets`]), of which an empty one is its last word,
//! and what the server says comes as it is, until the stream's end. A name that nobody offers is answered with the end of
//! the stream.
//!
//! A router stands in between and need not know of packets: it offers a sidechannel of its own to the node, and moves what
//! comes from stream to stream as it is. To clients of ours it can say first how new the repository is: [`generation`].

pub mod generation;
mod packets;

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use tokio::{io::AsyncReadExt as _, sync::oneshot};

pub use packets::{Client, PacketError, Server};

use super::{Backchannel, PREAMBLE_BYTES, Stream};

/// What a sidechannel's stream begins with.
pub(super) const MAGIC: &[u8; PREAMBLE_BYTES] = b"sidechannel";
/// The answer to whoever opens one.
const OK: &[u8; 2] = b"ok";
/// Metadata that names a sidechannel, a decimal number. The last value counts: every one on the way may add its own.
pub const METADATA: &str = "gitaly-sidechannel-id";
/// How long opening one may take, until the peer has answered.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Offers at once over the same connections.
const MAX_OFFERS: usize = 65_536;

/// The name of a sidechannel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SidechannelId(i64);

impl SidechannelId {
    /// The one that an RPC's metadata offers.
    pub fn offered(headers: &HeaderMap) -> Result<Self, OpenError> {
        let last = headers.get_all(METADATA).iter().next_back().ok_or(OpenError::NotOffered)?;
        // Gitaly takes what is not a number for 0.
        let number = last.to_str().ok().and_then(|text| text.parse().ok()).unwrap_or(0);
        Ok(Self(number))
    }

    /// The value of [`METADATA`].
    pub fn header(self) -> HeaderValue {
        HeaderValue::from(self.0)
    }
}

/// Why there is no sidechannel. The texts are Gitaly's.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The RPC's metadata names none.
    #[error("sidechannel: sidechannel-id not found in incoming metadata")]
    NotOffered,
    /// The RPC came over a plain connection.
    #[error("sidechannel: fail to extract yamux session: cannot get yamux session")]
    NotMultiplexed,
    /// The connection is at its end.
    #[error("sidechannel: open stream: {0}")]
    Stream(io::Error),
    /// The peer ended the stream instead of agreeing.
    #[error("sidechannel: receive confirmation: {0}")]
    Refused(io::Error),
    /// The peer did not answer.
    #[error("sidechannel: receive confirmation: i/o deadline reached")]
    Silent,
    /// The peer said something else.
    #[error("sidechannel: expected ok, got {0:?}")]
    Other(String),
}

fn refused(error: io::Error) -> OpenError {
    OpenError::Refused(match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "EOF"),
        _ => error,
    })
}

/// Opens the sidechannel `id` to the peer of the connection that an RPC came over.
pub async fn open(back: Option<&Backchannel>, id: SidechannelId) -> Result<Stream, OpenError> {
    let back = back.ok_or(OpenError::NotMultiplexed)?;
    let open = async {
        let mut stream = back.session().open().await.map_err(OpenError::Stream)?;
        let hello = [&MAGIC[..], &id.0.to_be_bytes()].concat();
        stream.write_piece(hello.into()).await.map_err(OpenError::Stream)?;
        let mut answer = [0; OK.len()];
        stream.read_exact(&mut answer).await.map_err(refused)?;
        if &answer == OK {
            Ok(stream.expecting_much())
        } else {
            Err(OpenError::Other(String::from_utf8_lossy(&answer).into_owned()))
        }
    };
    match tokio::time::timeout(OPEN_TIMEOUT, open).await {
        Ok(opened) => opened,
        Err(_) => Err(OpenError::Silent),
    }
}

/// What has been offered and not been opened yet. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Sidechannels(Arc<Offers>);

#[derive(Debug, Default)]
struct Offers {
    next: AtomicI64,
    waiting: Mutex<HashMap<SidechannelId, oneshot::Sender<Opened>>>,
}

impl Offers {
    fn take(&self, id: SidechannelId) -> Option<oneshot::Sender<Opened>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id)
    }
}

/// A sidechannel that is offered until this is dropped.
#[derive(Debug)]
pub struct Offer {
    id: SidechannelId,
    offers: Arc<Offers>,
    /// Until it has been opened.
    opened: Option<oneshot::Receiver<Opened>>,
}

/// A sidechannel that the peer has opened, and that has not been agreed to. Dropped, it is refused.
#[derive(Debug)]
pub struct Opened(Option<Stream>);

impl Sidechannels {
    /// Offers one more. `None`: too many wait already.
    pub fn offer(&self) -> Option<Offer> {
        let (sender, opened) = oneshot::channel();
        let id = SidechannelId(self.0.next.fetch_add(1, Ordering::Relaxed));
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MAX_OFFERS {
            return None;
        }
        waiting.insert(id, sender);
        drop(waiting);
        Some(Offer { id, offers: Arc::clone(&self.0), opened: Some(opened) })
    }

    /// Takes a stream that began with [`MAGIC`] to whoever offered it.
    pub(super) async fn receive(&self, mut stream: Stream) -> io::Result<()> {
        let mut id = [0; 8];
        let name = tokio::time::timeout(OPEN_TIMEOUT, stream.read_exact(&mut id)).await;
        name.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let id = SidechannelId(i64::from_be_bytes(id));
        let opened = Opened(Some(stream));
        let Some(waiting) = self.0.take(id) else {
            drop(opened);
            return Err(io::Error::other(format!("nobody offers sidechannel {}", id.0)));
        };
        // Whoever offered it may have gone this moment; dropped, it is refused.
        drop(waiting.send(opened));
        Ok(())
    }
}

impl Offer {
    /// For the RPC's metadata.
    pub fn id(&self) -> SidechannelId {
        self.id
    }

    /// Waits for the peer to open it; for ever, if it does not want to. May be given up and called again.
    pub async fn opened(&mut self) -> Opened {
        if let Some(receiver) = &mut self.opened {
            let opened = receiver.await;
            self.opened = None;
            if let Ok(opened) = opened {
                return opened;
            }
        }
        // It was opened before.
        std::future::pending().await
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.offers.take(self.id);
    }
}

impl Opened {
    /// Agrees.
    pub async fn accept(mut self) -> io::Result<Stream> {
        match self.0.take() {
            None => Err(io::ErrorKind::NotConnected.into()),
            Some(stream) => {
                stream.write_piece(Bytes::from_static(OK)).await?;
                Ok(stream.expecting_much())
            }
        }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // As Gitaly refuses: the end of the stream, and not a reset.
        if let Some(stream) = &self.0 {
            stream.finish();
        }
    }
}
