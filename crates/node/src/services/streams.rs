//! From git's pipes to gRPC streams and back, in pieces and without collecting anything.

use std::{collections::VecDeque, io, pin::Pin};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, future::BoxFuture};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
    task::JoinHandle,
};
use tonic::Status;

use crate::git::{CHUNK_BYTES, Exit, GitProcess};

/// A response stream, as the generated servers want it.
pub(crate) type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Pieces that a blocking producer may be ahead of the client by.
const PRODUCER_QUEUE: usize = 4;

/// The task that feeds a process. It is stopped when this is dropped.
pub(crate) struct Pump(JoinHandle<Result<(), Status>>);

impl Drop for Pump {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl From<JoinHandle<Result<(), Status>>> for Pump {
    fn from(task: JoinHandle<Result<(), Status>>) -> Self {
        Self(task)
    }
}

/// Writes `first` and then what `data` finds in each message, until the client half-closes. A request stream that
/// breaks is an error and must end the process: its input must never look complete.
pub(crate) async fn feed<M>(
    mut messages: impl Stream<Item = Result<M, Status>> + Unpin,
    first: Bytes,
    mut data: impl FnMut(M) -> Bytes,
    mut sink: impl AsyncWrite + Unpin,
) -> Result<(), Status> {
    let mut next = Some(first);
    while let Some(bytes) = next {
        match sink.write_all(&bytes).await {
            Ok(()) => {}
            // The process wants no more; how it ends says whether that is right.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(Status::internal(format!("writing to git: {error}"))),
        }
        next = messages.next().await.transpose()?.map(&mut data);
    }
    match sink.shutdown().await {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Status::internal(format!("writing to git: {error}")))
        }
        _ => Ok(()),
    }
}

/// What the end of a process amounts to: the last items, or a failure.
pub(crate) type Ending<T> = BoxFuture<'static, Result<Vec<T>, Status>>;

struct Relay<T, F> {
    ready: VecDeque<T>,
    process: Option<(GitProcess, F)>,
    pump: Option<Pump>,
    wrap: fn(Bytes) -> T,
}

impl<T, F> Relay<T, F>
where
    F: FnOnce(Exit, Vec<u8>) -> Ending<T>,
{
    async fn next(&mut self) -> Result<Option<T>, Status> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Ok(Some(item));
            }
            let Some((process, _)) = &mut self.process else { return Ok(None) };
            let chunk = match &mut self.pump {
                None => process.read_chunk().await?,
                Some(pump) => tokio::select! {
                    chunk = process.read_chunk() => chunk?,
                    fed = &mut pump.0 => {
                        fed.map_err(|error| Status::internal(format!("feeding git: {error}")))??;
                        self.pump = None;
                        continue;
                    }
                },
            };
            if let Some(chunk) = chunk {
                return Ok(Some((self.wrap)(chunk)));
            }
            if let Some((process, ended)) = self.process.take() {
                let (exit, stderr) = process.finish().await?;
                self.ready.extend(ended(exit, stderr).await?);
            }
        }
    }
}

/// Streams `leading`, then the process's standard output, then what `ended` makes of its end. Dropping the stream kills
/// the process.
pub(crate) fn relay<T, F>(
    leading: Vec<T>,
    process: GitProcess,
    pump: Option<Pump>,
    wrap: fn(Bytes) -> T,
    ended: F,
) -> ResponseStream<T>
where
    T: Send + 'static,
    F: FnOnce(Exit, Vec<u8>) -> Result<Vec<T>, Status> + Send + 'static,
{
    let ended = |exit, stderr| -> Ending<T> { Box::pin(std::future::ready(ended(exit, stderr))) };
    relay_to_end(leading, process, pump, wrap, ended)
}

/// The same, with an end that takes its time.
pub(crate) fn relay_to_end<T, F>(
    leading: Vec<T>,
    process: GitProcess,
    pump: Option<Pump>,
    wrap: fn(Bytes) -> T,
    ended: F,
) -> ResponseStream<T>
where
    T: Send + 'static,
    F: FnOnce(Exit, Vec<u8>) -> Ending<T> + Send + 'static,
{
    let relay = Relay { ready: leading.into(), process: Some((process, ended)), pump, wrap };
    Box::pin(futures::stream::unfold(Some(relay), |relay| async move {
        let mut relay = relay?;
        match relay.next().await {
            Ok(Some(item)) => Some((Ok(item), Some(relay))),
            Ok(None) => None,
            Err(status) => Some((Err(status), None)),
        }
    }))
}

/// Streams what a blocking function writes, in pieces of at most [`CHUNK_BYTES`]. The function's writes fail once the
/// client has gone, and its own failure ends the stream.
pub(crate) fn produce<T: Send + 'static>(
    wrap: fn(Bytes) -> T,
    write: impl FnOnce(&mut dyn io::Write) -> Result<(), Status> + Send + 'static,
) -> ResponseStream<T> {
    let (sender, receiver) = mpsc::channel(PRODUCER_QUEUE);
    tokio::task::spawn_blocking(move || {
        let mut writer = io::BufWriter::with_capacity(CHUNK_BYTES, ChannelWriter(sender.clone()));
        let written = write(&mut writer).and_then(|()| {
            io::Write::flush(&mut writer).map_err(|error| Status::cancelled(error.to_string()))
        });
        if let Err(status) = written {
            // What is still buffered belongs to a stream that has failed.
            let _ = writer.into_parts();
            let _ = sender.blocking_send(Err(status));
        }
    });
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    Box::pin(stream.map(move |piece: Result<Bytes, Status>| piece.map(wrap)))
}

struct ChannelWriter(mpsc::Sender<Result<Bytes, Status>>);

impl io::Write for ChannelWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let piece = &data[..data.len().min(CHUNK_BYTES)];
        match self.0.blocking_send(Ok(Bytes::copy_from_slice(piece))) {
            Ok(()) => Ok(piece.len()),
            Err(_) => Err(io::Error::new(io::ErrorKind::BrokenPipe, "the client has gone")),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
