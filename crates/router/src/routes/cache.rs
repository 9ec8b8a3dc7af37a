//! The routes that are kept, and the questions that are under way.
//!
//! Each shard has a young and an old half. What is used moves to the young half; when that is full the old half is
//! dropped and the young one takes its place. So the cache is bounded and what is in use stays, at one lookup each.
//!
//! What was kept under a session that ended is not used any more, but *remembered*: for the time when nobody can be asked.
//! What was revoked is not.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tabularium_proto::coordinator::Route;
use tokio::sync::watch;

use crate::limits::{MAX_CACHED_ROUTES, ROUTE_SHARDS};

const HALF: usize = MAX_CACHED_ROUTES / ROUTE_SHARDS / 2;

/// A repository's key: no virtual storage that exists contains a NUL.
pub(crate) fn key(virtual_storage: &str, relative_path: &str) -> String {
    let mut key = String::with_capacity(virtual_storage.len() + 1 + relative_path.len());
    key.push_str(virtual_storage);
    key.push('\0');
    key.push_str(relative_path);
    key
}

/// What became of a question.
#[derive(Debug, Clone)]
pub(crate) enum Landed {
    /// Not answered yet.
    Flying,
    /// Answered, and others may use the answer.
    Kept(Arc<Route>),
    /// Failed, or others may not use the answer.
    Dropped,
}

struct Question {
    flight: u64,
    session: u64,
    revoked: bool,
    landed: watch::Sender<Landed>,
}

#[derive(Default)]
struct Halves {
    young: HashMap<String, Arc<Route>>,
    old: HashMap<String, Arc<Route>>,
}

impl Halves {
    fn remove(&mut self, key: &str) -> bool {
        // Both, whichever has it.
        let (young, old) = (self.young.remove(key), self.old.remove(key));
        young.is_some() || old.is_some()
    }

    fn get(&mut self, key: &str) -> Option<Arc<Route>> {
        if let Some(route) = self.young.get(key) {
            return Some(Arc::clone(route));
        }
        let (key, route) = self.old.remove_entry(key)?;
        self.put(key, Arc::clone(&route));
        Some(route)
    }

    fn put(&mut self, key: String, route: Arc<Route>) {
        if self.young.len() >= HALF {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, route);
    }
}

#[derive(Default)]
struct Shard {
    kept: Halves,
    remembered: Halves,
    /// Bounded by the RPCs under way.
    questions: HashMap<String, Question>,
}

/// What a reader does who has found nothing.
pub(crate) enum Joined<'c> {
    /// It came in the meantime.
    Known(Arc<Route>),
    /// Asks the coordinator.
    Lead(Flight<'c>),
    /// Waits for whoever asks.
    Follow(watch::Receiver<Landed>),
}

/// A question under way. Dropped without an answer it lets those who wait ask for themselves.
pub(crate) struct Flight<'c> {
    cache: &'c Cache,
    key: String,
    number: u64,
}

impl Flight<'_> {
    /// Keeps the answer if it is `cacheable`, not revoked meanwhile, and the session is still `alive`.
    pub(crate) fn land(self, route: &Arc<Route>, cacheable: bool, alive: impl Fn() -> bool) {
        let mut shard = self.cache.shard(&self.key);
        let Some(question) = shard.questions.get(&self.key).filter(|own| own.flight == self.number) else {
            return;
        };
        if cacheable && !question.revoked && alive() {
            question.landed.send_replace(Landed::Kept(Arc::clone(route)));
            shard.kept.put(self.key.clone(), Arc::clone(route));
            shard.remembered.put(self.key.clone(), Arc::clone(route));
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let mut shard = self.cache.shard(&self.key);
        if shard.questions.get(&self.key).is_some_and(|own| own.flight == self.number)
            && let Some(question) = shard.questions.remove(&self.key)
        {
            question.landed.send_if_modified(|landed| {
                let waiting = matches!(landed, Landed::Flying);
                if waiting {
                    *landed = Landed::Dropped;
                }
                waiting
            });
        }
    }
}

/// All shards.
pub(crate) struct Cache {
    shards: [Mutex<Shard>; ROUTE_SHARDS],
    hasher: RandomState,
    flights: AtomicU64,
}

impl Cache {
    /// Empty.
    pub(crate) fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::new(),
            flights: AtomicU64::new(0),
        }
    }

    fn shard(&self, key: &str) -> MutexGuard<'_, Shard> {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        let index = self.hasher.hash_one(key) as usize % ROUTE_SHARDS;
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A route that is kept. The caller checks the lease.
    pub(crate) fn get(&self, key: &str) -> Option<Arc<Route>> {
        self.shard(key).kept.get(key)
    }

    /// A route that was kept last, if it was not revoked since. It may not be true any more.
    pub(crate) fn remembered(&self, key: &str) -> Option<Arc<Route>> {
        self.shard(key).remembered.get(key)
    }

    /// Asks, or joins who asks under the same session.
    pub(crate) fn join(&self, key: &str, session: u64) -> Joined<'_> {
        let mut shard = self.shard(key);
        if let Some(route) = shard.kept.get(key) {
            return Joined::Known(route);
        }
        if let Some(question) = shard.questions.get(key)
            && question.session == session
            && !question.revoked
        {
            return Joined::Follow(question.landed.subscribe());
        }
        let flight = self.flights.fetch_add(1, Ordering::Relaxed);
        let question =
            Question { flight, session, revoked: false, landed: watch::Sender::new(Landed::Flying) };
        if let Some(overtaken) = shard.questions.insert(key.to_owned(), question) {
            overtaken.landed.send_replace(Landed::Dropped);
        }
        Joined::Lead(Flight { cache: self, key: key.to_owned(), number: flight })
    }

    /// Forgets a route, and marks a question about it so that its answer is not kept. Answers whether there was one.
    pub(crate) fn revoke(&self, key: &str) -> bool {
        let mut shard = self.shard(key);
        shard.kept.remove(key);
        let known = shard.remembered.remove(key);
        if let Some(question) = shard.questions.get_mut(key) {
            question.revoked = true;
        }
        known
    }

    /// Does not keep a route that proved to be out of date, nor the answer to a question about it.
    pub(crate) fn drop_kept(&self, key: &str) {
        let mut shard = self.shard(key);
        shard.kept.remove(key);
        if let Some(question) = shard.questions.get_mut(key) {
            question.revoked = true;
        }
    }

    /// Replaces a route that is kept by what `advance` makes of it.
    pub(crate) fn advance(&self, key: &str, advance: impl FnOnce(&Route) -> Option<Route>) {
        let mut shard = self.shard(key);
        if let Some(route) = shard.kept.get(key).and_then(|route| advance(&route)).map(Arc::new) {
            shard.kept.put(key.to_owned(), Arc::clone(&route));
            if shard.remembered.get(key).is_some() {
                shard.remembered.put(key.to_owned(), route);
            }
        }
    }

    /// Keeps no route any more, nor the answer to any question that is under way.
    pub(crate) fn forget(&self) {
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.kept = Halves::default();
            shard.questions.values_mut().for_each(|question| question.revoked = true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(generation: i64) -> Arc<Route> {
        Arc::new(Route { generation, ..Route::default() })
    }

    fn lead<'c>(cache: &'c Cache, key: &str, session: u64) -> Flight<'c> {
        match cache.join(key, session) {
            Joined::Lead(flight) => flight,
            _ => panic!("somebody else asks"),
        }
    }

    fn follow(cache: &Cache, key: &str, session: u64) -> watch::Receiver<Landed> {
        match cache.join(key, session) {
            Joined::Follow(answer) => answer,
            _ => panic!("nobody asks"),
        }
    }

    #[test]
    fn one_asks_and_the_others_get_the_answer() {
        let cache = Cache::new();
        let flight = lead(&cache, "k", 1);
        let answer = follow(&cache, "k", 1);
        flight.land(&route(3), true, || true);
        assert!(matches!(&*answer.borrow(), Landed::Kept(route) if route.generation == 3));
        assert_eq!(cache.get("k").unwrap().generation, 3);
    }

    #[test]
    fn an_answer_that_was_revoked_on_its_way_is_neither_kept_nor_shared() {
        let cache = Cache::new();
        let flight = lead(&cache, "k", 1);
        let early = follow(&cache, "k", 1);
        cache.revoke("k");
        let second = lead(&cache, "k", 1);
        assert!(matches!(&*early.borrow(), Landed::Dropped), "who waits for it asks again");
        flight.land(&route(3), true, || true);
        assert!(cache.get("k").is_none(), "the old answer is not taken for the new question's");
        second.land(&route(4), true, || true);
        assert_eq!(cache.get("k").unwrap().generation, 4);
    }

    #[test]
    fn a_revocation_alone_keeps_the_answer_out() {
        let cache = Cache::new();
        let flight = lead(&cache, "k", 1);
        let early = follow(&cache, "k", 1);
        cache.revoke("k");
        flight.land(&route(3), true, || true);
        assert!(cache.get("k").is_none());
        assert!(matches!(&*early.borrow(), Landed::Dropped));
    }

    #[test]
    fn an_answer_of_a_session_that_ended_is_not_kept() {
        let cache = Cache::new();
        lead(&cache, "k", 1).land(&route(3), true, || false);
        assert!(cache.get("k").is_none());
        lead(&cache, "k", 1).land(&route(3), false, || true);
        assert!(cache.get("k").is_none(), "not cacheable");
        let old = lead(&cache, "k", 1);
        let new = lead(&cache, "k", 2);
        old.land(&route(3), true, || true);
        assert!(cache.get("k").is_none(), "the question of another session is not answered by it");
        new.land(&route(4), true, || true);
        assert_eq!(cache.get("k").unwrap().generation, 4);
    }

    #[test]
    fn a_question_that_is_given_up_frees_those_who_wait() {
        let cache = Cache::new();
        let flight = lead(&cache, "k", 1);
        let answer = follow(&cache, "k", 1);
        drop(flight);
        assert!(matches!(&*answer.borrow(), Landed::Dropped));
        drop(lead(&cache, "k", 1));
    }

    #[test]
    fn what_is_not_kept_any_more_is_remembered_until_it_is_revoked() {
        let cache = Cache::new();
        lead(&cache, "a", 1).land(&route(3), true, || true);
        lead(&cache, "b", 1).land(&route(3), false, || true);
        cache.forget();
        assert!(cache.get("a").is_none());
        assert_eq!(cache.remembered("a").unwrap().generation, 3);
        assert!(cache.remembered("b").is_none(), "no revocation would have come");
        assert!(cache.revoke("a") && !cache.revoke("a"));
        assert!(cache.remembered("a").is_none());
    }

    #[test]
    fn the_cache_is_bounded_and_keeps_what_is_used() {
        let cache = Cache::new();
        lead(&cache, "used", 1).land(&route(1), true, || true);
        for number in 0..MAX_CACHED_ROUTES * 2 {
            lead(&cache, &number.to_string(), 1).land(&route(1), true, || true);
            if number % 1000 == 0 {
                assert!(cache.get("used").is_some());
            }
        }
        let kept: usize = cache
            .shards
            .iter()
            .map(|shard| shard.lock().unwrap())
            .map(|shard| shard.kept.young.len() + shard.kept.old.len())
            .sum();
        assert!(kept <= MAX_CACHED_ROUTES, "{kept}");
    }
}
