//! The lease under which a worker holds a duty, by the worker's own clock.
//!
//! It runs from the moment the question was sent that granted or renewed it, so it is over here before it is over at the
//! coordinator. The clock goes on while the process is stopped: a worker that wakes up late sees it before it does
//! anything else.

use std::{future::poll_fn, pin::pin, task::Poll, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

#[derive(Debug, Clone, Copy)]
struct State {
    /// `None`: it was taken away.
    until: Option<Instant>,
    length: Duration,
}

/// A lease on a duty.
pub(crate) struct Lease(watch::Sender<State>);

impl Lease {
    /// Granted by the answer to a question that was sent then.
    pub(crate) fn granted(sent: Instant, length: Duration) -> Self {
        Self(watch::Sender::new(State { until: Some(sent + length), length }))
    }

    /// Granted anew, for another length.
    pub(crate) fn grant(&self, sent: Instant, length: Duration) {
        self.0.send_if_modified(|state| {
            let held = state.until.is_some_and(|until| Instant::now() < until);
            if held {
                *state = State { until: Some(sent + length), length };
            }
            held
        });
    }

    /// Renewed by the answer to a question that was sent then.
    pub(crate) fn renewed(&self, sent: Instant) {
        let length = self.length();
        self.0.send_if_modified(|state| {
            let held = state.until.is_some_and(|until| Instant::now() < until);
            if held {
                // A grant for another length may have come meanwhile.
                state.until = state.until.max(Some(sent + length.min(state.length)));
            }
            held
        });
    }

    /// Taken away.
    pub(crate) fn lose(&self) {
        self.0.send_modify(|state| state.until = None);
    }

    /// How long one grant lasts.
    pub(crate) fn length(&self) -> Duration {
        self.0.borrow().length
    }

    /// Whether it still runs.
    pub(crate) fn is_held(&self) -> bool {
        self.0.borrow().until.is_some_and(|until| Instant::now() < until)
    }

    /// Returns when it is over. Looks at the clock whenever it is polled, not only when a timer says so.
    pub(crate) async fn over(&self) {
        let mut state = self.0.subscribe();
        loop {
            let Some(until) = state.borrow_and_update().until else { return };
            if Instant::now() >= until {
                return;
            }
            let mut changed = pin!(async {
                tokio::select! {
                    () = sleep_until(until) => {}
                    _ = state.changed() => {}
                }
            });
            poll_fn(
                |context| {
                    if Instant::now() >= until { Poll::Ready(()) } else { changed.as_mut().poll(context) }
                },
            )
            .await;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, timeout};

    use super::*;

    const LENGTH: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn it_runs_from_when_the_question_was_sent() {
        let sent = Instant::now();
        advance(Duration::from_secs(4)).await;
        let lease = Lease::granted(sent, LENGTH);
        assert!(timeout(Duration::from_millis(5900), lease.over()).await.is_err());
        let sent = Instant::now();
        lease.renewed(sent);
        assert!(timeout(Duration::from_millis(9900), lease.over()).await.is_err());
        timeout(Duration::from_millis(200), lease.over()).await.unwrap();
        assert!(!lease.is_held());
        lease.renewed(Instant::now());
        lease.grant(Instant::now(), LENGTH);
        assert!(!lease.is_held(), "what is over is not revived");
    }

    #[tokio::test(start_paused = true)]
    async fn a_shorter_grant_is_not_undone_by_a_late_renewal() {
        let lease = Lease::granted(Instant::now(), LENGTH);
        lease.grant(Instant::now(), Duration::from_secs(4));
        lease.renewed(Instant::now());
        assert!(timeout(Duration::from_secs(5), lease.over()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn it_can_be_taken_away() {
        let lease = Lease::granted(Instant::now(), LENGTH);
        assert!(lease.is_held());
        let lost = async {
            lease.over().await;
            Instant::now()
        };
        let began = Instant::now();
        let (lost, ()) = tokio::join!(lost, async { lease.lose() });
        assert_eq!(lost, began);
    }
}
