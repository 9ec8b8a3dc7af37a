//! Writes between `BeginWrite` and what is recorded of them.
//!
//! Whatever becomes of the client, a write that was begun is settled: an [`ActiveWrite`] that is dropped aborts itself.
//! Every call runs as a task of its own, so that a client that goes away does not take it along. While it is open, a
//! background task renews the intent. It is ours for certain only until the lease of the last renewal is over, counted
//! from when that was sent, by this router's clock ([`ActiveWrite::leased_until`]).

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::HeaderValue;
use tabularium_common::lifecycle::Tasks;
use tabularium_proto::{
    coordinator::{
        AbortWriteRequest, BeginWriteRequest, CommitWriteRequest, RenewWritesRequest, Route,
        abort_write_request::Outcome,
    },
    node::ReplicaRecord,
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::{
    coordinator::Coordinators,
    limits::{COMMIT_CALL_TIMEOUT, SETTLE_BACKOFF, SETTLE_PATIENCE, WRITE_CALL_TIMEOUT},
    metrics::Metrics,
    refusal::Refusal,
};

/// Write ids in one renewal.
const RENEWAL_BATCH: usize = 1000;
/// Shortest time that one coordinator is given to renew writes.
const MIN_RENEWAL_TIMEOUT: Duration = Duration::from_millis(100);
/// How often open writes are renewed when no lease says otherwise, and the bounds when one does.
const RENEW_INTERVAL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// What is recorded of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Settlement {
    /// It was done.
    Commit {
        /// By these storages for certain.
        storages: Vec<String>,
        /// Nobody voted, so that only the primary is known to have it.
        unvoted: bool,
    },
    /// It did not happen.
    NotApplied,
    /// Nobody knows.
    InDoubt,
}

/// The intent of one write.
#[derive(Debug)]
struct Intent {
    lost: CancellationToken,
    length: Duration,
    until: Mutex<Instant>,
}

impl Intent {
    fn renewed(&self, sent: Instant) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = sent + self.length;
    }
}

struct Inner {
    coordinators: Coordinators,
    router_id: String,
    tasks: Tasks,
    metrics: Arc<Metrics>,
    /// Bounded by the RPCs under way.
    open: Mutex<HashMap<String, Arc<Intent>>>,
    /// Shortest lease seen, in milliseconds.
    lease: AtomicU64,
    shorter_lease: Notify,
}

/// All writes of this router.
#[derive(Clone)]
pub(crate) struct Writes(Arc<Inner>);

impl Writes {
    /// None yet. `tasks` is what the router waits for before it exits.
    pub(crate) fn new(
        coordinators: Coordinators,
        router_id: String,
        tasks: Tasks,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self(Arc::new(Inner {
            coordinators,
            router_id,
            tasks,
            metrics,
            open: Mutex::default(),
            lease: AtomicU64::new(u64::MAX),
            shorter_lease: Notify::new(),
        }))
    }

    /// Takes the ticket and records the intent; waits for it for `patience`.
    pub(crate) async fn begin(
        &self,
        mut request: BeginWriteRequest,
        correlation: HeaderValue,
        patience: Duration,
    ) -> Result<ActiveWrite, Refusal> {
        request.router_id.clone_from(&self.0.router_id);
        request.wait_milliseconds = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
        let writes = self.clone();
        let begun = self.0.tasks.spawn("begin write", async move {
            let mut sent = Instant::now();
            let anew = || {
                sent = Instant::now();
                if !request.write_id.is_empty() {
                    request.given_up_write_ids.push(std::mem::take(&mut request.write_id));
                }
                request.write_id = Uuid::now_v7().to_string();
                request.clone()
            };
            let call = writes.0.coordinators.call_anew(
                Some(&correlation),
                patience + WRITE_CALL_TIMEOUT,
                anew,
                |mut client, request| async move { client.begin_write(request).await },
            );
            let answer = call.await.map_err(Refusal::Status)?;
            let Some(route) = answer.route else {
                return Err(Refusal::Status(Status::internal("the coordinator answered without a route")));
            };
            let lease = u64::from(answer.lease_milliseconds.max(1));
            let length = Duration::from_millis(lease);
            let waited = Duration::from_millis(answer.waited_milliseconds.into());
            let intent = Arc::new(Intent {
                lost: CancellationToken::new(),
                length,
                until: Mutex::new(sent + waited + length),
            });
            if writes.0.lease.fetch_min(lease, Ordering::Relaxed) > lease {
                writes.0.shorter_lease.notify_one();
            }
            writes.open().insert(answer.write_id.clone(), Arc::clone(&intent));
            writes.0.metrics.open_writes.inc();
            Ok(ActiveWrite {
                writes,
                id: answer.write_id,
                route: Arc::new(route),
                additional_replica_path: answer.additional_replica_path,
                participants: answer.participants,
                correlation,
                intent,
                sent: false,
                unreachable: Vec::new(),
                settled: false,
            })
        });
        begun.await.unwrap_or_else(|_| Err(Refusal::Status(Status::internal("beginning the write failed"))))
    }

    fn open(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Intent>>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, id: &str) {
        if self.open().remove(id).is_some() {
            self.0.metrics.open_writes.dec();
        }
    }

    /// Renews what is open, for as long as the router runs.
    pub(crate) async fn renew(self) {
        loop {
            let lease = Duration::from_millis(self.0.lease.load(Ordering::Relaxed));
            let pause = (lease / 3).clamp(RENEW_INTERVAL.0, RENEW_INTERVAL.1);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.0.shorter_lease.notified() => continue,
            }
            let ids: Vec<String> = self.open().keys().cloned().collect();
            // One coordinator that hangs must leave time for the next ones before the lease is over.
            let coordinators = u32::try_from(self.0.coordinators.count()).unwrap_or(u32::MAX).max(1);
            let patience = (pause / coordinators).max(MIN_RENEWAL_TIMEOUT).min(WRITE_CALL_TIMEOUT);
            for batch in ids.chunks(RENEWAL_BATCH) {
                self.renew_batch(batch.to_vec(), patience).await;
            }
        }
    }

    async fn renew_batch(&self, write_ids: Vec<String>, patience: Duration) {
        let sent = Instant::now();
        let request =
            RenewWritesRequest { router_id: self.0.router_id.clone(), write_ids: write_ids.clone() };
        let call = self.0.coordinators.call(None, patience, request, |mut client, request| async move {
            client.renew_writes(request).await
        });
        match call.await {
            Err(status) => tracing::warn!(error = status.message(), "open writes were not renewed"),
            Ok(answer) => {
                let open = self.open();
                for id in &write_ids {
                    // One that is being settled at this moment is gone from the coordinator and not lost.
                    match open.get(id) {
                        Some(intent) if answer.lost_write_ids.contains(id) => intent.lost.cancel(),
                        Some(intent) => intent.renewed(sent),
                        None => {}
                    }
                }
            }
        }
    }

    async fn settle(&self, order: Order) -> Result<(), Refusal> {
        let patience = Instant::now() + SETTLE_PATIENCE;
        let mut pause = SETTLE_BACKOFF.0;
        loop {
            let status = match order.give(&self.0).await {
                Ok(()) => return Ok(()),
                Err(status) => status,
            };
            if !is_passing(&status) || Instant::now() + pause > patience {
                self.0.metrics.unsettled_writes.inc();
                tracing::error!(
                    write_id = order.write_id,
                    settlement = ?order.settlement,
                    correlation_id = order.correlation.to_str().unwrap_or_default(),
                    grpc_code = status.code() as i32,
                    error = status.message(),
                    "the outcome of a write was not recorded"
                );
                return Err(Refusal::NotRecorded(status.message().to_owned()));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(SETTLE_BACKOFF.1);
        }
    }
}

/// Trying again may help.
fn is_passing(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Internal
            | Code::ResourceExhausted
            | Code::Aborted
    )
}

/// One settlement, as often as it has to be told.
struct Order {
    write_id: String,
    settlement: Settlement,
    unreachable: Vec<String>,
    correlation: HeaderValue,
}

impl Order {
    async fn give(&self, inner: &Inner) -> Result<(), Status> {
        let outcome = match &self.settlement {
            Settlement::Commit { storages, unvoted } => {
                return self.commit(inner, storages.clone(), *unvoted).await;
            }
            Settlement::NotApplied => Outcome::NotApplied,
            Settlement::InDoubt => Outcome::InDoubt,
        };
        let request = AbortWriteRequest {
            write_id: self.write_id.clone(),
            router_id: inner.router_id.clone(),
            outcome: outcome.into(),
            unreachable_storages: self.unreachable.clone(),
        };
        let call = inner.coordinators.call(
            Some(&self.correlation),
            WRITE_CALL_TIMEOUT,
            request,
            |mut client, request| async move { client.abort_write(request).await },
        );
        call.await.map(|_| ())
    }

    async fn commit(
        &self,
        inner: &Inner,
        committed_storages: Vec<String>,
        unvoted: bool,
    ) -> Result<(), Status> {
        let request = CommitWriteRequest {
            write_id: self.write_id.clone(),
            router_id: inner.router_id.clone(),
            committed_storages,
            unvoted,
        };
        let call = inner.coordinators.call(
            Some(&self.correlation),
            COMMIT_CALL_TIMEOUT,
            request,
            |mut client, request| async move { client.commit_write(request).await },
        );
        call.await.map(|_| ())
    }
}

/// A write that was begun. Dropped, it aborts itself: as not applied when no node was asked, else as in doubt.
pub(crate) struct ActiveWrite {
    writes: Writes,
    id: String,
    route: Arc<Route>,
    additional_replica_path: String,
    participants: Vec<String>,
    correlation: HeaderValue,
    intent: Arc<Intent>,
    sent: bool,
    unreachable: Vec<String>,
    settled: bool,
}

impl ActiveWrite {
    /// Its id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Where it goes.
    pub(crate) fn route(&self) -> &Arc<Route> {
        &self.route
    }

    /// What a node that has made its change notes beside its replica.
    pub(crate) fn record(&self) -> ReplicaRecord {
        let name = self.route.name.clone().unwrap_or_default();
        ReplicaRecord {
            repository_id: self.route.repository_id,
            virtual_storage: name.virtual_storage,
            relative_path: name.relative_path,
            generation: self.route.generation + 1,
            epoch: self.route.epoch,
            write_id: self.id.clone(),
            complete: true,
            ..ReplicaRecord::default()
        }
    }

    /// Storages that may take part, the primary first.
    pub(crate) fn participants(&self) -> &[String] {
        if self.participants.is_empty() {
            std::slice::from_ref(&self.route.primary)
        } else {
            &self.participants
        }
    }

    /// Until then nobody else can have settled it.
    pub(crate) fn leased_until(&self) -> std::time::Instant {
        self.intent.until.lock().unwrap_or_else(PoisonError::into_inner).into_std()
    }

    /// Where the second repository is kept, if there is one.
    pub(crate) fn additional_replica_path(&self) -> &str {
        &self.additional_replica_path
    }

    /// Cancelled when the coordinator has settled the intent without us.
    pub(crate) fn lost(&self) -> CancellationToken {
        self.intent.lost.clone()
    }

    /// From now on a node may have applied it.
    pub(crate) fn sending(&mut self) {
        self.sent = true;
    }

    /// A storage could not be reached; told to the coordinator with the abort.
    pub(crate) fn unreachable(&mut self, storage: String) {
        self.unreachable.push(storage);
    }

    /// Records the outcome, in a task of its own. The future ends when it is recorded, or cannot be.
    pub(crate) fn settle(
        mut self,
        settlement: Settlement,
    ) -> impl Future<Output = Result<(), Refusal>> + Send + 'static {
        let settling = self.start_settling(settlement);
        async move { settling.await.unwrap_or_else(|error| Err(Refusal::NotRecorded(error.to_string()))) }
    }

    fn start_settling(&mut self, settlement: Settlement) -> tokio::task::JoinHandle<Result<(), Refusal>> {
        self.settled = true;
        let order = Order {
            write_id: self.id.clone(),
            settlement,
            unreachable: std::mem::take(&mut self.unreachable),
            correlation: self.correlation.clone(),
        };
        let writes = self.writes.clone();
        self.writes.0.tasks.spawn("settle write", async move {
            // Open until it is recorded: the intent must not run out while a coordinator is looked for.
            let id = order.write_id.clone();
            let settled = writes.settle(order).await;
            writes.close(&id);
            settled
        })
    }
}

impl Drop for ActiveWrite {
    fn drop(&mut self) {
        // Outside a runtime the process is ending; the intent runs out and is settled as in doubt.
        if !self.settled && tokio::runtime::Handle::try_current().is_ok() {
            let settlement = if self.sent { Settlement::InDoubt } else { Settlement::NotApplied };
            drop(self.start_settling(settlement));
        }
    }
}
