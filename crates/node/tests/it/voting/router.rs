//! A router that only has votes: it answers them as a test wants it to and remembers them.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper_util::rt::TokioIo;
use prost::Message as _;
use tabularium_common::{lifecycle::Tasks, multiplex, records::WRITE_RECORD};
use tabularium_proto::gitaly::{
    StopTransactionRequest, StopTransactionResponse, VoteTransactionRequest, VoteTransactionResponse,
    ref_transaction_server::{RefTransaction, RefTransactionServer},
    vote_transaction_request::Phase,
    vote_transaction_response::TransactionState,
};
use tabularium_proto::node::ReplicaRecord;
use tonic::{
    Request, Response, Status,
    metadata::MetadataValue,
    service::{Routes, interceptor::InterceptedService},
    transport::Endpoint,
};

use crate::harness::{Caller, Client, TestNode};

/// The number of every transaction here.
const TRANSACTION: u64 = 7;

/// A vote that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vote {
    pub(crate) node: String,
    pub(crate) phase: Phase,
    pub(crate) ballot: Vec<u8>,
}

/// What a vote is answered.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Answer {
    Commit,
    Abort,
    Stop,
    /// Nothing, for ever.
    Silence,
}

type Decide = dyn Fn(&Vote) -> Answer + Send + Sync;

struct Shared {
    votes: Mutex<Vec<Vote>>,
    stops: AtomicUsize,
    /// What whoever may go on is told of the write.
    record: Mutex<Option<ReplicaRecord>>,
    decide: Box<Decide>,
}

pub(crate) struct Router {
    shared: Arc<Shared>,
    tasks: Tasks,
}

impl Router {
    /// One that agrees to everything.
    pub(crate) fn agreeing() -> Self {
        Self::deciding(|_| Answer::Commit)
    }

    /// One that decides so.
    pub(crate) fn deciding(decide: impl Fn(&Vote) -> Answer + Send + Sync + 'static) -> Self {
        let decide = Box::new(decide);
        let (votes, stops, record) = (Mutex::default(), AtomicUsize::new(0), Mutex::default());
        let shared = Shared { votes, stops, record, decide };
        Self { shared: Arc::new(shared), tasks: Tasks::new() }
    }

    /// From now on writes make this of the replica.
    pub(crate) fn tell(&self, record: ReplicaRecord) {
        *self.shared.record.lock().unwrap() = Some(record);
    }

    /// Calls to the node over a multiplexed connection, in a transaction.
    pub(crate) fn client(&self, node: &TestNode, primary: bool) -> Client {
        let votes = Routes::new(RefTransactionServer::new(Votes(Arc::clone(&self.shared))));
        let (address, tasks) = (node.address.clone(), self.tasks.clone());
        let connector = tower::service_fn(move |_| {
            let (address, votes, tasks) = (address.clone(), votes.clone(), tasks.clone());
            async move { multiplex::dial(&address, votes, &tasks).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://node").connect_with_connector_lazy(connector);
        let caller = Caller::known().in_transaction(TRANSACTION, &node.storage, primary);
        InterceptedService::new(channel, caller)
    }

    /// What a node has voted, in order.
    pub(crate) fn votes(&self, node: &TestNode) -> Vec<Vote> {
        let votes = self.shared.votes.lock().unwrap();
        votes.iter().filter(|vote| vote.node == node.storage).cloned().collect()
    }

    /// The phases of a node's votes, by their initials; `0` is the last one of a push.
    pub(crate) fn phases(&self, node: &TestNode) -> String {
        let initial = |vote: &Vote| match vote.phase {
            Phase::CommittedPhase if vote.ballot == [0; 20] => '0',
            Phase::PreparedPhase => 'P',
            Phase::CommittedPhase => 'C',
            Phase::SynchronizedPhase => 'S',
            Phase::UnknownPhase | Phase::PreparingPhase => '?',
        };
        self.votes(node).iter().map(initial).collect()
    }

    /// How often a transaction was stopped.
    pub(crate) fn stops(&self) -> usize {
        self.shared.stops.load(Ordering::SeqCst)
    }

    /// Dies: its connections end at once.
    pub(crate) async fn die(&self) {
        // What hangs for ever hangs on; its connection is gone.
        let _ = self.tasks.drain(Duration::ZERO).await;
    }
}

struct Votes(Arc<Shared>);

fn check(transaction: u64) -> Result<(), Status> {
    if transaction == TRANSACTION { Ok(()) } else { Err(Status::not_found("transaction not found")) }
}

#[tonic::async_trait]
impl RefTransaction for Votes {
    async fn vote_transaction(
        &self,
        request: Request<VoteTransactionRequest>,
    ) -> Result<Response<VoteTransactionResponse>, Status> {
        let request = request.into_inner();
        check(request.transaction_id)?;
        let phase = request.phase();
        assert_eq!(request.reference_updates_hash.len(), 20);
        let vote = Vote { node: request.node, phase, ballot: request.reference_updates_hash };
        let answer = (self.0.decide)(&vote);
        self.0.votes.lock().unwrap().push(vote);
        let state = match answer {
            Answer::Commit => TransactionState::Commit,
            Answer::Abort => TransactionState::Abort,
            Answer::Stop => TransactionState::Stop,
            Answer::Silence => std::future::pending().await,
        };
        let mut response = Response::new(VoteTransactionResponse { state: state.into() });
        if let Some(record) = &*self.0.record.lock().unwrap() {
            let record = MetadataValue::from_bytes(&record.encode_to_vec());
            response.metadata_mut().insert_bin(WRITE_RECORD, record);
        }
        Ok(response)
    }

    async fn stop_transaction(
        &self,
        request: Request<StopTransactionRequest>,
    ) -> Result<Response<StopTransactionResponse>, Status> {
        check(request.into_inner().transaction_id)?;
        self.0.stops.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(StopTransactionResponse {}))
    }
}
