//! `git range-diff`: pairs of commits, and how those that differ do.

use super::{MAX_PATCH_BYTES, Malformed};

/// Patch lines stand that far from the margin.
const INDENT: usize = 4;

/// How the two commits of a pair compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    Equal,
    /// Only the second series has it.
    Added,
    /// Only the first series has it.
    Removed,
    Different,
}

/// A commit of the first series and what became of it in the second. An absent one is a row of dashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) comparison: Comparison,
    pub(crate) title: Vec<u8>,
    /// The difference of their patches, without its indentation.
    pub(crate) patch: Vec<u8>,
}

/// Puts lines together.
#[derive(Debug, Default)]
pub(crate) struct Parser(Option<Pair>);

impl Parser {
    /// Takes a line without its newline; a pair is complete when the next one begins.
    pub(crate) fn line(&mut self, line: &[u8]) -> Result<Option<Pair>, Malformed> {
        if let Some(pair) = parse_pair(line) {
            return Ok(self.0.replace(pair));
        }
        let Some(pair) = &mut self.0 else { return Err(Malformed("range-diff does not begin with a pair")) };
        let Some(text) = line.get(INDENT..) else { return Err(Malformed("range-diff patch line too short")) };
        if pair.patch.len() + text.len() >= MAX_PATCH_BYTES {
            return Err(Malformed("patch is too large"));
        }
        pair.patch.extend_from_slice(text);
        pair.patch.push(b'\n');
        Ok(None)
    }

    /// The last pair.
    pub(crate) fn finish(self) -> Option<Pair> {
        self.0
    }
}

/// `1:  <id> = 2:  <id> Title`; numbers and ids may be dashes.
fn parse_pair(line: &[u8]) -> Option<Pair> {
    let (from, rest) = parse_side(trim_spaces(line))?;
    let rest = rest.strip_prefix(b" ")?;
    let comparison = match rest.first()? {
        b'=' => Comparison::Equal,
        b'>' => Comparison::Added,
        b'<' => Comparison::Removed,
        b'!' => Comparison::Different,
        _ => return None,
    };
    let rest = rest.get(1..).filter(|rest| rest.first() == Some(&b' '))?;
    let (to, rest) = parse_side(trim_spaces(rest))?;
    let title = rest.strip_prefix(b" ")?.to_vec();
    Some(Pair { from, to, comparison, title, patch: Vec::new() })
}

/// `12:  <id>`, and what follows.
fn parse_side(text: &[u8]) -> Option<(String, &[u8])> {
    let colon = text.iter().position(|byte| *byte == b':')?;
    let (number, rest) = (text.get(..colon)?, text.get(colon + 1..)?);
    let numbered = !number.is_empty() && number.iter().all(u8::is_ascii_digit);
    if number != b"-" && !numbered {
        return None;
    }
    let id = trim_spaces(rest);
    if id.len() == rest.len() {
        return None;
    }
    let end = id.iter().position(|byte| *byte == b' ').unwrap_or(id.len());
    let (id, rest) = id.split_at(end);
    let hexadecimal = id.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let absent = id.iter().all(|byte| *byte == b'-');
    if id.is_empty() || !(hexadecimal || absent) {
        return None;
    }
    Some((String::from_utf8_lossy(id).into_owned(), rest))
}

fn trim_spaces(text: &[u8]) -> &[u8] {
    let start = text.iter().position(|byte| *byte != b' ').unwrap_or(text.len());
    text.get(start..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_with_and_without_patches() {
        let text = b" 1:  aa = 1:  bb Same\xff\n-:  -- > 2:  cc New\n 2:  dd < -:  -- Gone\n\
                     10:  ee ! 3:  ff Changed: 1:  aa = x\n    @@ Commit message\n     ## f ##\n    \n";
        let mut parser = Parser::default();
        let mut pairs = Vec::new();
        for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            pairs.extend(parser.line(line).unwrap());
        }
        pairs.extend(parser.finish());
        let pair = |from: &str, to: &str, comparison, title: &[u8], patch: &[u8]| Pair {
            from: from.into(),
            to: to.into(),
            comparison,
            title: title.to_vec(),
            patch: patch.to_vec(),
        };
        assert_eq!(
            pairs,
            [
                pair("aa", "bb", Comparison::Equal, b"Same\xff", b""),
                pair("--", "cc", Comparison::Added, b"New", b""),
                pair("dd", "--", Comparison::Removed, b"Gone", b""),
                pair(
                    "ee",
                    "ff",
                    Comparison::Different,
                    b"Changed: 1:  aa = x",
                    b"@@ Commit message\n ## f ##\n\n"
                ),
            ]
        );
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Parser::default().line(b"    patch").is_err());
        let mut parser = Parser::default();
        assert_eq!(parser.line(b"1:  aa ! 1:  bb T"), Ok(None));
        assert!(parser.line(b"  x").is_err());
        for line in [&b"1: aa ? 1: bb t"[..], b"x:  aa = 1:  bb t", b"1:aa = 1:  bb t", b"1:  zz = 1:  bb t"]
        {
            assert_eq!(parse_pair(line), None, "{line:?}");
        }
    }
}
