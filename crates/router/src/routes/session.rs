//! The session with one coordinator: renews the lease, takes revocations and topology.
//!
//! One session lives at a time. When it ends, for whatever reason, the lease ends with it and the next coordinator is
//! tried.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tabularium_common::lifecycle::Readiness;
use tabularium_proto::coordinator::{
    RouteRevoked, SessionHello, SessionRenew, SessionRequest, SessionResponse, SessionWelcome,
    session_request::Message as Ours, session_response::Message as Theirs,
};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    coordinator::Coordinators,
    limits::{MAX_LEASE, SESSION_BACKOFF, SESSION_OPEN_TIMEOUT, SESSION_QUEUE},
    nodes::Nodes,
    routes::Routes,
};

/// Renewals per lease: two may be lost before it runs out.
const RENEWALS_PER_LEASE: u32 = 3;
/// Renewals that may be unanswered; older ones are forgotten.
const MAX_UNANSWERED: usize = 16;

/// Everything a session feeds.
pub(crate) struct Sessions {
    /// Who can be asked for one.
    pub(crate) coordinators: Coordinators,
    /// Takes leases and revocations.
    pub(crate) routes: Arc<Routes>,
    /// Takes the topology.
    pub(crate) nodes: Arc<Nodes>,
    /// Unique per process.
    pub(crate) router_id: String,
    /// Set once a topology is known: before that no RPC can be served.
    pub(crate) readiness: Readiness,
    /// Told to those that choose among routers: not serving without a session.
    pub(crate) health: HealthReporter,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("no answer in time")]
    Late,
    #[error("{}", .0.message())]
    Status(#[from] Status),
    #[error("closed by the coordinator")]
    Closed,
    #[error("the coordinator does not read")]
    Stuck,
    #[error("the first message is no welcome")]
    NoWelcome,
    #[error("the welcome grants no lease")]
    NoLease,
}

/// What a renewal that was sent a while ago is worth.
#[derive(Default)]
struct Renewals {
    sequence: u64,
    sent: VecDeque<(u64, Instant)>,
}

impl Renewals {
    fn next(&mut self, now: Instant) -> SessionRenew {
        self.sequence += 1;
        self.sent.push_back((self.sequence, now));
        if self.sent.len() > MAX_UNANSWERED {
            self.sent.pop_front();
        }
        SessionRenew { sequence: self.sequence }
    }

    /// When the renewal that was granted had been sent.
    fn granted(&mut self, sequence: u64) -> Option<Instant> {
        while let Some((own, sent)) = self.sent.front().copied() {
            if own > sequence {
                return None;
            }
            self.sent.pop_front();
            if own == sequence {
                return Some(sent);
            }
        }
        None
    }
}

impl Sessions {
    /// Holds a session with one coordinator after another, for as long as the router runs.
    pub(crate) async fn run(self) {
        let mut pause = SESSION_BACKOFF.0;
        let mut ended = Instant::now();
        for index in (0..self.coordinators.count()).cycle() {
            let started = Instant::now();
            let opened = AtomicBool::new(false);
            let error = tokio::select! {
                Err(error) = self.hold(index, &opened) => error,
                () = self.coordinators.falls_silent(index) => SessionError::Late,
            };
            self.routes.session_lost();
            if opened.into_inner() {
                ended = Instant::now();
            }
            if ended.elapsed() > SESSION_OPEN_TIMEOUT {
                self.health.set_service_status("", ServingStatus::NotServing).await;
            }
            if started.elapsed() > SESSION_OPEN_TIMEOUT {
                pause = SESSION_BACKOFF.0;
                tracing::warn!(coordinator = index, %error, "session with the coordinator ended");
            } else {
                tracing::debug!(coordinator = index, %error, "no session with the coordinator");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(SESSION_BACKOFF.1);
        }
    }

    async fn hold(
        &self,
        index: usize,
        opened: &AtomicBool,
    ) -> Result<std::convert::Infallible, SessionError> {
        let (ours, queue) = mpsc::channel(SESSION_QUEUE);
        let say = |message| {
            let request = SessionRequest { message: Some(message) };
            ours.try_send(request).map_err(|_| SessionError::Stuck)
        };
        say(Ours::Hello(SessionHello { router_id: self.router_id.clone() }))?;
        let mut client = self.coordinators.client(index);
        let welcomed = timeout(SESSION_OPEN_TIMEOUT, async {
            let mut theirs = client.session(ReceiverStream::new(queue)).await?.into_inner();
            let welcome = welcome(&mut theirs).await?;
            Ok::<_, SessionError>((theirs, welcome))
        });
        let (mut theirs, welcome) = welcomed.await.map_err(|_| SessionError::Late)??;
        if let Some(topology) = welcome.topology {
            self.nodes.update(topology);
            self.readiness.set(true);
        }
        // Never longer than what was granted; a session without a lease would be renewed without pause.
        let lease = Duration::from_millis(welcome.lease_milliseconds.into()).min(MAX_LEASE);
        if lease.is_zero() {
            return Err(SessionError::NoLease);
        }
        self.coordinators.prefer(index);
        self.routes.session_opened(&welcome.session_id);
        opened.store(true, Ordering::Relaxed);
        self.health.set_service_status("", ServingStatus::Serving).await;
        tracing::info!(coordinator = index, session_id = %welcome.session_id, "session with the coordinator");

        let mut renewals = Renewals::default();
        let mut ticks = tokio::time::interval(lease / RENEWALS_PER_LEASE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                biased;
                message = theirs.message() => {
                    heard = Instant::now();
                    let message = message?.ok_or(SessionError::Closed)?.message;
                    if let Some(answer) = self.take(message, &mut renewals, lease) {
                        say(answer)?;
                    }
                }
                _ = ticks.tick() => {
                    if heard.elapsed() > lease * 2 {
                        return Err(SessionError::Late);
                    }
                    say(Ours::Renew(renewals.next(Instant::now())))?;
                }
            }
        }
    }

    fn take(&self, message: Option<Theirs>, renewals: &mut Renewals, lease: Duration) -> Option<Ours> {
        match message? {
            Theirs::Renewed(renewed) => {
                if let Some(sent) = renewals.granted(renewed.sequence) {
                    self.routes.renewed(sent, lease);
                }
                None
            }
            Theirs::RevokeRoute(revocation) => {
                self.routes.revoke(&revocation);
                Some(Ours::RouteRevoked(RouteRevoked { revocation_id: revocation.revocation_id }))
            }
            Theirs::Topology(topology) => {
                self.nodes.update(topology);
                self.readiness.set(true);
                None
            }
            Theirs::Welcome(_) => None,
        }
    }
}

async fn welcome(theirs: &mut Streaming<SessionResponse>) -> Result<SessionWelcome, SessionError> {
    match theirs.message().await?.and_then(|response| response.message) {
        Some(Theirs::Welcome(welcome)) => Ok(welcome),
        _ => Err(SessionError::NoWelcome),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_renewal_counts_from_when_it_was_sent() {
        let mut renewals = Renewals::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for second in 1..=3 {
            assert_eq!(renewals.next(at(second)).sequence, second);
        }
        assert_eq!(renewals.granted(2), Some(at(2)));
        assert_eq!(renewals.granted(1), None, "an older one would shorten the lease");
        assert_eq!(renewals.granted(9), None, "one that was never sent grants nothing");
        assert_eq!(renewals.granted(3), None, "and says that the coordinator is confused");
    }

    #[test]
    fn unanswered_renewals_are_bounded() {
        let mut renewals = Renewals::default();
        for _ in 0..100 {
            renewals.next(Instant::now());
        }
        assert_eq!(renewals.sent.len(), MAX_UNANSWERED);
    }
}
