//! Where repositories are: answers of the coordinator, kept while a session's lease allows it.
//!
//! A cached route is used only while `now` is before the lease's end, which counts from the moment the renewal was
//! *sent*; so a coordinator that waits a lease's length after the last renewal it granted knows that nobody reads by an
//! old route. Without a lease every read asks for itself.
//!
//! Three rules keep a stale answer out of the cache and away from other readers:
//! * an answer is kept only if the session under which it was asked for still lives, and no revocation of that repository
//!   arrived while the question was under way;
//! * a reader joins somebody else's question only under a lease, and takes its answer only when it may be kept;
//! * whoever asked may use the answer: its read began before anything that the answer does not show was confirmed.
//!
//! When no coordinator can answer, [`confirmation`] lets the replicas themselves say which of them is the newest.

pub(crate) mod cache;
pub(crate) mod confirmation;
mod records;
pub(crate) mod session;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tabularium_common::{
    faults::{self, SafetyStep},
    ids::RelativePath,
};
use tabularium_proto::coordinator::{
    RepositoryName, ResolveRepositoryRequest, ResolveRepositoryResponse, RevokeRoute, Route,
};
use tokio::sync::mpsc;
use tonic::{Code, Status};

use crate::{
    coordinator::{Coordinators, Correlation},
    limits::{FOLLOW_ATTEMPTS, RESOLVE_AGAIN_TIMEOUT, RESOLVE_TIMEOUT, ROUTES_TO_LEARN},
    metrics::Metrics,
    refusal::Refusal,
    routing::advanced,
};
use cache::{Cache, Joined, Landed};
pub use records::WithoutRecords;

/// The session under which answers may be kept.
#[derive(Debug, Clone)]
struct Session {
    number: u64,
    id: String,
}

/// The router's knowledge of routes. Shared by all workers.
pub(crate) struct Routes {
    coordinators: Coordinators,
    cache: Cache,
    session: Mutex<Option<Session>>,
    /// Rises with every session; also names the one that lives.
    number: AtomicU64,
    /// Nanoseconds after `base` until which cached routes may be used; 0: not at all.
    lease: AtomicU64,
    base: Instant,
    /// The last question that any coordinator was asked was not answered by one.
    unanswered: AtomicBool,
    /// Names whose routes were revoked, to be asked for again.
    revoked: (mpsc::Sender<RepositoryName>, Mutex<Option<mpsc::Receiver<RepositoryName>>>),
    metrics: Arc<Metrics>,
}

impl Routes {
    /// Nothing known, no lease.
    pub(crate) fn new(coordinators: Coordinators, metrics: Arc<Metrics>) -> Self {
        let (revoked, to_learn) = mpsc::channel(ROUTES_TO_LEARN);
        Self {
            coordinators,
            cache: Cache::new(),
            session: Mutex::new(None),
            number: AtomicU64::new(0),
            lease: AtomicU64::new(0),
            base: Instant::now(),
            unanswered: AtomicBool::new(false),
            revoked: (revoked, Mutex::new(Some(to_learn))),
            metrics,
        }
    }

    fn since_base(&self, instant: Instant) -> u64 {
        u64::try_from(instant.saturating_duration_since(self.base).as_nanos()).unwrap_or(u64::MAX)
    }

    /// Cached routes may be used now.
    pub(crate) fn leased(&self) -> bool {
        let until = self.lease.load(Ordering::Acquire);
        until != 0 && self.since_base(Instant::now()) < until
    }

    /// The route of a repository: from the cache under a lease, else from a coordinator. `NOT_FOUND` as the coordinator
    /// says it.
    pub(crate) async fn resolve(
        &self,
        virtual_storage: &str,
        relative_path: &str,
        correlation: Correlation<'_>,
    ) -> Result<Arc<Route>, Refusal> {
        if (self.leased() || faults::is_off(SafetyStep::RouterRouteLease))
            && let Some(route) = self.cache.get(&cache::key(virtual_storage, relative_path))
        {
            self.metrics.cache_hits.inc();
            return Ok(route);
        }
        self.metrics.cache_misses.inc();
        let path: RelativePath = relative_path.parse().map_err(Refusal::Path)?;
        let name = RepositoryName {
            virtual_storage: virtual_storage.to_owned(),
            relative_path: path.as_str().to_owned(),
        };
        let key = cache::key(virtual_storage, path.as_str());
        for _ in 0..FOLLOW_ATTEMPTS {
            let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let Some(session) = session.filter(|_| self.leased()) else {
                break;
            };
            match self.cache.join(&key, session.number) {
                Joined::Known(route) => return Ok(route),
                Joined::Lead(flight) => {
                    let answer = self.ask(name, session.id, correlation).await?;
                    let (route, cacheable) = unpack(answer)?;
                    let alive = || self.leased() && self.number.load(Ordering::Acquire) == session.number;
                    flight.land(&route, cacheable, alive);
                    return Ok(route);
                }
                Joined::Follow(mut answer) => {
                    if let Ok(landed) = answer.wait_for(|landed| !matches!(landed, Landed::Flying)).await
                        && let Landed::Kept(route) = &*landed
                    {
                        return Ok(Arc::clone(route));
                    }
                }
            }
        }
        let answer = self.ask(name, String::new(), correlation).await?;
        unpack(answer).map(|(route, _)| route)
    }

    /// The route of a repository from a coordinator, after the known one proved to be out of date.
    pub(crate) async fn resolve_anew(
        &self,
        virtual_storage: &str,
        relative_path: &str,
        correlation: Correlation<'_>,
    ) -> Result<Arc<Route>, Refusal> {
        let path: RelativePath = relative_path.parse().map_err(Refusal::Path)?;
        self.cache.drop_kept(&cache::key(virtual_storage, path.as_str()));
        let name = RepositoryName { virtual_storage: virtual_storage.to_owned(), relative_path: path.into() };
        let answer = self.ask(name, String::new(), correlation).await?;
        unpack(answer).map(|(route, _)| route)
    }

    async fn ask(
        &self,
        name: RepositoryName,
        session_id: String,
        correlation: Correlation<'_>,
    ) -> Result<ResolveRepositoryResponse, Refusal> {
        let request = ResolveRepositoryRequest { name: Some(name), session_id };
        // Whoever writes while nobody can record it is told so at once.
        let patience = if self.is_unanswered() { RESOLVE_AGAIN_TIMEOUT } else { RESOLVE_TIMEOUT };
        let answer = self
            .coordinators
            .call(correlation, patience, request, |mut client, request| async move {
                client.resolve_repository(request).await
            })
            .await
            .map_err(Refusal::Status);
        self.unanswered.store(answer.as_ref().is_err_and(is_outage), Ordering::Relaxed);
        answer
    }

    /// The last question was not answered by any coordinator, and none renews the lease.
    fn is_unanswered(&self) -> bool {
        self.unanswered.load(Ordering::Relaxed) && !self.leased()
    }

    /// A question was given up before any coordinator answered it.
    fn given_up(&self) {
        self.unanswered.store(true, Ordering::Relaxed);
    }

    /// A route that was kept once and not revoked since. It may not be true any more.
    fn remembered(&self, virtual_storage: &str, relative_path: &str) -> Option<Arc<Route>> {
        let path: RelativePath = relative_path.parse().ok()?;
        self.cache.remembered(&cache::key(virtual_storage, path.as_str()))
    }

    /// Asks anew for routes that were revoked, for as long as the router runs: a route that is not known when the
    /// coordinators go away cannot be confirmed by anybody.
    pub(crate) async fn learn_again(self: Arc<Self>) {
        let names = self.revoked.1.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut names) = names else { return };
        while let Some(name) = names.recv().await {
            if let Err(refusal) = self.resolve(&name.virtual_storage, &name.relative_path, None).await {
                tracing::debug!(relative_path = name.relative_path, error = %refusal, "a revoked route is not replaced");
            }
        }
    }

    /// A write of this router's was recorded: a route that is kept is as new as that.
    pub(crate) fn advance(&self, written: &Route, storages: &[String]) {
        if let Some(name) = &written.name {
            let key = cache::key(&name.virtual_storage, &name.relative_path);
            self.cache.advance(&key, |known| advanced(known, written, storages));
        }
    }

    /// Once this returns, no read that starts uses what was asked for before.
    pub(crate) fn forget(&self) {
        self.cache.forget();
    }

    /// A session was opened; it has no lease yet. Answers its number.
    pub(crate) fn session_opened(&self, id: &str) -> u64 {
        let number = self.number.fetch_add(1, Ordering::AcqRel) + 1;
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Session { number, id: id.to_owned() });
        number
    }

    /// The lease now runs until `sent + length`.
    pub(crate) fn renewed(&self, sent: Instant, length: Duration) {
        let until = self.since_base(sent + length).max(1);
        self.lease.store(until, Ordering::Release);
        self.metrics.lease_until.set(Duration::from_nanos(until).as_secs_f64());
    }

    /// The session is over: nothing that was learned under it is used or kept any more.
    pub(crate) fn session_lost(&self) {
        self.lease.store(0, Ordering::Release);
        self.number.fetch_add(1, Ordering::AcqRel);
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.cache.forget();
        self.metrics.lease_until.set(0.0);
    }

    /// Once this returns, no read that starts uses the revoked route, and no answer under way is kept.
    pub(crate) fn revoke(&self, revocation: &RevokeRoute) {
        self.metrics.revocations.inc();
        if let Some(name) = &revocation.name {
            let known = self.cache.revoke(&cache::key(&name.virtual_storage, &name.relative_path));
            // When too many wait, the next read asks.
            if known && self.revoked.0.try_send(name.clone()).is_err() {
                tracing::debug!(
                    relative_path = name.relative_path,
                    "a revoked route is not asked for at once"
                );
            }
        }
    }
}

fn unpack(answer: ResolveRepositoryResponse) -> Result<(Arc<Route>, bool), Refusal> {
    let cacheable = answer.cacheable;
    answer
        .route
        .map(|route| (Arc::new(route), cacheable))
        .ok_or_else(|| Refusal::Status(Status::internal("the coordinator answered without a route")))
}

/// No coordinator was there to answer, or none had its database.
fn is_outage(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Status(status) if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded))
}

/// What clients hear of a repository that no coordinator knows.
pub(crate) fn not_found(refusal: Refusal) -> Refusal {
    if is_unknown(&refusal) { Refusal::RepositoryNotFound } else { refusal }
}

/// A repository that no coordinator knows.
pub(crate) fn is_unknown(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Status(status) if status.code() == Code::NotFound)
}
