//! Reads and replaces single fields of an encoded protobuf message without its schema.
//!
//! Decoding and encoding again would drop every field this build does not know. Here only the bytes of the replaced
//! fields and the lengths of the messages around them change; all others are copied as they are.

use std::ops::Range;

/// Deepest nesting of (deprecated) groups that is skipped.
const MAX_GROUP_DEPTH: usize = 32;

/// Bytes that are not a protobuf message, or not one that can be aimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    /// The message ends inside a field.
    #[error("malformed request message: unexpected end")]
    Truncated,
    /// A number of more than 64 bits.
    #[error("malformed request message: varint too long")]
    Varint,
    /// Field number 0, one above the limit, or a group that does not match.
    #[error("malformed request message: illegal tag")]
    Tag,
    /// The field is there, but not as text, bytes or a message.
    #[error("malformed request message: field {0} has the wrong wire type")]
    Kind(u32),
    /// Decoders would merge the occurrences; which repository is meant must not depend on how.
    #[error("malformed request message: field {0} occurs more than once")]
    Repeated(u32),
    /// Not UTF-8.
    #[error("malformed request message: field {0} is not UTF-8")]
    Text(u32),
}

struct Field {
    number: u32,
    /// Tag included.
    whole: Range<usize>,
    /// Of a length-delimited field: where its content stands.
    content: Option<Range<usize>>,
}

fn varint(message: &[u8], at: usize) -> Result<(u64, usize), WireError> {
    let mut value = 0u64;
    for (index, byte) in message.get(at..).unwrap_or_default().iter().enumerate().take(10) {
        if index == 9 && *byte > 1 {
            return Err(WireError::Varint);
        }
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok((value, at + index + 1));
        }
    }
    if message.len() >= at + 10 { Err(WireError::Varint) } else { Err(WireError::Truncated) }
}

fn tag(message: &[u8], at: usize) -> Result<(u32, u8, usize), WireError> {
    let (tag, next) = varint(message, at)?;
    let tag = u32::try_from(tag).map_err(|_| WireError::Tag)?;
    let number = tag >> 3;
    if number == 0 {
        return Err(WireError::Tag);
    }
    Ok((number, (tag & 7) as u8, next))
}

fn advance(at: usize, by: u64, end: usize) -> Result<usize, WireError> {
    let by = usize::try_from(by).map_err(|_| WireError::Truncated)?;
    at.checked_add(by).filter(|next| *next <= end).ok_or(WireError::Truncated)
}

/// The field that starts at `at` of a message that ends with the slice.
fn field(message: &[u8], start: usize) -> Result<Field, WireError> {
    let (number, kind, at) = tag(message, start)?;
    let mut content = None;
    let end = match kind {
        2 => {
            let (length, at) = varint(message, at)?;
            let end = advance(at, length, message.len())?;
            content = Some(at..end);
            end
        }
        3 => skip_group(message, number, at, MAX_GROUP_DEPTH)?,
        _ => skip_scalar(message, kind, at)?,
    };
    Ok(Field { number, whole: start..end, content })
}

fn skip_scalar(message: &[u8], kind: u8, at: usize) -> Result<usize, WireError> {
    match kind {
        0 => varint(message, at).map(|(_, next)| next),
        1 => advance(at, 8, message.len()),
        2 => {
            let (length, at) = varint(message, at)?;
            advance(at, length, message.len())
        }
        5 => advance(at, 4, message.len()),
        _ => Err(WireError::Tag),
    }
}

fn skip_group(message: &[u8], group: u32, mut at: usize, depth: usize) -> Result<usize, WireError> {
    if depth == 0 {
        return Err(WireError::Tag);
    }
    loop {
        let (number, kind, next) = tag(message, at)?;
        at = match kind {
            4 if number == group => return Ok(next),
            3 => skip_group(message, number, next, depth - 1)?,
            _ => skip_scalar(message, kind, next)?,
        };
    }
}

/// The last occurrence of a field in `range`, and how many there are. Walks the whole range, so that a malformed message
/// is found out even behind the field.
fn find(message: &[u8], range: Range<usize>, number: u32) -> Result<Option<(Field, usize)>, WireError> {
    let slice = &message[..range.end];
    let mut found: Option<(Field, usize)> = None;
    let mut at = range.start;
    while at < range.end {
        let field = field(slice, at)?;
        at = field.whole.end;
        if field.number == number {
            if field.content.is_none() {
                return Err(WireError::Kind(number));
            }
            let count = found.map_or(0, |(_, count)| count);
            found = Some((field, count + 1));
        }
    }
    Ok(found)
}

/// The only occurrence of a nested message.
fn nested(message: &[u8], range: Range<usize>, number: u32) -> Result<Option<Field>, WireError> {
    match find(message, range, number)? {
        None => Ok(None),
        Some((field, 1)) => Ok(Some(field)),
        Some(_) => Err(WireError::Repeated(number)),
    }
}

/// The nested message at `path`; the message itself for an empty path. `None` when a message on the way is absent.
pub(crate) fn message_at<'m>(message: &'m [u8], path: &[u32]) -> Result<Option<&'m [u8]>, WireError> {
    let mut range = 0..message.len();
    if path.is_empty() {
        find(message, range.clone(), 0)?;
    }
    for number in path {
        match nested(message, range, *number)?.and_then(|field| field.content) {
            None => return Ok(None),
            Some(content) => range = content,
        }
    }
    Ok(Some(&message[range]))
}

/// The text of a field directly in `message`; empty when it is absent, as protobuf defines. Of several the last counts.
pub(crate) fn text(message: &[u8], number: u32) -> Result<&str, WireError> {
    let found = find(message, 0..message.len(), number)?;
    let Some(content) = found.and_then(|(field, _)| field.content) else {
        return Ok("");
    };
    std::str::from_utf8(&message[content]).map_err(|_| WireError::Text(number))
}

fn varint_len(value: usize) -> usize {
    let bits = (usize::BITS - (value | 1).leading_zeros()) as usize;
    bits.div_ceil(7)
}

fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push((value & 0x7f).to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// A new value for a text or a nested message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Edit<'v> {
    /// Field number.
    pub(crate) number: u32,
    /// The text, or the encoded message.
    pub(crate) value: &'v [u8],
}

impl Edit<'_> {
    fn tag(&self) -> usize {
        ((self.number as usize) << 3) | 2
    }

    fn encoded_len(&self) -> usize {
        varint_len(self.tag()) + varint_len(self.value.len()) + self.value.len()
    }

    fn put(&self, out: &mut Vec<u8>) {
        put_varint(out, self.tag());
        put_varint(out, self.value.len());
        out.extend_from_slice(self.value);
    }
}

/// Appends to `out` a copy of `message` in which the message at `path` has other values in some fields. A field that is
/// absent is added; of one that occurs several times the last, which is the one that counts, is replaced. Each field
/// may be edited once. `false`: a message on the way is absent and nothing was appended.
pub(crate) fn edit(
    message: &[u8],
    path: &[u32],
    edits: &[Edit<'_>],
    out: &mut Vec<u8>,
) -> Result<bool, WireError> {
    let mut enclosing: Vec<Field> = Vec::with_capacity(path.len());
    let mut range = 0..message.len();
    for number in path {
        match nested(message, range, *number)? {
            None => return Ok(false),
            Some(field) => {
                range = field.content.clone().unwrap_or_default();
                enclosing.push(field);
            }
        }
    }

    let mut spans: Vec<(Range<usize>, Edit<'_>)> = Vec::with_capacity(edits.len());
    let mut length = range.len();
    for edit in edits {
        let old =
            find(message, range.clone(), edit.number)?.map_or(range.end..range.end, |(field, _)| field.whole);
        length = length - old.len() + edit.encoded_len();
        spans.push((old, *edit));
    }
    spans.sort_by_key(|(span, _)| span.start);

    // From the inside out, what each message around the edited one grows to.
    let mut lengths = vec![0; enclosing.len()];
    for (index, field) in enclosing.iter().enumerate().rev() {
        lengths[index] = length;
        let parent = index
            .checked_sub(1)
            .map_or(0..message.len(), |up| enclosing[up].content.clone().unwrap_or_default());
        let key = varint_len((field.number as usize) << 3);
        length = parent.len() - field.whole.len() + key + varint_len(length) + length;
    }

    out.reserve(length);
    let mut copied = 0;
    for (field, length) in enclosing.iter().zip(&lengths) {
        out.extend_from_slice(&message[copied..field.whole.start]);
        put_varint(out, ((field.number as usize) << 3) | 2);
        put_varint(out, *length);
        copied = field.content.as_ref().map_or(field.whole.end, |content| content.start);
    }
    for (span, edit) in spans {
        out.extend_from_slice(&message[copied..span.start]);
        edit.put(out);
        copied = span.end;
    }
    out.extend_from_slice(&message[copied..]);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;
    use tabularium_proto::gitaly::{
        CreateObjectPoolRequest, ObjectPool, Repository, UserCommitFilesRequest,
        UserCommitFilesRequestHeader, WriteRefRequest,
        user_commit_files_request::UserCommitFilesRequestPayload,
    };

    use super::*;

    fn edits<'v>(storage: &'v str, path: &'v str) -> [Edit<'v>; 2] {
        [Edit { number: 2, value: storage.as_bytes() }, Edit { number: 3, value: path.as_bytes() }]
    }

    fn edited(message: &[u8], path: &[u32], storage: &str, relative_path: &str) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        edit(message, path, &edits(storage, relative_path), &mut out).unwrap().then_some(out)
    }

    #[test]
    fn a_repository_in_a_header_is_found_and_replaced() {
        let request = UserCommitFilesRequest {
            user_commit_files_request_payload: Some(UserCommitFilesRequestPayload::Header(
                UserCommitFilesRequestHeader {
                    repository: Some(Repository {
                        storage_name: "default".into(),
                        relative_path: "a.git".into(),
                        gl_repository: "project-1".into(),
                        ..Repository::default()
                    }),
                    commit_message: b"x".repeat(200),
                    ..UserCommitFilesRequestHeader::default()
                },
            )),
        };
        let bytes = request.encode_to_vec();
        let repository = message_at(&bytes, &[1, 1]).unwrap().unwrap();
        assert_eq!((text(repository, 2), text(repository, 3)), (Ok("default"), Ok("a.git")));

        let long = "p".repeat(300);
        let out = edited(&bytes, &[1, 1], "node-1", &long).unwrap();
        let mut expected = request;
        let Some(UserCommitFilesRequestPayload::Header(header)) =
            &mut expected.user_commit_files_request_payload
        else {
            panic!("header")
        };
        let repository = header.repository.as_mut().unwrap();
        (repository.storage_name, repository.relative_path) = ("node-1".into(), long);
        assert_eq!(UserCommitFilesRequest::decode(&out[..]).unwrap(), expected);
    }

    #[test]
    fn an_absent_repository_is_told_from_an_empty_one() {
        assert_eq!(message_at(&[], &[1]).unwrap(), None);
        assert_eq!(message_at(&[0x0a, 0], &[1]).unwrap(), Some(&[][..]));
        assert_eq!(edited(&[], &[1], "s", "p"), None);
        assert_eq!(edited(&[0x0a, 0], &[1], "s", "p").unwrap(), b"\x0a\x06\x12\x01s\x1a\x01p");
    }

    #[test]
    fn ambiguous_and_malformed_messages_are_refused() {
        assert_eq!(message_at(&[0x0a, 0, 0x0a, 0], &[1]), Err(WireError::Repeated(1)));
        assert_eq!(message_at(&[0x08, 1], &[1]), Err(WireError::Kind(1)));
        assert_eq!(message_at(&[0x0a, 5, 1], &[1]), Err(WireError::Truncated));
        assert_eq!(message_at(&[0x00], &[1]), Err(WireError::Tag));
        assert_eq!(message_at(&[0xff; 11], &[1]), Err(WireError::Varint));
        assert_eq!(message_at(&[0x0a, 0, 0x17], &[1]), Err(WireError::Tag), "behind the field");
        assert_eq!(text(&[0x12, 1, 0xff], 2), Err(WireError::Text(2)));
        assert_eq!(message_at(&[0x0b; 100], &[1]), Err(WireError::Tag), "groups nested too deep");
    }

    #[test]
    fn of_several_values_the_last_counts_and_is_replaced() {
        let message = b"\x0a\x06\x12\x01a\x12\x01b";
        let repository = message_at(message, &[1]).unwrap().unwrap();
        assert_eq!(text(repository, 2), Ok("b"));
        let out = edited(message, &[1], "s", "p").unwrap();
        let decoded = WriteRefRequest::decode(&out[..]).unwrap().repository.unwrap();
        assert_eq!((decoded.storage_name.as_str(), decoded.relative_path.as_str()), ("s", "p"));
    }

    /// Field 2000 in the request and field 1000 in the repository: neither is in the schema. Both are within one group.
    #[test]
    fn unknown_fields_survive() {
        let mut repository = b"\xc2\x3e\x03abc".to_vec();
        repository.extend(Repository { storage_name: "v".into(), ..Repository::default() }.encode_to_vec());
        let mut message = b"\x83\x7d\x08\x01\x84\x7d".to_vec();
        message.push(0x0a);
        message.push(u8::try_from(repository.len()).unwrap());
        message.extend(&repository);
        message.extend(b"\x82\x7d\x02hi");
        let out = edited(&message, &[1], "node", "path").unwrap();
        for kept in [&b"\xc2\x3e\x03abc"[..], b"\x83\x7d\x08\x01\x84\x7d", b"\x82\x7d\x02hi"] {
            assert!(out.windows(kept.len()).any(|window| window == kept), "{kept:?} in {out:?}");
        }
        assert_eq!(message_at(&out, &[1]).map(|found| text(found.unwrap(), 3)), Ok(Ok("path")));
    }

    fn repository() -> impl Strategy<Value = Repository> {
        (".{0,40}", ".{0,300}", ".{0,20}", prop::collection::vec(".{0,10}", 0..4)).prop_map(
            |(storage_name, relative_path, gl_repository, git_alternate_object_directories)| Repository {
                storage_name,
                relative_path,
                gl_repository,
                git_alternate_object_directories,
                ..Repository::default()
            },
        )
    }

    proptest! {
        #[test]
        fn an_edit_is_what_decoding_and_encoding_would_do(
            pool in prop::option::of(repository()),
            origin in prop::option::of(repository()),
            storage in ".{0,200}",
            path in ".{0,200}",
        ) {
            let mut request = CreateObjectPoolRequest {
                object_pool: pool.map(|repository| ObjectPool { repository: Some(repository) }),
                origin,
            };
            let bytes = request.encode_to_vec();
            let out = edited(&bytes, &[1, 1], &storage, &path);
            match request.object_pool.as_mut().and_then(|pool| pool.repository.as_mut()) {
                None => prop_assert_eq!(out, None),
                Some(repository) => {
                    repository.storage_name = storage;
                    repository.relative_path = path;
                    let decoded = CreateObjectPoolRequest::decode(&out.unwrap()[..]).unwrap();
                    prop_assert_eq!(decoded, request);
                }
            }
        }

        #[test]
        fn garbage_never_panics_and_never_becomes_valid(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            path in prop::collection::vec(1u32..4, 0..3),
        ) {
            let found = message_at(&bytes, &path);
            let mut out = Vec::new();
            let result = edit(&bytes, &path, &edits("s", "p"), &mut out);
            if let (Ok(Some(_)), Ok(true)) = (&found, &result) {
                let repository = message_at(&out, &path).unwrap().unwrap();
                prop_assert_eq!(text(repository, 2), Ok("s"));
                prop_assert_eq!(text(repository, 3), Ok("p"));
            }
        }

        #[test]
        fn a_message_cut_short_is_never_taken_for_a_whole_one(repository in repository(), cut in any::<prop::sample::Index>()) {
            let bytes = WriteRefRequest { repository: Some(repository), ..WriteRefRequest::default() }.encode_to_vec();
            let cut = cut.index(bytes.len());
            if cut > 0 {
                prop_assert_eq!(message_at(&bytes[..cut], &[1]), Err(WireError::Truncated));
            }
        }
    }
}
