//! `--numstat -z`: lines added and removed for each file.

use super::Malformed;

/// One file. A binary one has no lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NumStat {
    pub(crate) added: i32,
    pub(crate) removed: i32,
    /// Where it was, if it was renamed or copied.
    pub(crate) old_path: Option<Vec<u8>>,
    pub(crate) path: Vec<u8>,
}

/// Puts records together.
#[derive(Debug, Default)]
pub(crate) struct Parser(Option<NumStat>);

impl Parser {
    /// Takes what stood before the next NUL.
    pub(crate) fn record(&mut self, record: &[u8]) -> Result<Option<NumStat>, Malformed> {
        if let Some(mut moved) = self.0.take() {
            if moved.old_path.is_none() {
                moved.old_path = Some(record.to_vec());
                self.0 = Some(moved);
                return Ok(None);
            }
            moved.path = record.to_vec();
            return Ok(Some(moved));
        }
        let mut fields = record.splitn(3, |byte| *byte == b'\t');
        let mut number = || fields.next().and_then(parse_number);
        let (added, removed) = (number(), number());
        let (Some(added), Some(removed), Some(path)) = (added, removed, fields.next()) else {
            return Err(Malformed("malformed numstat"));
        };
        let stat = NumStat { added, removed, old_path: None, path: path.to_vec() };
        if path.is_empty() {
            self.0 = Some(stat);
            return Ok(None);
        }
        Ok(Some(stat))
    }

    /// No file is half read.
    pub(crate) fn finish(&self) -> Result<(), Malformed> {
        if self.0.is_some() { Err(Malformed("numstat ends in the middle of a file")) } else { Ok(()) }
    }
}

fn parse_number(text: &[u8]) -> Option<i32> {
    if text == b"-" { Some(0) } else { std::str::from_utf8(text).ok()?.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_renames_and_binaries() {
        let mut parser = Parser::default();
        let mut found = Vec::new();
        for record in [&b"1\t2\ta\tb\xff"[..], b"3\t0\t", b"from", b"to", b"-\t-\tbin"] {
            found.extend(parser.record(record).unwrap());
        }
        parser.finish().unwrap();
        let stat = |added, removed, old_path: Option<&[u8]>, path: &[u8]| NumStat {
            added,
            removed,
            old_path: old_path.map(<[u8]>::to_vec),
            path: path.to_vec(),
        };
        assert_eq!(
            found,
            [stat(1, 2, None, b"a\tb\xff"), stat(3, 0, Some(b"from"), b"to"), stat(0, 0, None, b"bin")]
        );
        for bad in [&b"1\t2"[..], b"x\t1\tf", b""] {
            assert!(Parser::default().record(bad).is_err());
        }
        parser.record(b"1\t1\t").unwrap();
        assert!(parser.finish().is_err());
    }
}
