//! Bytes as text: lines of base64 between a line that says what begins and one that says that it ends (RFC 7468; RFC 9580,
//! section 6).

use base64::{Engine as _, engine::general_purpose::STANDARD};

/// Longest line. Others write longer ones; what is read may have any length.
const LINE: usize = 64;

/// Base64 in lines, each with its end.
pub(super) fn lines(bytes: &[u8]) -> String {
    let text = STANDARD.encode(bytes);
    let mut lines = String::with_capacity(text.len() + text.len() / LINE + 1);
    for (at, character) in text.chars().enumerate() {
        if at > 0 && at % LINE == 0 {
            lines.push('\n');
        }
        lines.push(character);
    }
    lines.push('\n');
    lines
}

/// What stands between `-----BEGIN label-----` at the beginning of `text` and `-----END label-----` at its end.
fn between<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    let inner = text.trim().strip_prefix("-----BEGIN ")?.strip_prefix(label)?.strip_prefix("-----")?;
    inner.strip_suffix("-----")?.strip_suffix(label)?.strip_suffix("-----END ")
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let text: String = text.split_ascii_whitespace().collect();
    STANDARD.decode(text).ok()
}

/// What an SSH signature's text stands for.
pub(super) fn read_ssh(text: &[u8], label: &str) -> Option<Vec<u8>> {
    decode(between(std::str::from_utf8(text).ok()?, label)?)
}

/// As OpenSSH has it.
pub(super) fn write_ssh(bytes: &[u8], label: &str) -> Vec<u8> {
    format!("-----BEGIN {label}-----\n{}-----END {label}-----\n", lines(bytes)).into_bytes()
}

/// What an OpenPGP text stands for. Its headers say nothing, and its checksum need not be looked at (RFC 9580, 6.1).
pub(super) fn read_open_pgp(text: &[u8], label: &str) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(text).ok()?.replace("\r\n", "\n");
    let (_headers, body) = between(&text, label)?.split_once("\n\n")?;
    let body = body.rsplit_once("\n=").map_or(body, |(body, _checksum)| body);
    decode(body)
}

/// As Gitaly has it: with a checksum, and without an end of the last line.
pub(super) fn write_open_pgp(bytes: &[u8], label: &str) -> Vec<u8> {
    let checksum = STANDARD.encode(checksum(bytes));
    format!("-----BEGIN {label}-----\n\n{}={checksum}\n-----END {label}-----", lines(bytes)).into_bytes()
}

/// CRC-24 (RFC 9580, 6.1.1).
fn checksum(bytes: &[u8]) -> [u8; 3] {
    let mut sum: u32 = 0x00b7_04ce;
    for byte in bytes {
        sum ^= u32::from(*byte) << 16;
        for _ in 0..8 {
            sum <<= 1;
            if sum & 0x0100_0000 != 0 {
                sum ^= 0x0186_4cfb;
            }
        }
    }
    let [_, high, middle, low] = sum.to_be_bytes();
    [high, middle, low]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for length in [0, 1, 47, 48, 49, 500] {
            let bytes = vec![b'x'; length];
            let text = write_ssh(&bytes, "X");
            assert_eq!(read_ssh(&text, "X"), Some(bytes.clone()));
            assert_eq!(read_ssh(&text, "Y"), None);
            assert_eq!(read_open_pgp(&write_open_pgp(&bytes, "X"), "X"), Some(bytes));
        }
    }

    #[test]
    fn lines_are_as_long_as_they_may_be() {
        assert_eq!(lines(&[0; 48]), format!("{}\n", "A".repeat(64)));
        assert_eq!(lines(&[0; 49]), format!("{}\nAA==\n", "A".repeat(64)));
    }

    #[test]
    fn headers_and_foreign_line_ends_are_read_over() {
        let text = b"-----BEGIN X-----\r\nVersion: 1\r\nComment: = \r\n\r\neHh4\r\neA==\r\n=AAAA\r\n-----END X-----\r\n";
        assert_eq!(read_open_pgp(text, "X").unwrap(), b"xxxx");
        assert_eq!(read_open_pgp(b"-----BEGIN X-----\n\neHh4\n-----END X-----", "X").unwrap(), b"xxx");
        assert_eq!(read_open_pgp(b"-----BEGIN X-----\neHh4\n-----END Y-----", "X"), None);
    }

    #[test]
    fn the_checksum_of_the_standard() {
        // The check value of CRC-24/OPENPGP.
        assert_eq!(checksum(b"123456789"), [0x21, 0xcf, 0x02]);
    }
}
