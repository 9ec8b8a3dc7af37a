//! A TCP relay between a client and a server that can be cut, slowed down or made to swallow everything.

use std::{
    net::SocketAddr,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tabularium_common::lifecycle::Tasks;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// Bytes relayed at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// What happens to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: they go through.
    None,
    /// Every chunk waits this long, each way.
    Delay(Duration),
    /// Nothing arrives any more, either way, and nobody is told. New connections are accepted and starve.
    BlackHole,
    /// New connections are closed at once.
    Refuse,
}

#[derive(Debug, Clone, Copy)]
struct Orders {
    fault: Fault,
    /// Connections made before the last cut are gone.
    cuts: u64,
}

/// The relay. It listens until it is dropped.
pub struct FaultProxy {
    address: SocketAddr,
    orders: watch::Sender<Orders>,
    relayed: Arc<AtomicU64>,
    tasks: Tasks,
}

impl FaultProxy {
    /// Listens on a port of the kernel's choice and relays to `upstream` (`host:port`).
    pub async fn start(upstream: impl Into<String>) -> Self {
        let upstream = upstream.into();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a loopback port");
        let address = listener.local_addr().expect("a bound port");
        let (orders, seen) = watch::channel(Orders { fault: Fault::None, cuts: 0 });
        let (relayed, tasks) = (Arc::new(AtomicU64::new(0)), Tasks::new());
        let (counter, spawner, stopping) = (Arc::clone(&relayed), tasks.clone(), tasks.stopping());
        tasks.spawn("fault proxy", async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = stopping.cancelled() => return,
                };
                let Ok((client, _)) = accepted else { return };
                if seen.borrow().fault == Fault::Refuse {
                    continue;
                }
                let connection = relay(client, upstream.clone(), seen.clone(), Arc::clone(&counter));
                let stopping = stopping.clone();
                spawner.spawn("fault proxy connection", async move {
                    tokio::select! {
                        () = connection => {}
                        () = stopping.cancelled() => {}
                    }
                });
            }
        });
        Self { address, orders, relayed, tasks }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What happens to bytes from now on, on new connections and on those that are open.
    pub fn set(&self, fault: Fault) {
        self.orders.send_modify(|orders| orders.fault = fault);
    }

    /// Closes every open connection. New ones are possible.
    pub fn cut(&self) {
        self.orders.send_modify(|orders| orders.cuts += 1);
    }

    /// Bytes relayed so far, both ways.
    pub fn relayed(&self) -> u64 {
        self.relayed.load(Ordering::Relaxed)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.tasks.stopping().cancel();
    }
}

async fn relay(
    client: TcpStream,
    upstream: String,
    mut seen: watch::Receiver<Orders>,
    relayed: Arc<AtomicU64>,
) {
    let cuts = seen.borrow_and_update().cuts;
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let up = one_way(from_client, to_server, seen.clone(), Arc::clone(&relayed));
    let down = one_way(from_server, to_client, seen.clone(), relayed);
    let cut = async {
        // An error means that the proxy is gone, which is a cut as well.
        let _orders = seen.wait_for(|orders| orders.cuts > cuts).await;
    };
    tokio::select! {
        _ = async { tokio::join!(up, down) } => {}
        () = cut => {}
    }
}

/// Ends when either side does; the end of one direction is passed on.
async fn one_way(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut seen: watch::Receiver<Orders>,
    relayed: Arc<AtomicU64>,
) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let Ok(length) = from.read(&mut chunk).await else { return };
        // Held back until the hole is gone: what was swallowed by a network is sent again by TCP.
        if seen.wait_for(|orders| orders.fault != Fault::BlackHole).await.is_err() {
            return;
        }
        let fault = seen.borrow().fault;
        if let Fault::Delay(delay) = fault {
            tokio::time::sleep(delay).await;
        }
        if length == 0 {
            // The other side may be gone already, which is what it would be told.
            let _gone = to.shutdown().await;
            return;
        }
        if to.write_all(&chunk[..length]).await.is_err() {
            return;
        }
        relayed.fetch_add(length as u64, Ordering::Relaxed);
    }
}
