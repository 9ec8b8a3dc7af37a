//! A copy from its first round to its last. The worker holds it under a lease that it renews all the while; when the lease
//! is over it stops at once, wherever it is, because another worker may have the copy.

use std::{convert::Infallible, time::Duration};

use tabularium_common::telemetry::CorrelationId;
use tabularium_proto::coordinator::{
    DutyFailed, DutySucceeded, FinishDutyRequest, RenewDutyRequest, ReplicateWork, finish_duty_request,
    finish_duty_response::Disposition,
};
use tokio::time::{Instant, sleep};
use tonic::Code;

use crate::{
    failure::{Failure, presentable},
    lease::Lease,
    replication::replicate,
    settlement::Verdict,
    workshop::{Delivery, Workshop},
};

/// Of an answer that names no lease: as if it were renewed for ever.
const NO_LEASE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Shortest time between two renewals.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

fn lease_length(work: &ReplicateWork) -> Duration {
    match work.lease_milliseconds {
        0 => NO_LEASE,
        length => Duration::from_millis(length.into()),
    }
}

impl Workshop {
    /// Copies until the coordinator has had enough. `asked` is when the first round was asked for.
    pub(crate) async fn copy(
        &self,
        duty_id: &str,
        first: ReplicateWork,
        asked: Instant,
        delivery: &Delivery<'_>,
    ) -> Verdict {
        let lease = Lease::granted(asked, lease_length(&first));
        tokio::select! {
            // First: what is below must not take another step when it is over.
            biased;
            () = lease.over() => {
                tracing::warn!(correlation_id = %delivery.correlation_id, duty_id, "the copy's lease is over");
                Verdict::LEASE_LOST
            }
            never = self.keep(duty_id, &lease, &delivery.correlation_id) => match never {},
            verdict = self.rounds(duty_id, first, &lease, delivery) => verdict,
        }
    }

    /// Renews the lease for as long as this is awaited. A coordinator that cannot be reached is asked again until it is over.
    async fn keep(&self, duty_id: &str, lease: &Lease, correlation_id: &CorrelationId) -> Infallible {
        loop {
            sleep((lease.length() / 3).max(SHORTEST_PAUSE)).await;
            let renew = RenewDutyRequest { duty_id: duty_id.to_owned(), worker_id: self.worker_id.clone() };
            let sent = Instant::now();
            match self.coordinators.renew_duty(correlation_id, renew).await {
                Ok(_) => lease.renewed(sent),
                Err(status) if status.code() == Code::FailedPrecondition => lease.lose(),
                Err(status) => tracing::warn!(%correlation_id, duty_id, %status, "lease not renewed"),
            }
        }
    }

    async fn rounds(
        &self,
        duty_id: &str,
        mut work: ReplicateWork,
        lease: &Lease,
        delivery: &Delivery<'_>,
    ) -> Verdict {
        let correlation_id = &delivery.correlation_id;
        loop {
            let began = Instant::now();
            let outcome = match self.round(&work, lease, correlation_id).await {
                Ok(reached) => finish_duty_request::Outcome::Succeeded(DutySucceeded { reached }),
                Err(failure) => {
                    let message = presentable(&failure.message, &self.secrets);
                    tracing::warn!(%correlation_id, duty_id, error = message, "copy failed");
                    finish_duty_request::Outcome::Failed(DutyFailed {
                        message,
                        unreachable: failure.unreachable,
                        bad_source: failure.bad_source,
                    })
                }
            };
            tracing::debug!(
                %correlation_id,
                duty_id,
                attempt = work.attempt,
                under_ticket = work.under_ticket,
                elapsed_ms = began.elapsed().as_millis(),
                "round is over"
            );
            let finish = FinishDutyRequest {
                duty_id: duty_id.to_owned(),
                worker_id: self.worker_id.clone(),
                outcome: Some(outcome),
                attempt: work.attempt,
            };
            let sent = Instant::now();
            match self.coordinators.finish_duty(correlation_id, finish).await {
                Ok(response) => match response.disposition {
                    Some(Disposition::AnotherRound(next)) => {
                        lease.grant(sent, lease_length(&next));
                        work = next;
                    }
                    disposition => return Verdict::of_duty(disposition.as_ref()),
                },
                Err(status) => {
                    tracing::warn!(%correlation_id, duty_id, %status, "round not reported");
                    return Verdict::coordinator_lost(delivery.deliveries);
                }
            }
        }
    }

    async fn round(
        &self,
        work: &ReplicateWork,
        lease: &Lease,
        correlation_id: &CorrelationId,
    ) -> Result<i64, Failure> {
        let deadline = match work.deadline_milliseconds {
            0 => self.job_deadline,
            deadline => Duration::from_millis(deadline.into()).min(self.job_deadline),
        };
        let job = replicate(&self.nodes, work, deadline, lease, correlation_id);
        tokio::time::timeout(deadline, job).await.unwrap_or_else(|_| {
            let milliseconds = deadline.as_millis();
            Err(Failure::unreachable(format!("the copy was not done within {milliseconds} ms")))
        })
    }
}
