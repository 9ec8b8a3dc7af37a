//! How a process puts another one in its place on SIGHUP, as Praefect does: the program at the same path is started with the
//! same arguments and is given the sockets; when it serves it says so, and the old process finishes what it has and ends.
//! When the new one does not come to that, the old one goes on as if nothing had been asked.
//!
//! The two talk over a pair of sockets, of which the new process finds one as its standard input.

use std::{
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::Path,
    process::Stdio,
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tabularium_common::grpc::Sockets;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    process::Command,
};

/// Set for a process that finds sockets at its standard input.
const MARK: &str = "TABULARIUM_HANDOVER";
/// Most sockets that change hands: three for clients and one for metrics, and room for as many again.
const MAX_SOCKETS: usize = 8;
/// Longest list of their addresses.
const MAX_LIST_BYTES: usize = 16 * 1024;
/// What the new process says once it serves.
const SERVING: &[u8] = b"serving\n";
/// How long it may take to come to that. A database that is slow to come back is waited for at start.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long the old process may take to hand over what it has promised.
const SENDING: Duration = Duration::from_secs(5);
/// Names the file that holds the id of the process that serves; what watches over Gitaly's programs reads it.
const PID_FILE: &str = "GITALY_PID_FILE";

/// Why nobody took our place.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandoverError {
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error("the new process ended before it served")]
    Ended,
    #[error("the new process did not serve within {} s", PATIENCE.as_secs())]
    Late,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> HandoverError {
    move |source| HandoverError::Io { what, source }
}

/// What a process was given by the one whose place it takes.
pub(crate) struct Predecessor {
    connection: UnixStream,
    /// Sockets with their addresses.
    pub(crate) sockets: Vec<(String, OwnedFd)>,
}

/// The process whose place this one is to take, if there is one.
pub(crate) fn predecessor() -> Result<Option<Predecessor>, HandoverError> {
    if std::env::var_os(MARK).is_none() {
        return Ok(None);
    }
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(failed("standard input"))?;
    let connection = StdUnixStream::from(input);
    connection.set_nonblocking(false).map_err(failed("standard input"))?;
    connection.set_read_timeout(Some(SENDING)).map_err(failed("standard input"))?;
    let sockets = receive(&connection).map_err(failed("taking over sockets"))?;
    connection.set_nonblocking(true).map_err(failed("standard input"))?;
    let connection = UnixStream::from_std(connection).map_err(failed("standard input"))?;
    Ok(Some(Predecessor { connection, sockets }))
}

impl Predecessor {
    /// Lets it end.
    pub(crate) async fn relieve(mut self) -> Result<(), HandoverError> {
        self.connection.write_all(SERVING).await.map_err(failed("telling the process before this one"))
    }
}

fn receive(connection: &StdUnixStream) -> io::Result<Vec<(String, OwnedFd)>> {
    let mut list = vec![0; MAX_LIST_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(connection, &mut [io::IoSliceMut::new(&mut list)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut sockets: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            sockets.extend(descriptors);
        }
    }
    let addresses: Vec<String> = serde_json::from_slice(&list[..received.bytes]).map_err(io::Error::other)?;
    if addresses.len() != sockets.len() {
        let told = format!("{} addresses with {} sockets", addresses.len(), sockets.len());
        return Err(io::Error::other(told));
    }
    Ok(addresses.into_iter().zip(sockets).collect())
}

fn send(connection: &StdUnixStream, sockets: &Sockets) -> io::Result<()> {
    let (addresses, descriptors): (Vec<_>, Vec<_>) = sockets.iter().unzip();
    if descriptors.len() > MAX_SOCKETS {
        return Err(io::Error::other(format!("{} sockets; at most {MAX_SOCKETS}", descriptors.len())));
    }
    let list = serde_json::to_vec(&addresses)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("too many sockets for one message"));
    }
    let sent = sendmsg(connection, &[io::IoSlice::new(&list)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == list.len() { Ok(()) } else { Err(io::Error::other("the list of sockets was cut off")) }
}

/// Starts the program anew and waits until it serves at these sockets. An error leaves everything as it was.
pub(crate) async fn hand_over(sockets: &Sockets) -> Result<(), HandoverError> {
    let program = std::env::args_os().next().unwrap_or_else(|| "tabularium-praefect".into());
    hand_over_to(Command::new(program).args(std::env::args_os().skip(1)), sockets).await
}

async fn hand_over_to(command: &mut Command, sockets: &Sockets) -> Result<(), HandoverError> {
    let (ours, theirs) = StdUnixStream::pair().map_err(failed("a pair of sockets"))?;
    // In the kernel's buffer until the new process looks.
    send(&ours, sockets).map_err(failed("handing over sockets"))?;
    let mut child = command
        .env(MARK, "1")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .map_err(failed("starting the new process"))?;
    // Whatever the command holds of the other end would keep it open.
    command.stdin(Stdio::null());
    ours.set_nonblocking(true).map_err(failed("a pair of sockets"))?;
    let mut ours = UnixStream::from_std(ours).map_err(failed("a pair of sockets"))?;
    let mut said = vec![0; SERVING.len()];
    let outcome = match tokio::time::timeout(PATIENCE, ours.read_exact(&mut said)).await {
        Ok(Ok(_)) if said == SERVING => return Ok(()),
        Ok(_) => HandoverError::Ended,
        Err(_) => HandoverError::Late,
    };
    if let Err(error) = child.kill().await {
        tracing::warn!(%error, "the new process cannot be ended");
    }
    Err(outcome)
}

/// Notes this process as the one that serves, where somebody wants to know.
pub(crate) fn note_pid() -> io::Result<()> {
    match std::env::var_os(PID_FILE) {
        None => Ok(()),
        Some(path) => write_pid(Path::new(&path)),
    }
}

fn write_pid(path: &Path) -> io::Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".new");
    fs::write(&unfinished, std::process::id().to_string())?;
    fs::rename(unfinished, path)
}

#[cfg(test)]
mod tests {
    use tabularium_common::grpc::ListenAddress;

    use super::*;

    async fn sockets() -> Sockets {
        let any = || ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
        Sockets::bind([any(), any()], Vec::new()).await.unwrap()
    }

    #[tokio::test]
    async fn sockets_travel_with_their_addresses() {
        let (here, there) = StdUnixStream::pair().unwrap();
        send(&here, &sockets().await).unwrap();
        let received = receive(&there).unwrap();
        assert_eq!(received.len(), 2);
        assert_eq!(received[0].0, "127.0.0.1:0");
        let listener = std::net::TcpListener::from(received.into_iter().next().unwrap().1);
        std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        drop(here);
        assert!(receive(&there).is_err());
    }

    #[tokio::test]
    async fn a_new_process_that_does_not_serve_changes_nothing() {
        let sockets = sockets().await;
        let ended = hand_over_to(&mut Command::new("false"), &sockets).await.unwrap_err();
        assert!(matches!(ended, HandoverError::Ended), "{ended}");
        let missing = hand_over_to(&mut Command::new("/nonexistent"), &sockets).await.unwrap_err();
        assert!(matches!(missing, HandoverError::Io { .. }), "{missing}");
        let said = "printf 'serving\\n' >&0";
        hand_over_to(Command::new("sh").args(["-c", said]), &sockets).await.unwrap();
    }

    #[test]
    fn the_pid_is_noted_in_one_step() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("praefect.pid");
        write_pid(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), std::process::id().to_string());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
