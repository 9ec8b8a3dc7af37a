//! A stand-in for the coordinator: hands out what the test put in, notes what it is told.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
    time::Instant,
};

use tabularium_proto::coordinator::{
    BeginSyncRequest, BeginSyncResponse, DutyDone, FinishDutyRequest, FinishDutyResponse, FinishSyncRequest,
    FinishSyncResponse, NothingToDo, RenewDutyRequest, RenewDutyResponse, StartDutyRequest,
    StartDutyResponse, SyncClaim, SyncSettled, begin_sync_response::Decision,
    duty_service_server::DutyService, finish_duty_request, finish_duty_response::Disposition,
    finish_sync_request, finish_sync_response::Next, start_duty_response::Work,
};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::support::{serve_coordinator, until};

#[derive(Default)]
pub(crate) struct State {
    pub(crate) work: HashMap<Uuid, Work>,
    /// Calls that are refused as by a coordinator that is down.
    pub(crate) down: usize,
    pub(crate) started: Vec<Instant>,
    pub(crate) finished: Vec<finish_duty_request::Outcome>,
    /// The attempt that each of them was about.
    pub(crate) attempts: Vec<i64>,
    pub(crate) renewals: usize,
    /// Renewals are refused: the duty is another worker's.
    pub(crate) taken_away: bool,
    /// Renewals are answered as by a coordinator that is down.
    pub(crate) renewals_down: bool,
    /// Answers to FinishDuty; done when there is none.
    pub(crate) dispositions: VecDeque<Disposition>,
    /// Answers to BeginSync; a claim when there is none.
    pub(crate) decisions: VecDeque<Decision>,
    pub(crate) exists: bool,
    pub(crate) syncs: Vec<(BeginSyncRequest, Option<finish_sync_request::Outcome>)>,
    /// Answers to FinishSync; settled when there is none.
    pub(crate) nexts: VecDeque<Next>,
    pub(crate) correlation_ids: Vec<String>,
}

#[derive(Clone)]
struct Service {
    state: Arc<Mutex<State>>,
    finish_gate: Arc<Semaphore>,
}

pub(crate) struct Coordinator {
    pub(crate) address: String,
    pub(crate) state: Arc<Mutex<State>>,
    /// One permit for each FinishDuty that may be answered.
    pub(crate) finish_gate: Arc<Semaphore>,
}

impl Coordinator {
    pub(crate) async fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let finish_gate = Arc::new(Semaphore::new(1000));
        let service = Service { state: Arc::clone(&state), finish_gate: Arc::clone(&finish_gate) };
        Self { address: serve_coordinator(service).await, state, finish_gate }
    }

    /// Owes this work under a new duty.
    pub(crate) fn owe(&self, work: Work) -> Uuid {
        let duty = Uuid::new_v4();
        self.state.lock().unwrap().work.insert(duty, work);
        duty
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock().unwrap())
    }

    /// The outcome of the first duty, once it is reported.
    pub(crate) async fn outcome(&self) -> finish_duty_request::Outcome {
        until("a duty is finished", || async { self.with(|state| !state.finished.is_empty()) }).await;
        self.with(|state| state.finished[0].clone())
    }

    /// The outcomes of the first `count` syncs, with their paths, once they are reported.
    pub(crate) async fn syncs(&self, count: usize) -> Vec<(String, finish_sync_request::Outcome)> {
        let finished =
            |state: &mut State| state.syncs.iter().filter(|(_, outcome)| outcome.is_some()).count();
        until("syncs are finished", || async { self.with(|state| finished(state) >= count) }).await;
        self.with(|state| {
            let syncs = state.syncs.iter();
            syncs.filter_map(|(begin, end)| Some((begin.relative_path.clone(), end.clone()?))).collect()
        })
    }
}

impl Service {
    fn up<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let mut state = self.state.lock().unwrap();
        let given = request.metadata().get("x-gitlab-correlation-id");
        state.correlation_ids.extend(given.map(|value| value.to_str().unwrap().to_owned()));
        if state.down > 0 {
            state.down -= 1;
            return Err(Status::unavailable("down"));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl DutyService for Service {
    async fn start_duty(
        &self,
        request: Request<StartDutyRequest>,
    ) -> Result<Response<StartDutyResponse>, Status> {
        self.up(&request)?;
        let mut state = self.state.lock().unwrap();
        state.started.push(Instant::now());
        let duty: Uuid = request.get_ref().duty_id.parse().unwrap();
        let work = state.work.get(&duty).cloned();
        let work = work.unwrap_or_else(|| Work::Nothing(NothingToDo { reason: "unknown".into() }));
        Ok(Response::new(StartDutyResponse { work: Some(work) }))
    }

    async fn renew_duty(
        &self,
        request: Request<RenewDutyRequest>,
    ) -> Result<Response<RenewDutyResponse>, Status> {
        self.up(&request)?;
        let mut state = self.state.lock().unwrap();
        if state.renewals_down {
            return Err(Status::unavailable("down"));
        }
        state.renewals += 1;
        if state.taken_away {
            return Err(Status::failed_precondition("the duty is not held any more"));
        }
        Ok(Response::new(RenewDutyResponse {}))
    }

    async fn finish_duty(
        &self,
        request: Request<FinishDutyRequest>,
    ) -> Result<Response<FinishDutyResponse>, Status> {
        self.up(&request)?;
        self.finish_gate.acquire().await.unwrap().forget();
        let mut state = self.state.lock().unwrap();
        let request = request.into_inner();
        state.finished.push(request.outcome.unwrap());
        state.attempts.push(request.attempt);
        let disposition = state.dispositions.pop_front().unwrap_or(Disposition::Done(DutyDone {}));
        if matches!(disposition, Disposition::Done(_)) {
            state.work.remove(&request.duty_id.parse().unwrap());
        }
        Ok(Response::new(FinishDutyResponse { disposition: Some(disposition) }))
    }

    async fn begin_sync(
        &self,
        request: Request<BeginSyncRequest>,
    ) -> Result<Response<BeginSyncResponse>, Status> {
        self.up(&request)?;
        let mut state = self.state.lock().unwrap();
        let decision = state.decisions.pop_front();
        state.syncs.push((request.into_inner(), None));
        let claim_id = (state.syncs.len() - 1).to_string();
        let exists = state.exists;
        let decision = decision.unwrap_or(Decision::Claim(SyncClaim {
            claim_id,
            repository_exists: exists,
            lease_milliseconds: 60_000,
        }));
        Ok(Response::new(BeginSyncResponse { decision: Some(decision) }))
    }

    async fn finish_sync(
        &self,
        request: Request<FinishSyncRequest>,
    ) -> Result<Response<FinishSyncResponse>, Status> {
        self.up(&request)?;
        let mut state = self.state.lock().unwrap();
        let request = request.into_inner();
        let claim: usize = request.claim_id.parse().unwrap();
        state.syncs[claim].1 = request.outcome;
        let next = state.nexts.pop_front().unwrap_or(Next::Settled(SyncSettled {}));
        Ok(Response::new(FinishSyncResponse { next: Some(next) }))
    }
}
