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
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tabularium_proto::gitaly::{
    StopTransactionRequest, StopTransactionResponse, VoteTransactionRequest, VoteTransactionResponse,
    ref_transaction_server::RefTransaction, vote_transaction_request::Phase as WirePhase,
    vote_transaction_response::TransactionState,
};
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

use crate::limits::{VOTE_QUEUE, VOTE_WAIT};
use ballot::{BALLOT_BYTES, Ballot, Phase};
use transaction::Verdict;

/// Why a vote is not counted. Texts and codes are Gitaly's (wire reference, section g.2).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VoteError {
    #[error("transaction not found")]
    UnknownTransaction,
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
            VoteError::UnknownTransaction => Self::not_found(text),
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

#[derive(Default)]
struct Inner {
    open: Mutex<HashMap<u64, mpsc::Sender<Heard>>>,
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
}

impl Transactions {
    fn map(&self) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Heard>>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the next one.
    pub(crate) fn open(&self) -> Ears {
        let id = self.0.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, heard) = mpsc::channel(VOTE_QUEUE);
        self.map().insert(id, sender);
        Ears { transactions: self.clone(), id, heard }
    }

    async fn tell(&self, id: u64, what: Heard) -> Result<(), VoteError> {
        let transaction = self.map().get(&id).cloned().ok_or(VoteError::UnknownTransaction)?;
        transaction.send(what).await.map_err(|_| VoteError::UnknownTransaction)
    }

    async fn vote(&self, request: VoteTransactionRequest) -> Result<Verdict, VoteError> {
        let phase = phase(request.phase());
        let value: [u8; BALLOT_BYTES] =
            request.reference_updates_hash.as_slice().try_into().map_err(|_| VoteError::Length)?;
        let (answer, answered) = oneshot::channel();
        let vote = Heard::Vote { node: request.node, ballot: Ballot { phase, value }, answer };
        self.tell(request.transaction_id, vote).await?;
        match tokio::time::timeout(VOTE_WAIT, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(VoteError::Cancelled),
        }
    }
}

impl Ears {
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
        let state = match self.vote(request.into_inner()).await? {
            Verdict::Commit => TransactionState::Commit,
            Verdict::Abort => TransactionState::Abort,
            Verdict::Stop => TransactionState::Stop,
            Verdict::Cancelled => return Err(VoteError::Cancelled.into()),
        };
        Ok(Response::new(VoteTransactionResponse { state: state.into() }))
    }

    async fn stop_transaction(
        &self,
        request: Request<StopTransactionRequest>,
    ) -> Result<Response<StopTransactionResponse>, Status> {
        self.tell(request.into_inner().transaction_id, Heard::Stop).await?;
        Ok(Response::new(StopTransactionResponse {}))
    }
}
