//! `git log` with a format of ours: ids, and beside each what a client asked to hear of the commit.
//!
//! Everything that people write can hold anything but a NUL, so NULs stand between the parts: an empty one, the id, the
//! names of references, the trailers, and behind the last of those the line with the statistics.

use tabularium_proto::gitaly::{CommitStatInfo, CommitTrailer};

use super::{diff::Malformed, objects};

/// What else is to be printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Details {
    pub(crate) trailers: bool,
    pub(crate) references: bool,
}

impl Details {
    /// `--format` for [`Parser`].
    pub(crate) fn format(self) -> String {
        let references = if self.references { "%D" } else { "" };
        let trailers = if self.trailers { "%(trailers:unfold,separator=%x00)" } else { "" };
        format!("--format=%x00%x00%H%x00{references}%x00{trailers}")
    }
}

/// One commit.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Entry {
    pub(crate) id: Vec<u8>,
    pub(crate) references: Vec<Vec<u8>>,
    pub(crate) trailers: Vec<CommitTrailer>,
    pub(crate) stats: Option<CommitStatInfo>,
}

#[derive(Debug, Default)]
enum State {
    /// The next part is empty or an id.
    #[default]
    Begin,
    References(Entry),
    Trailers(Entry, Vec<u8>),
}

/// Puts the parts together.
#[derive(Debug, Default)]
pub(crate) struct Parser(State);

impl Parser {
    /// Takes what stood before the next NUL, or the rest of the output. A commit is complete when the next one begins.
    pub(crate) fn part(&mut self, part: &[u8]) -> Result<Option<Entry>, Malformed> {
        match std::mem::take(&mut self.0) {
            State::Begin if part.is_empty() => Ok(None),
            State::Begin => {
                self.0 = State::References(Entry { id: part.to_vec(), ..Entry::default() });
                Ok(None)
            }
            State::References(entry) => {
                self.0 = State::Trailers(Entry { references: parse_references(part), ..entry }, Vec::new());
                Ok(None)
            }
            State::Trailers(entry, trailers) if part.is_empty() => complete(entry, &trailers).map(Some),
            State::Trailers(entry, mut trailers) => {
                trailers.extend_from_slice(part);
                trailers.push(0);
                self.0 = State::Trailers(entry, trailers);
                Ok(None)
            }
        }
    }

    /// The last commit.
    pub(crate) fn finish(self) -> Result<Option<Entry>, Malformed> {
        match self.0 {
            State::Begin => Ok(None),
            State::References(_) => Err(Malformed("log ends in the middle of a commit")),
            State::Trailers(entry, trailers) => complete(entry, &trailers).map(Some),
        }
    }
}

fn complete(mut entry: Entry, text: &[u8]) -> Result<Entry, Malformed> {
    let end = text.iter().position(|byte| *byte == b'\n').unwrap_or(text.len());
    let (trailers, rest) = text.split_at(end);
    entry.trailers = objects::parse_trailers(trailers);
    let rest: Vec<u8> = rest.iter().copied().filter(|byte| *byte != 0).collect();
    let rest = rest.trim_ascii();
    if !rest.is_empty() {
        entry.stats = Some(parse_stats(rest).ok_or(Malformed("unexpected stats format"))?);
    }
    Ok(entry)
}

/// `HEAD -> refs/heads/main, tag: refs/tags/v1`. No reference has a space in its name.
fn parse_references(text: &[u8]) -> Vec<Vec<u8>> {
    text.split(|byte| *byte == b' ')
        .map(|word| word.strip_suffix(b",").unwrap_or(word))
        .filter(|word| !word.is_empty() && *word != b"->" && *word != b"tag:")
        .map(<[u8]>::to_vec)
        .collect()
}

/// `2 files changed, 3 insertions(+), 1 deletion(-)`, of which all but the first may be missing.
fn parse_stats(text: &[u8]) -> Option<CommitStatInfo> {
    let text = std::str::from_utf8(text).ok()?;
    let mut stats = CommitStatInfo::default();
    for (number, part) in text.split(", ").enumerate() {
        let (count, what) = part.split_once(' ')?;
        let count: i32 = count.parse().ok()?;
        match (number, what) {
            (0, "file changed" | "files changed") => stats.changed_files = count,
            (1.., "insertion(+)" | "insertions(+)") => stats.additions = count,
            (1.., "deletion(-)" | "deletions(-)") => stats.deletions = count,
            _ => return None,
        }
    }
    Some(stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(output: &[u8]) -> Result<Vec<Entry>, Malformed> {
        let mut parser = Parser::default();
        let mut found = Vec::new();
        for part in output.split(|byte| *byte == 0) {
            found.extend(parser.part(part)?);
        }
        found.extend(parser.finish()?);
        Ok(found)
    }

    #[test]
    fn commits_with_everything() {
        let output = b"\0\0aa\0HEAD -> refs/heads/main, tag: refs/tags/v1, refs/heads/x\0A: 1\0B: \x01\xff\n\n \
                       2 files changed, 3 insertions(+), 1 deletion(-)\n\0\0bb\0\0\n\0\0cc\0\0\n\n 1 file changed\n";
        let found = parse(output).unwrap();
        assert_eq!(found.iter().map(|entry| entry.id.as_slice()).collect::<Vec<_>>(), [b"aa", b"bb", b"cc"]);
        assert_eq!(found[0].references, [&b"HEAD"[..], b"refs/heads/main", b"refs/tags/v1", b"refs/heads/x"]);
        assert_eq!(found[0].trailers.len(), 2);
        assert_eq!(found[0].trailers[1].value, b"\x01\xff");
        assert_eq!(found[0].stats, Some(CommitStatInfo { additions: 3, deletions: 1, changed_files: 2 }));
        assert_eq!((found[1].stats, found[1].trailers.len(), found[1].references.len()), (None, 0, 0));
        assert_eq!(found[2].stats, Some(CommitStatInfo { changed_files: 1, ..CommitStatInfo::default() }));
        assert_eq!(parse(b"").unwrap(), []);
    }

    #[test]
    fn half_a_commit_and_odd_statistics_are_refused() {
        assert!(parse(b"\0\0aa").is_err());
        assert!(parse(b"\0\0aa\0\0\n\n nonsense\n").is_err());
        assert_eq!(parse_stats(b"3 insertions(+)"), None);
    }
}
