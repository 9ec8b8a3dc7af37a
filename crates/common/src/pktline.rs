//! Git's pkt-line framing: four hexadecimal digits of length (their own four bytes included), then the payload;
//! `0000`, `0001` and `0002` are flush, delimiter and response end (gitprotocol-common).

use bytes::{BufMut as _, Bytes, BytesMut};

/// Longest packet git sends or takes, length digits included.
pub const MAX_PACKET_BYTES: usize = 65_520;
/// Longest payload of a packet.
pub const MAX_PAYLOAD_BYTES: usize = MAX_PACKET_BYTES - 4;
/// A flush packet.
pub const FLUSH: &[u8] = b"0000";

/// One packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// `0000`.
    Flush,
    /// `0001`.
    Delimiter,
    /// `0002`.
    ResponseEnd,
    /// A payload; may be empty.
    Data(Bytes),
}

/// Bytes that are not a packet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// The length is not four hexadecimal digits.
    #[error("bad pkt-line length {0:?}")]
    Length(String),
    /// `0003`, or more than [`MAX_PACKET_BYTES`].
    #[error("pkt-line of {0} bytes")]
    Size(usize),
    /// A payload beyond [`MAX_PAYLOAD_BYTES`] was to be written.
    #[error("payload of {0} bytes does not fit a pkt-line")]
    Payload(usize),
}

/// Takes the next packet off `buffer`, or answers `None` and leaves it alone when it is not complete yet.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<Packet>, PacketError> {
    let Some(digits) = buffer.get(..4) else { return Ok(None) };
    let bad = || PacketError::Length(String::from_utf8_lossy(digits).into_owned());
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(bad());
    }
    let text = std::str::from_utf8(digits).map_err(|_| bad())?;
    let length = usize::from_str_radix(text, 16).map_err(|_| bad())?;
    let special = match length {
        0 => Some(Packet::Flush),
        1 => Some(Packet::Delimiter),
        2 => Some(Packet::ResponseEnd),
        3 => return Err(PacketError::Size(length)),
        length if length > MAX_PACKET_BYTES => return Err(PacketError::Size(length)),
        _ => None,
    };
    if let Some(packet) = special {
        let _ = buffer.split_to(4);
        return Ok(Some(packet));
    }
    if buffer.len() < length {
        return Ok(None);
    }
    let mut packet = buffer.split_to(length);
    let _ = packet.split_to(4);
    Ok(Some(Packet::Data(packet.freeze())))
}

/// Appends a data packet to `buffer`.
pub fn encode(payload: &[u8], buffer: &mut BytesMut) -> Result<(), PacketError> {
    if payload.len() > MAX_PAYLOAD_BYTES {
        return Err(PacketError::Payload(payload.len()));
    }
    buffer.put_slice(format!("{:04x}", payload.len() + 4).as_bytes());
    buffer.put_slice(payload);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn special_packets_and_garbage() {
        for (bytes, expected) in [
            (&b"0000"[..], Ok(Some(Packet::Flush))),
            (b"0001", Ok(Some(Packet::Delimiter))),
            (b"0002", Ok(Some(Packet::ResponseEnd))),
            (b"0003", Err(PacketError::Size(3))),
            (b"0004", Ok(Some(Packet::Data(Bytes::new())))),
            (b"fff1", Err(PacketError::Size(0xfff1))),
            (b"+123", Err(PacketError::Length("+123".into()))),
            (b"GET ", Err(PacketError::Length("GET ".into()))),
            (b"000", Ok(None)),
            (b"0006a", Ok(None)),
            (b"0006a\n0000", Ok(Some(Packet::Data(Bytes::from_static(b"a\n"))))),
        ] {
            assert_eq!(decode(&mut BytesMut::from(bytes)), expected, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_however_it_is_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 1..8),
            cut in 1_usize..700,
        ) {
            let mut wire = BytesMut::new();
            for payload in &payloads {
                encode(payload, &mut wire).unwrap();
            }
            let mut buffer = BytesMut::new();
            let mut seen = Vec::new();
            for chunk in wire.chunks(cut) {
                buffer.extend_from_slice(chunk);
                while let Some(packet) = decode(&mut buffer).unwrap() {
                    let Packet::Data(data) = packet else { panic!("not data: {packet:?}") };
                    seen.push(data.to_vec());
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(seen, payloads);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode(&mut buffer) {}
        }
    }
}
