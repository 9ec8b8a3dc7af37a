//! The bus within one process: a bounded queue for each class.
//!
//! It keeps NATS' manners, as far as they matter. A hint goes to one taker; one that is put off comes again after its
//! delay; what does not fit is refused, and what is lost is published again by the coordinator, which holds what is owed.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::Link;
use crate::duties::Class;

/// Hints of one class that may wait, those that were put off included.
const MAX_WAITING: usize = 1024;

/// A message within the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hint {
    /// What a message on the bus has for a body.
    pub body: Bytes,
    /// Of the request that caused it; empty: none is known.
    pub correlation_id: String,
    /// How often it was taken, the next time included.
    pub deliveries: u64,
}

/// Too many hints wait already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_WAITING} messages wait already")]
pub struct Full;

/// The queues. Clones share them.
#[derive(Clone)]
pub struct Exchange(Arc<Shared>);

struct Shared {
    queues: [Queue; Class::ALL.len()],
    link: watch::Sender<Link>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// Rung for each hint that can be taken, and when the next time to look has changed.
    bell: Notify,
}

#[derive(Default)]
struct Waiting {
    due: VecDeque<Hint>,
    /// By the time they are due; the number tells apart what is due at once.
    later: BinaryHeap<Reverse<(Instant, u64)>>,
    put_off: HashMap<u64, Hint>,
    next: u64,
}

impl Waiting {
    fn len(&self) -> usize {
        self.due.len() + self.put_off.len()
    }

    /// The first hint that is due by `now`, or when the first one will be.
    fn take(&mut self, now: Instant) -> Result<Hint, Option<Instant>> {
        while let Some(Reverse((due, number))) = self.later.peek().copied()
            && due <= now
        {
            self.later.pop();
            self.due.extend(self.put_off.remove(&number));
        }
        self.due.pop_front().ok_or_else(|| self.later.peek().map(|Reverse((due, _))| *due))
    }
}

impl Default for Exchange {
    fn default() -> Self {
        Self(Arc::new(Shared { queues: Default::default(), link: watch::Sender::new(Link::Up) }))
    }
}

impl Exchange {
    /// Empty queues.
    pub fn new() -> Self {
        Self::default()
    }

    /// Always up, for as long as the exchange lives.
    pub(super) fn link(&self) -> watch::Receiver<Link> {
        self.0.link.subscribe()
    }

    fn queue(&self, class: Class) -> &Queue {
        &self.0.queues[class as usize]
    }

    /// Gives a hint to whoever takes the next one of its class.
    pub fn publish(&self, class: Class, body: Bytes, correlation_id: &str) -> Result<(), Full> {
        let hint = Hint { body, correlation_id: correlation_id.to_owned(), deliveries: 1 };
        self.put(class, hint, Duration::ZERO)
    }

    /// Gives a hint back that was taken; it comes again after `delay`.
    pub fn give_back(&self, class: Class, hint: Hint, delay: Duration) -> Result<(), Full> {
        let deliveries = hint.deliveries.saturating_add(1);
        self.put(class, Hint { deliveries, ..hint }, delay)
    }

    fn put(&self, class: Class, hint: Hint, delay: Duration) -> Result<(), Full> {
        let queue = self.queue(class);
        {
            let mut waiting = queue.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() >= MAX_WAITING {
                return Err(Full);
            }
            if delay.is_zero() {
                waiting.due.push_back(hint);
            } else {
                let number = waiting.next;
                waiting.next += 1;
                waiting.later.push(Reverse((Instant::now() + delay, number)));
                waiting.put_off.insert(number, hint);
            }
        }
        queue.bell.notify_one();
        Ok(())
    }

    /// The next hint of a class. A taker that stops waiting has taken none.
    pub async fn take(&self, class: Class) -> Hint {
        let queue = self.queue(class);
        loop {
            let found = {
                let mut waiting = queue.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                let found = waiting.take(Instant::now());
                // One ring may have been for several: the next taker is to look as well.
                if found.is_ok() && waiting.len() > 0 {
                    queue.bell.notify_one();
                }
                found
            };
            match found {
                Ok(hint) => return hint,
                Err(None) => queue.bell.notified().await,
                Err(Some(due)) => tokio::select! {
                    () = queue.bell.notified() => {}
                    () = tokio::time::sleep_until(due) => {}
                },
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "what a test starts ends with its runtime")]
mod tests {
    use super::*;

    fn publish(exchange: &Exchange, body: &'static str) -> Result<(), Full> {
        exchange.publish(Class::Cleanup, Bytes::from_static(body.as_bytes()), "c")
    }

    #[tokio::test(start_paused = true)]
    async fn hints_come_in_order_and_to_one_taker_each() {
        let exchange = Exchange::new();
        let takers: Vec<_> = (0..3)
            .map(|_| {
                let exchange = exchange.clone();
                tokio::spawn(async move { exchange.take(Class::Cleanup).await.body })
            })
            .collect();
        for body in ["a", "b", "c"] {
            publish(&exchange, body).unwrap();
        }
        let mut taken = Vec::new();
        for taker in takers {
            taken.push(taker.await.unwrap());
        }
        taken.sort();
        assert_eq!(taken, ["a", "b", "c"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_put_off_comes_again_after_its_delay_and_is_counted() {
        let exchange = Exchange::new();
        publish(&exchange, "a").unwrap();
        let hint = exchange.take(Class::Cleanup).await;
        assert_eq!((hint.deliveries, hint.correlation_id.as_str()), (1, "c"));
        let given_back = Instant::now();
        exchange.give_back(Class::Cleanup, hint, Duration::from_secs(7)).unwrap();
        publish(&exchange, "b").unwrap();
        assert_eq!(exchange.take(Class::Cleanup).await.body, "b", "nobody waits for what is put off");
        let again = exchange.take(Class::Cleanup).await;
        assert_eq!((again.deliveries, again.body.as_ref()), (2, b"a".as_slice()));
        assert!(given_back.elapsed() >= Duration::from_secs(7));
    }

    #[tokio::test(start_paused = true)]
    async fn every_taker_that_waits_hears_of_what_becomes_due() {
        let exchange = Exchange::new();
        let hint = Hint { body: Bytes::from_static(b"a"), correlation_id: String::new(), deliveries: 1 };
        for _ in 0..2 {
            exchange.give_back(Class::Cleanup, hint.clone(), Duration::from_secs(1)).unwrap();
        }
        let takers = [0, 1].map(|_| {
            let exchange = exchange.clone();
            tokio::spawn(async move { exchange.take(Class::Cleanup).await })
        });
        for taker in takers {
            tokio::time::timeout(Duration::from_secs(2), taker).await.unwrap().unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_bounded_and_a_taker_that_gives_up_has_taken_nothing() {
        let exchange = Exchange::new();
        let waited = tokio::time::timeout(Duration::from_secs(1), exchange.take(Class::Cleanup)).await;
        assert!(waited.is_err());
        for _ in 0..MAX_WAITING {
            publish(&exchange, "a").unwrap();
        }
        assert_eq!(publish(&exchange, "b"), Err(Full));
        exchange.publish(Class::Replication, Bytes::new(), "").unwrap();
        exchange.take(Class::Cleanup).await;
        publish(&exchange, "b").unwrap();
        assert_eq!(*exchange.link().borrow(), Link::Up);
    }
}
