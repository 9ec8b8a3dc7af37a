//! Signatures of version 4 (RFC 9580, section 5.2).

use sha2::{Digest as _, Sha256, Sha384, Sha512};

use super::packets::{Reader, multiprecision, packet, packet_type, padded};
use crate::signing::pair::{Digest, Pair};

/// Signature types.
pub(super) mod signature_type {
    pub(in super::super) const BINARY: u8 = 0x00;
    pub(in super::super) const TEXT: u8 = 0x01;
    pub(in super::super) const CERTIFICATION: std::ops::RangeInclusive<u8> = 0x10..=0x13;
    pub(in super::super) const SUBKEY_BINDING: u8 = 0x18;
    pub(in super::super) const DIRECT_KEY: u8 = 0x1f;
    pub(in super::super) const KEY_REVOCATION: u8 = 0x20;
    pub(in super::super) const SUBKEY_REVOCATION: u8 = 0x28;
}

/// Subpacket types.
mod subpacket {
    pub(super) const CREATION_TIME: u8 = 2;
    pub(super) const KEY_EXPIRATION_TIME: u8 = 9;
    pub(super) const ISSUER_KEY_ID: u8 = 16;
    pub(super) const KEY_FLAGS: u8 = 27;
    pub(super) const ISSUER_FINGERPRINT: u8 = 33;
}

const VERSION: u8 = 4;
/// The flag of a key that may sign.
const MAY_SIGN: u8 = 2;

/// The last eight bytes of a fingerprint.
pub(super) type KeyId = [u8; 8];

/// A signature, taken apart.
#[derive(Debug)]
pub(super) struct Signature<'a> {
    pub(super) kind: u8,
    pub(super) algorithm: u8,
    hash: u8,
    pub(super) created: u32,
    /// How long after its creation the key that this is about ends.
    pub(super) key_expires_after: Option<u32>,
    /// Whether that key may sign, if anything is said about it.
    pub(super) may_sign: Option<bool>,
    issuer: Option<KeyId>,
    /// From the version to the last hashed subpacket.
    hashed: &'a [u8],
    numbers: Reader<'a>,
}

impl<'a> Signature<'a> {
    pub(super) fn parse(body: &'a [u8]) -> Option<Self> {
        let mut reader = Reader(body);
        let version = reader.byte()?;
        let (kind, algorithm, hash) = (reader.byte()?, reader.byte()?, reader.byte()?);
        if version != VERSION {
            return None;
        }
        let length = reader.number(2)?;
        let hashed_subpackets = Reader(reader.take(length)?);
        let hashed = body.get(..body.len() - reader.0.len())?;
        let length = reader.number(2)?;
        let unhashed_subpackets = Reader(reader.take(length)?);
        let _beginning_of_digest = reader.take(2)?;
        let mut signature = Self {
            kind,
            algorithm,
            hash,
            created: 0,
            key_expires_after: None,
            may_sign: None,
            issuer: None,
            hashed,
            numbers: reader,
        };
        // What is not signed says at most who signed.
        for (mut subpackets, is_hashed) in [(hashed_subpackets, true), (unhashed_subpackets, false)] {
            while !subpackets.is_empty() {
                let (kind, body) = subpackets.subpacket()?;
                let mut reader = Reader(body);
                match kind {
                    subpacket::CREATION_TIME if is_hashed => signature.created = reader.time()?,
                    subpacket::KEY_EXPIRATION_TIME if is_hashed => {
                        signature.key_expires_after = Some(reader.time()?).filter(|after| *after > 0);
                    }
                    subpacket::KEY_FLAGS if is_hashed => {
                        signature.may_sign = Some(reader.byte().is_some_and(|flags| flags & MAY_SIGN != 0));
                    }
                    subpacket::ISSUER_KEY_ID => signature.issuer = body.try_into().ok(),
                    subpacket::ISSUER_FINGERPRINT => signature.issuer = body.last_chunk().copied(),
                    _ => {}
                }
            }
        }
        Some(signature)
    }

    /// Whether it claims to be made with this key, or does not say with which.
    pub(super) fn claims(&self, key: KeyId) -> bool {
        self.issuer.is_none_or(|issuer| issuer == key)
    }

    /// Whether this key made it, over this text.
    pub(super) fn is_of(&self, pair: &Pair, text: &[u8]) -> bool {
        let message = match self.kind {
            signature_type::BINARY => text.to_vec(),
            signature_type::TEXT => canonical(text),
            _ => return false,
        };
        let message = [message, self.hashed.to_vec(), trailer(self.hashed)].concat();
        let (digest, hashed) = match self.hash {
            8 => (Digest::Sha256, Sha256::digest(&message).to_vec()),
            9 => (Digest::Sha384, Sha384::digest(&message).to_vec()),
            10 => (Digest::Sha512, Sha512::digest(&message).to_vec()),
            _ => return false,
        };
        let mut numbers = self.numbers;
        let mut number = |length| padded(numbers.multiprecision()?, length);
        let signature = match pair {
            Pair::Rsa(_) => number(pair.signature_bytes()),
            Pair::Ed25519(_) => {
                let half = pair.signature_bytes() / 2;
                number(half).zip(number(half)).map(|(first, second)| [first, second].concat())
            }
        };
        let signed = match pair {
            Pair::Rsa(_) => &message,
            Pair::Ed25519(_) => &hashed,
        };
        signature.is_some_and(|signature| pair.made(digest, signed, &signature))
    }
}

/// A packet with a signature of a text, made at this time. The subpackets and their order are Gitaly's.
pub(super) fn sign(
    pair: &Pair,
    algorithm: u8,
    fingerprint: &[u8; 20],
    created: u32,
    text: &[u8],
) -> Result<Vec<u8>, ring::error::Unspecified> {
    const SHA256: u8 = 8;
    let subpacket = |kind: u8, body: &[&[u8]]| {
        let body = body.concat();
        // Both are shorter than what one byte tells.
        [&[u8::try_from(body.len() + 1).unwrap_or(u8::MAX), kind], body.as_slice()].concat()
    };
    let subpackets = [
        subpacket(subpacket::CREATION_TIME, &[&created.to_be_bytes()]),
        subpacket(subpacket::ISSUER_KEY_ID, &[&key_id(fingerprint)]),
        subpacket(subpacket::ISSUER_FINGERPRINT, &[&[VERSION], fingerprint]),
    ]
    .concat();
    let length = u16::try_from(subpackets.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut body =
        [&[VERSION, signature_type::TEXT, algorithm, SHA256], length.as_slice(), &subpackets].concat();

    let message = [canonical(text), body.clone(), trailer(&body)].concat();
    let hashed = Sha256::digest(&message);
    let signature = match pair {
        Pair::Rsa(_) => multiprecision(&pair.sign(Digest::Sha256, &message)?),
        Pair::Ed25519(_) => {
            let signature = pair.sign(Digest::Sha256, &hashed)?;
            let (first, second) = signature.split_at(signature.len() / 2);
            [multiprecision(first), multiprecision(second)].concat()
        }
    };
    const NO_UNHASHED_SUBPACKETS: [u8; 2] = [0, 0];
    body.extend(NO_UNHASHED_SUBPACKETS);
    body.extend(hashed.first_chunk::<2>().into_iter().flatten());
    body.extend(signature);
    Ok(packet(packet_type::SIGNATURE, &body))
}

pub(super) fn key_id(fingerprint: &[u8; 20]) -> KeyId {
    // It has more than eight bytes.
    fingerprint.last_chunk().copied().unwrap_or_default()
}

/// What is hashed last.
fn trailer(hashed: &[u8]) -> Vec<u8> {
    let length = u32::try_from(hashed.len()).unwrap_or(u32::MAX);
    [&[VERSION, 0xff], length.to_be_bytes().as_slice()].concat()
}

/// A text with the line ends that OpenPGP signs. What follows a carriage return is left as it is, whatever it is: Gitaly
/// signs it so.
fn canonical(text: &[u8]) -> Vec<u8> {
    let mut canonical = Vec::with_capacity(text.len() + text.len() / 32);
    let mut after_return = false;
    for byte in text {
        if *byte == b'\n' && !after_return {
            canonical.push(b'\r');
        }
        canonical.push(*byte);
        after_return = *byte == b'\r' && !after_return;
    }
    canonical
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_ends_are_those_of_the_standard() {
        assert_eq!(canonical(b"a\nb\r\nc\rd\n\n"), b"a\r\nb\r\nc\rd\r\n\r\n");
        assert_eq!(canonical(b"\r\r\n"), b"\r\r\r\n");
    }
}
