//! Who may hold which cached route, and how one is taken back. No clock, no task, no socket: events with the time they
//! happened go in, messages to send and waits that are over come out.
//!
//! * A router uses cached routes until `send time of its last answered renewal + lease`. We count from the arrival of the
//!   renewal, and a little longer, so our end of the lease is never before the router's.
//! * A renewal is answered only while our own lease covers the whole of the router's, so when our lease has run out, those
//!   of all our routers have; and only once every revocation sent before it arrived is acknowledged, so a router that
//!   does not acknowledge loses its lease at most one lease after the revocation was sent.
//! * A route is registered under its session when the answer that may be cached is given (`end_fill`), unless a
//!   revocation of the same name passed while the answer was being made.
//! * A session that is cut off keeps its registrations until its lease has run out. One whose lease has run out is closed
//!   and never renewed: the router starts a new one with an empty cache.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::Duration,
};

use tabularium_common::ids::Generation;

use crate::repository::{RepositoryKey, RevokedRoute};

/// Time since an origin that the driver chose.
pub(crate) type Moment = Duration;

/// Routes one session may hold; beyond it the oldest is revoked to make room.
pub(crate) const MAX_ROUTES_PER_SESSION: usize = 100_000;
/// Unacknowledged revocations of one session beyond which nothing more is cached for it.
const MAX_PENDING_PER_SESSION: usize = 1000;
/// What is added to a lease for clocks that run at different speeds: one part in this many.
const DRIFT_PART: u32 = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SessionId(pub(crate) u64);

/// A revocation whose end somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct WaitId(u64);

/// An answer in the making that may be cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FillId(u64);

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// The renewal of that number is granted.
    Renewed { session: SessionId, sequence: u64 },
    /// The router is to forget a route.
    Revoke { session: SessionId, revocation: u64, route: RevokedRoute },
    /// The session is over; its stream is to end.
    Close(SessionId),
    /// No router can use a route that this wait was for.
    Settled(WaitId),
}

/// A length of time with the allowance for drifting clocks.
pub(crate) fn with_drift(length: Duration) -> Duration {
    length + length / DRIFT_PART
}

enum Held {
    Cached(Generation),
    /// Until this revocation is acknowledged the router may still have it.
    Revoking(u64),
}

struct Pending {
    key: RepositoryKey,
    wait: Option<WaitId>,
}

struct Renewal {
    sequence: u64,
    at: Moment,
    /// Revocations up to this one were sent before it arrived.
    after: u64,
}

struct Session {
    router_id: String,
    /// The router uses nothing cached under this session from then on.
    until: Moment,
    routes: HashMap<RepositoryKey, Held>,
    /// Names in the order they were cached; may name routes that are gone.
    oldest: VecDeque<RepositoryKey>,
    pending: BTreeMap<u64, Pending>,
    waiting: Option<Renewal>,
}

/// All sessions of one coordinator.
pub(crate) struct Leases {
    lease: Duration,
    max_routes: usize,
    own_until: Option<Moment>,
    sessions: BTreeMap<SessionId, Session>,
    fills: HashMap<FillId, (RepositoryKey, bool)>,
    /// How many sessions each wait still depends on.
    waits: HashMap<WaitId, usize>,
    last_number: u64,
}

impl Leases {
    pub(crate) fn new(lease: Duration, max_routes: usize) -> Self {
        Self {
            lease,
            max_routes,
            own_until: None,
            sessions: BTreeMap::new(),
            fills: HashMap::new(),
            waits: HashMap::new(),
            last_number: 0,
        }
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Our own lease stands until then, by our clock, drift taken off.
    pub(crate) fn own_lease(&mut self, until: Moment) {
        self.own_until = Some(until);
    }

    /// Our own lease will not be extended: no router's is any more, and every session ends.
    pub(crate) fn stop_granting(&mut self) -> Vec<Action> {
        self.own_until = None;
        self.sessions.keys().copied().map(Action::Close).collect()
    }

    fn covers(&self, end: Moment) -> bool {
        self.own_until.is_some_and(|own| end <= own)
    }

    /// A router says hello. `None`: we hold no lease under which it could be served.
    pub(crate) fn open(&mut self, now: Moment, router_id: &str) -> Option<SessionId> {
        let until = now + with_drift(self.lease);
        if !self.covers(until) {
            return None;
        }
        let id = SessionId(self.number());
        let session = Session {
            router_id: router_id.to_owned(),
            until,
            routes: HashMap::new(),
            oldest: VecDeque::new(),
            pending: BTreeMap::new(),
            waiting: None,
        };
        self.sessions.insert(id, session);
        Some(id)
    }

    /// A renewal arrived.
    pub(crate) fn renew(&mut self, now: Moment, id: SessionId, sequence: u64) -> Vec<Action> {
        let Some(session) = self.sessions.get_mut(&id) else { return vec![Action::Close(id)] };
        if session.until <= now {
            return self.remove(id, true);
        }
        match session.pending.last_key_value() {
            // The earlier one is granted sooner, and this router will send more.
            Some(_) if session.waiting.is_some() => Vec::new(),
            Some((&last, _)) => {
                session.waiting = Some(Renewal { sequence, at: now, after: last });
                Vec::new()
            }
            None => self.grant(id, sequence, now),
        }
    }

    fn grant(&mut self, id: SessionId, sequence: u64, at: Moment) -> Vec<Action> {
        let until = at + with_drift(self.lease);
        if !self.covers(until) {
            return Vec::new();
        }
        let Some(session) = self.sessions.get_mut(&id) else { return Vec::new() };
        session.until = session.until.max(until);
        vec![Action::Renewed { session: id, sequence }]
    }

    /// The router has forgotten what a revocation named.
    pub(crate) fn acknowledge(&mut self, now: Moment, id: SessionId, revocation: u64) -> Vec<Action> {
        let Some(session) = self.sessions.get_mut(&id) else { return Vec::new() };
        let Some(pending) = session.pending.remove(&revocation) else { return Vec::new() };
        if matches!(session.routes.get(&pending.key), Some(Held::Revoking(last)) if *last == revocation) {
            session.routes.remove(&pending.key);
        }
        let due = session.waiting.take_if(|waiting| {
            session.pending.first_key_value().is_none_or(|(first, _)| *first > waiting.after)
        });
        let alive = session.until > now;
        let mut actions = self.one_less(pending.wait);
        if let Some(renewal) = due
            && alive
        {
            actions.extend(self.grant(id, renewal.sequence, renewal.at));
        }
        actions
    }

    fn one_less(&mut self, wait: Option<WaitId>) -> Vec<Action> {
        let Some(wait) = wait else { return Vec::new() };
        let Some(left) = self.waits.get_mut(&wait) else { return Vec::new() };
        *left -= 1;
        if *left > 0 {
            return Vec::new();
        }
        self.waits.remove(&wait);
        vec![Action::Settled(wait)]
    }

    /// An answer about `key` is about to be read from the database.
    pub(crate) fn begin_fill(&mut self, key: &RepositoryKey) -> FillId {
        let id = FillId(self.number());
        self.fills.insert(id, (key.clone(), false));
        id
    }

    /// The answer is there. True: it may be cached under that session, and is registered.
    pub(crate) fn end_fill(
        &mut self,
        now: Moment,
        fill: FillId,
        id: SessionId,
        generation: Option<Generation>,
    ) -> (bool, Vec<Action>) {
        let Some((key, overtaken)) = self.fills.remove(&fill) else { return (false, Vec::new()) };
        let (Some(generation), false) = (generation, overtaken) else { return (false, Vec::new()) };
        let max_routes = self.max_routes;
        let revocation = self.number();
        let Some(session) = self.sessions.get_mut(&id) else { return (false, Vec::new()) };
        if session.until <= now || session.pending.len() >= MAX_PENDING_PER_SESSION {
            return (false, Vec::new());
        }
        let mut actions = Vec::new();
        if !session.routes.contains_key(&key) && session.routes.len() >= max_routes {
            actions.extend(session.evict(id, revocation));
        }
        if !matches!(session.routes.insert(key.clone(), Held::Cached(generation)), Some(Held::Cached(_))) {
            session.oldest.push_back(key);
        }
        if session.oldest.len() > max_routes.saturating_mul(2) {
            // A name that was cached again stands in it more than once; the last time counts.
            let mut seen = HashSet::with_capacity(session.routes.len());
            let mut kept: VecDeque<RepositoryKey> = VecDeque::with_capacity(session.routes.len());
            while let Some(key) = session.oldest.pop_back() {
                if matches!(session.routes.get(&key), Some(Held::Cached(_))) && seen.insert(key.clone()) {
                    kept.push_front(key);
                }
            }
            session.oldest = kept;
        }
        (true, actions)
    }

    /// A route is wrong from now on. `None`: no router has it.
    pub(crate) fn revoke(&mut self, now: Moment, route: &RevokedRoute) -> (Option<WaitId>, Vec<Action>) {
        for (key, overtaken) in self.fills.values_mut() {
            *overtaken |= *key == route.key;
        }
        let wait = WaitId(self.number());
        let mut actions = Vec::new();
        let mut number = self.last_number;
        for (&id, session) in &mut self.sessions {
            if session.until <= now || !session.routes.contains_key(&route.key) {
                continue;
            }
            number += 1;
            session.routes.insert(route.key.clone(), Held::Revoking(number));
            session.pending.insert(number, Pending { key: route.key.clone(), wait: Some(wait) });
            actions.push(Action::Revoke { session: id, revocation: number, route: route.clone() });
        }
        self.last_number = number;
        if actions.is_empty() {
            return (None, actions);
        }
        self.waits.insert(wait, actions.len());
        (Some(wait), actions)
    }

    fn remove(&mut self, id: SessionId, close: bool) -> Vec<Action> {
        let Some(session) = self.sessions.remove(&id) else { return Vec::new() };
        let mut actions = Vec::new();
        if close {
            actions.push(Action::Close(id));
        }
        for pending in session.pending.into_values() {
            actions.extend(self.one_less(pending.wait));
        }
        actions
    }

    /// Ends what has run out.
    pub(crate) fn expire(&mut self, now: Moment) -> Vec<Action> {
        let over: Vec<SessionId> =
            self.sessions.iter().filter(|(_, session)| session.until <= now).map(|(id, _)| *id).collect();
        over.into_iter().flat_map(|id| self.remove(id, true)).collect()
    }

    /// When [`Leases::expire`] has something to do next.
    pub(crate) fn next_expiry(&self) -> Option<Moment> {
        self.sessions.values().map(|session| session.until).min()
    }

    /// Routers with a session, cut off or not.
    pub(crate) fn routers(&self) -> Vec<String> {
        self.sessions.values().map(|session| session.router_id.clone()).collect()
    }

    /// No router can use anything that was cached under a session of ours.
    pub(crate) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }
}

impl Session {
    /// Asks the router to forget the route it has held longest. It counts as held until that is acknowledged.
    fn evict(&mut self, id: SessionId, revocation: u64) -> Option<Action> {
        loop {
            let key = self.oldest.pop_front()?;
            let Some(held @ Held::Cached(_)) = self.routes.get_mut(&key) else { continue };
            let Held::Cached(generation) = std::mem::replace(held, Held::Revoking(revocation)) else {
                continue;
            };
            self.pending.insert(revocation, Pending { key: key.clone(), wait: None });
            let route = RevokedRoute {
                key,
                id: tabularium_common::ids::RepositoryId(0),
                generation: generation.next(),
            };
            return Some(Action::Revoke { session: id, revocation, route });
        }
    }
}

#[cfg(test)]
mod tests;
