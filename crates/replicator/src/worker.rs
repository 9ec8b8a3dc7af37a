//! One slot of a class: takes a message, has it worked on, settles it, takes the next. A class has as many as it may run
//! duties at once, so nothing is ever taken that cannot start at once.
//!
//! When the service stops a slot takes no more and finishes what it has; when that takes too long it lets go and gives
//! the message back.

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt as _;
use tabularium_common::{
    bus::Link,
    duties::{Class, PROGRESS_INTERVAL},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    messages::{Message, Source},
    metrics::Metrics,
    settlement::Verdict,
    workshop::{Delivery, Workshop},
};

/// Wait after a fault of stream or consumer.
const FAULT_DELAY: Duration = Duration::from_secs(1);
/// How long the bus may take to confirm a settlement.
const SETTLE_DEADLINE: Duration = Duration::from_secs(5);

/// A slot.
pub(crate) struct Worker {
    pub(crate) class: Class,
    pub(crate) source: Source,
    pub(crate) link: watch::Receiver<Link>,
    pub(crate) workshop: Arc<Workshop>,
    pub(crate) metrics: Metrics,
    /// Take no more.
    pub(crate) stopping: CancellationToken,
    /// Let go of what runs.
    pub(crate) abandon: CancellationToken,
}

impl Worker {
    /// Works until the service stops.
    pub(crate) async fn run(mut self) {
        while self.connected().await {
            let taken = tokio::select! {
                () = self.abandon.cancelled() => return,
                taken = self.source.next(&self.stopping) => taken,
            };
            match taken {
                Ok(Some(message)) if self.stopping.is_cancelled() => {
                    self.settle(&message, Verdict::ABANDONED).await;
                }
                Ok(Some(message)) => self.work(&message).await,
                Ok(None) => {}
                Err(error) => self.fault(&error).await,
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

    async fn work(&self, message: &Message) {
        let started = Instant::now();
        let in_flight = self.metrics.begin(self.class);
        let delivery = Delivery {
            body: message.body(),
            correlation_id: message.correlation_id(),
            deliveries: message.deliveries(),
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
        let error = match tokio::time::timeout(SETTLE_DEADLINE, message.settle(verdict.settlement)).await {
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
        if let Err(error) = message.show_progress().await {
            tracing::debug!(%error, "progress not shown");
        }
    }
}
