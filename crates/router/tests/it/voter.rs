//! How a fake node votes: over the connection that its request came over, what `x-votes` says.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::HeaderMap;
use sha1::{Digest as _, Sha1};
use tabularium_proto::gitaly::{
    StopTransactionRequest, VoteTransactionRequest, ref_transaction_client::RefTransactionClient,
    vote_transaction_request::Phase, vote_transaction_response::TransactionState,
};
use tonic::{Status, transport::Channel};

use crate::node::Node;

/// A vote, and what it is for unless it is for the change that is made.
type Vote = (Phase, Option<Hash>);
type Hash = [u8; 20];

/// The vote that ends every push.
const FINAL: Vote = (Phase::CommittedPhase, Some([0; 20]));
const HOOK: Vote = (Phase::SynchronizedPhase, None);
const PREPARED: Vote = (Phase::PreparedPhase, None);
const COMMITTED: Vote = (Phase::CommittedPhase, None);

/// What a node votes.
fn script(name: &str) -> Vec<Vote> {
    let after_change = || Sha1::digest(b"synchronize post-receive hook").into();
    match name {
        "push" => vec![HOOK, HOOK, PREPARED, COMMITTED, HOOK, FINAL],
        // Git has refused all references.
        "push without effect" => vec![HOOK, HOOK, FINAL],
        // Git has refused it before the first hook, or there are no hooks.
        "push without hooks" => vec![FINAL],
        "update" => vec![PREPARED, COMMITTED],
        // The node itself does what stands in the other hooks.
        "operation without hooks" => vec![HOOK, HOOK, (Phase::SynchronizedPhase, Some(after_change()))],
        "update that is announced" => vec![(Phase::PreparingPhase, None)],
        "update that is announced and made" => vec![(Phase::PreparingPhase, None), PREPARED, COMMITTED],
        "none" => Vec::new(),
        other => panic!("{other}"),
    }
}

/// What a node does otherwise than the others; a number is that of the vote before which it does it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Play {
    /// Casts another value, from there on.
    pub(crate) differs: Option<usize>,
    /// Does nothing any more.
    pub(crate) stalls: Option<usize>,
    /// Is killed.
    pub(crate) dies: Option<usize>,
    /// Ends the write for everybody, as a hook that refuses it.
    pub(crate) stops: Option<usize>,
    /// Takes its time for every vote.
    pub(crate) delay: Duration,
    /// Says that all went well whatever it is told.
    pub(crate) careless: bool,
    /// Votes this instead.
    pub(crate) script: Option<&'static str>,
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
    votes: Vec<Vote>,
    client: RefTransactionClient<Channel>,
}

impl Seat {
    /// `None` for a request on which nobody votes.
    pub(crate) fn of(headers: &HeaderMap, back: Option<Channel>) -> Option<Self> {
        let votes = script(headers.get("x-votes")?.to_str().unwrap());
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
        self.cast_hash(phase, [value; 20]).await
    }

    async fn cast_hash(&mut self, phase: Phase, hash: Hash) -> Told {
        let request = VoteTransactionRequest {
            repository: None,
            transaction_id: self.id,
            node: self.node.clone(),
            reference_updates_hash: hash.to_vec(),
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
        if let Some(name) = self.0.play.lock().unwrap().script {
            seat.votes = script(name);
        }
        for (number, (phase, hash)) in seat.votes.clone().into_iter().enumerate() {
            let play = *self.0.play.lock().unwrap();
            if play.dies.is_some_and(|at| at == number) {
                self.kill();
                std::future::pending::<()>().await;
            }
            if play.stalls.is_some_and(|at| at <= number) {
                std::future::pending::<()>().await;
            }
            if play.stops.is_some_and(|at| at == number) {
                let stop = StopTransactionRequest { repository: None, transaction_id: seat.id };
                seat.client.stop_transaction(stop).await?;
                let (phase, hash) = FINAL;
                let told = seat.cast_hash(phase, hash.unwrap_or_default()).await;
                assert_eq!(told, Told::State(TransactionState::Stop));
                return Ok(());
            }
            tokio::time::sleep(play.delay).await;
            let differs = play.differs.is_some_and(|at| at <= number);
            let told = seat.cast_hash(phase, hash.unwrap_or([1 + u8::from(differs); 20])).await;
            self.0.told.lock().unwrap().push(told.clone());
            if !play.careless && told != Told::State(TransactionState::Commit) {
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
