//! `gitaly.RefTransaction` as clients see it: there are no transactions for them.
//!
//! Nodes vote on the way back of the connection on which they were told to, see `votes`. Praefect lets anybody vote who knows
//! its token; here a vote that comes from the front is one on a transaction that is not known, in Praefect's words.

use tabularium_proto::gitaly::{
    StopTransactionRequest, StopTransactionResponse, VoteTransactionRequest, VoteTransactionResponse,
    ref_transaction_server::RefTransaction,
};
use tonic::{Request, Response, Status};

use crate::votes::{VoteError, ballot_value};

/// The service.
pub(crate) struct NoTransactions;

#[tonic::async_trait]
impl RefTransaction for NoTransactions {
    async fn vote_transaction(
        &self,
        request: Request<VoteTransactionRequest>,
    ) -> Result<Response<VoteTransactionResponse>, Status> {
        let request = request.into_inner();
        ballot_value(&request.reference_updates_hash)?;
        Err(VoteError::UnknownTransaction(request.transaction_id).into())
    }

    async fn stop_transaction(
        &self,
        request: Request<StopTransactionRequest>,
    ) -> Result<Response<StopTransactionResponse>, Status> {
        Err(VoteError::UnknownTransaction(request.get_ref().transaction_id).into())
    }
}
