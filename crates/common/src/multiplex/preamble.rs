//! What a connection or a stream begins with, read without losing it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

use super::{HANDSHAKE_TIMEOUT, PREAMBLE_BYTES};

/// The first bytes, within [`HANDSHAKE_TIMEOUT`].
pub(super) async fn read(io: &mut (impl AsyncRead + Unpin)) -> io::Result<[u8; PREAMBLE_BYTES]> {
    let mut preamble = [0; PREAMBLE_BYTES];
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, io.read_exact(&mut preamble)).await {
        Ok(read) => read.map(|_| preamble),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no preamble")),
    }
}

/// Bytes that were read, in front of those that were not.
#[derive(Debug)]
pub struct Rewound<IO> {
    head: [u8; PREAMBLE_BYTES],
    taken: usize,
    io: IO,
}

impl<IO> Rewound<IO> {
    pub(super) fn new(head: [u8; PREAMBLE_BYTES], io: IO) -> Self {
        Self { head, taken: 0, io }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Rewound<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let left = &this.head[this.taken..];
        if left.is_empty() {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        let count = left.len().min(buf.remaining());
        buf.put_slice(&left[..count]);
        this.taken += count;
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Rewound<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_read_is_read_again() {
        let mut rest: &[u8] = b"0123456789ab and more";
        let head = read(&mut rest).await.unwrap();
        assert_eq!(&head, b"0123456789a");
        let mut again = Vec::new();
        let mut rewound = Rewound::new(head, rest);
        // In small pieces, so that a piece ends inside what is put back.
        while rewound.read_buf(&mut (&mut again).limit(4)).await.unwrap() > 0 {}
        assert_eq!(again, b"0123456789ab and more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalling_peer_is_given_up() {
        let (mut ours, theirs) = tokio::io::duplex(64);
        let error = read(&mut ours).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(theirs);
        assert_eq!(read(&mut ours).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    use bytes::BufMut as _;
}
