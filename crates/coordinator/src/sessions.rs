//! Sessions of routers: the streams, the clock and the waiting around [`crate::leases`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tabularium_common::{ids::Generation, lifecycle::Tasks};
use tabularium_proto::coordinator as wire;
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::Instant,
};
use tonic::Status;

use crate::{
    leases::{Action, FillId, Leases, MAX_ROUTES_PER_SESSION, Moment, SessionId, WaitId},
    repository::{RepositoryKey, RevokedRoute},
};

/// Messages that may wait for a router to read them. One that lags further is cut off and loses its lease.
const OUTLET_MESSAGES: usize = 4096;

/// What a router's stream yields.
pub(crate) type Outlet = mpsc::Receiver<Result<wire::SessionResponse, Status>>;

struct State {
    leases: Leases,
    outlets: HashMap<SessionId, mpsc::Sender<Result<wire::SessionResponse, Status>>>,
    waiting: HashMap<WaitId, oneshot::Sender<()>>,
}

/// All sessions of this coordinator. Clones share them.
#[derive(Clone)]
pub(crate) struct Sessions {
    state: Arc<Mutex<State>>,
    opened: Arc<Notify>,
    origin: Instant,
    /// Makes session ids of this process differ from those of any other.
    prefix: Arc<str>,
}

fn message(message: wire::session_response::Message) -> wire::SessionResponse {
    wire::SessionResponse { message: Some(message) }
}

fn over() -> Status {
    Status::unavailable("the session is over; start a new one with an empty cache")
}

impl State {
    fn apply(&mut self, actions: Vec<Action>) {
        use wire::session_response::Message;
        for action in actions {
            match action {
                Action::Renewed { session, sequence } => {
                    self.send(session, Message::Renewed(wire::SessionRenewed { sequence }));
                }
                Action::Revoke { session, revocation, route } => {
                    let revoke = wire::RevokeRoute {
                        revocation_id: revocation,
                        name: Some((&route.key).into()),
                        repository_id: route.id.0,
                        generation: route.generation.0,
                    };
                    self.send(session, Message::RevokeRoute(revoke));
                }
                Action::Close(session) => {
                    if let Some(outlet) = self.outlets.remove(&session) {
                        // If it does not fit, the end of the stream says the same.
                        let _ = outlet.try_send(Err(over()));
                    }
                }
                Action::Settled(wait) => {
                    if let Some(waiting) = self.waiting.remove(&wait) {
                        // Nobody waits any more: the caller's deadline has passed.
                        let _ = waiting.send(());
                    }
                }
            }
        }
    }

    /// A router that does not take a message keeps its registrations and runs out of its lease.
    fn send(&mut self, session: SessionId, body: wire::session_response::Message) {
        let Some(outlet) = self.outlets.get(&session) else { return };
        if outlet.try_send(Ok(message(body))).is_err() {
            self.outlets.remove(&session);
        }
    }
}

impl Sessions {
    pub(crate) fn new(router_lease: Duration) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                leases: Leases::new(router_lease, MAX_ROUTES_PER_SESSION),
                outlets: HashMap::new(),
                waiting: HashMap::new(),
            })),
            opened: Arc::new(Notify::new()),
            origin: Instant::now(),
            prefix: uuid::Uuid::new_v4().simple().to_string().into(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moment(&self, instant: Instant) -> Moment {
        instant.saturating_duration_since(self.origin)
    }

    fn now(&self) -> Moment {
        self.moment(Instant::now())
    }

    /// Ends leases when they run out.
    pub(crate) fn start(&self, tasks: &Tasks) {
        let sessions = self.clone();
        let stopping = tasks.stopping();
        tasks.spawn("lease-expiry", async move {
            loop {
                let next = sessions.lock().leases.next_expiry();
                let expiry = async {
                    match next {
                        Some(next) => tokio::time::sleep_until(sessions.origin + next).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = expiry => {
                        let mut state = sessions.lock();
                        let actions = state.leases.expire(sessions.now());
                        state.apply(actions);
                    }
                    () = sessions.opened.notified() => {}
                    () = stopping.cancelled() => if sessions.is_empty() { return },
                }
                // While stopping, what still runs out is waited for without spinning.
                if stopping.is_cancelled() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        });
    }

    /// Our own lease stands until then.
    pub(crate) fn own_lease(&self, until: Instant) {
        let until = self.moment(until);
        self.lock().leases.own_lease(until);
    }

    /// Ends every session; what routers have cached runs out.
    pub(crate) fn stop_granting(&self) {
        let mut state = self.lock();
        let actions = state.leases.stop_granting();
        state.apply(actions);
    }

    /// No router can use anything cached under a session of ours.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().leases.is_empty()
    }

    /// Waits until [`Sessions::is_empty`]: at most one router lease after [`Sessions::stop_granting`].
    pub(crate) async fn emptied(&self) {
        while !self.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Routers with a session.
    pub(crate) fn routers(&self) -> Vec<String> {
        self.lock().leases.routers()
    }

    /// Opens a session. `None` while this coordinator has no lease of its own.
    pub(crate) fn open(&self, router_id: &str) -> Option<(SessionId, Outlet)> {
        let (sender, receiver) = mpsc::channel(OUTLET_MESSAGES);
        let now = self.now();
        let mut state = self.lock();
        let id = state.leases.open(now, router_id)?;
        state.outlets.insert(id, sender);
        drop(state);
        self.opened.notify_one();
        Some((id, receiver))
    }

    /// The text by which a router names its session.
    pub(crate) fn name(&self, id: SessionId) -> String {
        format!("{}-{}", self.prefix, id.0)
    }

    /// The session of that name, when it is one of this process.
    pub(crate) fn parse(&self, name: &str) -> Option<SessionId> {
        let (prefix, number) = name.rsplit_once('-')?;
        (prefix == &*self.prefix).then(|| number.parse().ok().map(SessionId)).flatten()
    }

    /// Sends a message that is not about leases.
    pub(crate) fn send(&self, id: SessionId, body: wire::session_response::Message) {
        self.lock().send(id, body);
    }

    /// Sends a message to every router.
    pub(crate) fn broadcast(&self, body: &wire::session_response::Message) {
        let mut state = self.lock();
        let ids: Vec<SessionId> = state.outlets.keys().copied().collect();
        for id in ids {
            state.send(id, body.clone());
        }
    }

    pub(crate) fn renew(&self, id: SessionId, sequence: u64) {
        let now = self.now();
        let mut state = self.lock();
        let actions = state.leases.renew(now, id, sequence);
        state.apply(actions);
    }

    pub(crate) fn acknowledge(&self, id: SessionId, revocation: u64) {
        let now = self.now();
        let mut state = self.lock();
        let actions = state.leases.acknowledge(now, id, revocation);
        state.apply(actions);
    }

    /// The router's stream ended: it hears nothing more and keeps what it has until its lease runs out.
    pub(crate) fn cut_off(&self, id: SessionId) {
        self.lock().outlets.remove(&id);
    }

    /// An answer about `key` that may be cached under session `id` is about to be read. End it with [`Filling::end`].
    pub(crate) fn begin_fill(&self, id: SessionId, key: &RepositoryKey) -> Filling<'_> {
        Filling { sessions: self, session: id, fill: Some(self.lock().leases.begin_fill(key)) }
    }

    fn end_fill(&self, fill: FillId, id: SessionId, generation: Option<Generation>) -> bool {
        let now = self.now();
        let mut state = self.lock();
        let (cacheable, actions) = state.leases.end_fill(now, fill, id, generation);
        state.apply(actions);
        cacheable
    }

    /// Makes our routers forget routes. The future is done when none of them can use one any more.
    pub(crate) fn revoke(&self, routes: &[RevokedRoute]) -> impl Future<Output = ()> + Send + use<> {
        let now = self.now();
        let mut waits = Vec::new();
        let mut state = self.lock();
        for route in routes {
            let (wait, actions) = state.leases.revoke(now, route);
            if let Some(wait) = wait {
                let (sender, receiver) = oneshot::channel();
                state.waiting.insert(wait, sender);
                waits.push(receiver);
            }
            state.apply(actions);
        }
        drop(state);
        async move {
            for wait in waits {
                // The sender goes only when the wait is over.
                let _ = wait.await;
            }
        }
    }
}

/// An answer being made. Dropped without an end, it is not cached.
pub(crate) struct Filling<'a> {
    sessions: &'a Sessions,
    session: SessionId,
    fill: Option<FillId>,
}

impl Filling<'_> {
    /// True: the answer, of this generation, may be cached.
    pub(crate) fn end(mut self, generation: Generation) -> bool {
        self.fill.take().is_some_and(|fill| self.sessions.end_fill(fill, self.session, Some(generation)))
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        if let Some(fill) = self.fill.take() {
            self.sessions.end_fill(fill, self.session, None);
        }
    }
}
