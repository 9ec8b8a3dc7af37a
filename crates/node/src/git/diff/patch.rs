//! `git diff --raw --patch -z`: first the list of changed files, then their patches in the same order, as far as they have
//! one.

use std::collections::VecDeque;

use super::{
    MAX_PATCH_BYTES, Malformed,
    limits::{Limits, Spent},
    raw::{Change, Side, Status},
};

/// Most bytes of the list of files. It is complete before the first patch comes.
const MAX_LIST_BYTES: usize = 64 * 1024 * 1024;
/// What a file of the list weighs beside its paths.
const LISTED_OVERHEAD: usize = 160;
const SECTION: &[u8] = b"diff --git ";

/// How one file differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileDiff {
    pub(crate) from: Side,
    pub(crate) to: Side,
    pub(crate) from_path: Vec<u8>,
    pub(crate) to_path: Vec<u8>,
    /// Hunks, without the header of the file. Empty if it is left out.
    pub(crate) patch: Vec<u8>,
    /// Length of the patch before it was left out.
    pub(crate) patch_size: usize,
    pub(crate) binary: bool,
    pub(crate) lines_added: i32,
    pub(crate) lines_removed: i32,
    pub(crate) collapsed: bool,
    pub(crate) too_large: bool,
    /// The limits are reached with this file, which is not told of unless all are.
    pub(crate) overflow: bool,
}

impl FileDiff {
    fn of(listed: Listed) -> Self {
        let Listed { from, to, from_path, to_path } = listed;
        Self {
            from,
            to,
            from_path,
            to_path,
            patch: Vec::new(),
            patch_size: 0,
            binary: false,
            lines_added: 0,
            lines_removed: 0,
            collapsed: false,
            too_large: false,
            overflow: false,
        }
    }
}

#[derive(Debug)]
struct Listed {
    from: Side,
    to: Side,
    from_path: Vec<u8>,
    to_path: Vec<u8>,
}

impl Listed {
    /// The line that begins this file's patch.
    fn header(&self) -> Vec<u8> {
        [SECTION, &quoted(b"a/", &self.from_path), b" ", &quoted(b"b/", &self.to_path)].concat()
    }
}

/// A path as git writes it in headers.
fn quoted(prefix: &[u8], path: &[u8]) -> Vec<u8> {
    let plain = |byte: &u8| matches!(byte, 0x20..=0x7e) && !matches!(byte, b'"' | b'\\');
    if path.iter().all(plain) {
        return [prefix, path].concat();
    }
    let mut text = vec![b'"'];
    text.extend_from_slice(prefix);
    for byte in path {
        let letter = match byte {
            0x07 => b'a',
            0x08 => b'b',
            b'\t' => b't',
            b'\n' => b'n',
            0x0b => b'v',
            0x0c => b'f',
            b'\r' => b'r',
            b'"' | b'\\' => *byte,
            other if plain(other) => {
                text.push(*other);
                continue;
            }
            other => {
                text.extend_from_slice(format!("\\{other:03o}").as_bytes());
                continue;
            }
        };
        text.extend_from_slice(&[b'\\', letter]);
    }
    text.push(b'"');
    text
}

/// What a line of a patch is, by how it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// Of no use to anybody.
    Other,
    Hunk,
    Added,
    Removed,
    Content,
    Binary,
}

#[derive(Debug)]
struct Open {
    diff: FileDiff,
    line: Line,
    lines: i64,
    bytes: i64,
    /// Bytes of the patch that are kept at most: from here on it will be left out.
    keep: usize,
}

/// Puts files and their patches together, within limits.
#[derive(Debug)]
pub(crate) struct Parser {
    limits: Limits,
    spent: Spent,
    listed: VecDeque<Listed>,
    list_bytes: usize,
    /// More files differ than can be told of.
    list_cut: bool,
    zero_id: String,
    /// Headers are not looked at.
    blobs: bool,
    open: Option<Open>,
    ready: VecDeque<FileDiff>,
    /// No more patches are collected.
    without_patches: bool,
    /// Nothing that follows is told of.
    ended: bool,
}

impl Parser {
    /// For a repository whose "no object" is `zero_id`.
    pub(crate) fn new(limits: Limits, zero_id: String) -> Self {
        Self {
            limits: limits.bounded(),
            spent: Spent::default(),
            listed: VecDeque::new(),
            list_bytes: 0,
            list_cut: false,
            zero_id,
            blobs: false,
            open: None,
            ready: VecDeque::new(),
            without_patches: false,
            ended: false,
        }
    }

    /// For two blobs, which git does not name as it names files: whatever patch comes is theirs. The limits are taken as
    /// they are.
    pub(crate) fn of_blobs(limits: Limits, from: Side, to: Side) -> Self {
        let mut parser = Self::new(Limits::default(), String::new());
        parser.limits = limits;
        parser.listed.push_back(Listed { from, to, from_path: Vec::new(), to_path: Vec::new() });
        parser.blobs = true;
        parser
    }

    /// Takes a file of the list.
    pub(crate) fn list(&mut self, change: Change) -> Result<(), Malformed> {
        let Change { old, new, old_path, path } = change;
        let Ok([(from, status)]) = <[_; 1]>::try_from(old) else {
            return Err(Malformed("a difference of two trees has one old side"));
        };
        let from_path = old_path.unwrap_or_else(|| path.clone());
        if status == Status::TypeChanged {
            // Git shows these as the end of one file and the beginning of another.
            let nothing = Side { mode: 0, id: self.zero_id.clone() };
            self.remember(Listed {
                from,
                to: nothing.clone(),
                from_path: from_path.clone(),
                to_path: path.clone(),
            })?;
            return self.remember(Listed { from: nothing, to: new, from_path, to_path: path });
        }
        self.remember(Listed { from, to: new, from_path, to_path: path })
    }

    fn remember(&mut self, listed: Listed) -> Result<(), Malformed> {
        if self.limits.files().is_some_and(|files| self.listed.len() >= files) {
            self.list_cut = true;
            return Ok(());
        }
        self.list_bytes += listed.from_path.len() + listed.to_path.len() + LISTED_OVERHEAD;
        if self.list_bytes > MAX_LIST_BYTES {
            return Err(Malformed("too many files differ"));
        }
        self.listed.push_back(listed);
        Ok(())
    }

    /// Takes a piece of a line; `begins` says whether it is the first of its line, which has to hold what tells lines
    /// apart. The newline belongs to the line.
    pub(crate) fn piece(&mut self, piece: &[u8], begins: bool) -> Result<(), Malformed> {
        if self.ended {
            return Ok(());
        }
        if begins && piece.starts_with(SECTION) {
            self.close();
            return if self.ended { Ok(()) } else { self.section(piece) };
        }
        let without_patches = self.without_patches;
        let Some(open) = &mut self.open else {
            return Err(Malformed("patch does not begin with a header"));
        };
        if begins {
            open.line = classify(piece, open.diff.patch_size == 0);
            match open.line {
                Line::Added => open.diff.lines_added = open.diff.lines_added.saturating_add(1),
                Line::Removed => open.diff.lines_removed = open.diff.lines_removed.saturating_add(1),
                Line::Binary => open.diff.binary = true,
                Line::Other | Line::Hunk | Line::Content => {}
            }
        }
        if open.line == Line::Other {
            return Ok(());
        }
        if open.line != Line::Hunk {
            open.lines += i64::from(begins);
            open.bytes += i64::try_from(piece.len()).unwrap_or(i64::MAX);
        }
        if without_patches {
            return Ok(());
        }
        open.diff.patch_size += piece.len();
        if open.diff.patch_size <= open.keep {
            open.diff.patch.extend_from_slice(piece);
        } else if open.keep == MAX_PATCH_BYTES {
            return Err(Malformed("patch is too large"));
        }
        Ok(())
    }

    /// A patch begins: of the first listed file that has this header. Those before it have none.
    fn section(&mut self, line: &[u8]) -> Result<(), Malformed> {
        let header = line.strip_suffix(b"\n").unwrap_or(line);
        loop {
            let Some(listed) = self.listed.pop_front() else {
                if self.list_cut {
                    self.overflow();
                    return Ok(());
                }
                return Err(Malformed("patch of a file that is not listed"));
            };
            self.spent.file();
            let found = self.blobs || listed.header() == header;
            let diff = FileDiff::of(listed);
            if found {
                let keep = self.limits.patch_bytes(&diff.to_path);
                let keep = keep.map_or(MAX_PATCH_BYTES, |bytes| usize::try_from(bytes).unwrap_or_default());
                let keep = keep.min(MAX_PATCH_BYTES);
                self.open = Some(Open { diff, line: Line::Other, lines: 0, bytes: 0, keep });
                return Ok(());
            }
            self.ready.push_back(diff);
        }
    }

    /// The open patch is complete.
    fn close(&mut self) {
        let Some(Open { mut diff, lines, bytes, .. }) = self.open.take() else { return };
        let size = i64::try_from(diff.patch_size).unwrap_or(i64::MAX);
        let verdict = self.spent.patch(&self.limits, &diff.to_path, lines, bytes, size);
        diff.collapsed = verdict.collapsed;
        diff.too_large = verdict.too_large;
        if verdict.collapsed || verdict.too_large {
            diff.patch = Vec::new();
        }
        if verdict.overflow && !self.limits.collect_all_paths {
            return self.overflow();
        }
        if verdict.overflow {
            diff.patch = Vec::new();
            diff.overflow = true;
            self.without_patches = true;
        }
        self.ready.push_back(diff);
    }

    /// The listing ends here, with a file that says so and nothing else.
    fn overflow(&mut self) {
        self.ended = true;
        let nothing = || Side { mode: 0, id: String::new() };
        let (from, to) = (nothing(), nothing());
        let marker = FileDiff::of(Listed { from, to, from_path: Vec::new(), to_path: Vec::new() });
        self.ready.push_back(FileDiff { overflow: true, ..marker });
    }

    /// The next file that is complete.
    pub(crate) fn next(&mut self) -> Option<FileDiff> {
        self.ready.pop_front()
    }

    /// The listing has been cut off: nothing that still comes matters.
    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Everything has been read; more files may be complete now.
    pub(crate) fn finish(&mut self) {
        self.close();
        if self.ended {
            return;
        }
        // Whatever is left has no patch.
        self.ready.extend(self.listed.drain(..).map(FileDiff::of));
        if self.list_cut {
            self.overflow();
        }
    }
}

fn classify(piece: &[u8], nothing_yet: bool) -> Line {
    let starts = |prefix: &[u8]| piece.starts_with(prefix);
    if nothing_yet && (starts(b"---") || starts(b"+++")) {
        return Line::Other;
    }
    match piece.first() {
        Some(b'@') if starts(b"@@") => Line::Hunk,
        Some(b'B') if starts(b"Binary") => Line::Binary,
        Some(b'+') => Line::Added,
        Some(b'-') => Line::Removed,
        Some(b' ' | b'\\') => Line::Content,
        // The end of a line among words.
        Some(b'~') if starts(b"~\n") => Line::Content,
        _ => Line::Other,
    }
}

#[cfg(test)]
mod tests;
