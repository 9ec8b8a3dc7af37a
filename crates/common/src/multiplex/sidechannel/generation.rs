//! How new a repository is, said before what comes beside the RPC.
//!
//! The RPC's own answer comes when everything has been said, which is too late for whoever has to pass the generation on
//! first. A client of ours therefore [asks](ASK) for a preface: [`MARK`], and the generation in eight bytes, big-endian. What
//! git says begins with four hexadecimal digits (gitprotocol-common) and never with the mark, so that whoever asks notices that
//! the preface is missing, as it is when a router does not know of it or has no answer.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// Metadata of an RPC whose client knows the preface. Any value.
pub const ASK: &str = "tabularium-generation-preface";
/// What the preface begins with.
const MARK: [u8; 4] = *b"\0gen";
const PREFACE_BYTES: usize = MARK.len() + size_of::<i64>();

/// The preface that says `generation`.
pub fn preface(generation: i64) -> Bytes {
    let mut preface = BytesMut::with_capacity(PREFACE_BYTES);
    preface.put_slice(&MARK);
    preface.put_i64(generation);
    preface.freeze()
}

/// Takes the preface from the front of what comes, however that is cut.
#[derive(Debug, Default)]
pub struct Front {
    held: BytesMut,
}

/// What stood there.
#[derive(Debug, PartialEq, Eq)]
pub struct Read {
    /// The generation, if there was a preface.
    pub generation: Option<i64>,
    /// What comes after it, as far as it is here. May be empty.
    pub rest: Bytes,
}

impl Front {
    /// Takes the next piece. `None`: it is not known yet.
    pub fn take(&mut self, piece: Bytes) -> Option<Read> {
        let mut rest = if self.held.is_empty() {
            piece
        } else {
            self.held.extend_from_slice(&piece);
            self.held.split().freeze()
        };
        let compared = rest.len().min(MARK.len());
        if rest[..compared] != MARK[..compared] {
            return Some(Read { generation: None, rest });
        }
        if rest.len() < PREFACE_BYTES {
            self.held = BytesMut::from(rest);
            return None;
        }
        rest.advance(MARK.len());
        let generation = rest.get_i64();
        Some(Read { generation: Some(generation), rest })
    }

    /// What was held when nothing more comes: no preface.
    pub fn end(self) -> Bytes {
        self.held.freeze()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8], cut: usize) -> (Option<i64>, Vec<u8>) {
        let mut front = Some(Front::default());
        let mut found = (None, Vec::new());
        for piece in bytes.chunks(cut) {
            match &mut front {
                None => found.1.extend_from_slice(piece),
                Some(reading) => {
                    if let Some(read) = reading.take(Bytes::copy_from_slice(piece)) {
                        found = (read.generation, read.rest.to_vec());
                        front = None;
                    }
                }
            }
        }
        if let Some(front) = front {
            found.1 = front.end().to_vec();
        }
        found
    }

    proptest! {
        #[test]
        fn what_was_said_is_read_however_it_is_cut(
            generation in any::<i64>(),
            rest in proptest::collection::vec(any::<u8>(), 0..40),
            cut in 1_usize..60,
        ) {
            let said = [&preface(generation)[..], &rest].concat();
            prop_assert_eq!(read(&said, cut), (Some(generation), rest));
        }

        #[test]
        fn what_has_no_preface_loses_nothing(
            said in "[0-9a-f]{4}.{0,30}|PACK.{0,30}|\0ge|\0gen.{0,3}|",
            cut in 1_usize..60,
        ) {
            prop_assume!(!said.starts_with("\0gen") || said.len() < PREFACE_BYTES);
            prop_assert_eq!(read(said.as_bytes(), cut), (None, said.clone().into_bytes()));
        }
    }
}
