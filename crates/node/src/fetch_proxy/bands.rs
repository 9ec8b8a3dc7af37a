//! What a source says on a sidechannel of SSH: packets whose first byte says which of git's outputs the rest is of.

use bytes::{Buf as _, Bytes, BytesMut};
use tabularium_common::pktline::MAX_PACKET_BYTES;

/// Git's standard output; every other band is for people.
pub(super) const STDOUT: u8 = 1;
/// The packet's length, and the band.
const HEADER_BYTES: usize = 5;

/// Something else than that.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the source says {0:?} in place of a packet")]
pub(super) struct NotBanded(String);

/// Takes packets apart as they come, in pieces of any length.
#[derive(Debug, Default)]
pub(super) struct Bands {
    header: BytesMut,
    band: u8,
    left: usize,
}

impl Bands {
    /// The next piece at the front of `input`, not copied, with its band; `None` when more is needed.
    pub(super) fn next(&mut self, input: &mut Bytes) -> Result<Option<(u8, Bytes)>, NotBanded> {
        while !input.is_empty() {
            if self.left > 0 {
                let piece = input.split_to(self.left.min(input.len()));
                self.left -= piece.len();
                return Ok(Some((self.band, piece)));
            }
            let part = input.split_to((HEADER_BYTES - self.header.len()).min(input.len()));
            self.header.extend_from_slice(&part);
            if self.header.len() == HEADER_BYTES {
                let digits = std::str::from_utf8(&self.header[..HEADER_BYTES - 1]).ok();
                let length = digits.and_then(|digits| usize::from_str_radix(digits, 16).ok());
                let length = length.filter(|length| (HEADER_BYTES..=MAX_PACKET_BYTES).contains(length));
                let said = || NotBanded(String::from_utf8_lossy(&self.header).into_owned());
                self.left = length.ok_or_else(said)? - HEADER_BYTES;
                self.header.advance(HEADER_BYTES - 1);
                self.band = self.header.get_u8();
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_does_not_matter_how_packets_are_cut() {
        let text = b"0009\x01Hell0006\x02!0005\x010006\x01o";
        for cut in 1..=text.len() {
            let (mut bands, mut heard) = (Bands::default(), [Vec::new(), Vec::new()]);
            for piece in text.chunks(cut) {
                let mut piece = Bytes::copy_from_slice(piece);
                while let Some((band, piece)) = bands.next(&mut piece).unwrap() {
                    heard[usize::from(band) - 1].extend_from_slice(&piece);
                }
            }
            assert_eq!(heard, [b"Hello".to_vec(), b"!".to_vec()], "{cut}");
        }
    }

    #[test]
    fn anything_else_is_named() {
        for wrong in [&b"0000\x01"[..], b"0004\x01", b"PACK\x00", b"ffff\x01"] {
            let error = Bands::default().next(&mut Bytes::from_static(wrong)).unwrap_err();
            assert!(error.to_string().starts_with("the source says \""), "{error}");
        }
    }
}
