//! The protocol of git's long running filters (gitattributes, "Long Running Filter Process"), the filter's side of it.
//!
//! Git says who it is and what it can, then sends file after file. A file that is no pointer, or whose pointer leads
//! nowhere, is answered with an error, on which git takes it as it is; so no file has to be kept to be sent back.

use std::io;

use bytes::{Bytes, BytesMut};
use tabularium_common::pktline::{self, FLUSH, MAX_PAYLOAD_BYTES, Packet};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::{
    access::{Access, LfsObject},
    services::blob_service::parse_pointer,
};

/// What is longer is no pointer.
const MAX_POINTER_BYTES: usize = 1024;
/// Most that git says about itself, or about one file.
const MAX_LINES: usize = 256;

/// Where files are kept.
pub(super) trait Store {
    /// The file of this id; `None` if it is not to be had.
    async fn open(&self, id: &str, gl_repository: &str) -> Option<LfsObject>;
}

impl Store for Access {
    async fn open(&self, id: &str, gl_repository: &str) -> Option<LfsObject> {
        self.lfs_object(id, gl_repository).await
    }
}

fn senseless(problem: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem.to_string())
}

struct Packets<R> {
    from: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> Packets<R> {
    /// The next packet; `None` at the end, which may only come between two.
    async fn next(&mut self) -> io::Result<Option<Packet>> {
        loop {
            if let Some(packet) = pktline::decode(&mut self.buffer).map_err(senseless)? {
                return Ok(Some(packet));
            }
            if self.from.read_buf(&mut self.buffer).await? == 0 {
                let whole = self.buffer.is_empty();
                return if whole { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// Lines up to a flush; `None` if there are no more.
    async fn lines(&mut self) -> io::Result<Option<Vec<Bytes>>> {
        let mut lines = Vec::new();
        loop {
            match self.next().await? {
                None if lines.is_empty() => return Ok(None),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(Packet::Data(line)) if lines.len() < MAX_LINES => lines.push(line),
                Some(Packet::Data(_)) => return Err(senseless("too many lines")),
                Some(_) => return Ok(Some(lines)),
            }
        }
    }

    /// A file up to a flush, if it is short enough to be a pointer.
    async fn short(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut content = Some(Vec::new());
        while let Some(packet) = self.next().await? {
            let Packet::Data(piece) = packet else { return Ok(content) };
            content = content.filter(|content| content.len() + piece.len() <= MAX_POINTER_BYTES);
            if let Some(content) = &mut content {
                content.extend_from_slice(&piece);
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Writes these lines and a flush.
async fn say(to: &mut (impl AsyncWrite + Unpin), lines: &[&str]) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    for line in lines {
        pktline::encode(line.as_bytes(), &mut buffer).map_err(senseless)?;
    }
    buffer.extend_from_slice(FLUSH);
    to.write_all(&buffer).await?;
    to.flush().await
}

fn require(lines: Option<Vec<Bytes>>, wanted: &str) -> io::Result<()> {
    let said = lines.is_some_and(|lines| lines.iter().any(|line| line == wanted));
    if said { Ok(()) } else { Err(senseless(format!("git does not say {wanted:?}"))) }
}

/// Answers git until it has no more files.
pub(super) async fn hold(
    from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    store: &impl Store,
    gl_repository: &str,
) -> io::Result<()> {
    let mut packets = Packets { from, buffer: BytesMut::new() };
    require(packets.lines().await?, "version=2\n")?;
    say(&mut to, &["git-filter-server\n", "version=2\n"]).await?;
    require(packets.lines().await?, "capability=smudge\n")?;
    say(&mut to, &["capability=smudge\n"]).await?;
    while let Some(lines) = packets.lines().await? {
        require(Some(lines), "command=smudge\n")?;
        let content = packets.short().await?;
        let pointer = content.as_deref().and_then(parse_pointer);
        let found = match pointer {
            Some((id, size)) => {
                let opened = store.open(&String::from_utf8_lossy(&id), gl_repository).await;
                opened.map(|object| (object, u64::try_from(size).unwrap_or_default()))
            }
            None => None,
        };
        match found {
            Some((object, size)) => send(&mut to, object, size).await?,
            None => say(&mut to, &["status=error\n"]).await?,
        }
    }
    Ok(())
}

/// Sends the file. What breaks off, or is not as long as the pointer says, is taken back at the end.
async fn send(to: &mut (impl AsyncWrite + Unpin), mut object: LfsObject, size: u64) -> io::Result<()> {
    say(to, &["status=success\n"]).await?;
    let mut sent = 0;
    let whole = loop {
        match object.chunk().await {
            Ok(Some(piece)) => {
                sent += u64::try_from(piece.len()).unwrap_or_default();
                let mut buffer = BytesMut::with_capacity(piece.len() + 64);
                for part in piece.chunks(MAX_PAYLOAD_BYTES) {
                    pktline::encode(part, &mut buffer).map_err(senseless)?;
                }
                to.write_all(&buffer).await?;
            }
            Ok(None) => break sent == size,
            Err(error) => {
                tracing::warn!(%error, "fetching an LFS object");
                break false;
            }
        }
    };
    say(to, &[]).await?;
    say(to, if whole { &[] } else { &["status=error\n"] }).await
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Shelf(Vec<(&'static str, Result<&'static [u8], ()>)>);

    impl Store for Shelf {
        async fn open(&self, id: &str, gl_repository: &str) -> Option<LfsObject> {
            assert_eq!(gl_repository, "project-1");
            let (_, content) = self.0.iter().find(|(known, _)| id.starts_with(known))?;
            Some(LfsObject::of(vec![content.map(Bytes::from_static)]))
        }
    }

    fn packets(lines: &[&[u8]]) -> Vec<u8> {
        let mut buffer = BytesMut::new();
        for line in lines {
            if *line == b"." {
                buffer.extend_from_slice(FLUSH);
            } else {
                pktline::encode(line, &mut buffer).unwrap();
            }
        }
        buffer.to_vec()
    }

    async fn answer(files: &[&[u8]], shelf: Shelf) -> io::Result<Vec<u8>> {
        let mut said: Vec<&[u8]> = vec![b"git-filter-client\n", b"version=2\n", b"."];
        said.extend([&b"capability=clean\n"[..], b"capability=smudge\n", b"."]);
        for &file in files {
            said.extend([&b"command=smudge\n"[..], b"pathname=a\n", b".", file, b"."]);
        }
        let mut answer = Vec::new();
        hold(packets(&said).as_slice(), &mut answer, &shelf, "project-1").await?;
        let greeting = packets(&[b"git-filter-server\n", b"version=2\n", b".", b"capability=smudge\n", b"."]);
        Ok(answer.strip_prefix(greeting.as_slice()).unwrap().to_vec())
    }

    fn pointer(digit: &str, size: usize) -> Vec<u8> {
        let id = digit.repeat(64);
        format!("version https://git-lfs.github.com/spec/v1\noid sha256:{id}\nsize {size}\n").into_bytes()
    }

    #[tokio::test]
    async fn pointers_are_replaced_and_all_else_is_left() {
        let shelf = Shelf(vec![("a", Ok(&b"content"[..])), ("b", Err(())), ("c", Ok(&b"short"[..]))]);
        let [good, broken, cut, missing] =
            [pointer("a", 7), pointer("b", 1), pointer("c", 6), pointer("d", 1)];
        let long = [b'x'; 5000];
        let files: [&[u8]; 7] = [&good, &missing, b"no pointer", &long, &broken, &cut, &good];
        let whole: &[&[u8]] = &[b"status=success\n", b".", b"content", b".", b"."];
        let refused: &[&[u8]] = &[b"status=error\n", b"."];
        let taken_back: &[&[u8]] = &[b"status=success\n", b".", b".", b"status=error\n", b"."];
        let too_short: &[&[u8]] = &[b"status=success\n", b".", b"short", b".", b"status=error\n", b"."];
        let expected = [whole, refused, refused, refused, taken_back, too_short, whole];
        assert_eq!(answer(&files, shelf).await.unwrap(), packets(&expected.concat()));
    }

    #[tokio::test]
    async fn whoever_is_not_git_is_left() {
        let conversations: [&[&[u8]]; 4] = [
            &[b"version=1\n", b"."],
            &[b"version=2\n", b".", b"capability=clean\n", b"."],
            &[b"version=2\n", b".", b"capability=smudge\n", b".", b"command=clean\n", b"."],
            &[b"version=2\n"],
        ];
        for said in conversations {
            let said = packets(said);
            let held = hold(said.as_slice(), &mut Vec::<u8>::new(), &Shelf(Vec::new()), "").await;
            assert!(held.is_err());
        }
    }
}
