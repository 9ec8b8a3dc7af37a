//! `:100644 100644 <id> <id> M`, a NUL, and one path or two: the records of `--raw -z`.

use super::Malformed;
use crate::git::revision::ObjectHash;

/// One side of a change. Mode 0 and an id of zeros mean that there is nothing on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Side {
    pub(crate) mode: i32,
    pub(crate) id: String,
}

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Added,
    Copied,
    Deleted,
    Modified,
    Renamed,
    TypeChanged,
    /// One of git's other letters, which two trees never give.
    Other,
}

impl Status {
    fn of_letter(letter: u8) -> Option<Self> {
        match letter {
            b'A' => Some(Self::Added),
            b'C' => Some(Self::Copied),
            b'D' => Some(Self::Deleted),
            b'M' => Some(Self::Modified),
            b'R' => Some(Self::Renamed),
            b'T' => Some(Self::TypeChanged),
            b'U' | b'X' => Some(Self::Other),
            _ => None,
        }
    }
}

/// A changed file. In the combined form of a merge there is an old side for each parent, otherwise one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) old: Vec<(Side, Status)>,
    pub(crate) new: Side,
    /// Where it was, if it was renamed or copied.
    pub(crate) old_path: Option<Vec<u8>>,
    pub(crate) path: Vec<u8>,
}

/// What a record completes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    /// The changes from here on are those of this commit.
    Commit(String),
    Change(Change),
}

/// Puts records together.
#[derive(Debug, Default)]
pub(crate) struct Parser(Option<Pending>);

#[derive(Debug)]
struct Pending {
    old: Vec<(Side, Status)>,
    new: Side,
    old_path: Option<Vec<u8>>,
    /// A path from before the change comes first.
    moved: bool,
}

impl Parser {
    /// Takes what stood before the next NUL.
    pub(crate) fn record(&mut self, record: &[u8]) -> Result<Option<Record>, Malformed> {
        let Some(mut pending) = self.0.take() else {
            let record = behind_trees(record);
            if record.first() == Some(&b':') {
                self.0 = Some(parse_header(record).ok_or(Malformed("malformed raw diff"))?);
                return Ok(None);
            }
            if record.is_empty() {
                return Ok(None);
            }
            let id = parse_id(record).ok_or(Malformed("neither a change nor a commit"))?;
            return Ok(Some(Record::Commit(id)));
        };
        if pending.moved && pending.old_path.is_none() {
            pending.old_path = Some(record.to_vec());
            self.0 = Some(pending);
            return Ok(None);
        }
        let Pending { old, new, old_path, moved: _ } = pending;
        Ok(Some(Record::Change(Change { old, new, old_path, path: record.to_vec() })))
    }

    /// No change is half read.
    pub(crate) fn finish(&self) -> Result<(), Malformed> {
        if self.0.is_some() { Err(Malformed("raw diff ends in the middle of a change")) } else { Ok(()) }
    }
}

fn parse_id(text: &[u8]) -> Option<String> {
    [ObjectHash::Sha1, ObjectHash::Sha256].iter().find_map(|hash| hash.parse(text).ok())
}

/// Pairs of trees are named on lines of their own, whatever ends everything else.
fn behind_trees(mut record: &[u8]) -> &[u8] {
    while let Some(end) = record.iter().position(|byte| *byte == b'\n') {
        let mut ids = record.get(..end).unwrap_or_default().split(|byte| *byte == b' ').map(parse_id);
        if !matches!((ids.next(), ids.next(), ids.next()), (Some(Some(_)), Some(Some(_)), None)) {
            break;
        }
        record = record.get(end + 1..).unwrap_or_default();
    }
    record
}

fn parse_header(record: &[u8]) -> Option<Pending> {
    let text = std::str::from_utf8(record).ok()?;
    let fields = text.trim_start_matches(':');
    let sources = text.len() - fields.len();
    let fields: Vec<&str> = fields.split(' ').collect();
    let (status, sides) = fields.split_last()?;
    if sides.len() != 2 * (sources + 1) {
        return None;
    }
    let (modes, ids) = sides.split_at(sources + 1);
    let mut parsed = Vec::with_capacity(sides.len() / 2);
    for (mode, id) in modes.iter().zip(ids) {
        let mode = i32::from_str_radix(mode, 8).ok()?;
        parsed.push(Side { mode, id: (*id).to_owned() });
    }
    let new = parsed.pop()?;
    // A letter for each parent; the number behind it is how similar the two sides are.
    let letters = status.trim_end_matches(|character: char| character.is_ascii_digit());
    let statuses: Vec<Status> = letters.bytes().map(Status::of_letter).collect::<Option<_>>()?;
    if statuses.len() != sources {
        return None;
    }
    let moved = matches!(statuses.as_slice(), [Status::Renamed | Status::Copied]);
    Some(Pending { old: parsed.into_iter().zip(statuses).collect(), new, old_path: None, moved })
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "1111111111111111111111111111111111111111";
    const B: &str = "2222222222222222222222222222222222222222";

    fn parse(records: &[&[u8]]) -> Result<Vec<Record>, Malformed> {
        let mut parser = Parser::default();
        let mut found = Vec::new();
        for record in records {
            found.extend(parser.record(record)?);
        }
        parser.finish()?;
        Ok(found)
    }

    fn side(mode: i32, id: &str) -> Side {
        Side { mode, id: id.to_owned() }
    }

    #[test]
    fn changes_of_every_kind() {
        let header = |status: &str| format!(":100644 100755 {A} {B} {status}").into_bytes();
        let found =
            parse(&[&header("M"), b":odd\xff", &header("R087"), b"from", b"to", &header("T"), b"t"]).unwrap();
        let change = |status, old_path: Option<&[u8]>, path: &[u8]| {
            Record::Change(Change {
                old: vec![(side(0o100_644, A), status)],
                new: side(0o100_755, B),
                old_path: old_path.map(<[u8]>::to_vec),
                path: path.to_vec(),
            })
        };
        assert_eq!(
            found,
            [
                change(Status::Modified, None, b":odd\xff"),
                change(Status::Renamed, Some(b"from"), b"to"),
                change(Status::TypeChanged, None, b"t"),
            ]
        );
    }

    #[test]
    fn a_merge_has_a_side_for_each_parent_and_commits_stand_before_their_changes() {
        let header = format!("::100644 000000 100644 {A} {B} {A} MA");
        let found = parse(&[B.as_bytes(), header.as_bytes(), b"f"]).unwrap();
        assert_eq!(found[0], Record::Commit(B.to_owned()));
        let Record::Change(change) = &found[1] else { panic!("{found:?}") };
        assert_eq!(change.old, [(side(0o100_644, A), Status::Modified), (side(0, B), Status::Added)]);
    }

    #[test]
    fn pairs_of_trees_are_passed_over() {
        let header = format!("{A} {B}\n{B} {A}\n:100644 100644 {A} {B} M");
        let last = format!("{A} {A}\n");
        let found = parse(&[header.as_bytes(), b"f", last.as_bytes()]).unwrap();
        assert!(matches!(&found[..], [Record::Change(change)] if change.path == b"f"));
        assert!(parse(&[format!("{A} {B} {A}\n").as_bytes()]).is_err());
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            &b"nonsense"[..],
            b":100644 100644 M",
            b":100644 100644 a b Q",
            b":100644 100644 a b MM",
            b":x 100644 a b M",
        ] {
            assert!(parse(&[bad]).is_err(), "{bad:?}");
        }
        assert!(parse(&[format!(":100644 100644 {A} {B} M").as_bytes()]).is_err(), "no path");
    }
}
