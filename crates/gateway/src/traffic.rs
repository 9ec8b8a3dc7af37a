//! How many bytes a request moved, and noticing when none move any more.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep};

/// Bytes of one request's body and of its answer.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Traffic {
    /// Counts bytes of the request's body, as they came over the wire.
    pub(crate) fn receive(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts bytes of the answer's body.
    pub(crate) fn send(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Received so far.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

/// Goes off when a whole period passed in which no byte moved. Moving bytes cost it nothing: it looks at the counters
/// only when its period is over, so it goes off between one and two periods after the last byte.
pub(crate) struct StallClock {
    traffic: Arc<Traffic>,
    period: Duration,
    seen: u64,
    sleep: Pin<Box<Sleep>>,
}

impl StallClock {
    pub(crate) fn new(traffic: Arc<Traffic>, period: Duration) -> Self {
        let seen = traffic.received() + traffic.sent();
        Self { traffic, period, seen, sleep: Box::pin(tokio::time::sleep(period)) }
    }

    /// Ready when the transfer has stalled.
    pub(crate) fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.sleep.as_mut().poll(cx));
            let moved = self.traffic.received() + self.traffic.sent();
            if moved == self.seen {
                return Poll::Ready(());
            }
            self.seen = moved;
            self.sleep.as_mut().reset(Instant::now() + self.period);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_goes_off_only_after_a_whole_quiet_period() {
        let traffic = Arc::new(Traffic::default());
        let period = Duration::from_secs(10);
        let mut clock = StallClock::new(Arc::clone(&traffic), period);
        let started = Instant::now();
        let moving = async {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_secs(7)).await;
                traffic.send(1);
            }
        };
        tokio::join!(moving, std::future::poll_fn(|cx| clock.poll_stalled(cx)));
        let elapsed = started.elapsed();
        assert!(elapsed >= Duration::from_secs(45) && elapsed <= Duration::from_secs(55), "{elapsed:?}");
    }
}
