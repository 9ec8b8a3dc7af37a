//! Votes: nodes ask whether to go on, and the write they take part in answers.
//!
//! [`transaction`] decides, without I/O. Here are the transactions that are open, by their id, and the service on which
//! nodes vote: it finds the transaction, hands the vote to the task that drives the write, and waits for its answer.

mod ballot;
pub(crate) mod transaction;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use prost::Message as _;
use tabularium_common::records::WRITE_RECORD;
use tabularium_proto::{
    gitaly::{
        StopTransactionRequest, StopTransactionResponse, VoteTransactionRequest, VoteTransactionResponse,
        ref_transaction_server::RefTransaction, vote_transaction_request::Phase as WirePhase,
        vote_transaction_response::TransactionState,
    },
    node::ReplicaRecord,
};
use tokio::sync::{mpsc, oneshot};
use tonic::{
    Request, Response, Status,
    metadata::{Binary, MetadataValue},
};

use crate::limits::{VOTE_QUEUE, VOTE_WAIT};
use ballot::{BALLOT_BYTES, Ballot, Phase};
use transaction::Verdict;

/// Why a vote is not counted. Texts and codes are Gitaly's (wire reference, section g.2).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VoteError {
    #[error("transaction not found: {0}")]
    UnknownTransaction(u64),
    #[error("invalid node for transaction: {0:?}")]
    UnknownNode(String),
    #[error("node {0:?} already cast a vote")]
    Duplicate(String),
    #[error("invalid reference update hash: invalid vote length")]
    Length,
    #[error("transaction has been canceled")]
    Cancelled,
}

impl From<VoteError> for Status {
    fn from(error: VoteError) -> Self {
        let text = error.to_string();
        match error {
            VoteError::UnknownTransaction(_) => Self::not_found(text),
            VoteError::UnknownNode(_) | VoteError::Duplicate(_) => Self::internal(text),
            VoteError::Length => Self::invalid_argument(text),
            VoteError::Cancelled => Self::cancelled(text),
        }
    }
}

/// Where the answer to a vote goes. Dropped, the vote is answered as cancelled; closed, nobody waits for it any more.
pub(crate) type Answer = oneshot::Sender<Result<Verdict, VoteError>>;

/// What a node said.
#[derive(Debug)]
pub(crate) enum Heard {
    /// It votes.
    Vote {
        /// As whom it votes.
        node: String,
        /// For what.
        ballot: Ballot,
        /// Where it waits.
        answer: Answer,
    },
    /// It ends the write.
    Stop,
}

/// What nodes note beside their replicas before they say that they have made a change; set once the ticket is held.
type WriteRecord = OnceLock<MetadataValue<Binary>>;

#[derive(Clone)]
struct Open {
    sender: mpsc::Sender<Heard>,
    record: Arc<WriteRecord>,
}

#[derive(Default)]
struct Inner {
    open: Mutex<HashMap<u64, Open>>,
    last: AtomicU64,
}

/// All transactions of this router that are open; their number is bounded by that of the writes.
#[derive(Clone, Default)]
pub(crate) struct Transactions(Arc<Inner>);

/// An open transaction. Dropped, it is not found any more.
pub(crate) struct Ears {
    transactions: Transactions,
    /// Its id, as nodes know it.
    pub(crate) id: u64,
    heard: mpsc::Receiver<Heard>,
    record: Arc<WriteRecord>,
}

impl Transactions {
    fn map(&self) -> MutexGuard<'_, HashMap<u64, Open>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the next one.
    pub(crate) fn open(&self) -> Ears {
        let id = self.0.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, heard) = mpsc::channel(VOTE_QUEUE);
        let record = Arc::<WriteRecord>::default();
        self.map().insert(id, Open { sender, record: Arc::clone(&record) });
        Ears { transactions: self.clone(), id, heard, record }
    }

    async fn tell(&self, id: u64, what: Heard) -> Result<Arc<WriteRecord>, VoteError> {
        let Open { sender, record } =
            self.map().get(&id).cloned().ok_or(VoteError::UnknownTransaction(id))?;
        sender.send(what).await.map_err(|_| VoteError::UnknownTransaction(id))?;
        Ok(record)
    }

    async fn vote(&self, request: VoteTransactionRequest) -> Result<(Verdict, Arc<WriteRecord>), VoteError> {
        let phase = phase(request.phase());
        let value = ballot_value(&request.reference_updates_hash)?;
        let (answer, answered) = oneshot::channel();
        let vote = Heard::Vote { node: request.node, ballot: Ballot { phase, value }, answer };
        let record = self.tell(request.transaction_id, vote).await?;
        match tokio::time::timeout(VOTE_WAIT, answered).await {
            Ok(Ok(answer)) => answer.map(|verdict| (verdict, record)),
            Ok(Err(_)) | Err(_) => Err(VoteError::Cancelled),
        }
    }
}

impl Ears {
    /// From now on whoever is told to go on is told this as well.
    pub(crate) fn announce(&self, record: &ReplicaRecord) {
        self.record.get_or_init(|| MetadataValue::from_bytes(&record.encode_to_vec()));
    }

    /// The next thing that a node says.
    pub(crate) async fn hear(&mut self) -> Heard {
        match self.heard.recv().await {
            Some(heard) => heard,
            // The other end stands in the map for as long as this one lives.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Ears {
    fn drop(&mut self) {
        self.transactions.map().remove(&self.id);
    }
}

/// What a vote is for, if it is long enough to be one.
pub(crate) fn ballot_value(hash: &[u8]) -> Result<[u8; BALLOT_BYTES], VoteError> {
    hash.try_into().map_err(|_| VoteError::Length)
}

fn phase(phase: WirePhase) -> Phase {
    match phase {
        WirePhase::UnknownPhase => Phase::Unknown,
        WirePhase::PreparingPhase => Phase::Preparing,
        WirePhase::PreparedPhase => Phase::Prepared,
        WirePhase::CommittedPhase => Phase::Committed,
        WirePhase::SynchronizedPhase => Phase::Synchronized,
    }
}

#[tonic::async_trait]
impl RefTransaction for Transactions {
    async fn vote_transaction(
        &self,
        request: Request<VoteTransactionRequest>,
    ) -> Result<Response<VoteTransactionResponse>, Status> {
        let (verdict, record) = self.vote(request.into_inner()).await?;
        let state = match verdict {
            Verdict::Commit => TransactionState::Commit,
            Verdict::Abort => TransactionState::Abort,
            Verdict::Stop => TransactionState::Stop,
            Verdict::Cancelled => return Err(VoteError::Cancelled.into()),
        };
        let mut response = Response::new(VoteTransactionResponse { state: state.into() });
        if let Some(record) = record.get().filter(|_| verdict == Verdict::Commit) {
            response.metadata_mut().insert_bin(WRITE_RECORD, record.clone());
        }
        Ok(response)
    }

    async fn stop_transaction(
        &self,
        request: Request<StopTransactionRequest>,
    ) -> Result<Response<StopTransactionResponse>, Status> {
        self.tell(request.into_inner().transaction_id, Heard::Stop).await.map(drop)?;
        Ok(Response::new(StopTransactionResponse {}))
    }
}

#[cfg(test)]
mod announcement {
    use super::*;

    #[tokio::test]
    async fn whoever_goes_on_under_the_ticket_is_told_what_to_note() {
        let transactions = Transactions::default();
        let mut ears = transactions.open();
        let request = VoteTransactionRequest {
            transaction_id: ears.id,
            node: "a".into(),
            reference_updates_hash: vec![1; BALLOT_BYTES],
            ..VoteTransactionRequest::default()
        };
        let record = ReplicaRecord { repository_id: 4, generation: 9, ..ReplicaRecord::default() };
        for (ticket, verdict) in [(false, Verdict::Commit), (true, Verdict::Commit), (true, Verdict::Abort)] {
            if ticket {
                ears.announce(&record);
            }
            let voting = transactions.vote_transaction(Request::new(request.clone()));
            let hearing = async {
                if let Heard::Vote { answer, .. } = ears.hear().await {
                    answer.send(Ok(verdict)).unwrap();
                }
            };
            let (answer, ()) = tokio::join!(voting, hearing);
            let told = answer.unwrap().metadata().get_bin(WRITE_RECORD).map(|told| told.to_bytes().unwrap());
            let told = told.map(|bytes| ReplicaRecord::decode(bytes).unwrap());
            assert_eq!(told, (ticket && verdict == Verdict::Commit).then(|| record.clone()));
        }
    }
}
