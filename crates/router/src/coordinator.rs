//! Calls to whichever coordinator answers.
//!
//! Calls go to the preferred one; when it cannot be reached, or falls silent, the next becomes the preferred one. Which
//! answers mean "could not be reached" is decided here once, and all coordinators are asked twice a second whether they
//! are there: so a connection that swallows everything costs a moment, and a router that is cut off from all of them says so
//! soon instead of holding on to its clients. That a call may be made again elsewhere, although the first coordinator may
//! have acted on it, is the business of its message, see [`Coordinators::call_anew`].

use std::{
    error::Error as _,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use http::HeaderValue;
use tabularium_common::{
    auth::SendToken,
    grpc::{Address, watched_channel},
    telemetry::CORRELATION_ID,
};
use tabularium_proto::coordinator::routing_service_client::RoutingServiceClient;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, timeout},
};
use tonic::{
    Code, Request, Response, Status, metadata::MetadataValue, service::interceptor::InterceptedService,
    transport::Channel,
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    limits::{COORDINATOR_PROBE, COORDINATOR_PROBE_TIMEOUT, SILENT_COORDINATOR_PATIENCE},
    routing::judgement::refuses_token,
};

/// The way to one coordinator.
pub(crate) type Link = InterceptedService<Channel, SendToken>;
/// A client of one coordinator.
pub(crate) type Client = RoutingServiceClient<Link>;

/// The coordinators of the configuration.
#[derive(Clone)]
pub(crate) struct Coordinators {
    all: Arc<[Coordinator]>,
    preferred: Arc<AtomicUsize>,
}

struct Coordinator {
    link: Link,
    client: Client,
    health: HealthClient<Link>,
    /// It did not answer when it was last asked.
    silent: watch::Sender<bool>,
}

/// One call's correlation id, if it belongs to an RPC.
pub(crate) type Correlation<'c> = Option<&'c HeaderValue>;

impl Coordinators {
    /// Dials nobody yet. Call it inside the runtime that is to own the connections.
    pub(crate) fn new(addresses: &[Address], token: &SendToken) -> Self {
        let all = addresses.iter().map(|address| {
            let link = InterceptedService::new(watched_channel(address), token.clone());
            Coordinator {
                client: RoutingServiceClient::new(link.clone()),
                health: HealthClient::new(link.clone()),
                link,
                silent: watch::Sender::new(false),
            }
        });
        Self { all: all.collect(), preferred: Arc::default() }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.all.len()
    }

    /// The client of one of them.
    pub(crate) fn client(&self, index: usize) -> Client {
        self.all[index % self.all.len()].client.clone()
    }

    /// The way to the one that is asked first.
    pub(crate) fn preferred_link(&self) -> Link {
        self.all[self.preferred.load(Ordering::Relaxed) % self.all.len()].link.clone()
    }

    /// Makes one the first that is asked: the one that holds the session, so that it can vouch for what it answers.
    pub(crate) fn prefer(&self, index: usize) {
        self.preferred.store(index, Ordering::Relaxed);
    }

    /// Asks all of them whether they are there, for as long as the router runs.
    pub(crate) async fn watch(self) {
        let mut ticks = tokio::time::interval(COORDINATOR_PROBE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            join_all(self.all.iter().enumerate().map(|(index, coordinator)| async move {
                let silent = !answers(coordinator.health.clone()).await;
                if coordinator.silent.send_replace(silent) != silent {
                    tracing::info!(coordinator = index, silent, "coordinator");
                }
            }))
            .await;
        }
    }

    /// Waits until one of them stops answering.
    pub(crate) async fn falls_silent(&self, index: usize) {
        let mut silent = self.all[index % self.all.len()].silent.subscribe();
        let fell = async {
            silent.wait_for(|silent| !*silent).await?;
            silent.wait_for(|silent| *silent).await.map(|_| ())
        };
        if fell.await.is_err() {
            // The senders live as long as this.
            std::future::pending::<()>().await;
        }
    }

    /// Calls the preferred one, or the next that can be reached, each within `timeout`. It may be carried out twice.
    pub(crate) async fn call<Q, A, F>(
        &self,
        correlation: Correlation<'_>,
        timeout: Duration,
        message: Q,
        rpc: impl Fn(Client, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        self.call_anew(correlation, timeout, || message.clone(), rpc).await
    }

    /// The same with a message that is made for each coordinator, so that it can tell the next one what the one before was
    /// asked and may have done.
    pub(crate) async fn call_anew<Q, A, F>(
        &self,
        correlation: Correlation<'_>,
        timeout: Duration,
        message: impl FnMut() -> Q,
        rpc: impl Fn(Client, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        self.each(correlation, timeout, message, |index, request| rpc(self.client(index), request)).await
    }

    /// As [`Coordinators::call`], to another service of theirs than that for routers.
    pub(crate) async fn call_other<Q, A, F>(
        &self,
        correlation: Correlation<'_>,
        timeout: Duration,
        message: Q,
        rpc: impl Fn(Link, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let message = || message.clone();
        self.each(correlation, timeout, message, |index, request| rpc(self.all[index].link.clone(), request))
            .await
    }

    async fn each<Q, A, F>(
        &self,
        correlation: Correlation<'_>,
        timeout: Duration,
        mut message: impl FnMut() -> Q,
        rpc: impl Fn(usize, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let silent: Vec<bool> = self.all.iter().map(|coordinator| *coordinator.silent.borrow()).collect();
        let mut last = Status::unavailable("no coordinator is configured");
        for index in order(self.preferred.load(Ordering::Relaxed), &silent) {
            let timeout = if silent[index] { timeout.min(SILENT_COORDINATOR_PATIENCE) } else { timeout };
            let mut request = Request::new(message());
            request.set_timeout(timeout);
            if let Some(value) = correlation
                && let Ok(value) = MetadataValue::try_from(value.as_bytes())
            {
                request.metadata_mut().insert(CORRELATION_ID, value);
            }
            let called = tokio::select! {
                biased;
                called = tokio::time::timeout(timeout, rpc(index, request)) => called.ok(),
                () = self.falls_silent(index) => None,
            };
            last = match called {
                Some(Ok(answer)) => return Ok(answer.into_inner()),
                Some(Err(status)) if !is_unreachable(&status) => return Err(status),
                Some(Err(status)) => status,
                None => Status::unavailable("the coordinator did not answer in time"),
            };
            let _ = self.preferred.compare_exchange(
                index,
                (index + 1) % self.all.len(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        Err(Status::unavailable(format!("no coordinator can be reached: {}", last.message())))
    }
}

/// In which order coordinators are asked: in turn from the preferred one, those that are silent last.
fn order(preferred: usize, silent: &[bool]) -> Vec<usize> {
    let turn = (0..silent.len()).map(|offset| (preferred + offset) % silent.len());
    let (last, first): (Vec<_>, Vec<_>) = turn.partition(|index| silent[*index]);
    first.into_iter().chain(last).collect()
}

/// Whether a coordinator is there. What it says of its health does not matter here: it refuses what it cannot do.
async fn answers(mut health: HealthClient<Link>) -> bool {
    match timeout(COORDINATOR_PROBE_TIMEOUT, health.check(HealthCheckRequest::default())).await {
        Err(_) => false,
        Ok(answer) => answer.err().is_none_or(|status| status.source().is_none()),
    }
}

/// The status was made here because the transport failed, or the coordinator says that it cannot serve, or that it does not
/// know us.
pub(crate) fn is_unreachable(status: &Status) -> bool {
    status.source().is_some()
        || matches!(status.code(), Code::Unavailable | Code::Cancelled)
        || refuses_token(status.code(), status.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_that_serves_nobody_leads_to_the_next_coordinator() {
        assert!(is_unreachable(&Status::unavailable("x")));
        assert!(is_unreachable(&Status::from_error(Box::new(std::io::Error::other("cut")))));
        assert!(is_unreachable(&Status::permission_denied("permission denied: token has expired")));
        assert!(!is_unreachable(&Status::permission_denied("this site is a mirror")));
        assert!(!is_unreachable(&Status::not_found("repository not found")));
        assert!(!is_unreachable(&Status::internal("a coordinator's own")));
    }

    #[test]
    fn silent_coordinators_are_asked_last() {
        assert_eq!(order(1, &[false, false, false]), [1, 2, 0]);
        assert_eq!(order(1, &[false, true, false]), [2, 0, 1]);
        assert_eq!(order(5, &[true, true]), [1, 0]);
    }
}
