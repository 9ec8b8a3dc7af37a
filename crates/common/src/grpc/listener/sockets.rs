//! Bound sockets without a runtime: what a process listens at, while it changes hands.
//!
//! A process that takes another's place takes its sockets over. The kernel keeps connections for whoever has the socket, so
//! none is refused and none is lost in between.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::atomic::AtomicUsize,
};

use tokio::net::{TcpListener, UnixListener};

use super::{Bound, ListenAddress, Listener, Socket, bind_socket_file};
use crate::tls::{Acceptor, Application, TlsConfig};

/// Sockets, each with the address that it was bound for.
pub struct Sockets(Vec<(ListenAddress, OwnedFd)>);

impl Sockets {
    /// Binds those addresses of which `inherited` has no socket, and takes over the others. What is left of `inherited` is
    /// closed.
    pub async fn bind(
        addresses: impl IntoIterator<Item = ListenAddress>,
        mut inherited: Vec<(String, OwnedFd)>,
    ) -> io::Result<Self> {
        let mut sockets = Vec::new();
        for address in addresses {
            let text = address.to_string();
            let taken = inherited.iter().position(|(known, _)| *known == text);
            let socket = match (taken, &address) {
                (Some(index), _) => inherited.swap_remove(index).1,
                (None, ListenAddress::Tcp(address) | ListenAddress::Tls(address)) => {
                    let bound = TcpListener::bind(address).await;
                    bound.and_then(TcpListener::into_std).map_err(|error| of(&text, &error))?.into()
                }
                (None, ListenAddress::Unix(path)) => {
                    let bound = bind_socket_file(path).await;
                    bound.and_then(UnixListener::into_std).map_err(|error| of(&text, &error))?.into()
                }
            };
            sockets.push((address, socket));
        }
        Ok(Self(sockets))
    }

    /// Each with its address, for whoever comes next.
    pub fn iter(&self) -> impl Iterator<Item = (String, BorrowedFd<'_>)> {
        self.0.iter().map(|(address, socket)| (address.to_string(), socket.as_fd()))
    }

    /// Listens at those with one of these addresses. Call it inside the runtime that is to accept; the sockets stay bound
    /// when the listener is dropped.
    pub fn listen(
        &self,
        wanted: impl Fn(&ListenAddress) -> bool,
        tls: &TlsConfig,
        application: Application,
    ) -> io::Result<Listener> {
        let mut bound = Vec::new();
        for (address, socket) in self.0.iter().filter(|(address, _)| wanted(address)) {
            let socket = socket.try_clone()?;
            let (socket, acceptor) = match address {
                ListenAddress::Unix(_) => (Socket::Unix(UnixListener::from_std(socket.into())?), None),
                ListenAddress::Tcp(_) => (Socket::Tcp(TcpListener::from_std(socket.into())?), None),
                ListenAddress::Tls(_) => {
                    let acceptor = Acceptor::new(tls, application).map_err(io::Error::other)?;
                    (Socket::Tcp(TcpListener::from_std(socket.into())?), Some(acceptor))
                }
            };
            bound.push(Bound { socket, acceptor });
        }
        Ok(Listener { bound, first: AtomicUsize::new(0) })
    }
}

fn of(address: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("listening on {address}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(sockets: &Sockets) -> Listener {
        sockets.listen(|_| true, &TlsConfig::NONE, Application::Grpc).unwrap()
    }

    #[tokio::test]
    async fn a_connection_that_nobody_has_accepted_is_the_next_ones() {
        let directory = tempfile::tempdir().unwrap();
        let addresses =
            [ListenAddress::Unix(directory.path().join("s")), ListenAddress::Tcp(([127, 0, 0, 1], 0).into())];
        let old = Sockets::bind(addresses.clone(), Vec::new()).await.unwrap();
        let listener = listen(&old);
        let dialled = listener.addresses().unwrap();
        let mut waiting = Vec::new();
        for address in &dialled {
            waiting.push(address.connect().await.unwrap());
        }
        let inherited = old.iter().map(|(address, socket)| (address, socket.try_clone_to_owned().unwrap()));
        let new = Sockets::bind(addresses, inherited.collect()).await.unwrap();
        drop((listener, old));
        let listener = listen(&new);
        assert_eq!(listener.addresses().unwrap(), dialled);
        for _ in waiting {
            listener.accept().await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_cannot_be_bound_is_named() {
        let address = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
        let first = Sockets::bind([address], Vec::new()).await.unwrap();
        let taken = listen(&first).address().unwrap().to_string().replace("tcp://", "").parse().unwrap();
        let error = Sockets::bind([taken], Vec::new()).await.err().unwrap().to_string();
        assert!(error.contains("listening on 127.0.0.1:"), "{error}");
    }
}
