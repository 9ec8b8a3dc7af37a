//! Commits, tags and trees as git stores them, turned into the messages of the wire.
//!
//! History holds every mistake that any git client ever made, so parsing a commit never fails: what is missing or
//! malformed stays empty. The rules are those of the wire reference, section a.

use tabularium_proto::gitaly::{CommitAuthor, CommitTrailer, GitCommit, SignatureType, Tag};

/// Longest message that is handed out whole. Of a longer one the beginning is sent, and its true length.
pub(crate) const MAX_MESSAGE_BYTES: usize = 10 * 1024;
/// How much of a commit or tag has to be read: headers (merge tags and signatures included) and the message's part.
pub(crate) const MAX_HEAD_BYTES: usize = 1024 * 1024;
/// Trailers of one commit that are told of, and how long they may be.
const MAX_TRAILERS: usize = 64;
const MAX_TRAILER_KEY_BYTES: usize = 128;
const MAX_TRAILER_VALUE_BYTES: usize = 512;
/// Seconds for dates that make no sense; the largest a Go program can hold, which clients compare with.
const FALLBACK_SECONDS: i64 = 9_223_371_974_719_179_007;
/// Dates from here on count as senseless.
const MAX_SECONDS: i64 = 1 << 53;

/// The headers of an object and where its message starts; `None` when no message follows.
fn split_headers(raw: &[u8]) -> (&[u8], Option<usize>) {
    if raw.first() == Some(&b'\n') {
        return (&[], Some(1));
    }
    match raw.windows(2).position(|pair| pair == b"\n\n") {
        Some(at) => (raw.get(..at).unwrap_or_default(), Some(at + 2)),
        None => (raw, None),
    }
}

/// Key and value of every header line; continuation lines are left out.
fn header_lines(headers: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    headers.split(|byte| *byte == b'\n').filter_map(|line| {
        let at = line.iter().position(|byte| *byte == b' ')?;
        if at == 0 { None } else { Some((line.get(..at)?, line.get(at + 1..)?)) }
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The message of a commit or tag, all of which is given.
pub(crate) fn message(raw: &[u8]) -> &[u8] {
    split_headers(raw).1.and_then(|at| raw.get(at..)).unwrap_or_default()
}

/// A commit. `head` is the beginning of the object, `size` its whole length.
pub(crate) fn parse_commit(id: &str, head: &[u8], size: u64) -> GitCommit {
    let (headers, message_at) = split_headers(head);
    let mut commit = GitCommit { id: id.to_owned(), ..GitCommit::default() };
    for (key, value) in header_lines(headers) {
        match key {
            b"tree" => commit.tree_id = text(value),
            b"parent" => commit.parent_ids.push(text(value)),
            b"author" => commit.author = Some(parse_person(value)),
            b"committer" => commit.committer = Some(parse_person(value)),
            b"encoding" => commit.encoding = text(value),
            b"gpgsig" | b"gpgsig-sha256" => commit.set_signature_type(signature_type(value)),
            _ => {}
        }
    }
    if let Some(at) = message_at {
        let body = head.get(at..).unwrap_or_default();
        commit.body_size = true_length(size, at);
        commit.subject = first_line(body).to_vec();
        commit.body = body.get(..MAX_MESSAGE_BYTES).unwrap_or(body).to_vec();
    }
    commit
}

fn true_length(size: u64, at: usize) -> i64 {
    let at = u64::try_from(at).unwrap_or(u64::MAX);
    i64::try_from(size.saturating_sub(at)).unwrap_or(i64::MAX)
}

fn first_line(body: &[u8]) -> &[u8] {
    let mut line = body.split(|byte| *byte == b'\n').next().unwrap_or_default();
    while let Some(rest) = line.strip_suffix(b"\r") {
        line = rest;
    }
    line
}

/// `Name <email> seconds zone`, or as much of it as is there.
pub(crate) fn parse_person(line: &[u8]) -> CommitAuthor {
    let mut author = CommitAuthor::default();
    let Some(open) = line.iter().position(|byte| *byte == b'<') else {
        author.name = line.strip_suffix(b" ").unwrap_or(line).to_vec();
        return author;
    };
    let (name, rest) = (line.get(..open).unwrap_or_default(), line.get(open + 1..).unwrap_or_default());
    author.name = name.strip_suffix(b" ").unwrap_or(name).to_vec();
    let Some(close) = rest.iter().position(|byte| *byte == b'>') else { return author };
    author.email = rest.get(..close).unwrap_or_default().to_vec();
    let mut fields = rest
        .get(close + 1..)
        .unwrap_or_default()
        .split(u8::is_ascii_whitespace)
        .filter(|field| !field.is_empty());
    let Some(seconds) = fields.next() else { return author };
    let seconds = std::str::from_utf8(seconds).ok().and_then(|seconds| seconds.parse::<i64>().ok());
    let seconds = seconds.filter(|seconds| *seconds < MAX_SECONDS).unwrap_or(FALLBACK_SECONDS);
    author.date = Some(prost_types::Timestamp { seconds, nanos: 0 });
    if let (Some(zone), None) = (fields.next(), fields.next()) {
        author.timezone = zone.to_vec();
    }
    author
}

fn signature_type(first_line: &[u8]) -> SignatureType {
    match first_line.trim_ascii_end() {
        b"-----BEGIN SIGNED MESSAGE-----" => SignatureType::X509,
        b"-----BEGIN PGP MESSAGE-----" | b"-----BEGIN PGP SIGNATURE-----" => SignatureType::Pgp,
        b"-----BEGIN SSH SIGNATURE-----" => SignatureType::Ssh,
        _ => SignatureType::None,
    }
}

/// A tag object; the commit it points to is filled in by whoever can read it. `name` is what the ref calls it.
pub(crate) fn parse_tag(id: &str, name: &[u8], head: &[u8], size: u64) -> Tag {
    let (headers, message_at) = split_headers(head);
    let mut tag = Tag { id: id.to_owned(), name: name.to_vec(), ..Tag::default() };
    for (key, value) in header_lines(headers) {
        if key == b"tagger" {
            tag.tagger = Some(parse_person(value));
        }
    }
    let Some(at) = message_at else { return tag };
    let mut body = head.get(at..).unwrap_or_default();
    let cut_off = u64::try_from(head.len()).unwrap_or(u64::MAX) < size;
    if cut_off {
        tag.message_size = true_length(size, at);
    } else {
        while let Some(rest) = body.strip_suffix(b"\n") {
            body = rest;
        }
        tag.message_size = i64::try_from(body.len()).unwrap_or(i64::MAX);
    }
    // Tags carry their signature at the end of the message.
    if let Some(begin) =
        body.windows(10).position(|window| window == b"-----BEGIN").filter(|begin| *begin > 0)
    {
        let line = body.get(begin..).unwrap_or_default();
        tag.set_signature_type(signature_type(first_line(line)));
    }
    tag.message = body.get(..MAX_MESSAGE_BYTES).unwrap_or(body).to_vec();
    tag
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeaderPart {
    Signed,
    FirstSignature,
    OtherSignature,
}

/// The first signature of a commit, and what it signs: everything but the signatures. `None` if it is not signed.
pub(crate) fn split_signature(raw: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut signed_text = Vec::with_capacity(raw.len());
    // Git looks at the first one only.
    let mut signature: Option<Vec<u8>> = None;
    let mut part = HeaderPart::Signed;
    let mut taken = 0;
    for line in raw.split_inclusive(|byte| *byte == b'\n').take_while(|line| *line != b"\n") {
        taken += line.len();
        let begins = [&b"gpgsig "[..], b"gpgsig-sha256 "].iter().find_map(|key| line.strip_prefix(*key));
        match (part, line.strip_prefix(b" "), begins) {
            (HeaderPart::FirstSignature, Some(continued), _) => {
                signature.get_or_insert_default().extend_from_slice(continued);
            }
            (HeaderPart::OtherSignature, Some(_), _) => {}
            (HeaderPart::Signed, _, Some(first)) if signature.is_none() => {
                signature = Some(first.to_vec());
                part = HeaderPart::FirstSignature;
            }
            (HeaderPart::FirstSignature | HeaderPart::OtherSignature, _, Some(_)) => {
                part = HeaderPart::OtherSignature;
            }
            _ => {
                part = HeaderPart::Signed;
                signed_text.extend_from_slice(line);
            }
        }
    }
    signed_text.extend_from_slice(raw.get(taken..).unwrap_or_default());
    let signature = signature?;
    let signature = signature.strip_suffix(b"\n").unwrap_or(&signature).to_vec();
    Some((signature, signed_text))
}

/// What `%(trailers:unfold,separator=%x00)` printed. So many are told of, up to the first that is too long.
pub(crate) fn parse_trailers(output: &[u8]) -> Vec<CommitTrailer> {
    let trailers = output.split(|byte| *byte == 0).filter_map(|line| {
        let at = line.iter().position(|byte| *byte == b':').filter(|at| *at > 0)?;
        let value = line.get(at + 1..)?.trim_ascii();
        Some(CommitTrailer { key: line.get(..at)?.to_vec(), value: value.to_vec() })
    });
    let fits = |trailer: &CommitTrailer| {
        trailer.key.len() <= MAX_TRAILER_KEY_BYTES && trailer.value.len() <= MAX_TRAILER_VALUE_BYTES
    };
    trailers.take_while(fits).take(MAX_TRAILERS).collect()
}

/// One line of a tree object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TreeItem {
    /// Unix mode as git writes it: 0o100644, 0o40000, ...
    pub(crate) mode: u32,
    /// File name, without directory.
    pub(crate) name: Vec<u8>,
    /// Object id in hex.
    pub(crate) id: String,
}

/// What an entry of a tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ItemKind {
    /// File or symbolic link.
    Blob,
    /// Directory.
    Tree,
    /// Submodule.
    Commit,
}

impl ItemKind {
    /// By the mode of the entry.
    pub(crate) fn of_mode(mode: u32) -> Self {
        match mode & 0o170_000 {
            0o040_000 => Self::Tree,
            0o160_000 => Self::Commit,
            _ => Self::Blob,
        }
    }
}

/// A tree object that does not follow the format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed tree object")]
pub(crate) struct MalformedTree;

/// A tree object; `id_bytes` is 20, or 32 in a SHA-256 repository.
pub(crate) fn parse_tree(raw: &[u8], id_bytes: usize) -> Result<Vec<TreeItem>, MalformedTree> {
    let mut items = Vec::new();
    let mut rest = raw;
    while !rest.is_empty() {
        let space = rest.iter().position(|byte| *byte == b' ').ok_or(MalformedTree)?;
        let nul = rest.iter().position(|byte| *byte == 0).ok_or(MalformedTree)?;
        let mode = std::str::from_utf8(rest.get(..space).ok_or(MalformedTree)?).map_err(|_| MalformedTree)?;
        let mode = u32::from_str_radix(mode, 8).map_err(|_| MalformedTree)?;
        let name = rest.get(space + 1..nul).ok_or(MalformedTree)?.to_vec();
        let id = rest.get(nul + 1..nul + 1 + id_bytes).ok_or(MalformedTree)?;
        items.push(TreeItem { mode, name, id: hex::encode(id) });
        rest = rest.get(nul + 1 + id_bytes..).unwrap_or_default();
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(raw: &[u8]) -> GitCommit {
        parse_commit("c0ffee", raw, u64::try_from(raw.len()).unwrap())
    }

    #[test]
    fn an_ordinary_commit() {
        let parsed = commit(
            b"tree aa\nparent bb\nparent cc\nauthor A U Thor <a@x> 1700000000 +0200\n\
              committer C <c@x> 1700000001 -0330\n\nSubject\r\n\nBody\n",
        );
        assert_eq!(parsed.tree_id, "aa");
        assert_eq!(parsed.parent_ids, ["bb", "cc"]);
        let author = parsed.author.unwrap();
        assert_eq!((author.name.as_slice(), author.email.as_slice()), (&b"A U Thor"[..], &b"a@x"[..]));
        assert_eq!(author.date.unwrap().seconds, 1_700_000_000);
        assert_eq!(author.timezone, b"+0200");
        assert_eq!(parsed.committer.unwrap().timezone, b"-0330");
        assert_eq!(parsed.subject, b"Subject");
        assert_eq!(parsed.body, b"Subject\r\n\nBody\n");
        assert_eq!(parsed.body_size, 15);
        assert_eq!(parsed.signature_type, SignatureType::None as i32);
    }

    #[test]
    fn a_commit_without_a_message() {
        for raw in [
            &b"tree aa\nauthor A <a> 1 +0000\ncommitter A <a> 1 +0000\n\n"[..],
            b"tree aa\nauthor A <a> 1 +0000",
        ] {
            let parsed = commit(raw);
            assert_eq!(parsed.tree_id, "aa");
            assert_eq!((parsed.subject.len(), parsed.body.len(), parsed.body_size), (0, 0, 0));
        }
    }

    #[test]
    fn signatures_encodings_and_merge_tags_are_headers_and_not_the_message() {
        let parsed = commit(
            b"tree aa\nauthor A <a> 1 +0000\ncommitter A <a> 1 +0000\nencoding ISO-8859-1\n\
              mergetag object dd\n type commit\n tag v1\n tagger T <t> 5 +0000\n \n tree ee\n\
              gpgsig -----BEGIN PGP SIGNATURE-----\n \n abc\n -----END PGP SIGNATURE-----\n\nGr\xfc\xdfe\n",
        );
        assert_eq!(parsed.encoding, "ISO-8859-1");
        assert_eq!(parsed.signature_type, SignatureType::Pgp as i32);
        assert_eq!(parsed.tree_id, "aa");
        assert_eq!(parsed.subject, b"Gr\xfc\xdfe");
        for (line, kind) in [
            ("-----BEGIN SIGNED MESSAGE-----", SignatureType::X509),
            ("-----BEGIN SSH SIGNATURE-----", SignatureType::Ssh),
            ("-----BEGIN PGP MESSAGE-----", SignatureType::Pgp),
            ("something else", SignatureType::None),
        ] {
            assert_eq!(commit(format!("gpgsig {line}\n x\n\nm").as_bytes()).signature_type, kind as i32);
        }
    }

    #[test]
    fn people_with_half_a_signature() {
        assert_eq!(parse_person(b"Only Name").name, b"Only Name");
        assert_eq!(parse_person(b"N <open").email, b"");
        let no_date = parse_person(b"N <e>");
        assert_eq!((no_date.email.as_slice(), no_date.date), (&b"e"[..], None));
        assert_eq!(parse_person(b"N <e> soon +0000").date.unwrap().seconds, FALLBACK_SECONDS);
        assert_eq!(parse_person(b"N <e> 9007199254740992 +0000").date.unwrap().seconds, FALLBACK_SECONDS);
        assert_eq!(parse_person(b"N <e> -5 +0000").date.unwrap().seconds, -5);
        assert_eq!(parse_person(b"<e> 1 +0000").name, b"");
        assert_eq!(parse_person(b"J\xf6rg <e> 1 +0000").name, b"J\xf6rg");
    }

    #[test]
    fn a_long_message_is_cut_and_its_length_kept() {
        let head = b"tree aa\n\nsubject\n".to_vec();
        let mut raw = head.clone();
        raw.resize(head.len() + 20_000, b'x');
        let whole = commit(&raw);
        assert_eq!(whole.body.len(), MAX_MESSAGE_BYTES);
        assert_eq!(whole.body_size, 20_008);
        let read_in_part =
            parse_commit("c0ffee", raw.get(..15_000).unwrap(), u64::try_from(raw.len()).unwrap());
        assert_eq!(read_in_part, whole);
    }

    #[test]
    fn tags_keep_their_signature_and_lose_the_last_newline() {
        let raw = b"object aa\ntype commit\ntag v1\ntagger T <t@x> 7 +0100\n\nRelease\n-----BEGIN SSH SIGNATURE-----\nxx\n-----END SSH SIGNATURE-----\n";
        let tag = parse_tag("dd", b"v1", raw, u64::try_from(raw.len()).unwrap());
        assert_eq!(tag.signature_type, SignatureType::Ssh as i32);
        assert_eq!(tag.tagger.unwrap().date.unwrap().seconds, 7);
        assert!(tag.message.starts_with(b"Release\n-----BEGIN") && tag.message.ends_with(b"-----"));
        assert_eq!(tag.message_size, i64::try_from(tag.message.len()).unwrap());
        let bare = parse_tag("dd", b"v1", b"object aa\ntype blob\ntag v1\n", 26);
        assert_eq!((bare.tagger, bare.message.len()), (None, 0));
    }

    #[test]
    fn a_signature_is_taken_out_of_what_it_signs() {
        let head = "tree aa\nauthor A <a> 1 +0000\ncommitter A <a> 1 +0000\n";
        let rest = "mergetag object bb\n type commit\n\nmessage\n\ngpgsig no header\n";
        let signed = "gpgsig -----BEGIN PGP SIGNATURE-----\n \n abc\n -----END PGP SIGNATURE-----\n";
        let other = "gpgsig-sha256 other\n lines\n";
        for raw in [[head, signed, rest].concat(), [head, signed, other, rest].concat()] {
            let (signature, text) = split_signature(raw.as_bytes()).unwrap();
            assert_eq!(signature, b"-----BEGIN PGP SIGNATURE-----\n\nabc\n-----END PGP SIGNATURE-----");
            assert_eq!(text, [head, rest].concat().as_bytes());
        }
        assert_eq!(split_signature([head, rest].concat().as_bytes()), None);
    }

    #[test]
    fn trailers_are_key_and_value() {
        let found = parse_trailers(b"Signed-off-by: A <a@x>\0Fixes: #1: yes\0no trailer\0\n");
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].key, b"Fixes");
        assert_eq!(found[1].value, b"#1: yes");
        let long = [&b"A: 1\0B: "[..], &[b'x'; 513], b"\0C: 2"].concat();
        assert_eq!(parse_trailers(&long).len(), 1, "nothing behind one that is too long");
        assert_eq!(parse_trailers(&b"A: 1\0".repeat(100)).len(), 64);
    }

    #[test]
    fn trees() {
        let mut raw = b"100644 a b\xff\0".to_vec();
        raw.extend([1_u8; 20]);
        raw.extend(b"40000 d\0");
        raw.extend([0x20_u8; 20]);
        let items = parse_tree(&raw, 20).unwrap();
        assert_eq!(items.len(), 2);
        assert_eq!(items[0].name, b"a b\xff");
        assert_eq!(items[0].id, "01".repeat(20));
        assert_eq!(ItemKind::of_mode(items[1].mode), ItemKind::Tree);
        raw.pop();
        assert_eq!(parse_tree(&raw, 20), Err(MalformedTree));
        assert_eq!(parse_tree(b"", 20), Ok(vec![]));
    }
}
