//! Reads exactly one gRPC message from the front of a request body, and keeps what came with it.
//!
//! A gRPC message is a flag byte (1: compressed), four bytes of length, and the content.

use std::future::poll_fn;

use bytes::{Buf as _, Bytes, BytesMut};
use http_body::Body;

use crate::limits::{FIRST_MESSAGE_BYTES, FIRST_MESSAGE_WAIT};

/// Flag and length.
pub(crate) const PREFIX_BYTES: usize = 5;

/// The first message, without its prefix, and what was read past it.
#[derive(Debug)]
pub(crate) struct FirstMessage {
    /// The message.
    pub(crate) message: Bytes,
    /// Bytes after it that came in the same frame.
    pub(crate) leftover: Option<Bytes>,
}

/// Why there is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FirstMessageError {
    /// The client closed its side first.
    #[error("the request ended before its first message was complete")]
    Missing,
    /// The client reset the stream or its connection was lost.
    #[error("the request was cancelled")]
    Cancelled,
    /// The flag says compressed.
    #[error("compressed request messages are not supported")]
    Compressed,
    /// The flag is neither 0 nor 1.
    #[error("malformed request: message flag {0}")]
    Flag(u8),
    /// grpc-go's text for a message above its limit.
    #[error("grpc: received message larger than max ({0} vs. {FIRST_MESSAGE_BYTES})")]
    TooLarge(usize),
    /// [`FIRST_MESSAGE_WAIT`] passed.
    #[error("no first message within {} seconds", FIRST_MESSAGE_WAIT.as_secs())]
    Late,
}

/// Reads the first message, within [`FIRST_MESSAGE_WAIT`].
pub(crate) async fn read<B>(body: &mut B) -> Result<FirstMessage, FirstMessageError>
where
    B: Body<Data = Bytes> + Unpin,
{
    match tokio::time::timeout(FIRST_MESSAGE_WAIT, read_unbounded(body)).await {
        Ok(result) => result,
        Err(_) => Err(FirstMessageError::Late),
    }
}

async fn read_unbounded<B>(body: &mut B) -> Result<FirstMessage, FirstMessageError>
where
    B: Body<Data = Bytes> + Unpin,
{
    let mut chunk = next(body).await?;
    if let Some(whole) = split(&mut chunk)? {
        return Ok(FirstMessage { message: whole, leftover: (!chunk.is_empty()).then_some(chunk) });
    }
    let mut buffer = BytesMut::from(&chunk[..]);
    loop {
        let more = next(body).await?;
        buffer.extend_from_slice(&more);
        if let Some(length) = announced(&buffer)?
            && buffer.len() >= PREFIX_BYTES + length
        {
            let mut all = buffer.freeze();
            all.advance(PREFIX_BYTES);
            let message = all.split_to(length);
            return Ok(FirstMessage { message, leftover: (!all.is_empty()).then_some(all) });
        }
    }
}

/// Takes a whole message off the front of `chunk`, without copying.
fn split(chunk: &mut Bytes) -> Result<Option<Bytes>, FirstMessageError> {
    match announced(chunk)? {
        Some(length) if chunk.len() >= PREFIX_BYTES + length => {
            chunk.advance(PREFIX_BYTES);
            Ok(Some(chunk.split_to(length)))
        }
        _ => Ok(None),
    }
}

/// The length in the prefix, once the prefix is there.
fn announced(bytes: &[u8]) -> Result<Option<usize>, FirstMessageError> {
    let Some((&[flag, a, b, c, d], _)) = bytes.split_first_chunk() else {
        return Ok(None);
    };
    match flag {
        0 => {}
        1 => return Err(FirstMessageError::Compressed),
        other => return Err(FirstMessageError::Flag(other)),
    }
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if length > FIRST_MESSAGE_BYTES {
        return Err(FirstMessageError::TooLarge(length));
    }
    Ok(Some(length))
}

async fn next<B>(body: &mut B) -> Result<Bytes, FirstMessageError>
where
    B: Body<Data = Bytes> + Unpin,
{
    loop {
        let mut pinned = std::pin::Pin::new(&mut *body);
        match poll_fn(|cx| pinned.as_mut().poll_frame(cx)).await {
            None => return Err(FirstMessageError::Missing),
            Some(Err(_)) => return Err(FirstMessageError::Cancelled),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => return Ok(data),
                Err(_) => return Err(FirstMessageError::Missing),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body::Frame;
    use http_body_util::StreamBody;
    use proptest::prelude::*;

    use super::*;

    async fn check(chunks: &[&[u8]]) -> Result<(Vec<u8>, Vec<u8>), FirstMessageError> {
        let frames: Vec<_> = chunks
            .iter()
            .map(|chunk| Ok::<_, Infallible>(Frame::data(Bytes::copy_from_slice(chunk))))
            .collect();
        let mut body = StreamBody::new(futures::stream::iter(frames));
        let first = read(&mut body).await?;
        let mut rest = first.leftover.unwrap_or_default().to_vec();
        while let Ok(more) = next(&mut body).await {
            rest.extend(more);
        }
        Ok((first.message.to_vec(), rest))
    }

    #[tokio::test]
    async fn one_message_is_taken_however_it_is_cut() {
        let expected = Ok((b"abc".to_vec(), b"\0\0".to_vec()));
        assert_eq!(check(&[b"\0\0\0\0\x03abc\0\0"]).await, expected);
        assert_eq!(check(&[b"\0\0", b"\0\0\x03a", b"", b"bc\0", b"\0"]).await, expected);
        assert_eq!(check(&[b"\0\0\0\0\0"]).await, Ok((vec![], vec![])));
    }

    #[tokio::test]
    async fn what_is_not_a_message_is_refused() {
        assert_eq!(check(&[]).await, Err(FirstMessageError::Missing));
        assert_eq!(check(&[b"\0\0\0\0\x03ab"]).await, Err(FirstMessageError::Missing));
        assert_eq!(check(&[b"\x01\0\0\0\0"]).await, Err(FirstMessageError::Compressed));
        assert_eq!(check(&[b"GET / HTTP"]).await, Err(FirstMessageError::Flag(b'G')));
        let large = FIRST_MESSAGE_BYTES + 1;
        let [a, b, c, d] = u32::try_from(large).unwrap().to_be_bytes();
        assert_eq!(check(&[&[0, a, b, c, d]]).await, Err(FirstMessageError::TooLarge(large)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_nothing_is_not_waited_for_for_ever() {
        let mut body = StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, Infallible>>());
        assert_eq!(read(&mut body).await.unwrap_err(), FirstMessageError::Late);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_at_any_cut(
            message in prop::collection::vec(any::<u8>(), 0..100),
            rest in prop::collection::vec(any::<u8>(), 0..100),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        ) {
            let mut bytes = vec![0];
            bytes.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
            bytes.extend(&message);
            bytes.extend(&rest);
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
            at.sort_unstable();
            at.insert(0, 0);
            at.push(bytes.len());
            let chunks: Vec<&[u8]> = at.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            prop_assert_eq!(runtime.block_on(check(&chunks)), Ok((message, rest)));
        }
    }
}
