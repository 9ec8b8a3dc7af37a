//! How a fake node votes: over the connection that its request came over, what `x-votes` says.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::HeaderMap;
use tabularium_proto::gitaly::{
    VoteTransactionRequest, ref_transaction_client::RefTransactionClient, vote_transaction_request::Phase,
    vote_transaction_response::TransactionState,
};
use tonic::{Status, transport::Channel};

use crate::node::Node;

/// What a push of one ref votes.
const PUSH: [Phase; 6] = [
    Phase::SynchronizedPhase,
    Phase::SynchronizedPhase,
    Phase::PreparedPhase,
    Phase::CommittedPhase,
    Phase::SynchronizedPhase,
    Phase::CommittedPhase,
];
/// What a write of one ref votes.
const UPDATE: [Phase; 2] = [Phase::PreparedPhase, Phase::CommittedPhase];

/// What a node does otherwise than the others; a number is that of the vote before which it does it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Play {
    /// Casts another value, from there on.
    pub(crate) differs: Option<usize>,
    /// Does nothing any more.
    pub(crate) stalls: Option<usize>,
    /// Is killed.
    pub(crate) dies: Option<usize>,
    /// Takes its time for every vote.
    pub(crate) delay: Duration,
}

/// The answer to a vote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Told {
    State(TransactionState),
    Refused(tonic::Code, String),
}

/// A place in a transaction.
#[derive(Clone)]
pub(crate) struct Seat {
    id: u64,
    node: String,
    votes: Vec<Phase>,
    client: RefTransactionClient<Channel>,
}

impl Seat {
    /// `None` for a request on which nobody votes.
    pub(crate) fn of(headers: &HeaderMap, back: Option<Channel>) -> Option<Self> {
        let votes = match headers.get("x-votes")?.to_str().unwrap() {
            "push" => PUSH.to_vec(),
            "update" => UPDATE.to_vec(),
            "none" => Vec::new(),
            other => panic!("{other}"),
        };
        let text = headers.get("gitaly-reference-transaction")?;
        let text = STANDARD.decode(text.as_bytes()).unwrap();
        let text: serde_json::Value = serde_json::from_slice(&text).unwrap();
        Some(Self {
            id: text["id"].as_u64().unwrap(),
            node: text["node"].as_str().unwrap().to_owned(),
            votes,
            client: RefTransactionClient::new(back.expect("a way back")),
        })
    }

    /// One that is made up.
    pub(crate) fn at(id: u64, node: &str, back: Channel) -> Self {
        Self { id, node: node.to_owned(), votes: Vec::new(), client: RefTransactionClient::new(back) }
    }

    pub(crate) async fn cast(&mut self, phase: Phase, value: u8) -> Told {
        let request = VoteTransactionRequest {
            repository: None,
            transaction_id: self.id,
            node: self.node.clone(),
            reference_updates_hash: vec![value; 20],
            phase: phase.into(),
        };
        match self.client.vote_transaction(request).await {
            Ok(answer) => Told::State(answer.into_inner().state()),
            Err(status) => Told::Refused(status.code(), status.message().to_owned()),
        }
    }
}

impl Node {
    /// Votes as it should, but for what its play says.
    pub(crate) async fn vote(&self, mut seat: Seat) -> Result<(), Status> {
        assert_eq!(seat.node, self.0.storage);
        for (number, phase) in seat.votes.clone().into_iter().enumerate() {
            let play = *self.0.play.lock().unwrap();
            if play.dies.is_some_and(|at| at == number) {
                self.kill();
                std::future::pending::<()>().await;
            }
            if play.stalls.is_some_and(|at| at <= number) {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(play.delay).await;
            let differs = play.differs.is_some_and(|at| at <= number);
            let value = if number == 5 { 0 } else { 1 + u8::from(differs) };
            let told = seat.cast(phase, value).await;
            self.0.told.lock().unwrap().push(told.clone());
            if told != Told::State(TransactionState::Commit) {
                return Err(Status::aborted("transaction was aborted"));
            }
        }
        Ok(())
    }

    /// How often it was told to go on.
    pub(crate) fn commits(&self) -> usize {
        let told = self.0.told.lock().unwrap();
        told.iter().filter(|told| **told == Told::State(TransactionState::Commit)).count()
    }
}
