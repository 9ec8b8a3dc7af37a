//! The `Git-Protocol` header: colon-separated keys, of which `version=N` matters (gitprotocol-v2).

use crate::limits::MAX_GIT_PROTOCOL_BYTES;

/// The header's name.
pub(crate) const HEADER: &str = "git-protocol";

/// A header that would have to be cleaned before it could become an environment variable of git.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the Git-Protocol header may have lower-case letters, digits, '=' and ':', and must be shorter than 64 bytes"
)]
pub(crate) struct Malformed;

/// What the RPCs take as `git_protocol`: the highest version asked for that exists, or nothing for version 0. Keys and
/// versions we do not know are ignored, as git itself does.
pub(crate) fn parse(header: Option<&[u8]>) -> Result<&'static str, Malformed> {
    let Some(header) = header else { return Ok("") };
    let plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'=' | b':');
    if header.len() >= MAX_GIT_PROTOCOL_BYTES || !header.iter().all(plain) {
        return Err(Malformed);
    }
    let mut version = "";
    for key in header.split(|byte| *byte == b':') {
        match key {
            b"version=2" => version = "version=2",
            b"version=1" if version.is_empty() => version = "version=1",
            _ => {}
        }
    }
    Ok(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for (header, expected) in [
            (None, Ok("")),
            (Some(&b""[..]), Ok("")),
            (Some(b"version=0"), Ok("")),
            (Some(b"version=1"), Ok("version=1")),
            (Some(b"version=2"), Ok("version=2")),
            (Some(b"version=2:version=1"), Ok("version=2")),
            (Some(b"version=1:key=value:version=2"), Ok("version=2")),
            (Some(b"version=3"), Ok("")),
            (Some(b"version=2\n"), Err(Malformed)),
            (Some(b"Version=2"), Err(Malformed)),
            (Some(&[b'a'; MAX_GIT_PROTOCOL_BYTES]), Err(Malformed)),
        ] {
            assert_eq!(parse(header), expected, "{header:?}");
        }
    }
}
