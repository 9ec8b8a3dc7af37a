//! Takes a message through start, work and finish. Nothing is acknowledged before the coordinator has recorded what
//! became of the work.

use std::{sync::Arc, time::Duration};

use secrecy::SecretString;
use tabularium_common::{
    duties::{BodyError, Class, DutyMessage, SyncMessage, read_body},
    telemetry::CorrelationId,
};
use tabularium_proto::coordinator::{
    DutyFailed, DutySucceeded, FinishDutyRequest, NotifyWork, StartDutyRequest, finish_duty_request,
    start_duty_response::Work,
};
use tokio::time::Instant;

use crate::{
    cleanup::clean_up,
    coordinators::Coordinators,
    failure::{Failure, presentable},
    geo_notify::Notifier,
    geo_sync::Syncer,
    nodes::Nodes,
    settlement::Verdict,
};

/// A message, as far as its handling needs it.
pub(crate) struct Delivery<'a> {
    pub(crate) body: &'a [u8],
    pub(crate) correlation_id: CorrelationId,
    /// How often it was delivered, this time included.
    pub(crate) deliveries: u64,
}

/// What all workers share.
pub(crate) struct Workshop {
    pub(crate) coordinators: Arc<Coordinators>,
    pub(crate) nodes: Nodes,
    pub(crate) notifier: Notifier,
    pub(crate) syncer: Option<Syncer>,
    pub(crate) worker_id: String,
    pub(crate) job_deadline: Duration,
    pub(crate) secrets: Vec<SecretString>,
}

impl Workshop {
    /// Does what a message asks for and answers how it is to be settled.
    pub(crate) async fn handle(&self, class: Class, delivery: &Delivery<'_>) -> Verdict {
        match (class, &self.syncer) {
            (Class::GeoSync, Some(syncer)) => match read_body::<SyncMessage>(delivery.body) {
                Ok(event) => syncer.take(&event, delivery.deliveries, &delivery.correlation_id).await,
                Err(error) => undecodable(class, &error),
            },
            (Class::GeoSync, None) => Verdict::unknown_site(delivery.deliveries),
            (Class::Replication | Class::Cleanup | Class::GeoNotify, _) => {
                match read_body::<DutyMessage>(delivery.body) {
                    Ok(message) => self.duty(&message.duty_id.to_string(), delivery).await,
                    Err(error) => undecodable(class, &error),
                }
            }
        }
    }

    async fn duty(&self, duty_id: &str, delivery: &Delivery<'_>) -> Verdict {
        let correlation_id = &delivery.correlation_id;
        let asked = Instant::now();
        let start = StartDutyRequest { duty_id: duty_id.to_owned(), worker_id: self.worker_id.clone() };
        let work = match self.coordinators.start_duty(correlation_id, start).await {
            Ok(response) => response.work,
            Err(status) => {
                tracing::warn!(%correlation_id, duty_id, %status, "duty not started");
                return Verdict::coordinator_lost(delivery.deliveries);
            }
        };
        let Some(work) = work else {
            tracing::warn!(%correlation_id, duty_id, "the duty is of a kind that this version does not know");
            return Verdict::UNKNOWN_ANSWER;
        };
        if let Work::Nothing(nothing) = &work {
            tracing::debug!(%correlation_id, duty_id, reason = nothing.reason, "nothing to do");
            return Verdict::NOTHING;
        }
        let result = match work {
            Work::Nothing(_) => Ok(0),
            Work::Replicate(work) => return Box::pin(self.copy(duty_id, work, asked, delivery)).await,
            Work::Cleanup(work) => clean_up(&self.nodes, &work, correlation_id).await.map(|()| 0),
            Work::Notify(work) => self.notify(&work, correlation_id).await,
        };
        self.finish(duty_id, result, delivery).await
    }

    /// What was delivered before an event failed is kept: the rest is owed anew.
    async fn notify(&self, work: &NotifyWork, correlation_id: &CorrelationId) -> Result<i64, Failure> {
        let progress = self.notifier.notify(work, correlation_id).await;
        match (progress.reached, progress.failure) {
            (Some(reached), Some(failure)) => {
                let error = presentable(&failure.message, &self.secrets);
                tracing::warn!(%correlation_id, site = work.site, reached, error, "notified in part");
                Ok(reached)
            }
            (Some(reached), None) => Ok(reached),
            (None, Some(failure)) => Err(failure),
            (None, None) => Ok(0),
        }
    }

    async fn finish(&self, duty_id: &str, result: Result<i64, Failure>, delivery: &Delivery<'_>) -> Verdict {
        let correlation_id = &delivery.correlation_id;
        let outcome = match result {
            Ok(reached) => finish_duty_request::Outcome::Succeeded(DutySucceeded { reached }),
            Err(failure) => {
                let message = presentable(&failure.message, &self.secrets);
                tracing::warn!(%correlation_id, duty_id, error = message, unreachable = failure.unreachable, "duty failed");
                finish_duty_request::Outcome::Failed(DutyFailed {
                    message,
                    unreachable: failure.unreachable,
                    bad_source: false,
                })
            }
        };
        let finish = FinishDutyRequest {
            duty_id: duty_id.to_owned(),
            worker_id: self.worker_id.clone(),
            outcome: Some(outcome),
            attempt: 0,
        };
        match self.coordinators.finish_duty(correlation_id, finish).await {
            Ok(response) => Verdict::of_duty(response.disposition.as_ref()),
            Err(status) => {
                tracing::warn!(%correlation_id, duty_id, %status, "duty not reported");
                Verdict::coordinator_lost(delivery.deliveries)
            }
        }
    }
}

fn undecodable(class: Class, error: &BodyError) -> Verdict {
    tracing::error!(stream = class.stream(), %error, "message dropped: its body cannot be read");
    Verdict::UNDECODABLE
}
