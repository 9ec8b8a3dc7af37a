//! A small pack, taken apart in memory (gitformat-pack). Nothing here reads or writes anything.
//!
//! What is not exactly as expected is left to git, which knows what to make of it or how to refuse it. So nothing is taken
//! in here that git would not take in.

use std::collections::HashMap;

use flate2::{Decompress, FlushDecompress, Status};
use gix_hash::ObjectId;
use gix_object::Kind;
use gix_odb::pack::data::{Entry, entry::Header};

use super::LeftToGit;

/// `PACK`, version, number of objects.
pub(super) const HEADER_BYTES: usize = 12;
/// The digest of everything before it.
const TRAILER_BYTES: usize = 20;
/// The only version that is written.
const VERSION: u32 = 2;

/// An object, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) id: ObjectId,
    pub(super) kind: Kind,
    pub(super) data: Vec<u8>,
}

/// How many objects a pack that begins like this says it has.
pub(super) fn count(front: &[u8]) -> Option<u32> {
    let number = |at: usize| Some(u32::from_be_bytes(front.get(at..at + 4)?.try_into().ok()?));
    (front.starts_with(b"PACK") && number(4)? == VERSION).then(|| number(8))?
}

/// Takes a pack apart. Its objects together have at most `room` bytes; `base` finds those that are not in it.
pub(super) fn read(
    pack: &[u8],
    mut room: usize,
    mut base: impl FnMut(&ObjectId) -> Option<(Kind, Vec<u8>)>,
) -> Result<Vec<Object>, LeftToGit> {
    let count = count(pack).ok_or(LeftToGit("a pack of another kind"))?;
    let cut = pack.len().checked_sub(TRAILER_BYTES).ok_or(LeftToGit("a pack that is cut off"))?;
    let (body, trailer) = pack.split_at(cut);
    let mut digest = gix_hash::hasher(gix_hash::Kind::Sha1);
    digest.update(body);
    if digest.try_finalize().map_err(|_| LeftToGit("a forged pack"))?.as_slice() != trailer {
        return Err(LeftToGit("a pack that came damaged"));
    }
    let (entries, end) = entries(body, count, &mut room)?;
    if end != body.len() {
        return Err(LeftToGit("a pack with more behind its objects"));
    }
    Resolved::default().resolve(entries, &mut room, &mut base)
}

/// What a pack has of an object.
struct Packed {
    offset: usize,
    content: Content,
    /// The object, or how it differs from another.
    data: Vec<u8>,
}

enum Content {
    Whole(Kind),
    DeltaTo(Base),
}

enum Base {
    At(usize),
    Id(ObjectId),
}

/// The entries, and where the last one ends.
fn entries(body: &[u8], count: u32, room: &mut usize) -> Result<(Vec<Packed>, usize), LeftToGit> {
    let malformed = LeftToGit("a malformed pack");
    let mut offset = HEADER_BYTES;
    let mut entries = Vec::new();
    for _ in 0..count {
        let rest = body.get(offset..).ok_or(malformed)?;
        let position = u64::try_from(offset).map_err(|_| malformed)?;
        let entry = Entry::from_bytes(rest, position, gix_hash::Kind::Sha1).map_err(|_| malformed)?;
        let begin = usize::try_from(entry.data_offset).map_err(|_| malformed)?;
        let size = usize::try_from(entry.decompressed_size).map_err(|_| malformed)?;
        take(room, size)?;
        let (data, length) = inflate(body.get(begin..).ok_or(malformed)?, size)?;
        let content = match entry.header {
            Header::Commit => Content::Whole(Kind::Commit),
            Header::Tree => Content::Whole(Kind::Tree),
            Header::Blob => Content::Whole(Kind::Blob),
            Header::Tag => Content::Whole(Kind::Tag),
            Header::RefDelta { base_id } => Content::DeltaTo(Base::Id(base_id)),
            Header::OfsDelta { base_distance } => {
                let base = position.checked_sub(base_distance).and_then(|base| usize::try_from(base).ok());
                Content::DeltaTo(Base::At(base.ok_or(malformed)?))
            }
        };
        entries.push(Packed { offset, content, data });
        offset = begin + length;
    }
    Ok((entries, offset))
}

fn take(room: &mut usize, bytes: usize) -> Result<(), LeftToGit> {
    *room = room.checked_sub(bytes).ok_or(LeftToGit("objects that are too large together"))?;
    Ok(())
}

/// What the stream at the front of `from` holds, which must be `size` bytes, and the stream's own length.
fn inflate(from: &[u8], size: usize) -> Result<(Vec<u8>, usize), LeftToGit> {
    let malformed = LeftToGit("a malformed stream");
    let mut stream = Decompress::new(true);
    // One byte more than there may be, so that one that is too long is seen to be.
    let mut data = vec![0; size + 1];
    let status = stream.decompress(from, &mut data, FlushDecompress::Finish).map_err(|_| malformed)?;
    let whole = status == Status::StreamEnd && usize::try_from(stream.total_out()) == Ok(size);
    if !whole {
        return Err(malformed);
    }
    data.truncate(size);
    let length = usize::try_from(stream.total_in()).map_err(|_| malformed)?;
    Ok((data, length))
}

/// The objects of a pack that are whole already.
#[derive(Default)]
struct Resolved {
    objects: Vec<Object>,
    at: HashMap<usize, usize>,
    of_id: HashMap<ObjectId, usize>,
}

impl Resolved {
    fn resolve(
        mut self,
        mut waiting: Vec<Packed>,
        room: &mut usize,
        outside: &mut impl FnMut(&ObjectId) -> Option<(Kind, Vec<u8>)>,
    ) -> Result<Vec<Object>, LeftToGit> {
        while !waiting.is_empty() {
            let before = waiting.len();
            let mut still = Vec::new();
            for mut packed in waiting {
                let resolved = match &packed.content {
                    Content::Whole(kind) => Some((*kind, std::mem::take(&mut packed.data))),
                    Content::DeltaTo(base) => match (self.find(base), base) {
                        (Some(base), _) => Some((base.kind, apply(&base.data, &packed.data, room)?)),
                        (None, Base::At(_)) => None,
                        (None, Base::Id(id)) => match outside(id) {
                            Some((kind, base)) => Some((kind, apply(&base, &packed.data, room)?)),
                            None => None,
                        },
                    },
                };
                match resolved {
                    Some((kind, data)) => self.add(packed.offset, kind, data)?,
                    None => still.push(packed),
                }
            }
            if still.len() == before {
                return Err(LeftToGit("a delta to what is not there"));
            }
            waiting = still;
        }
        Ok(self.objects)
    }

    fn find(&self, base: &Base) -> Option<&Object> {
        let index = match base {
            Base::At(offset) => self.at.get(offset),
            Base::Id(id) => self.of_id.get(id),
        };
        self.objects.get(*index?)
    }

    fn add(&mut self, offset: usize, kind: Kind, data: Vec<u8>) -> Result<(), LeftToGit> {
        // Tells content that was made to have the id of another.
        let id = gix_object::compute_hash(gix_hash::Kind::Sha1, kind, &data);
        let id = id.map_err(|_| LeftToGit("a forged object"))?;
        self.at.insert(offset, self.objects.len());
        self.of_id.insert(id, self.objects.len());
        self.objects.push(Object { id, kind, data });
        Ok(())
    }
}

/// The object that differs from `base` like that.
fn apply(base: &[u8], delta: &[u8], room: &mut usize) -> Result<Vec<u8>, LeftToGit> {
    let malformed = LeftToGit("a malformed delta");
    let mut rest = delta;
    let (of, size) = (size(&mut rest).ok_or(malformed)?, size(&mut rest).ok_or(malformed)?);
    if of != base.len() {
        return Err(malformed);
    }
    take(room, size)?;
    let mut object = Vec::with_capacity(size);
    while let Some((&instruction, after)) = rest.split_first() {
        rest = after;
        let piece = if instruction & 0x80 == 0 {
            let length = usize::from(instruction);
            let (piece, after) = rest.split_at_checked(length).filter(|_| length > 0).ok_or(malformed)?;
            rest = after;
            piece
        } else {
            let from = number(instruction, 0..4, &mut rest).ok_or(malformed)?;
            let length = match number(instruction, 4..7, &mut rest).ok_or(malformed)? {
                0 => 0x1_0000,
                length => length,
            };
            base.get(from..from + length).ok_or(malformed)?
        };
        if object.len() + piece.len() > size {
            return Err(malformed);
        }
        object.extend_from_slice(piece);
    }
    if object.len() == size { Ok(object) } else { Err(malformed) }
}

/// A size as a delta begins with: seven bits a byte, the lowest first.
fn size(rest: &mut &[u8]) -> Option<usize> {
    let mut size = 0_usize;
    for shift in (0..28).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        size |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(size);
        }
    }
    // Larger than anything that is read here.
    None
}

/// The bytes of a number that these bits of a copy instruction say follow, the lowest first.
fn number(instruction: u8, bits: std::ops::Range<u32>, rest: &mut &[u8]) -> Option<usize> {
    let mut number = 0_usize;
    for (place, bit) in bits.enumerate() {
        if instruction & (1 << bit) != 0 {
            let (&byte, after) = rest.split_first()?;
            *rest = after;
            number |= usize::from(byte) << (8 * place);
        }
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    const ROOM: usize = 1 << 20;

    fn header(kind: u8, size: usize) -> Vec<u8> {
        let mut bytes = vec![u8::try_from(size & 15).unwrap() | (kind << 4)];
        let mut rest = size >> 4;
        while rest > 0 {
            *bytes.last_mut().unwrap() |= 0x80;
            bytes.push(u8::try_from(rest & 0x7f).unwrap());
            rest >>= 7;
        }
        bytes
    }

    fn deflated(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn pack(count: u32, entries: &[Vec<u8>]) -> Vec<u8> {
        let mut pack = [b"PACK".as_slice(), &VERSION.to_be_bytes(), &count.to_be_bytes()].concat();
        pack.extend(entries.concat());
        sealed(pack)
    }

    fn sealed(mut pack: Vec<u8>) -> Vec<u8> {
        let mut digest = gix_hash::hasher(gix_hash::Kind::Sha1);
        digest.update(&pack);
        pack.extend(digest.try_finalize().unwrap().as_slice());
        pack
    }

    fn blob(data: &[u8]) -> Vec<u8> {
        [header(3, data.len()), deflated(data)].concat()
    }

    fn id(data: &[u8]) -> ObjectId {
        gix_object::compute_hash(gix_hash::Kind::Sha1, Kind::Blob, data).unwrap()
    }

    fn delta_to(base: &ObjectId, delta: &[u8]) -> Vec<u8> {
        [header(7, delta.len()), base.as_slice().to_vec(), deflated(delta)].concat()
    }

    fn nothing(_: &ObjectId) -> Option<(Kind, Vec<u8>)> {
        None
    }

    /// Of "hello, world": the first five bytes and two more.
    const DELTA: &[u8] = &[12, 7, 0x90, 5, 2, b'!', b'?'];

    #[test]
    fn objects_come_whole_or_as_deltas_to_others_here_and_there() {
        let base = b"hello, world".as_slice();
        let near = pack(2, &[delta_to(&id(base), DELTA), blob(base)]);
        let objects = read(&near, ROOM, nothing).unwrap();
        let contents: Vec<_> = objects.iter().map(|object| object.data.as_slice()).collect();
        assert_eq!(contents, [base, b"hello!?"]);
        assert_eq!(objects[1].id, id(b"hello!?"));

        let first = blob(base);
        let distance = u8::try_from(first.len()).unwrap();
        let offset = [header(6, DELTA.len()), vec![distance], deflated(DELTA)].concat();
        assert_eq!(read(&pack(2, &[first, offset]), ROOM, nothing).unwrap(), objects);

        let thin = pack(1, &[delta_to(&id(base), DELTA)]);
        assert!(read(&thin, ROOM, nothing).is_err());
        let outside = |wanted: &ObjectId| (*wanted == id(base)).then(|| (Kind::Blob, base.to_vec()));
        assert_eq!(read(&thin, ROOM, outside).unwrap(), objects[1..]);

        let empty = read(&pack(1, &[blob(b"")]), ROOM, nothing).unwrap();
        assert_eq!(empty[0].id.to_string(), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        assert_eq!(read(&pack(0, &[]), ROOM, nothing).unwrap(), []);
    }

    #[test]
    fn what_is_not_as_it_should_be_is_left_to_git() {
        let good = blob(b"hello, world");
        let base = id(b"hello, world");
        let delta = |delta: &[u8]| vec![good.clone(), delta_to(&base, delta)];
        let wrong_size = [header(3, 11), deflated(b"hello, world")].concat();
        let longer = [header(3, 13), deflated(b"hello, world")].concat();
        for (what, pack) in [
            ("fewer", pack(2, std::slice::from_ref(&good))),
            ("more", pack(0, std::slice::from_ref(&good))),
            ("too small a size", pack(1, &[wrong_size])),
            ("too large a size", pack(1, &[longer])),
            ("an unknown kind", pack(1, &[[header(5, 1), deflated(b"x")].concat()])),
            ("another version", sealed(b"PACK\0\0\0\x04\0\0\0\0".to_vec())),
            ("another base", pack(2, &delta(&[11, 1, 1, b'x']))),
            ("the reserved instruction", pack(2, &delta(&[12, 1, 0]))),
            ("beyond the base", pack(2, &delta(&[12, 5, 0x91, 10, 5]))),
            ("more than was said", pack(2, &delta(&[12, 1, 2, b'x', b'y']))),
            ("less than was said", pack(2, &delta(&[12, 2, 1, b'x']))),
            ("cut off in a number", pack(2, &delta(&[12, 5, 0x90]))),
            ("an endless size", pack(2, &delta(&[0x8c, 0x80, 0x80, 0x80, 0x80, 0]))),
            ("before the pack", pack(1, &[[header(6, 4), vec![100], deflated(DELTA)].concat()])),
            ("to itself", pack(1, &[[header(6, 4), vec![0], deflated(&DELTA[..4])].concat()])),
        ] {
            assert!(read(&pack, ROOM, nothing).is_err(), "{what}");
        }
        let large = pack(1, &[blob(&[b'x'; 1000])]);
        assert!(read(&large, 999, nothing).is_err());
        assert!(read(&large, 1000, nothing).is_ok());
        let grows = pack(2, &delta(DELTA));
        assert!(read(&grows, 12 + DELTA.len() + 7, nothing).is_ok());
        assert!(read(&grows, 12 + DELTA.len() + 6, nothing).is_err());
    }

    proptest! {
        #[test]
        fn a_pack_that_was_changed_anywhere_is_not_taken(at in any::<prop::sample::Index>(), bit in 0_u8..8, cut in any::<prop::sample::Index>()) {
            let whole = pack(2, &[blob(b"hello, world"), delta_to(&id(b"hello, world"), DELTA)]);
            prop_assert!(read(&whole[..cut.index(whole.len())], ROOM, nothing).is_err());
            let mut changed = whole;
            let at = at.index(changed.len());
            changed[at] ^= 1 << bit;
            prop_assert!(read(&changed, ROOM, nothing).is_err());
        }

        /// A digest that is right proves nothing about the rest.
        #[test]
        fn no_bytes_at_all_do_any_harm(count in 0_u32..4, body in prop::collection::vec(any::<u8>(), 0..200)) {
            let pack = pack(count, &[body]);
            if let Ok(objects) = read(&pack, ROOM, nothing) {
                prop_assert_eq!(objects.len(), usize::try_from(count).unwrap());
            }
        }

        #[test]
        fn no_delta_does_any_harm(delta in prop::collection::vec(any::<u8>(), 0..50)) {
            let mut room = 1000;
            if let Ok(object) = apply(b"hello, world", &delta, &mut room) {
                prop_assert_eq!(room, 1000 - object.len());
            }
        }
    }
}
