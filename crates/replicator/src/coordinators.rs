//! The coordinators: any one of them will do.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use secrecy::SecretString;
use tabularium_common::{
    auth::SendToken,
    grpc::{Address, channel},
    telemetry::CorrelationId,
};
use tabularium_proto::coordinator::{
    BeginSyncRequest, BeginSyncResponse, FinishDutyRequest, FinishDutyResponse, FinishSyncRequest,
    FinishSyncResponse, RenewDutyRequest, RenewDutyResponse, StartDutyRequest, StartDutyResponse,
    duty_service_client::DutyServiceClient,
};
use tonic::{Request, Response, Status};

use crate::{
    calls::{Signed, request, within},
    failure::not_reached,
};

/// How long one coordinator may take to answer before the next is asked.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

type Client = DutyServiceClient<Signed>;

/// Clients of every coordinator, and which of them answered last.
pub(crate) struct Coordinators {
    clients: Vec<Client>,
    preferred: AtomicUsize,
}

impl Coordinators {
    pub(crate) fn new(addresses: &[Address], token: Option<&SecretString>) -> Self {
        let clients = addresses
            .iter()
            .map(|address| DutyServiceClient::with_interceptor(channel(address), SendToken(token.cloned())))
            .collect();
        Self { clients, preferred: AtomicUsize::new(0) }
    }

    /// Asks one coordinator after the other until one answers, beginning with the one that did last. Every call here may
    /// be repeated.
    async fn ask<B: Clone, T, F>(
        &self,
        correlation_id: &CorrelationId,
        body: B,
        call: impl Fn(Client, Request<B>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let first = self.preferred.load(Ordering::Relaxed);
        let mut last = Status::unavailable("no coordinator is configured");
        for offset in 0..self.clients.len() {
            let index = (first + offset) % self.clients.len();
            let Some(client) = self.clients.get(index) else { continue };
            let request = request(body.clone(), correlation_id, CALL_DEADLINE);
            match within(CALL_DEADLINE, call(client.clone(), request)).await {
                Err(status) if not_reached(&status) => {
                    tracing::warn!(%correlation_id, coordinator = index, %status, "coordinator not reached");
                    last = status;
                }
                answer => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return answer;
                }
            }
        }
        Err(last)
    }

    pub(crate) async fn start_duty(
        &self,
        correlation_id: &CorrelationId,
        body: StartDutyRequest,
    ) -> Result<StartDutyResponse, Status> {
        self.ask(correlation_id, body, |mut client, request| async move { client.start_duty(request).await })
            .await
    }

    pub(crate) async fn renew_duty(
        &self,
        correlation_id: &CorrelationId,
        body: RenewDutyRequest,
    ) -> Result<RenewDutyResponse, Status> {
        self.ask(correlation_id, body, |mut client, request| async move { client.renew_duty(request).await })
            .await
    }

    pub(crate) async fn finish_duty(
        &self,
        correlation_id: &CorrelationId,
        body: FinishDutyRequest,
    ) -> Result<FinishDutyResponse, Status> {
        self.ask(correlation_id, body, |mut client, request| async move { client.finish_duty(request).await })
            .await
    }

    pub(crate) async fn begin_sync(
        &self,
        correlation_id: &CorrelationId,
        body: BeginSyncRequest,
    ) -> Result<BeginSyncResponse, Status> {
        self.ask(correlation_id, body, |mut client, request| async move { client.begin_sync(request).await })
            .await
    }

    pub(crate) async fn finish_sync(
        &self,
        correlation_id: &CorrelationId,
        body: FinishSyncRequest,
    ) -> Result<FinishSyncResponse, Status> {
        self.ask(correlation_id, body, |mut client, request| async move { client.finish_sync(request).await })
            .await
    }
}
