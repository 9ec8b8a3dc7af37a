//! A file with conflict markers, and what becomes of it when people have chosen a side for each conflict.

use std::collections::HashMap;

use sha1::{Digest as _, Sha1};

/// Longest file that is looked at, in bytes.
const MAX_BYTES: usize = 200 * 1024;

/// Why a file cannot be resolved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum MarkerError {
    /// It is too long, or empty, as one is that git does not merge.
    #[error("resolve: parse conflict for {0:?}: merging is not supported for file")]
    Unmergeable(String),
    /// A marker where none can be.
    #[error("resolve: parse conflict for {0:?}: unexpected conflict delimiter")]
    Unexpected(String),
    /// A conflict without an end.
    #[error("resolve: parse conflict for {0:?}: missing last delimiter")]
    Unended(String),
    /// Nobody said what is to become of a conflict.
    #[error("Missing resolution for section ID: {0}")]
    Unresolved(String),
}

/// Where a line comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Both,
    Ours,
    Theirs,
}

/// A line and its number in the file of either side.
struct Line<'a> {
    text: &'a [u8],
    side: Side,
    theirs: usize,
    ours: usize,
}

/// A file that git has put markers into.
pub(super) struct Marked<'a> {
    path: &'a str,
    lines: Vec<Line<'a>>,
}

impl<'a> Marked<'a> {
    /// Reads a file; the markers name the commits.
    pub(super) fn parse(
        content: &'a [u8],
        ours: &str,
        theirs: &str,
        path: &'a str,
    ) -> Result<Self, MarkerError> {
        if content.is_empty() || content.len() > MAX_BYTES {
            return Err(MarkerError::Unmergeable(path.to_owned()));
        }
        let (start, end) = (format!("<<<<<<< {ours}"), format!(">>>>>>> {theirs}"));
        let mut lines = Vec::new();
        let (mut side, mut their_line, mut our_line) = (Side::Both, 1, 1);
        for text in content.strip_suffix(b"\n").unwrap_or(content).split(|byte| *byte == b'\n') {
            let turned = [
                (start.as_bytes(), Side::Both, Side::Ours),
                (b"=======".as_slice(), Side::Ours, Side::Theirs),
                (end.as_bytes(), Side::Theirs, Side::Both),
            ];
            if let Some((_, from, to)) = turned.into_iter().find(|(marker, ..)| *marker == text) {
                if side != from {
                    return Err(MarkerError::Unexpected(path.to_owned()));
                }
                side = to;
                continue;
            }
            lines.push(Line { text, side, theirs: their_line, ours: our_line });
            if side != Side::Ours {
                their_line += 1;
            }
            if side != Side::Theirs {
                our_line += 1;
            }
        }
        if side != Side::Both {
            return Err(MarkerError::Unended(path.to_owned()));
        }
        Ok(Self { path, lines })
    }

    /// The file with the chosen sides. A conflict is known by its file and the lines it begins at.
    pub(super) fn resolve(
        &self,
        choices: &HashMap<String, String>,
        newline: bool,
    ) -> Result<Vec<u8>, MarkerError> {
        let mut resolved: Vec<&[u8]> = Vec::new();
        let mut choice: Option<Side> = None;
        for line in &self.lines {
            if line.side == Side::Both {
                choice = None;
                resolved.push(line.text);
                continue;
            }
            let chosen = match choice {
                Some(chosen) => chosen,
                None => self.choice(line, choices)?,
            };
            choice = Some(chosen);
            if line.side == chosen {
                resolved.push(line.text);
            }
        }
        let mut content = resolved.join(&b'\n');
        if newline {
            content.push(b'\n');
        }
        Ok(content)
    }

    fn choice(&self, first: &Line<'_>, choices: &HashMap<String, String>) -> Result<Side, MarkerError> {
        let file = hex::encode(Sha1::digest(self.path.as_bytes()));
        let id = format!("{file}_{}_{}", first.theirs, first.ours);
        match choices.get(&id).map(String::as_str) {
            Some("head") => Ok(Side::Ours),
            Some("origin") => Ok(Side::Theirs),
            _ => Err(MarkerError::Unresolved(id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &[u8] =
        b"1\n<<<<<<< aa\n2\n3\n=======\nzwei\n>>>>>>> bb\n4\n<<<<<<< aa\n=======\nmore\n>>>>>>> bb\n";

    fn id(theirs: usize, ours: usize) -> String {
        format!("{}_{theirs}_{ours}", hex::encode(Sha1::digest(b"f")))
    }

    fn choices(chosen: &[(String, &str)]) -> HashMap<String, String> {
        chosen.iter().map(|(id, side)| (id.clone(), (*side).to_owned())).collect()
    }

    #[test]
    fn sides_are_chosen() {
        let marked = Marked::parse(FILE, "aa", "bb", "f").unwrap();
        let chosen = choices(&[(id(2, 2), "head"), (id(4, 5), "origin")]);
        assert_eq!(marked.resolve(&chosen, true).unwrap(), b"1\n2\n3\n4\nmore\n");
        let chosen = choices(&[(id(2, 2), "origin"), (id(4, 5), "head")]);
        assert_eq!(marked.resolve(&chosen, false).unwrap(), b"1\nzwei\n4");
        for lacking in [&[(id(2, 2), "origin")][..], &[(id(2, 2), "origin"), (id(4, 5), "both")]] {
            let error = marked.resolve(&choices(lacking), false).unwrap_err();
            assert_eq!(error.to_string(), format!("Missing resolution for section ID: {}", id(4, 5)));
        }
    }

    #[test]
    fn files_that_make_no_sense() {
        let parse = |content: &[u8]| Marked::parse(content, "aa", "bb", "f").map(drop).unwrap_err();
        assert_eq!(parse(b""), MarkerError::Unmergeable("f".into()));
        assert_eq!(parse(&vec![b'x'; MAX_BYTES + 1]), MarkerError::Unmergeable("f".into()));
        for unexpected in ["=======\n", ">>>>>>> bb\n", "<<<<<<< aa\n<<<<<<< aa\n", "<<<<<<< aa\n>>>>>>> bb"]
        {
            assert_eq!(parse(unexpected.as_bytes()), MarkerError::Unexpected("f".into()), "{unexpected}");
        }
        assert_eq!(parse(b"<<<<<<< aa\n1\n=======\n"), MarkerError::Unended("f".into()));
    }
}
