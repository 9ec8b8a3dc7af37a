//! One slot of a class: pulls a message, has it worked on, settles it, pulls the next. A class has as many as it may run
//! duties at once, so nothing is ever pulled that cannot start at once.
//!
//! When the service stops a slot pulls no more and finishes what it has; when that takes too long it lets go and gives
//! the message back.

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use async_nats::jetstream::{AckKind, Context, Message, consumer::PullConsumer};
use futures::{FutureExt as _, StreamExt as _};
use tabularium_common::{
    bus::Link,
    duties::{Class, PROGRESS_INTERVAL},
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    settlement::{Settlement, Verdict},
    streams,
    workshop::{Delivery, Workshop},
};

/// How long one pull waits for a message; also how long a stop may wait for a pull to end.
const PULL_WAIT: Duration = Duration::from_secs(1);
/// Pulls without a message after which the consumer is looked up anew.
const IDLE_PULLS: u32 = 30;
/// Wait after a fault of stream or consumer.
const FAULT_DELAY: Duration = Duration::from_secs(1);
/// How long the bus may take to confirm a settlement.
const SETTLE_DEADLINE: Duration = Duration::from_secs(5);

/// A slot.
pub(crate) struct Worker {
    pub(crate) class: Class,
    pub(crate) bus: Context,
    pub(crate) link: watch::Receiver<Link>,
    pub(crate) workshop: Arc<Workshop>,
    pub(crate) metrics: Metrics,
    /// Pull no more.
    pub(crate) stopping: CancellationToken,
    /// Let go of what runs.
    pub(crate) abandon: CancellationToken,
}

impl Worker {
    /// Works until the service stops.
    pub(crate) async fn run(mut self) {
        let mut consumer = None;
        let mut idle = 0;
        while self.connected().await {
            let Some(found) = &consumer else {
                match streams::consumer(&self.bus, self.class).await {
                    Ok(found) => consumer = Some(found),
                    Err(error) => self.fault(&error).await,
                }
                continue;
            };
            match self.pull(found).await {
                Ok(Some(message)) if self.stopping.is_cancelled() => {
                    self.settle(&message, Verdict::ABANDONED).await;
                }
                Ok(Some(message)) => {
                    idle = 0;
                    self.work(&message).await;
                }
                Ok(None) => idle += 1,
                Err(error) => {
                    consumer = None;
                    self.fault(&error).await;
                }
            }
            if idle >= IDLE_PULLS {
                idle = 0;
                consumer = None;
            }
        }
    }

    /// Waits for the bus. False once the service stops.
    async fn connected(&mut self) -> bool {
        let up = self.link.wait_for(|link| *link == Link::Up);
        tokio::select! {
            biased;
            () = self.stopping.cancelled() => false,
            up = up => up.is_ok(),
        }
    }

    async fn fault(&self, error: &(dyn std::fmt::Display + Sync)) {
        tracing::warn!(stream = self.class.stream(), %error, "cannot pull");
        self.metrics.consumer_fault(self.class);
        tokio::select! {
            () = self.stopping.cancelled() => {}
            () = tokio::time::sleep(FAULT_DELAY) => {}
        }
    }

    /// The next message, if one comes in time. Runs to its end when the service stops: a message that is under way is
    /// then given back instead of being lost for the length of its acknowledgement window.
    async fn pull(&self, consumer: &PullConsumer) -> Result<Option<Message>, async_nats::Error> {
        let pulled = async {
            let mut batch = consumer.batch().max_messages(1).expires(PULL_WAIT).messages().await?;
            batch.next().await.transpose()
        };
        tokio::select! {
            () = self.abandon.cancelled() => Ok(None),
            pulled = pulled => pulled,
        }
    }

    async fn work(&self, message: &Message) {
        let started = Instant::now();
        let in_flight = self.metrics.begin(self.class);
        let delivery = Delivery {
            body: &message.payload,
            correlation_id: correlation_id(message),
            deliveries: message.info().map_or(1, |info| u64::try_from(info.delivered).unwrap_or(1)),
        };
        let handled = AssertUnwindSafe(self.workshop.handle(self.class, &delivery)).catch_unwind();
        let verdict = tokio::select! {
            verdict = handled => verdict.unwrap_or(Verdict::PANICKED),
            never = show_progress(message) => match never {},
            () = self.abandon.cancelled() => Verdict::ABANDONED,
        };
        self.settle(message, verdict).await;
        drop(in_flight);
        self.metrics.ended(self.class, verdict.outcome, started.elapsed());
        tracing::info!(
            correlation_id = %delivery.correlation_id,
            stream = self.class.stream(),
            outcome = ?verdict.outcome,
            settlement = ?verdict.settlement,
            elapsed_ms = started.elapsed().as_millis(),
            "message handled"
        );
    }

    async fn settle(&self, message: &Message, verdict: Verdict) {
        let settled = async {
            match verdict.settlement {
                Settlement::Ack => message.double_ack().await,
                Settlement::Term => message.double_ack_with(AckKind::Term).await,
                Settlement::Nak(Duration::ZERO) => message.ack_with(AckKind::Nak(None)).await,
                Settlement::Nak(delay) => message.ack_with(AckKind::Nak(Some(delay))).await,
            }
        };
        let error = match tokio::time::timeout(SETTLE_DEADLINE, settled).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".to_owned(),
        };
        self.metrics.unsettled(self.class);
        tracing::warn!(stream = self.class.stream(), error, "message not settled; it will come again");
    }
}

/// Keeps the message ours for as long as this is awaited.
async fn show_progress(message: &Message) -> Infallible {
    loop {
        tokio::time::sleep(PROGRESS_INTERVAL).await;
        if let Err(error) = message.ack_with(AckKind::Progress).await {
            tracing::debug!(%error, "progress not shown");
        }
    }
}

/// The publisher's correlation id, or a new one.
fn correlation_id(message: &Message) -> CorrelationId {
    let mut headers = http::HeaderMap::new();
    let given = message.headers.as_ref().and_then(|headers| headers.get(CORRELATION_ID));
    if let Some(value) = given.and_then(|value| http::HeaderValue::from_str(value.as_str()).ok()) {
        headers.insert(CORRELATION_ID, value);
    }
    CorrelationId::of(&headers)
}
