//! The routers, or the coordinators: any of them will do, so they are used in turn, and one that cannot be dialled is
//! passed over and then left alone for a moment.

use std::{
    error::Error as _,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use http::HeaderMap;
use tabularium_common::{
    auth::SendToken,
    grpc::{Address, channel},
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tonic::{Status, metadata::MetadataMap, transport::Channel};

use crate::{limits::UPSTREAM_REST, metrics::Metrics};

/// How peers know us in their logs (wire reference, section f).
const CLIENT_NAME: (&str, &str) = ("x-gitlab-client-name", "tabularium-gateway");

/// Interchangeable peers.
pub(crate) struct Upstreams {
    peers: Vec<Peer>,
    next: AtomicUsize,
    token: SendToken,
    started: Instant,
    metrics: Arc<Metrics>,
}

struct Peer {
    address: Address,
    channel: Channel,
    /// Milliseconds after `started`.
    rests_until: AtomicU64,
}

/// When a call that failed may be made again with another peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// The call reads: whenever a peer is unavailable.
    IfUnavailable,
    /// The call writes: only when it certainly never left this process.
    IfNotSent,
}

impl Again {
    fn allows(self, status: &Status) -> bool {
        match self {
            Self::IfUnavailable => status.code() == tonic::Code::Unavailable,
            Self::IfNotSent => never_dialled(status),
        }
    }
}

impl Upstreams {
    pub(crate) fn new(addresses: &[Address], token: SendToken, metrics: Arc<Metrics>) -> Self {
        let peers = addresses
            .iter()
            .map(|address| Peer {
                address: address.clone(),
                channel: channel(address),
                rests_until: AtomicU64::new(0),
            })
            .collect();
        Self { peers, next: AtomicUsize::new(0), token, started: Instant::now(), metrics }
    }

    /// Makes a call with one peer after the other until one answers or `again` says no. `deadline` bounds all of it;
    /// without one the caller must.
    pub(crate) async fn call<T, F, Fut>(
        &self,
        deadline: Option<Duration>,
        again: Again,
        call: F,
    ) -> Result<T, Status>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        let attempts = self.attempts(again, call);
        match deadline {
            None => attempts.await,
            Some(deadline) => match tokio::time::timeout(deadline, attempts).await {
                Ok(result) => result,
                Err(_) => Err(Status::deadline_exceeded("no answer in time")),
            },
        }
    }

    async fn attempts<T, F, Fut>(&self, again: Again, call: F) -> Result<T, Status>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let resting: Vec<bool> =
            self.peers.iter().map(|peer| peer.rests_until.load(Ordering::Relaxed) > now).collect();
        let mut last = Status::unavailable("no upstream is configured");
        for index in order(self.next.fetch_add(1, Ordering::Relaxed), &resting) {
            let peer = &self.peers[index];
            match call(peer.channel.clone()).await {
                Err(status) if again.allows(&status) => {
                    if never_dialled(&status) {
                        let rest = u64::try_from(UPSTREAM_REST.as_millis()).unwrap_or(u64::MAX);
                        peer.rests_until.store(now.saturating_add(rest), Ordering::Relaxed);
                    }
                    self.metrics.failovers.inc();
                    tracing::warn!(address = %peer.address, error = status.message(), "upstream passed over");
                    last = status;
                }
                result => return result,
            }
        }
        Err(last)
    }

    /// The headers of every call: token, correlation id, our name.
    pub(crate) fn headers(&self, correlation_id: &CorrelationId) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(value) = self.token.header() {
            headers.insert(http::header::AUTHORIZATION, value);
        }
        if let Some(value) = correlation_id.header() {
            headers.insert(CORRELATION_ID, value);
        }
        headers.insert(CLIENT_NAME.0, http::HeaderValue::from_static(CLIENT_NAME.1));
        headers
    }

    /// A message with the headers of every call and, for calls that must end as a whole in time, gRPC's deadline.
    pub(crate) fn request<T>(
        &self,
        message: T,
        correlation_id: &CorrelationId,
        deadline: Option<Duration>,
    ) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        *request.metadata_mut() = MetadataMap::from_headers(self.headers(correlation_id));
        if let Some(deadline) = deadline {
            request.set_timeout(deadline);
        }
        request
    }
}

/// In which order peers are tried: in turn from `start`, those that rest last.
fn order(start: usize, resting: &[bool]) -> Vec<usize> {
    let count = resting.len();
    let turn = (0..count).map(|step| (start % count + step) % count);
    let (last, first): (Vec<_>, Vec<_>) = turn.partition(|index| resting[*index]);
    first.into_iter().chain(last).collect()
}

/// No connection could be made, so that no byte of the call left this process.
fn never_dialled(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_take_turns_and_resting_ones_come_last() {
        assert_eq!(order(0, &[false, false, false]), [0, 1, 2]);
        assert_eq!(order(5, &[false, false, false]), [2, 0, 1]);
        assert_eq!(order(0, &[true, false, false]), [1, 2, 0]);
        assert_eq!(order(1, &[true, true]), [1, 0]);
        assert_eq!(order(usize::MAX, &[false]), [0]);
        assert!(order(3, &[]).is_empty());
    }
}
