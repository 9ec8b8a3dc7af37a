//! The routers, or the coordinators: any of them will do, so they are used in turn. One that fails is passed over and then
//! left alone for a moment, and so is one that says that it cannot serve, or says nothing, when it is asked for its health.
//!
//! A call is made again with another peer only when that cannot do a thing twice, see [`repeats_read`] and
//! [`repeats_write`].

use std::{
    error::Error as _,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use http::HeaderMap;
use tabularium_common::{
    auth::SendToken,
    grpc::{Address, NOT_BEGUN, channel},
    lifecycle::Tasks,
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, timeout},
};
use tonic::{Code, Status, metadata::MetadataMap, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    beside::Beside,
    limits::{UPSTREAM_PROBE_INTERVAL, UPSTREAM_PROBE_TIMEOUT, UPSTREAM_REST},
    metrics::Metrics,
};

/// How peers know us in their logs (wire reference, section f).
const CLIENT_NAME: (&str, &str) = ("x-gitlab-client-name", "tabularium-gateway");

/// Interchangeable peers.
pub(crate) struct Upstreams {
    peers: Vec<Arc<Peer>>,
    next: AtomicUsize,
    token: SendToken,
    started: Instant,
    metrics: Arc<Metrics>,
}

pub(crate) struct Peer {
    address: Address,
    pub(crate) channel: Channel,
    /// For what goes beside calls.
    pub(crate) beside: Option<Beside>,
    /// Milliseconds after `started`.
    rests_until: AtomicU64,
    /// What it said, or did not say, when it was last asked for its health.
    well: watch::Sender<bool>,
}

impl Peer {
    /// Waits until it stops being well.
    async fn falls_silent(&self) {
        let mut well = self.well.subscribe();
        let fell = async {
            well.wait_for(|well| *well).await?;
            well.wait_for(|well| !*well).await.map(|_| ())
        };
        if fell.await.is_err() {
            // The sender lives as long as the peer.
            std::future::pending::<()>().await;
        }
    }
}

/// Whether a call that reads may be made again: no server has answered it, or one is unavailable.
pub(crate) fn repeats_read(status: &Status) -> bool {
    is_lost(status) || status.code() == Code::Unavailable
}

/// Whether a call that writes may be made again: it certainly never left this process, or the peer says that nothing has
/// begun. After a connection that broke nobody knows; made again, a push that was done would be told as refused.
pub(crate) fn repeats_write(status: &Status) -> bool {
    never_dialled(status) || status.metadata().contains_key(NOT_BEGUN)
}

impl Upstreams {
    /// `sessions`: peers may know sidechannels; they own the connections for those.
    pub(crate) fn new(
        addresses: &[Address],
        token: SendToken,
        metrics: Arc<Metrics>,
        sessions: Option<&Tasks>,
    ) -> Self {
        let peers = addresses
            .iter()
            .map(|address| {
                Arc::new(Peer {
                    address: address.clone(),
                    channel: channel(address),
                    beside: sessions.map(|tasks| Beside::new(address, tasks)),
                    rests_until: AtomicU64::new(0),
                    well: watch::Sender::new(true),
                })
            })
            .collect();
        Self { peers, next: AtomicUsize::new(0), token, started: Instant::now(), metrics }
    }

    /// Asks all peers for their health, for as long as the gateway runs.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(UPSTREAM_PROBE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            join_all(self.peers.iter().map(|peer| self.probe(peer))).await;
        }
    }

    async fn probe(&self, peer: &Peer) {
        let problem = match timeout(UPSTREAM_PROBE_TIMEOUT, self.check(peer)).await {
            Err(_) => Some("no answer".to_owned()),
            Ok(problem) => problem,
        };
        let well = problem.is_none();
        let changed = peer.well.send_if_modified(|before| std::mem::replace(before, well) != well);
        match problem {
            Some(problem) if changed => {
                tracing::warn!(address = %peer.address, problem, "upstream is not well");
            }
            None if changed => tracing::info!(address = %peer.address, "upstream is well again"),
            _ => {}
        }
    }

    /// What is wrong, if something is.
    async fn check(&self, peer: &Peer) -> Option<String> {
        let request = self.request(HealthCheckRequest::default(), &CorrelationId::new(), None);
        match HealthClient::new(peer.channel.clone()).check(request).await {
            Ok(answer) if answer.get_ref().status() == ServingStatus::Serving => None,
            Ok(answer) => Some(answer.get_ref().status().as_str_name().to_owned()),
            Err(status) if repeats_read(&status) => Some(status.message().to_owned()),
            // It answers; how well it is, it cannot say.
            Err(_) => None,
        }
    }

    /// Makes a call with one peer after the other until one answers or `again` says that it may not be made again after
    /// such a failure. `deadline` bounds all of it; without one the caller must.
    pub(crate) async fn call<T, F, Fut>(
        &self,
        deadline: Option<Duration>,
        again: impl Fn(&Status) -> bool,
        call: F,
    ) -> Result<T, Status>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        let attempts = self.attempts(again, |peer: Arc<Peer>| call(peer.channel.clone()));
        match deadline {
            None => attempts.await,
            Some(deadline) => match timeout(deadline, attempts).await {
                Ok(result) => result,
                Err(_) => Err(Status::deadline_exceeded("no answer in time")),
            },
        }
    }

    /// The same without a deadline, and with all that there is of the peer.
    pub(crate) async fn attempts<T, F, Fut>(
        &self,
        again: impl Fn(&Status) -> bool,
        call: F,
    ) -> Result<T, Status>
    where
        F: Fn(Arc<Peer>) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        let now = self.now();
        let rests = |peer: &Arc<Peer>| peer.rests_until.load(Ordering::Relaxed) > now || !*peer.well.borrow();
        let resting: Vec<bool> = self.peers.iter().map(rests).collect();
        let order = order(self.next.fetch_add(1, Ordering::Relaxed), &resting);
        let mut last = Status::unavailable("no upstream is configured");
        for (place, index) in order.iter().enumerate() {
            let peer = &self.peers[*index];
            let is_last = place + 1 == order.len();
            let status = match attempt(peer, !is_last, &again, call(Arc::clone(peer))).await {
                Err(status) if again(&status) => status,
                result => return result,
            };
            let rest = u64::try_from(UPSTREAM_REST.as_millis()).unwrap_or(u64::MAX);
            peer.rests_until.store(self.now().saturating_add(rest), Ordering::Relaxed);
            self.metrics.failovers.inc();
            tracing::warn!(address = %peer.address, error = status.message(), "upstream passed over");
            last = status;
        }
        Err(last)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
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

/// One attempt. It is given up when the peer falls silent, there are `others`, and the call may be made again.
async fn attempt<T>(
    peer: &Peer,
    others: bool,
    again: impl Fn(&Status) -> bool,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let mut call = std::pin::pin!(call);
    if others {
        let silent = Status::unavailable("the peer is silent");
        tokio::select! {
            biased;
            result = &mut call => return result,
            () = peer.falls_silent() => {
                if again(&silent) {
                    return Err(silent);
                }
            }
        }
    }
    call.await
}

/// In which order peers are tried: in turn from `start`, those that rest last.
fn order(start: usize, resting: &[bool]) -> Vec<usize> {
    let count = resting.len();
    let turn = (0..count).map(|step| (start % count + step) % count);
    let (last, first): (Vec<_>, Vec<_>) = turn.partition(|index| resting[*index]);
    first.into_iter().chain(last).collect()
}

/// The client library made this status, because the transport failed: no server sent it.
pub(crate) fn is_lost(status: &Status) -> bool {
    status.source().is_some()
}

/// No connection could be made, so that no byte of the call left this process.
pub(crate) fn never_dialled(status: &Status) -> bool {
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
