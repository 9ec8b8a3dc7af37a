//! Votes: before a change is made, and again when it has been, the node asks the router that sent it whether all
//! replicas do the same (wire reference, sections g.2 and g.4).
//!
//! A request that belongs to a transaction says so in its metadata. Its [`Voter`] asks over the same connection, backwards.
//! Without a transaction a voter agrees to everything, so handlers do not tell the two apart. What lies between the first
//! vote and the change is a [`Section`], which whoever wants to know what a replica holds waits for.
//!
//! * `git push` and `git fetch` decide themselves when references move; their votes come from git's hooks: [`crate::hooks`].
//! * Everything else votes where it makes the change: [`crate::git::update_ref`], [`crate::place`], [`agreed`].

pub(crate) mod made;
mod sections;

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost::Message as _;
use serde::Deserialize;
use sha1::{Digest as _, Sha1};
use tabularium_common::{
    faults::{SafetyStep, is_off},
    multiplex::Backchannel,
    records::{WRITE_RECORD, is_older},
};
use tabularium_proto::{
    gitaly::{
        StopTransactionRequest, VoteTransactionRequest, ref_transaction_client::RefTransactionClient,
        vote_transaction_request, vote_transaction_response::TransactionState,
    },
    node::ReplicaRecord,
};
use tokio::time::timeout;
use tonic::{Code, Extensions, Status, metadata::MetadataMap, transport::Channel};

use crate::records;

pub(crate) use sections::{Section, Sections};

/// Metadata key of a transaction.
const TRANSACTION: &str = "gitaly-reference-transaction";
/// How long a router that is alive may take to answer a vote; Gitaly's bound. That one is silent is noticed by the
/// connection within seconds.
const ANSWER_DEADLINE: Duration = Duration::from_secs(300);
/// How long a router may take to hear that a transaction stops. Nothing depends on the answer.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// The last vote of a push.
const LAST_WORD: [u8; 20] = [0; 20];

/// What a vote is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The change can be made and has not been.
    Prepared,
    /// It has been made.
    Committed,
    /// Nothing; all replicas have come this far.
    Synchronized,
}

impl Phase {
    fn on_the_wire(self) -> i32 {
        use vote_transaction_request::Phase as Wire;
        i32::from(match self {
            Self::Prepared => Wire::PreparedPhase,
            Self::Committed => Wire::CommittedPhase,
            Self::Synchronized => Wire::SynchronizedPhase,
        })
    }
}

/// Why a replica must not go on.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum VoteError {
    /// The replicas do not agree.
    #[error("transaction was aborted")]
    Aborted,
    /// Whoever decides has decided against the change.
    #[error("transaction was stopped")]
    Stopped,
    /// No word in time.
    #[error("vote was not answered within {} s", ANSWER_DEADLINE.as_secs())]
    Unanswered,
    /// The replica lacks what was written before: it is not the one that the router takes it for.
    #[error("replica is of generation {present}, and the write makes {told}")]
    Behind {
        /// By the record beside it.
        present: i64,
        /// By the router's word.
        told: i64,
    },
    /// What the write makes of the replica could not be noted beside it.
    #[error("writing the replica's record: {0}")]
    Unrecorded(String),
    /// The router refused the vote, or is gone.
    #[error("voting on transaction: {0}")]
    Failed(Status),
}

impl From<VoteError> for Status {
    fn from(error: VoteError) -> Self {
        let text = error.to_string();
        match error {
            VoteError::Aborted => Self::aborted(text),
            VoteError::Stopped => Self::failed_precondition(text),
            VoteError::Unanswered => Self::deadline_exceeded(text),
            VoteError::Behind { .. } => Self::data_loss(text),
            VoteError::Unrecorded(_) => Self::internal(text),
            VoteError::Failed(status) => {
                Self::new(status.code(), format!("voting on transaction: {}", status.message()))
            }
        }
    }
}

/// The digest that stands for a change.
pub(crate) type Ballot = [u8; 20];

/// The vote on these bytes.
pub(crate) fn ballot(subject: &[u8]) -> Ballot {
    Sha1::digest(subject).into()
}

#[derive(Deserialize)]
struct Transaction {
    id: u64,
    node: String,
    #[serde(default)]
    primary: bool,
}

struct Seat {
    transaction: Transaction,
    router: RefTransactionClient<Channel>,
    /// What the write makes of the replica; known once the router is certain that there is a write.
    record: Mutex<Option<ReplicaRecord>>,
}

impl Seat {
    fn record(&self) -> std::sync::MutexGuard<'_, Option<ReplicaRecord>> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the router says of the write. Gitaly's says nothing.
    fn learn(&self, answer: &MetadataMap) {
        let Some(encoded) = answer.get_bin(WRITE_RECORD) else { return };
        let decoded = encoded.to_bytes().ok().and_then(|bytes| ReplicaRecord::decode(bytes).ok());
        let Some(told) = decoded else {
            return tracing::warn!("a router says of a write what cannot be read");
        };
        let mut record = self.record();
        if record.as_ref().is_none_or(|known| known.write_id != told.write_id) {
            *record = Some(told);
        }
    }

    /// One more change has been made: what is to be noted.
    fn changed(&self) -> Option<ReplicaRecord> {
        let mut record = self.record();
        let record = record.as_mut()?;
        record.changes += 1;
        Some(record.clone())
    }
}

/// One replica's voice in the transaction of one request; clones are the same voice.
#[derive(Clone)]
pub(crate) struct Voter(Option<Arc<Seat>>);

impl Voter {
    /// Of work that no transaction is about.
    pub(crate) fn none() -> Self {
        Self(None)
    }

    /// Of a request.
    pub(crate) fn of(metadata: &MetadataMap, extensions: &Extensions) -> Result<Self, Status> {
        let Some(encoded) = metadata.get(TRANSACTION) else { return Ok(Self::none()) };
        let bad = |why: &str| Status::invalid_argument(format!("{TRANSACTION} metadata: {why}"));
        let json = STANDARD.decode(encoded.as_bytes()).map_err(|_| bad("not base64"))?;
        let transaction = serde_json::from_slice(&json).map_err(|_| bad("not a transaction"))?;
        // Connections without a way back have this number in Gitaly.
        let backchannel = extensions
            .get::<Backchannel>()
            .ok_or_else(|| Status::internal("get backchannel: no backchannel for peer 0"))?;
        let router = RefTransactionClient::new(backchannel.channel());
        Ok(Self(Some(Arc::new(Seat { transaction, router, record: Mutex::default() }))))
    }

    /// Whether there is a transaction at all.
    pub(crate) fn takes_part(&self) -> bool {
        self.0.is_some()
    }

    /// Whether custom hooks run here. They run once for all replicas.
    pub(crate) fn runs_hooks(&self) -> bool {
        self.0.as_ref().is_none_or(|seat| seat.transaction.primary)
    }

    /// Asks whether to go on, and waits for the word.
    pub(crate) async fn vote(&self, phase: Phase, ballot: Ballot) -> Result<(), VoteError> {
        let word = self.cast(phase, ballot).await;
        if is_off(SafetyStep::NodeVote) { Ok(()) } else { word }
    }

    async fn cast(&self, phase: Phase, ballot: Ballot) -> Result<(), VoteError> {
        let Some(seat) = &self.0 else { return Ok(()) };
        let request = VoteTransactionRequest {
            repository: None,
            transaction_id: seat.transaction.id,
            node: seat.transaction.node.clone(),
            reference_updates_hash: ballot.to_vec(),
            phase: phase.on_the_wire(),
        };
        let mut router = seat.router.clone();
        let answer = timeout(ANSWER_DEADLINE, router.vote_transaction(request)).await;
        let answer = answer.map_err(|_| VoteError::Unanswered)?.map_err(VoteError::Failed)?;
        seat.learn(answer.metadata());
        match TransactionState::try_from(answer.into_inner().state) {
            Ok(TransactionState::Commit) => Ok(()),
            Ok(TransactionState::Abort) => Err(VoteError::Aborted),
            Ok(TransactionState::Stop) => Err(VoteError::Stopped),
            Err(_) => Err(VoteError::Failed(Status::internal("unknown transaction state"))),
        }
    }

    /// Asks whether to make a change of the replica. A replica that has missed a write makes none, whatever the others say:
    /// its record would hide that it has.
    pub(crate) async fn prepared(&self, replica: &Path, ballot: Ballot) -> Result<(), VoteError> {
        self.vote(Phase::Prepared, ballot).await?;
        let Some(told) = self.0.as_ref().and_then(|seat| seat.record().clone()) else { return Ok(()) };
        let record = records::known(replica).await;
        match record.filter(|record| is_older(record, told.repository_id, told.generation - 1)) {
            Some(older) => Err(VoteError::Behind { present: older.generation, told: told.generation }),
            None => Ok(()),
        }
    }

    /// Says that a change has been made, when it is noted beside the replica.
    pub(crate) async fn committed(&self, replica: &Path, ballot: Ballot) -> Result<(), VoteError> {
        let noted = self.note(replica).await?;
        self.vote(Phase::Committed, ballot).await?;
        if !noted {
            // Nothing had to be asked before: what the write makes of the replica came with this answer.
            self.note(replica).await?;
        }
        Ok(())
    }

    /// Notes one more change beside the replica, if it is known what the write makes of it.
    async fn note(&self, replica: &Path) -> Result<bool, VoteError> {
        let Some(record) = self.0.as_ref().and_then(|seat| seat.changed()) else { return Ok(false) };
        let replica = replica.to_owned();
        let noted = tokio::task::spawn_blocking(move || records::write(&replica, record, None)).await;
        let noted = noted.map_err(std::io::Error::other).and_then(|noted| noted);
        noted.map_err(|error| VoteError::Unrecorded(error.to_string()))?;
        Ok(true)
    }

    /// Waits until all replicas have come to this point.
    pub(crate) async fn synchronize(&self, point: &str) -> Result<(), VoteError> {
        self.vote(Phase::Synchronized, ballot(point.as_bytes())).await
    }

    /// The vote that ends a push. That it was stopped earlier is known by then.
    pub(crate) async fn last_word(&self) -> Result<(), Status> {
        match self.vote(Phase::Committed, LAST_WORD).await {
            Ok(()) | Err(VoteError::Stopped) => Ok(()),
            Err(error) => {
                let status = Status::from(error);
                let code = if status.code() == Code::Internal { Code::Aborted } else { status.code() };
                Err(Status::new(code, format!("final transactional vote: {}", status.message())))
            }
        }
    }

    /// Ends the transaction for all replicas: whoever waits is told to stop.
    pub(crate) async fn stop(&self) {
        let Some(seat) = &self.0 else { return };
        let request = StopTransactionRequest { repository: None, transaction_id: seat.transaction.id };
        let mut router = seat.router.clone();
        match timeout(STOP_DEADLINE, router.stop_transaction(request)).await {
            Ok(Ok(_)) => {}
            // The others learn it when this replica's request fails.
            Ok(Err(error)) => tracing::warn!(%error, "a transaction could not be stopped"),
            Err(_) => tracing::warn!("a transaction could not be stopped in time"),
        }
    }
}

/// What the votes on a change are about.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ballots {
    /// Before it is made.
    pub(crate) before: Ballot,
    /// When it has been made.
    pub(crate) after: Ballot,
}

impl From<Ballot> for Ballots {
    fn from(both: Ballot) -> Self {
        Self { before: both, after: both }
    }
}

/// Makes a change of `replica` between two votes on it.
pub(crate) async fn agreed<T, E: From<VoteError>>(
    sections: &Sections,
    voter: &Voter,
    replica: &Path,
    ballots: Ballots,
    change: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let section = sections.enter(replica).await;
    voter.prepared(replica, ballots.before).await?;
    let changed = change.await?;
    drop(section);
    voter.committed(replica, ballots.after).await?;
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(value: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert(TRANSACTION, value.parse().unwrap());
        metadata
    }

    fn refusal(metadata: &MetadataMap) -> (Code, String) {
        let status = Voter::of(metadata, &Extensions::new()).err().unwrap();
        (status.code(), status.message().to_owned())
    }

    #[tokio::test]
    async fn without_a_transaction_everything_is_agreed() {
        let voter = Voter::of(&MetadataMap::new(), &Extensions::new()).unwrap();
        assert!(!voter.takes_part() && voter.runs_hooks());
        voter.vote(Phase::Prepared, ballot(b"x")).await.unwrap();
        voter.last_word().await.unwrap();
    }

    #[test]
    fn a_transaction_needs_a_way_back() {
        let good = STANDARD.encode(r#"{"id":1,"node":"a","primary":true}"#);
        let text = "get backchannel: no backchannel for peer 0".to_owned();
        assert_eq!(refusal(&metadata(&good)), (Code::Internal, text));
        assert_eq!(refusal(&metadata("%")).0, Code::InvalidArgument);
        assert_eq!(refusal(&metadata(&STANDARD.encode("[]"))).0, Code::InvalidArgument);
    }
}
