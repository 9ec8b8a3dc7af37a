//! Standard input and output, without a thread in between where they are pipes, as they are when git starts us.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::unix::pipe::{Receiver, Sender},
};

/// Standard input.
pub(crate) fn stdin() -> Pin<Box<dyn AsyncRead + Send>> {
    let pipe = owned(&io::stdin()).and_then(Receiver::from_owned_fd);
    pipe.map_or_else(|_| Box::pin(tokio::io::stdin()) as _, |pipe| Box::pin(pipe) as _)
}

/// Standard output.
pub(crate) fn stdout() -> Pin<Box<dyn AsyncWrite + Send>> {
    let pipe = owned(&io::stdout()).and_then(Sender::from_owned_fd);
    pipe.map_or_else(|_| Box::pin(tokio::io::stdout()) as _, |pipe| Box::pin(pipe) as _)
}

fn owned(stream: &impl AsFd) -> io::Result<OwnedFd> {
    stream.as_fd().try_clone_to_owned()
}
