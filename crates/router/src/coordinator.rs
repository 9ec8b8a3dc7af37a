//! Calls to whichever coordinator answers.
//!
//! Calls go to the preferred one; when it cannot be reached the next becomes the preferred one. Which answers mean
//! "could not be reached" is decided here once.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::HeaderValue;
use tabularium_common::{
    auth::SendToken,
    grpc::{Address, channel},
    telemetry::CORRELATION_ID,
};
use tabularium_proto::coordinator::routing_service_client::RoutingServiceClient;
use tonic::{
    Code, Request, Response, Status, metadata::MetadataValue, service::interceptor::InterceptedService,
    transport::Channel,
};

/// A client of one coordinator.
pub(crate) type Client = RoutingServiceClient<InterceptedService<Channel, SendToken>>;

/// The coordinators of the configuration.
#[derive(Clone)]
pub(crate) struct Coordinators {
    clients: Arc<[Client]>,
    preferred: Arc<AtomicUsize>,
}

/// One call's correlation id, if it belongs to an RPC.
pub(crate) type Correlation<'c> = Option<&'c HeaderValue>;

impl Coordinators {
    /// Dials nobody yet. Call it inside the runtime that is to own the connections.
    pub(crate) fn new(addresses: &[Address], token: &SendToken) -> Self {
        let clients = addresses
            .iter()
            .map(|address| RoutingServiceClient::with_interceptor(channel(address), token.clone()))
            .collect();
        Self { clients, preferred: Arc::default() }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.clients.len()
    }

    /// The client of one of them.
    pub(crate) fn client(&self, index: usize) -> Client {
        self.clients[index % self.clients.len()].clone()
    }

    /// Makes one the first that is asked: the one that holds the session, so that it can vouch for what it answers.
    pub(crate) fn prefer(&self, index: usize) {
        self.preferred.store(index, Ordering::Relaxed);
    }

    /// Calls the preferred one, or the next that can be reached, each within `timeout`.
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
        let first = self.preferred.load(Ordering::Relaxed);
        let mut last = Status::unavailable("no coordinator is configured");
        for offset in 0..self.clients.len() {
            let index = (first + offset) % self.clients.len();
            let mut request = Request::new(message.clone());
            request.set_timeout(timeout);
            if let Some(value) = correlation
                && let Ok(value) = MetadataValue::try_from(value.as_bytes())
            {
                request.metadata_mut().insert(CORRELATION_ID, value);
            }
            let called = tokio::time::timeout(timeout, rpc(self.client(index), request)).await;
            last = match called {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) if !is_unreachable(&status) => return Err(status),
                Ok(Err(status)) => status,
                Err(_) => Status::unavailable("the coordinator did not answer in time"),
            };
            let _ = self.preferred.compare_exchange(
                index,
                (index + 1) % self.clients.len(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        Err(Status::unavailable(format!("no coordinator can be reached: {}", last.message())))
    }
}

/// The status was made here because the transport failed, or the coordinator says that it cannot serve.
pub(crate) fn is_unreachable(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
        || matches!(status.code(), Code::Unavailable | Code::Cancelled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failed_transport_leads_to_the_next_coordinator() {
        assert!(is_unreachable(&Status::unavailable("x")));
        assert!(is_unreachable(&Status::from_error(Box::new(std::io::Error::other("cut")))));
        assert!(!is_unreachable(&Status::not_found("repository not found")));
        assert!(!is_unreachable(&Status::internal("a coordinator's own")));
    }
}
