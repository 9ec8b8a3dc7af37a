//! Who is next at a repository's write ticket, within this router.
//!
//! There is one ticket for each repository in the whole cluster. The writes of one router queue here, first come first
//! served, so that of all that it has only one competes with those of other routers.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::OwnedMutexGuard;

#[derive(Default)]
struct Queue {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// How many wait in it or are at their turn.
    length: usize,
}

type Queues = Arc<Mutex<HashMap<String, Queue>>>;

/// The queues of all repositories that are being written to.
#[derive(Clone, Default)]
pub(crate) struct Turns(Queues);

/// A place in a queue; it is given up when this is dropped.
struct Place {
    queues: Queues,
    repository: String,
}

/// A write's turn. It lasts until this is dropped.
pub(crate) struct Turn {
    _turn: OwnedMutexGuard<()>,
    _place: Place,
}

fn lock(queues: &Queues) -> MutexGuard<'_, HashMap<String, Queue>> {
    queues.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Turns {
    /// Waits for a turn at a repository. Dropping the future gives the place up.
    pub(crate) async fn wait(&self, virtual_storage: &str, relative_path: &str) -> Turn {
        let repository = format!("{virtual_storage}\0{relative_path}");
        let turn = {
            let mut queues = lock(&self.0);
            let queue = queues.entry(repository.clone()).or_default();
            queue.length += 1;
            Arc::clone(&queue.turn)
        };
        let place = Place { queues: Arc::clone(&self.0), repository };
        Turn { _turn: turn.lock_owned().await, _place: place }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queues = lock(&self.queues);
        if let Some(queue) = queues.get_mut(&self.repository) {
            queue.length -= 1;
            if queue.length == 0 {
                queues.remove(&self.repository);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn one_at_a_time_in_order_and_nothing_is_left_behind() {
        let turns = Turns::default();
        let first = turns.wait("default", "a").await;
        assert!(turns.wait("default", "b").now_or_never().is_some(), "another repository");
        let mut second = Box::pin(turns.wait("default", "a"));
        assert!(second.as_mut().now_or_never().is_none());
        let mut third = Box::pin(turns.wait("default", "a"));
        assert!(third.as_mut().now_or_never().is_none());
        drop(first);
        assert!(third.as_mut().now_or_never().is_none(), "the second comes first");
        drop(second.await);
        drop(third.await);
        assert!(lock(&turns.0).is_empty());
    }
}
