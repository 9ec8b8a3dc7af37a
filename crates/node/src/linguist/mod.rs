//! Which language a file is written in, and which files say nothing about a project's languages.
//!
//! What is told apart by what is linguist's data (`data/`, under its own license there): languages with their file names
//! ([`catalogue`]), rules for extensions that several languages share ([`content`]), and where vendored code and
//! documentation lie ([`paths`]). Which files a program wrote is in [`generated`]. The order in which all of it is asked
//! is in [`detection`].
//!
//! Pure: paths and the beginning of contents go in, words come out. `services/commit_service/languages.rs` adds up a
//! repository by it.

mod catalogue;
mod content;
mod detection;
mod generated;
mod paths;

use regex::bytes::{Regex, RegexBuilder};

pub(crate) use catalogue::{Kind, Language, by_alias};
pub(crate) use detection::language;
pub(crate) use generated::is_generated;
pub(crate) use paths::{is_documentation, is_vendored};

/// A pattern of linguist's or of ours: lines matter, and bytes need not be text.
#[expect(clippy::expect_used, reason = "constants, each of which a test compiles")]
fn pattern(text: &str) -> Regex {
    RegexBuilder::new(text).multi_line(true).unicode(false).build().expect("a constant")
}

/// The last component of a path.
fn base_name(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').next().unwrap_or(path)
}

/// What stands behind the last dot of the last component, in lower case, the dot included; empty if there is none.
fn extension(path: &[u8]) -> Vec<u8> {
    let name = base_name(path);
    let dot = name.iter().rposition(|byte| *byte == b'.');
    dot.and_then(|dot| name.get(dot..)).unwrap_or_default().to_ascii_lowercase()
}

/// Lines without their ends; what stands behind the last newline is one only if it is something.
fn lines(content: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    let content = content.strip_suffix(b"\n").unwrap_or(content);
    let lines = content.split(|byte| *byte == b'\n');
    lines.map(|line| line.strip_suffix(b"\r").unwrap_or(line))
}

/// Whether `words` stand somewhere in it.
fn contains(text: &[u8], words: &str) -> bool {
    text.windows(words.len()).any(|window| window == words.as_bytes())
}
