//! One owner for every task, and the order in which a service stops: not ready, stop accepting, finish what runs, stop
//! the tasks, exit.
//!
//! A service makes one [`Tasks`] and hands clones of it to what needs to start work. Every task is named; when a drain
//! runs past its deadline the names of those still running are logged.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The tasks of one service. Clones share the same set.
#[derive(Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    stopping: CancellationToken,
    running: Arc<Mutex<BTreeMap<u64, &'static str>>>,
    next: Arc<AtomicU64>,
}

/// Tasks that did not end before the deadline.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("still running after the drain deadline: {}", names.join(", "))]
pub struct DrainError {
    /// Their names; one entry per task.
    pub names: Vec<&'static str>,
}

/// Takes a task's name off the list however it ends, panics included.
struct Entry {
    running: Arc<Mutex<BTreeMap<u64, &'static str>>>,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

impl Tasks {
    /// No tasks yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a task. It should watch [`Tasks::stopping`] and end soon after.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(number, name);
        let entry = Entry { running: Arc::clone(&self.running), number };
        self.tracker.spawn(async move {
            let _entry = entry;
            future.await
        })
    }

    /// Cancelled when the service stops.
    pub fn stopping(&self) -> CancellationToken {
        self.stopping.clone()
    }

    /// Tells every task to stop and waits for them, at most `deadline`.
    pub async fn drain(&self, deadline: Duration) -> Result<(), DrainError> {
        self.stopping.cancel();
        self.tracker.close();
        if tokio::time::timeout(deadline, self.tracker.wait()).await.is_ok() {
            return Ok(());
        }
        Err(DrainError { names: self.running() })
    }

    /// The names of those that run; one entry per task.
    pub fn running(&self) -> Vec<&'static str> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).values().copied().collect()
    }
}

/// Whether a service takes work. Shared with its readiness endpoint.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Not ready yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the answer of the readiness endpoint.
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Release);
    }

    /// The present answer.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Waits for SIGTERM or SIGINT.
pub async fn stop_signal() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_waits_for_tasks_that_stop() {
        let tasks = Tasks::new();
        let stopping = tasks.stopping();
        let task = tasks.spawn("listener", async move { stopping.cancelled().await });
        tasks.drain(Duration::from_secs(5)).await.unwrap();
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_names_who_is_late() {
        let tasks = Tasks::new();
        tasks.spawn("stuck", std::future::pending::<()>());
        tasks.spawn("quick", async {});
        let error = tasks.drain(Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(error.names, ["stuck"]);
    }
}
