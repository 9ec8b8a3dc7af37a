//! Git's bundles: a header that names references, and a pack. Only the pack is of use here, the references stand elsewhere.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _};

/// Longest line of a header: an id and a reference or the subject of a commit.
const MAX_LINE_BYTES: u64 = 1024 * 1024;
/// What a header begins with.
const SIGNATURES: [&[u8]; 2] = [b"# v2 git bundle", b"# v3 git bundle"];
/// The one capability that changes nothing about what a pack holds.
const OBJECT_FORMAT: &[u8] = b"@object-format=";

/// Reads the header; what comes next is the pack.
pub(super) async fn skip_header(bundle: &mut (impl AsyncBufRead + Unpin)) -> io::Result<()> {
    let bad = |why: &str| io::Error::other(format!("not a bundle of a backup: {why}"));
    let mut line = Vec::new();
    let mut first = true;
    loop {
        line.clear();
        (&mut *bundle).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await?;
        if line.pop() != Some(b'\n') {
            return Err(bad("its header ends early"));
        }
        match line.as_slice() {
            _ if first && !SIGNATURES.contains(&line.as_slice()) => {
                return Err(bad("it begins with other words"));
            }
            _ if first => first = false,
            b"" => return Ok(()),
            capability if capability.starts_with(b"@") && !capability.starts_with(OBJECT_FORMAT) => {
                return Err(bad(&String::from_utf8_lossy(capability)));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn rest(bundle: &str) -> io::Result<String> {
        let mut reader = bundle.as_bytes();
        skip_header(&mut reader).await?;
        Ok(String::from_utf8_lossy(reader).into_owned())
    }

    #[tokio::test]
    async fn the_pack_comes_behind_the_header() {
        for (bundle, pack) in [
            ("# v2 git bundle\n12 refs/heads/main\n\nPACK\n\n", "PACK\n\n"),
            ("# v2 git bundle\n-34 subject\n12 HEAD\n\nPACK", "PACK"),
            ("# v3 git bundle\n@object-format=sha256\n12 HEAD\n\nPACK", "PACK"),
            ("# v2 git bundle\n\n", ""),
        ] {
            assert_eq!(rest(bundle).await.unwrap(), pack, "{bundle}");
        }
        for bad in [
            "",
            "gitdir: /etc\n\n",
            "# v2 git bundle\n12 HEAD\n",
            "# v3 git bundle\n@filter=blob:none\n\nPACK",
        ] {
            assert!(rest(bad).await.is_err(), "{bad}");
        }
    }
}
