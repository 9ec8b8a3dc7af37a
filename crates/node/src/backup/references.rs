//! The references of a step, as they stand in the sink: a line for each, an id and a name, `HEAD` among them.

use std::io;

use tokio::{
    fs::File,
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, BufWriter},
    process::ChildStdin,
};
use tonic::Status;

use super::{Backups, sink::Key};
use crate::git::revision::{ObjectHash, check_reference};

/// Longest line.
const MAX_LINE_BYTES: u64 = 1024 * 1024;

/// The references of a step that are still to be read.
pub(super) struct References {
    lines: BufReader<File>,
    hash: ObjectHash,
}

impl References {
    /// Those under a key; `None`: there is nothing.
    pub(super) async fn open(
        backups: &Backups,
        key: io::Result<Key>,
        hash: ObjectHash,
        doing: &'static str,
    ) -> Result<Option<Self>, Status> {
        let file = backups.open_file(key, doing).await?;
        Ok(file.map(|file| Self { lines: BufReader::new(file), hash }))
    }

    /// The next one: an id and a name.
    pub(super) async fn next(&mut self) -> io::Result<Option<(String, Vec<u8>)>> {
        let mut line = Vec::new();
        (&mut self.lines).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return Ok(None);
        }
        let bad = || io::Error::other(format!("not a reference: {:?}", String::from_utf8_lossy(&line)));
        let whole = line.strip_suffix(b"\n").ok_or_else(bad)?;
        let space = whole.iter().position(|byte| *byte == b' ').ok_or_else(bad)?;
        let (id, name) = (&whole[..space], &whole[space + 1..]);
        let id = self.hash.parse(id).map_err(|_| bad())?;
        if name != b"HEAD" && check_reference(name).is_err() {
            return Err(bad());
        }
        Ok(Some((id, name.to_vec())))
    }

    /// Tells git `first`, and then the ids, each on a line behind `mark`. Git may want no more before the end: how it ends says
    /// whether that is right.
    pub(super) async fn feed(mut self, stdin: ChildStdin, first: &str, mark: &str) -> io::Result<()> {
        let feeding = async {
            let mut stdin = BufWriter::new(stdin);
            stdin.write_all(first.as_bytes()).await?;
            while let Some((id, _)) = self.next().await? {
                stdin.write_all(format!("{mark}{id}\n").as_bytes()).await?;
            }
            stdin.shutdown().await
        };
        match feeding.await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            fed => fed,
        }
    }
}
