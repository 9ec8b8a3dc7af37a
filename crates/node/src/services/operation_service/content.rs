//! Contents of files on their way from the client into the repository, in pieces of whatever size they come.

use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt as _, path::PathBuf};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tokio::{fs::File, io::AsyncWriteExt as _};
use tonic::Status;

use super::tree_edit::Path;
use crate::{error::internal_io, git::quarantine::Quarantine, node::Node};

/// Decodes base64 in pieces. Line ends are skipped, as Go's decoder does.
#[derive(Debug, Default)]
struct Decoder {
    pending: Vec<u8>,
    ended: bool,
}

/// A text that is not base64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("illegal base64 data")]
pub(super) struct IllegalBase64;

impl Decoder {
    fn push(&mut self, piece: &[u8]) -> Result<Vec<u8>, IllegalBase64> {
        self.pending.extend(piece.iter().filter(|byte| !matches!(byte, b'\r' | b'\n')));
        let rest = self.pending.split_off(self.pending.len() / 4 * 4);
        let whole = std::mem::replace(&mut self.pending, rest);
        if whole.is_empty() {
            return Ok(whole);
        }
        // Padding ends the text; the engine sees to it that none stands inside of a piece.
        if self.ended {
            return Err(IllegalBase64);
        }
        self.ended = whole.ends_with(b"=");
        STANDARD.decode(whole).map_err(|_| IllegalBase64)
    }

    fn finish(&self) -> Result<(), IllegalBase64> {
        if self.pending.is_empty() { Ok(()) } else { Err(IllegalBase64) }
    }
}

/// One file's content, kept in the quarantine until it is complete.
pub(super) struct Content {
    file: File,
    place: PathBuf,
    decoder: Option<Decoder>,
}

fn illegal(error: IllegalBase64) -> Status {
    Status::invalid_argument(error.to_string())
}

impl Content {
    /// Of nothing yet.
    pub(super) async fn start(quarantine: &Quarantine, base64: bool) -> Result<Self, Status> {
        let place = quarantine.scratch("content");
        let file = File::create(&place).await.map_err(internal_io("creating content"))?;
        Ok(Self { file, place, decoder: base64.then(Decoder::default) })
    }

    /// Appends a piece.
    pub(super) async fn push(&mut self, piece: &[u8]) -> Result<(), Status> {
        let written = match &mut self.decoder {
            Some(decoder) => {
                let decoded = decoder.push(piece).map_err(illegal)?;
                self.file.write_all(&decoded).await
            }
            None => self.file.write_all(piece).await,
        };
        written.map_err(internal_io("writing content"))
    }

    /// Makes it a blob, as if it stood at `path`, and answers its id. Git reads the file itself: a large one is never
    /// in anybody's memory.
    pub(super) async fn into_blob(
        mut self,
        node: &Node,
        quarantine: &Quarantine,
        path: &Path,
    ) -> Result<String, Status> {
        if let Some(decoder) = &self.decoder {
            decoder.finish().map_err(illegal)?;
        }
        self.file.flush().await.map_err(internal_io("writing content"))?;
        let name = [b"--path=".as_slice(), &path.join(&b'/')].concat();
        let command = node.git.command(quarantine.repository(), "hash-object").args(["-w", "-t", "blob"]);
        let id = command.arg(OsStr::from_bytes(&name)).arg("--").arg(&self.place).checked().await?;
        match tokio::fs::remove_file(&self.place).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(internal_io("removing content")(error))
            }
            _ => Ok(String::from_utf8_lossy(id.trim_ascii()).into_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(pieces: &[&[u8]]) -> Result<Vec<u8>, IllegalBase64> {
        let mut decoder = Decoder::default();
        let mut decoded = Vec::new();
        for piece in pieces {
            decoded.extend(decoder.push(piece)?);
        }
        decoder.finish()?;
        Ok(decoded)
    }

    #[test]
    fn base64_in_pieces() {
        let data: Vec<u8> = (0..=255).collect();
        let text = STANDARD.encode(&data);
        for size in [1, 2, 3, 4, 5, 7, 100, 1000] {
            let pieces: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
            assert_eq!(decode(&pieces).unwrap(), data, "pieces of {size}");
        }
        assert_eq!(decode(&[b"YW\r\nJj\n", b"\n"]).unwrap(), b"abc");
        assert_eq!(decode(&[]).unwrap(), b"");
        for bad in
            [&[b"YWJ".as_slice()][..], &[b"YQ==", b"YQ=="], &[b"YQ==YQ=="], &[b"Y*Jj"], &[b"YWJj", b"="]]
        {
            assert_eq!(decode(bad), Err(IllegalBase64), "{bad:?}");
        }
    }
}
