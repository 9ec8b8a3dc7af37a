//! Client connections: accepted in one place, each served to its end by one worker.
//!
//! A worker is a thread with a runtime of its own, so that a request never changes threads: waking another thread costs
//! more than relaying a small message. The first worker is the thread that accepts. A connection goes to the worker that
//! has the fewest.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use hyper::{body::Incoming, server::conn::http2::Builder};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tabularium_common::{
    grpc::{
        Accepted, CONNECTION_WINDOW_BYTES, Detached, KEEPALIVE_TIMEOUT, Listener, MAX_CONCURRENT_STREAMS,
        MAX_HEADER_LIST_BYTES, MAX_PENDING_RESETS,
    },
    lifecycle::Tasks,
    multiplex::identify,
};
use tokio::{io::BufReader, sync::mpsc, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    limits::{
        ACCEPT_BACKOFF, CLIENT_KEEPALIVE, FIRST_BYTES_GRACE, HANDOFF_QUEUE, MAX_CONNECTIONS, MAX_FRAME_BYTES,
        SEND_BUFFER_BYTES, SOCKET_BUFFER_BYTES, STREAM_WINDOW_BYTES,
    },
    relay::Relay,
};

/// Where a worker takes its connections from.
enum Inbox {
    /// It is the accepting thread.
    Here,
    There(mpsc::Sender<(Detached, Open)>),
}

struct Worker {
    relay: Arc<Relay>,
    inbox: Inbox,
    connections: Arc<AtomicUsize>,
}

/// All workers. Dropping it does not stop them; [`Workers::join`] does.
pub(crate) struct Workers {
    all: Vec<Worker>,
    threads: Vec<JoinHandle<()>>,
    tasks: Tasks,
    sessions: Tasks,
    exit: CancellationToken,
}

impl Workers {
    /// Starts a thread for every relay but the first. `tasks` owns the connections, `sessions` what lies below those that are
    /// multiplexed: it has to outlive them.
    pub(crate) fn start(relays: Vec<Relay>, tasks: &Tasks, sessions: &Tasks) -> io::Result<Self> {
        let exit = CancellationToken::new();
        let mut all = Vec::new();
        let mut threads = Vec::new();
        for (number, relay) in relays.into_iter().enumerate() {
            let relay = Arc::new(relay);
            let connections = Arc::<AtomicUsize>::default();
            let mut inbox = Inbox::Here;
            if number > 0 {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                let (sender, receiver) = mpsc::channel(HANDOFF_QUEUE);
                inbox = Inbox::There(sender);
                let life =
                    work(receiver, Arc::clone(&relay), (tasks.clone(), sessions.clone()), exit.clone());
                let thread = std::thread::Builder::new().name(format!("relay-{number}"));
                threads.push(thread.spawn(move || runtime.block_on(life))?);
            }
            all.push(Worker { relay, inbox, connections });
        }
        Ok(Self { all, threads, tasks: tasks.clone(), sessions: sessions.clone(), exit })
    }

    /// Accepts until the tasks stop.
    pub(crate) async fn accept(&self, listener: Listener) {
        let stopping = self.tasks.stopping();
        loop {
            let accepted = tokio::select! {
                biased;
                () = stopping.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(connection) => self.place(connection).await,
                Err(error) => {
                    tracing::warn!(%error, "a connection was not accepted");
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    async fn place(&self, connection: Accepted) {
        let load = |worker: &&Worker| worker.connections.load(Ordering::Relaxed);
        let total: usize = self.all.iter().map(|worker| load(&worker)).sum();
        let Some(worker) = self.all.iter().min_by_key(load) else { return };
        if total >= MAX_CONNECTIONS {
            tracing::warn!(connections = total, "too many connections; one more was closed");
            return;
        }
        let open = Open::new(&worker.connections);
        match &worker.inbox {
            Inbox::Here => {
                self.tasks.spawn(
                    "connection",
                    serve(
                        connection,
                        Arc::clone(&worker.relay),
                        self.sessions.clone(),
                        self.tasks.stopping(),
                        open,
                    ),
                );
            }
            Inbox::There(inbox) => match connection.detach() {
                Ok(connection) => {
                    if inbox.send((connection, open)).await.is_err() {
                        tracing::error!("a worker is gone; a connection was closed");
                    }
                }
                Err(error) => tracing::warn!(%error, "a connection was not handed over"),
            },
        }
    }

    /// Ends the other threads, after the tasks have been drained.
    pub(crate) fn join(self) {
        self.exit.cancel();
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
    }
}

async fn work(
    mut inbox: mpsc::Receiver<(Detached, Open)>,
    relay: Arc<Relay>,
    (tasks, sessions): (Tasks, Tasks),
    exit: CancellationToken,
) {
    loop {
        let connection = tokio::select! {
            () = exit.cancelled() => return,
            connection = inbox.recv() => connection,
        };
        let Some((connection, open)) = connection else {
            // Nobody accepts any more; what is open goes on.
            exit.cancelled().await;
            return;
        };
        match connection.attach() {
            Err(error) => tracing::warn!(%error, "a connection was not taken over"),
            Ok(connection) => {
                let serving = serve(connection, Arc::clone(&relay), sessions.clone(), tasks.stopping(), open);
                tasks.spawn("connection", serving);
            }
        }
    }
}

/// Counts a connection while it is open.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(connections: &Arc<AtomicUsize>) -> Self {
        connections.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connections))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one connection until the client closes it, or, once the router is stopping, until its RPCs are done.
///
/// After the handshake of TLS, if there is one, the first bytes say what the connection is: HTTP/2, or one that is multiplexed,
/// on whose first stream HTTP/2 begins. What a client that was accepted says at once is heard even when the router stops: nobody
/// else has the connection.
async fn serve(
    accepted: Accepted,
    relay: Arc<Relay>,
    sessions: Tasks,
    stopping: CancellationToken,
    open: Open,
) {
    let identified = async { identify(accepted.secure().await?, &sessions).await };
    let given_up = async {
        stopping.cancelled().await;
        sleep(FIRST_BYTES_GRACE).await;
    };
    let identified = tokio::select! {
        identified = identified => identified,
        () = given_up => return,
    };
    let connection = match identified {
        Ok(connection) => connection,
        Err(error) => return tracing::debug!(%error, "client connection came to nothing"),
    };
    let metrics = Arc::clone(&relay.shared.metrics);
    metrics.connections.inc();
    let back = connection.backchannel().cloned();
    let service = hyper::service::service_fn(move |mut request: http::Request<Incoming>| {
        let relay = Arc::clone(&relay);
        if let Some(back) = &back {
            request.extensions_mut().insert(back.clone());
        }
        async move { Ok::<_, std::convert::Infallible>(relay.serve(request).await) }
    });
    let io = TokioIo::new(BufReader::with_capacity(SOCKET_BUFFER_BYTES, connection));
    let mut http = std::pin::pin!(builder().serve_connection(io, service));
    let served = tokio::select! {
        served = http.as_mut() => served,
        () = stopping.cancelled() => {
            http.as_mut().graceful_shutdown();
            http.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "client connection ended");
    }
    metrics.connections.dec();
    drop(open);
}

fn builder() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        // Gitaly sends none, and it would reach clients as metadata.
        .auto_date_header(false)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .max_header_list_size(MAX_HEADER_LIST_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(None)
        .keep_alive_interval(CLIENT_KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    builder
}
