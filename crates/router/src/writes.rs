//! Writes between `BeginWrite` and what is recorded of them.
//!
//! Whatever becomes of the client, a write that was begun is settled: an [`ActiveWrite`] that is dropped aborts itself.
//! Every call runs as a task of its own, so that a client that goes away does not take it along. While it is open, a
//! background task renews the intent.

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
use tabularium_proto::coordinator::{
    AbortWriteRequest, BeginWriteRequest, CommitWriteRequest, RenewWritesRequest, Route, WriteKind,
    abort_write_request::Outcome,
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::{
    coordinator::Coordinators,
    limits::{COMMIT_CALL_TIMEOUT, SETTLE_BACKOFF, SETTLE_PATIENCE, WRITE_CALL_TIMEOUT},
    metrics::Metrics,
    refusal::Refusal,
    routing::Settlement,
};

/// Write ids in one renewal.
const RENEWAL_BATCH: usize = 1000;
/// Shortest time that one coordinator is given to renew writes.
const MIN_RENEWAL_TIMEOUT: Duration = Duration::from_millis(100);
/// How often open writes are renewed when no lease says otherwise, and the bounds when one does.
const RENEW_INTERVAL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

struct Inner {
    coordinators: Coordinators,
    router_id: String,
    tasks: Tasks,
    metrics: Arc<Metrics>,
    /// Bounded by the RPCs under way.
    open: Mutex<HashMap<String, CancellationToken>>,
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

    /// Records the intent.
    pub(crate) async fn begin(
        &self,
        mut request: BeginWriteRequest,
        correlation: HeaderValue,
    ) -> Result<ActiveWrite, Refusal> {
        request.router_id.clone_from(&self.0.router_id);
        let writes = self.clone();
        let kind = request.kind();
        let begun = self.0.tasks.spawn("begin write", async move {
            let call = writes.0.coordinators.call(
                Some(&correlation),
                WRITE_CALL_TIMEOUT,
                request,
                |mut client, request| async move { client.begin_write(request).await },
            );
            let answer = call.await.map_err(Refusal::Status)?;
            let Some(route) = answer.route else {
                return Err(Refusal::Status(Status::internal("the coordinator answered without a route")));
            };
            let lost = CancellationToken::new();
            let lease = u64::from(answer.lease_milliseconds.max(1));
            if writes.0.lease.fetch_min(lease, Ordering::Relaxed) > lease {
                writes.0.shorter_lease.notify_one();
            }
            writes.open().insert(answer.write_id.clone(), lost.clone());
            writes.0.metrics.open_writes.inc();
            Ok(ActiveWrite {
                writes,
                id: answer.write_id,
                kind,
                route: Arc::new(route),
                additional_replica_path: answer.additional_replica_path,
                correlation,
                lost,
                sent: false,
                unreachable: Vec::new(),
                settled: false,
            })
        });
        begun.await.unwrap_or_else(|_| Err(Refusal::Status(Status::internal("beginning the write failed"))))
    }

    fn open(&self) -> std::sync::MutexGuard<'_, HashMap<String, CancellationToken>> {
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
        let request = RenewWritesRequest { router_id: self.0.router_id.clone(), write_ids };
        let call = self.0.coordinators.call(None, patience, request, |mut client, request| async move {
            client.renew_writes(request).await
        });
        match call.await {
            Err(status) => tracing::warn!(error = status.message(), "open writes were not renewed"),
            Ok(answer) => {
                let open = self.open();
                for id in &answer.lost_write_ids {
                    // One that is being settled at this moment is gone from the coordinator and not lost.
                    if let Some(lost) = open.get(id) {
                        lost.cancel();
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
    primary: String,
    unreachable: Vec<String>,
    correlation: HeaderValue,
}

impl Order {
    async fn give(&self, inner: &Inner) -> Result<(), Status> {
        let outcome = match self.settlement {
            Settlement::Commit => return self.commit(inner).await,
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

    async fn commit(&self, inner: &Inner) -> Result<(), Status> {
        let request = CommitWriteRequest {
            write_id: self.write_id.clone(),
            router_id: inner.router_id.clone(),
            committed_storages: vec![self.primary.clone()],
            unvoted: true,
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
    kind: WriteKind,
    route: Arc<Route>,
    additional_replica_path: String,
    correlation: HeaderValue,
    lost: CancellationToken,
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

    /// What it does to the repository's existence.
    pub(crate) fn kind(&self) -> WriteKind {
        self.kind
    }

    /// Where the second repository is kept, if there is one.
    pub(crate) fn additional_replica_path(&self) -> &str {
        &self.additional_replica_path
    }

    /// Cancelled when the coordinator has settled the intent without us.
    pub(crate) fn lost(&self) -> CancellationToken {
        self.lost.clone()
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
            primary: self.route.primary.clone(),
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
