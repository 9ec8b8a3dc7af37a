//! A TCP relay between a client and a server that can be cut, slowed down or made to swallow everything, also in one
//! direction only. Where its server refuses connections, so does the relay: a server that is killed looks killed.

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
    sync::{Notify, watch},
};

/// Bytes relayed at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// How often a server that is down is looked at, and a port that cannot be had back yet is tried.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

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

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

#[derive(Debug, Clone, Copy)]
struct Orders {
    up: Fault,
    down: Fault,
    /// Connections made before the last cut are gone.
    cuts: u64,
}

impl Orders {
    fn of(&self, direction: Direction) -> Fault {
        match direction {
            Direction::Up => self.up,
            Direction::Down => self.down,
        }
    }
}

/// What every connection of a relay shares.
#[derive(Clone)]
struct Shared {
    upstream: Arc<str>,
    orders: watch::Receiver<Orders>,
    relayed: Arc<AtomicU64>,
    /// Told when a connection to the server failed or ended.
    doubt: Arc<Notify>,
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
    #[expect(clippy::unused_async, reason = "needs a runtime, which this shows")]
    pub async fn start(upstream: impl Into<String>) -> Self {
        Self::start_now(upstream)
    }

    /// As [`FaultProxy::start`], where nothing can be awaited.
    pub fn start_now(upstream: impl Into<String>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let address = listener.local_addr().expect("a bound port");
        listener.set_nonblocking(true).expect("a socket that does not block");
        let listener = TcpListener::from_std(listener).expect("a runtime");
        let (orders, seen) = watch::channel(Orders { up: Fault::None, down: Fault::None, cuts: 0 });
        let (relayed, tasks) = (Arc::new(AtomicU64::new(0)), Tasks::new());
        let shared = Shared {
            upstream: upstream.into().into(),
            orders: seen,
            relayed: Arc::clone(&relayed),
            doubt: Arc::new(Notify::new()),
        };
        let (spawner, stopping) = (tasks.clone(), tasks.stopping());
        tasks.spawn("fault proxy", async move {
            tokio::select! {
                () = listen(listener, address, shared, spawner) => {}
                () = stopping.cancelled() => {}
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
        self.set_one_way(Direction::Up, fault);
        self.set_one_way(Direction::Down, fault);
    }

    /// As [`FaultProxy::set`], of one direction. New connections are refused as soon as either direction says so.
    pub fn set_one_way(&self, direction: Direction, fault: Fault) {
        self.orders.send_modify(|orders| match direction {
            Direction::Up => orders.up = fault,
            Direction::Down => orders.down = fault,
        });
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

/// Accepts as long as the server does.
async fn listen(mut listener: TcpListener, address: SocketAddr, shared: Shared, tasks: Tasks) {
    loop {
        let client = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.doubt.notified() => {
                if is_down(&shared.upstream).await {
                    drop(listener);
                    listener = back(&shared.upstream, address).await;
                }
                continue;
            }
        };
        let Ok((client, _)) = client else { continue };
        let orders = *shared.orders.borrow();
        if orders.up == Fault::Refuse || orders.down == Fault::Refuse {
            continue;
        }
        let (connection, stopping) = (relay(client, shared.clone()), tasks.stopping());
        tasks.spawn("fault proxy connection", async move {
            tokio::select! {
                () = connection => {}
                () = stopping.cancelled() => {}
            }
        });
    }
}

async fn is_down(upstream: &str) -> bool {
    TcpStream::connect(upstream).await.is_err()
}

/// Waits until the server is there again, then listens where it did before.
async fn back(upstream: &str, address: SocketAddr) -> TcpListener {
    loop {
        if !is_down(upstream).await
            && let Ok(listener) = TcpListener::bind(address).await
        {
            return listener;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn relay(client: TcpStream, shared: Shared) {
    let mut seen = shared.orders.clone();
    let cuts = seen.borrow_and_update().cuts;
    let Ok(server) = TcpStream::connect(&*shared.upstream).await else {
        shared.doubt.notify_one();
        return;
    };
    // As if nothing stood in between; neither refuses it on loopback.
    let _small_messages_at_once = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let up = one_way(Direction::Up, from_client, to_server, &shared);
    let down = async {
        one_way(Direction::Down, from_server, to_client, &shared).await;
        shared.doubt.notify_one();
    };
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
async fn one_way(direction: Direction, mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared) {
    let mut seen = shared.orders.clone();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let read = from.read(&mut chunk).await;
        // Held back until the hole is gone: what was swallowed by a network is sent again by TCP.
        let orders = seen.wait_for(|orders| orders.of(direction) != Fault::BlackHole).await;
        let Ok(fault) = orders.map(|orders| orders.of(direction)) else { return };
        if let Fault::Delay(delay) = fault {
            tokio::time::sleep(delay).await;
        }
        let length = read.unwrap_or(0);
        if length == 0 {
            // The other side may be gone already, which is what it would be told.
            let _gone = to.shutdown().await;
            return;
        }
        if to.write_all(&chunk[..length]).await.is_err() {
            return;
        }
        shared.relayed.fetch_add(length as u64, Ordering::Relaxed);
    }
}
