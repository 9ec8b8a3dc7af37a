//! The way back to whoever dialled.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use hyper_util::rt::TokioIo;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use super::{VOTE_PING_INTERVAL, VOTE_PING_TIMEOUT, session::Session};
use crate::{grpc, lifecycle::Tasks};

/// Number of a multiplexed connection in this process, from 1. Gitaly writes 0 where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(u64);

impl ConnectionId {
    pub(super) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// The number.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The way back to the peer of the connection that a request came over: an extension of the request.
#[derive(Clone)]
pub struct Backchannel(Arc<Shared>);

struct Shared {
    id: ConnectionId,
    session: Session,
    tasks: Tasks,
    channel: OnceLock<Channel>,
}

impl fmt::Debug for Backchannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Backchannel").field(&self.0.id).finish()
    }
}

impl Backchannel {
    /// `tasks` own whoever watches the peer.
    pub(super) fn new(session: Session, tasks: Tasks) -> Self {
        Self(Arc::new(Shared { id: ConnectionId::next(), session, tasks, channel: OnceLock::new() }))
    }

    /// Number of the connection.
    pub fn id(&self) -> ConnectionId {
        self.0.id
    }

    pub(super) fn session(&self) -> &Session {
        &self.0.session
    }

    /// For typed clients; inside a runtime. Its stream is opened when it is first used. Calls fail at once when the
    /// connection ends, and when the peer leaves [`VOTE_PING_INTERVAL`] and [`VOTE_PING_TIMEOUT`] pass without a word; that
    /// ends the connection too.
    pub fn channel(&self) -> Channel {
        let channel = self.0.channel.get_or_init(|| {
            self.0.tasks.spawn("watch of a connection's peer", watch(self.0.session.clone()));
            channel(self.0.session.clone())
        });
        channel.clone()
    }
}

/// Ends the session when the peer falls silent.
async fn watch(session: Session) {
    let answered = async {
        loop {
            sleep(VOTE_PING_INTERVAL).await;
            if !matches!(timeout(VOTE_PING_TIMEOUT, session.ping()).await, Ok(Ok(()))) {
                break;
            }
        }
    };
    if session.ended().run_until_cancelled(answered).await.is_some() {
        tracing::debug!("the peer of a multiplexed connection fell silent");
        session.ended().cancel();
    }
}

fn channel(session: Session) -> Channel {
    grpc::silent_endpoint().connect_with_connector_lazy(tower::service_fn(move |_| {
        let session = session.clone();
        async move { session.open().await.map(|stream| TokioIo::new(stream.holding_session())) }
    }))
}
