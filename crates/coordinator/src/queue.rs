//! Who of this process may try for a repository's write ticket next: first come, first served.
//!
//! The ticket itself is a row in the database. Here its seekers wait for each other without asking there; the one whose
//! turn it is tries again when a write ended through this coordinator, and now and then in case it ended through another.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout_at},
};

use crate::repository::RepositoryKey;

/// Most that wait for one repository; more are refused at once.
const MAX_WAITING: usize = 1000;
/// Shortest and longest pause before a ticket that somebody else holds is tried for again, in milliseconds.
const POLL_MILLISECONDS: std::ops::RangeInclusive<u64> = 5..=20;
/// For so long seekers of this process hand the ticket to each other at once. Then they leave it lying for one longest
/// pause, or those of another coordinator would never find it free.
const HANDED_ON_FOR: Duration = Duration::from_millis(500);
const LEFT_LYING: Duration = Duration::from_millis(*POLL_MILLISECONDS.end() + 5);

struct Lane {
    turn: Arc<Semaphore>,
    freed: Notify,
    /// Since when the ticket has been handed on among seekers of this process.
    handed_on_since: Mutex<Instant>,
}

/// The queues of all repositories that anybody waits for.
#[derive(Default)]
pub(crate) struct Queues {
    lanes: Mutex<HashMap<RepositoryKey, Arc<Lane>>>,
}

/// Why somebody who waited has no turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoTurn {
    /// It did not come in time.
    Late,
    /// Too many wait already.
    Crowded,
}

/// A place in a queue; the last one to leave takes the queue away.
struct Place<'a> {
    queues: &'a Queues,
    key: RepositoryKey,
    lane: Arc<Lane>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut lanes = self.queues.lanes();
        // Counted under the lock under which it is cloned: the map's and ours.
        if Arc::strong_count(&self.lane) <= 2 {
            lanes.remove(&self.key);
        }
    }
}

/// The right to try for the ticket. The next one's turn comes when it is dropped.
pub(crate) struct Turn<'a> {
    _permit: OwnedSemaphorePermit,
    place: Place<'a>,
}

impl Queues {
    fn lanes(&self) -> MutexGuard<'_, HashMap<RepositoryKey, Arc<Lane>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, key: &RepositoryKey) -> Option<Place<'_>> {
        let mut lanes = self.lanes();
        let lane = lanes.entry(key.clone()).or_insert_with(|| {
            Arc::new(Lane {
                turn: Arc::new(Semaphore::new(1)),
                freed: Notify::new(),
                handed_on_since: Mutex::new(Instant::now()),
            })
        });
        if Arc::strong_count(lane) > MAX_WAITING {
            return None;
        }
        let lane = Arc::clone(lane);
        Some(Place { queues: self, key: key.clone(), lane })
    }

    /// Waits until everybody who came earlier has had a turn. Dropped while it waits, it leaves the queue.
    pub(crate) async fn turn(&self, key: &RepositoryKey, deadline: Instant) -> Result<Turn<'_>, NoTurn> {
        let place = self.place(key).ok_or(NoTurn::Crowded)?;
        let waiting = Arc::clone(&place.lane.turn).acquire_owned();
        match timeout_at(deadline, waiting).await {
            Ok(Ok(permit)) => Ok(Turn { _permit: permit, place }),
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => Err(NoTurn::Late),
        }
    }

    /// A repository's ticket was given back through this coordinator.
    pub(crate) fn freed(&self, key: &RepositoryKey) {
        if let Some(lane) = self.lanes().get(key) {
            lane.freed.notify_one();
        }
    }
}

impl Turn<'_> {
    /// Waits until it is worth trying again; at most until `deadline`.
    pub(crate) async fn try_again(&self, deadline: Instant) -> Result<(), NoTurn> {
        if Instant::now() >= deadline {
            return Err(NoTurn::Late);
        }
        let pause = Duration::from_millis(rand::random_range(POLL_MILLISECONDS));
        let lane = &self.place.lane;
        tokio::select! {
            () = lane.freed.notified() => {
                let lend = {
                    let mut since = lane.handed_on_since.lock().unwrap_or_else(PoisonError::into_inner);
                    let lend = since.elapsed() > HANDED_ON_FOR;
                    if lend {
                        *since = Instant::now();
                    }
                    lend
                };
                if lend {
                    sleep(LEFT_LYING).await;
                }
            }
            () = sleep(pause) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> RepositoryKey {
        RepositoryKey { virtual_storage: "default".parse().unwrap(), relative_path: "a.git".parse().unwrap() }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[tokio::test(start_paused = true)]
    async fn turns_come_in_the_order_of_arrival_and_who_leaves_is_passed_over() {
        let queues = Queues::default();
        let first = queues.turn(&key(), soon()).await.unwrap();
        let order = Mutex::new(Vec::new());
        let wait = |number: u32, deadline| {
            let (queues, order) = (&queues, &order);
            async move {
                let turn = queues.turn(&key(), deadline).await;
                order.lock().unwrap().push((number, turn.is_ok()));
            }
        };
        let left = Instant::now() + Duration::from_millis(10);
        let others = async {
            tokio::join!(wait(1, soon()), wait(2, left), wait(3, soon()), wait(4, soon()));
        };
        let free = async {
            sleep(Duration::from_millis(50)).await;
            drop(first);
        };
        tokio::join!(others, free);
        assert_eq!(*order.lock().unwrap(), [(2, false), (1, true), (3, true), (4, true)]);
        assert!(queues.lanes().is_empty(), "nobody is left, and neither is the queue");
    }

    #[tokio::test(start_paused = true)]
    async fn a_ticket_that_is_given_back_here_is_tried_for_at_once_and_otherwise_now_and_then() {
        let queues = Queues::default();
        let turn = queues.turn(&key(), soon()).await.unwrap();
        let begun = Instant::now();
        turn.try_again(soon()).await.unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(*POLL_MILLISECONDS.start()));
        // Given back before anybody waited for it: not lost.
        queues.freed(&key());
        let begun = Instant::now();
        turn.try_again(soon()).await.unwrap();
        assert_eq!(begun.elapsed(), Duration::ZERO);
        sleep(HANDED_ON_FOR * 2).await;
        queues.freed(&key());
        let begun = Instant::now();
        turn.try_again(soon()).await.unwrap();
        assert!(begun.elapsed() >= LEFT_LYING, "another coordinator's seekers find it");
        assert_eq!(turn.try_again(Instant::now()).await, Err(NoTurn::Late));
    }

    #[tokio::test]
    async fn a_crowd_is_refused() {
        let queues = Queues::default();
        let _turn = queues.turn(&key(), soon()).await.unwrap();
        let places: Vec<_> = (0..MAX_WAITING).map_while(|_| queues.place(&key())).collect();
        assert_eq!(places.len(), MAX_WAITING - 1);
        assert_eq!(queues.turn(&key(), soon()).await.err(), Some(NoTurn::Crowded));
    }
}
