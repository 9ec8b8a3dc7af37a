//! What the client says on a sidechannel: packets of git's framing, the last of them a flush.

use std::{future::Future, io};

use bytes::{Bytes, BytesMut};
use tokio::sync::Mutex;

use super::super::Stream;
use crate::pktline::{FLUSH, MAX_PACKET_BYTES, MAX_PAYLOAD_BYTES};

/// Digits of a packet's length.
const LENGTH_BYTES: usize = 4;

/// What is not the way clients talk. The texts are Gitaly's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Not four hexadecimal digits, or a length that no packet has.
    #[error("sidechannel: invalid pktline header")]
    Length,
    /// The stream ended before the client had said that it had finished.
    #[error("unexpected EOF")]
    Cut,
}

impl From<PacketError> for io::Error {
    fn from(error: PacketError) -> Self {
        let kind = match error {
            PacketError::Length => io::ErrorKind::InvalidData,
            PacketError::Cut => io::ErrorKind::UnexpectedEof,
        };
        Self::new(kind, error)
    }
}

/// Takes packets apart as they come, in pieces of any length.
#[derive(Debug, Default)]
struct Unpack {
    length: Vec<u8>,
    left: usize,
    ended: bool,
}

impl Unpack {
    /// The next piece of payload at the front of `input`, which is not copied; `None` when more is needed, or at the end.
    fn next(&mut self, input: &mut Bytes) -> Result<Option<Bytes>, PacketError> {
        loop {
            if self.ended || input.is_empty() {
                return Ok(None);
            }
            if self.left > 0 {
                let piece = input.split_to(self.left.min(input.len()));
                self.left -= piece.len();
                return Ok(Some(piece));
            }
            let digits = input.split_to((LENGTH_BYTES - self.length.len()).min(input.len()));
            self.length.extend_from_slice(&digits);
            if self.length.len() == LENGTH_BYTES {
                match length(&self.length)? {
                    0 => self.ended = true,
                    length => self.left = length - LENGTH_BYTES,
                }
                self.length.clear();
            }
        }
    }
}

fn length(digits: &[u8]) -> Result<usize, PacketError> {
    let text = std::str::from_utf8(digits).map_err(|_| PacketError::Length)?;
    let digits = digits.iter().all(u8::is_ascii_hexdigit);
    match usize::from_str_radix(text, 16) {
        Ok(length) if digits && (length == 0 || (LENGTH_BYTES..=MAX_PACKET_BYTES).contains(&length)) => {
            Ok(length)
        }
        _ => Err(PacketError::Length),
    }
}

/// The serving end. Reading and writing may go on side by side.
#[derive(Debug)]
pub struct Server {
    stream: Stream,
    input: Mutex<(Unpack, Bytes)>,
}

impl Server {
    /// Of a stream that was [opened](super::open).
    pub fn new(stream: Stream) -> Self {
        Self { stream, input: Mutex::default() }
    }

    /// The next piece of what the client says; `None` when it has finished. May be given up.
    pub async fn read(&self) -> io::Result<Option<Bytes>> {
        let mut input = self.input.lock().await;
        loop {
            let (unpack, rest) = &mut *input;
            if let Some(piece) = unpack.next(rest)? {
                return Ok(Some(piece));
            }
            if unpack.ended {
                return Ok(None);
            }
            let Some(piece) = self.stream.read_piece().await? else { return Err(PacketError::Cut.into()) };
            *rest = piece;
        }
    }

    /// Says something to the client.
    pub async fn write(&self, piece: Bytes) -> io::Result<()> {
        self.stream.write_piece(piece).await
    }

    /// All has been said.
    pub fn finish(&self) {
        self.stream.finish();
    }
}

/// The end that made the offer. Reading and writing may go on side by side.
#[derive(Debug)]
pub struct Client(Stream);

impl Client {
    /// Of a stream that was [accepted](super::Opened::accept).
    pub fn new(stream: Stream) -> Self {
        Self(stream)
    }

    /// Says something to the server.
    pub async fn write(&self, mut data: impl bytes::Buf) -> io::Result<()> {
        while data.has_remaining() {
            let length = data.remaining().min(MAX_PAYLOAD_BYTES);
            let mut packet = BytesMut::with_capacity(LENGTH_BYTES + length);
            packet.extend_from_slice(format!("{:04x}", length + LENGTH_BYTES).as_bytes());
            packet.extend_from_slice(&data.copy_to_bytes(length));
            self.0.write_piece(packet.freeze()).await?;
        }
        Ok(())
    }

    /// All has been said. The server goes on.
    pub fn finish(&self) -> impl Future<Output = io::Result<()>> + Send + '_ {
        self.0.write_piece(Bytes::from_static(FLUSH))
    }

    /// The next piece of what the server says; `None` when it has finished, after which this end is finished too: Gitaly
    /// waits for that.
    pub async fn read(&self) -> io::Result<Option<Bytes>> {
        let piece = self.0.read_piece().await?;
        if piece.is_none() {
            self.0.finish();
        }
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unpacked(pieces: impl IntoIterator<Item = Bytes>) -> Result<(Vec<u8>, bool), PacketError> {
        let (mut unpack, mut payload) = (Unpack::default(), Vec::new());
        for mut piece in pieces {
            while let Some(part) = unpack.next(&mut piece)? {
                payload.extend_from_slice(&part);
            }
        }
        Ok((payload, unpack.ended))
    }

    fn of(text: &'static str) -> Result<(String, bool), PacketError> {
        let (payload, ended) = unpacked([Bytes::from_static(text.as_bytes())])?;
        Ok((String::from_utf8(payload).unwrap(), ended))
    }

    #[test]
    fn packets_are_those_of_the_reference() {
        assert_eq!(of("0009Hello0000"), Ok(("Hello".to_owned(), true)));
        assert_eq!(of("0009Hel"), Ok(("Hel".to_owned(), false)));
        assert_eq!(of("0004"), Ok((String::new(), false)));
        for wrong in ["0001", "0002", "0003", "fff1", "+009", "abcg", "PACK"] {
            assert_eq!(of(wrong), Err(PacketError::Length), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_packets_are_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 0..8),
            cut in 1usize..50,
        ) {
            let mut bytes = Vec::new();
            for payload in &payloads {
                bytes.extend_from_slice(format!("{:04x}", payload.len() + 4).as_bytes());
                bytes.extend_from_slice(payload);
            }
            bytes.extend_from_slice(FLUSH);
            let pieces = bytes.chunks(cut).map(Bytes::copy_from_slice);
            prop_assert_eq!(unpacked(pieces), Ok((payloads.concat(), true)));
        }
    }
}
