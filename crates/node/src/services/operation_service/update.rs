//! Moving one reference for a user: hooks are asked, new objects become part of the repository, the reference moves,
//! hooks are told. Between these steps replicas wait for each other, as in a push.

use std::sync::Arc;

use tabularium_proto::gitaly::{ReferenceUpdateError, Repository, User};
use tonic::Status;

use super::hooks::{Hook, HookError, Refusal, Surroundings};
use crate::{
    access,
    error::internal_io,
    git::{
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash},
        update_ref::{Expected, Transaction, UpdateRefError},
    },
    node::Node,
    storage::RepositoryPath,
    votes::Voter,
};

/// A reference's way from one object to another; the zero id stands for "does not exist".
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) reference: Vec<u8>,
    pub(super) old: String,
    pub(super) new: String,
}

impl Change {
    /// For clients, when it could not be made.
    pub(super) fn detail(&self) -> ReferenceUpdateError {
        ReferenceUpdateError {
            reference_name: self.reference.clone(),
            old_oid: self.old.clone(),
            new_oid: self.new.clone(),
        }
    }

    /// What users are told when it could not be made.
    pub(super) fn refusal(&self) -> String {
        format!(
            "Could not update {}. Please refresh and try again.",
            String::from_utf8_lossy(&self.reference)
        )
    }
}

/// Why a reference was not moved.
pub(super) enum UpdateError {
    /// GitLab or a custom hook refused.
    Hook(Refusal),
    /// It was not what was expected, or cannot be what was asked for.
    Reference,
    /// Anything else.
    Failed(Status),
}

impl From<Status> for UpdateError {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

/// Whoever asked for a change.
pub(super) struct Requester<'a> {
    /// As it was sent.
    pub(super) repository: &'a Repository,
    pub(super) user: &'a User,
    /// For this replica.
    pub(super) voter: &'a Voter,
}

/// Makes the change. Once hooks have agreed it goes on even if the client hangs up.
pub(super) async fn update(
    node: &Arc<Node>,
    repository: &RepositoryPath,
    requester: Requester<'_>,
    quarantine: Option<Quarantine>,
    change: &Change,
) -> Result<(), UpdateError> {
    update_with_options(node, repository, requester, quarantine, change, &[]).await
}

/// The same, and whoever has a say is told these options, as those of a push.
pub(super) async fn update_with_options(
    node: &Arc<Node>,
    repository: &RepositoryPath,
    requester: Requester<'_>,
    quarantine: Option<Quarantine>,
    change: &Change,
    push_options: &[String],
) -> Result<(), UpdateError> {
    if revision::check_reference(&change.reference).is_err() {
        return Err(UpdateError::Reference);
    }
    let voter = requester.voter.clone();
    let seen = quarantine.as_ref().map_or(repository, Quarantine::repository);
    let who = access::Requester::web(requester.repository, requester.user);
    let before = Surroundings::new(node, seen, who.clone(), push_options);
    let line = [change.old.as_bytes(), b" ", change.new.as_bytes(), b" ", &change.reference, b"\n"].concat();
    let arguments: [&[u8]; 3] = [&change.reference, change.old.as_bytes(), change.new.as_bytes()];
    agree(&voter, Hook::PreReceive, before.ask(&line)).await?;
    agree(&voter, Hook::Update, before.run(Hook::Update, &arguments, &[])).await?;

    let after = Surroundings::new(node, repository, who, push_options);
    let (owner, repository, change) = (Arc::clone(node), repository.clone(), change.clone());
    let accepted = node.tasks.spawn("accepted change", async move {
        if let Some(quarantine) = quarantine {
            quarantine.migrate().await.map_err(internal_io("migrating quarantined objects"))?;
        }
        move_reference(&owner, &repository, &change, &voter).await?;
        voter.synchronize(&Hook::PostReceive.synchronization_point()).await.map_err(Status::from)?;
        if voter.runs_hooks() {
            tell(&after, &line).await;
        }
        Ok(())
    });
    match accepted.await {
        Ok(result) => result,
        Err(error) => Err(Status::internal(format!("updating reference: {error}")).into()),
    }
}

/// Whoever has a say is asked on the primary; the other replicas wait for what they say.
async fn agree(
    voter: &Voter,
    hook: Hook,
    asking: impl Future<Output = Result<(), HookError>>,
) -> Result<(), UpdateError> {
    if voter.runs_hooks()
        && let Err(error) = asking.await
    {
        voter.stop().await;
        return Err(refused(error));
    }
    Ok(voter.synchronize(&hook.synchronization_point()).await.map_err(Status::from)?)
}

/// The reference has moved whatever anybody says now.
async fn tell(surroundings: &Surroundings, line: &[u8]) {
    match surroundings.tell(line).await {
        Ok(()) => {}
        Err(error @ HookError::Request(..)) => {
            tracing::error!(%error, "GitLab does not know of a change that has been made");
        }
        Err(error) => tracing::warn!(%error, "post-receive hooks did not all run"),
    }
}

fn refused(error: HookError) -> UpdateError {
    match error {
        // It says nothing about the change, which may be allowed later.
        HookError::Refused(refusal) if refusal.is_rate_limited() => {
            Status::resource_exhausted(refusal.full_message()).into()
        }
        HookError::Refused(refusal) => UpdateError::Hook(refusal),
        HookError::Busy(error) => UpdateError::Failed(error.into()),
        error @ (HookError::Request(..) | HookError::Io(_)) => Status::internal(error.to_string()).into(),
    }
}

async fn move_reference(
    node: &Node,
    repository: &RepositoryPath,
    change: &Change,
    voter: &Voter,
) -> Result<(), UpdateError> {
    let failed = |error: UpdateRefError| match error {
        UpdateRefError::Git(error) => UpdateError::Failed(error.into()),
        UpdateRefError::Vote(error) => UpdateError::Failed(error.into()),
        UpdateRefError::Locked { .. }
        | UpdateRefError::Mismatch { .. }
        | UpdateRefError::MissingObject { .. }
        | UpdateRefError::NotACommit { .. }
        | UpdateRefError::Conflict { .. }
        | UpdateRefError::Repeated { .. }
        | UpdateRefError::Invalid { .. } => UpdateError::Reference,
    };
    let mut transaction = Transaction::start(&node.git, repository, true).await.map_err(failed)?;
    let expected = Expected::Value(change.old.clone());
    transaction.update(&change.reference, &change.new, &expected).await.map_err(failed)?;
    transaction.commit(node, voter).await.map_err(failed)
}

/// The object a client says a reference must be at, if it says so.
pub(super) async fn expected_old(
    node: &Node,
    repository: &RepositoryPath,
    hash: ObjectHash,
    expected: &str,
) -> Result<Option<String>, Status> {
    if expected.is_empty() {
        return Ok(None);
    }
    let id = hash
        .parse(expected.as_bytes())
        .map_err(|error| Status::invalid_argument(format!("invalid expected old object ID: {error}")))?;
    let object = format!("{id}^{{object}}");
    references::resolve(&node.git, repository, object.as_bytes())
        .await?
        .map(Some)
        .ok_or_else(|| Status::invalid_argument("cannot resolve expected old object ID: reference not found"))
}
