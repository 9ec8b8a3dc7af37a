//! Writes: the intent first, then the primary, then the record, then the client's status.

use std::sync::Arc;

use hyper::body::Incoming;
use tabularium_common::ids::RelativePath;
use tabularium_proto::coordinator::{BeginWriteRequest, RepositoryName, WriteKind};
use tonic::Code;

use super::{
    Outcome, Relay,
    request::{self, Call, Named, Target},
    settle_status,
};
use crate::{
    account::Account,
    limits::WRITE_ATTEMPTS,
    nodes::named,
    refusal::{Refusal, code_of},
    routing::{Settlement, unreachable_storages},
};

impl Relay {
    pub(super) async fn write(
        &self,
        call: &Call,
        target: Target<'_>,
        kind: WriteKind,
        body: Incoming,
        account: &mut Account,
    ) -> Result<Outcome, Refusal> {
        let (message, mut rest) = request::first(body, call).await?;
        let repository = request::repository(&message, target.target)?;
        let additional = request::additional(&message, target.additional, repository)?;
        let directory = self.shared.nodes.directory();
        let storages = Self::storages(&directory, repository.virtual_storage)?;

        let mut begin = BeginWriteRequest {
            name: Some(name(repository)?),
            kind: kind.into(),
            router_id: String::new(),
            method: call.path().to_owned(),
            additional_repository: additional.map(name).transpose()?,
            unreachable_storages: Vec::new(),
            sync_from_site: call.sync_from_site.clone(),
            correlation_id: call.correlation.to_str().unwrap_or_default().to_owned(),
            ..BeginWriteRequest::default()
        };
        let mut refused: Vec<String> = Vec::new();
        let mut last = Refusal::NoHealthyNodes;
        for _ in 0..WRITE_ATTEMPTS {
            let reachable = storages.iter().map(|node| {
                (&*node.storage, node.healthy() && !refused.iter().any(|name| **name == *node.storage))
            });
            begin.unreachable_storages = unreachable_storages(reachable).ok_or_else(|| last.clone())?;
            let mut write = self
                .shared
                .writes
                .begin(begin.clone(), call.correlation.clone())
                .await
                .map_err(unknown_to_mutator)?;
            account.route = Some(Arc::clone(write.route()));
            account.write_id = Some(write.id().to_owned());
            let primary = write.route().primary.clone();
            let Some(node) = named(storages, &primary) else {
                tracing::error!(
                    storage = primary,
                    "the coordinator chose a storage that its topology does not have"
                );
                return Err(Refusal::Unreachable(primary));
            };
            account.storage = Some(Arc::clone(&node.storage));
            let additional = additional.map(|_| write.additional_replica_path());
            let head = request::rewritten_twice(
                &message,
                target,
                &primary,
                &write.route().replica_path,
                additional,
            )?;
            write.sending();
            let lost = write.lost();
            let attempted = tokio::select! {
                biased;
                attempted = self.attempt(call, node, head, &mut rest) => attempted,
                // Dropping the attempt stops the node (a unary call says nothing before its end), and dropping the write
                // says that the node was at it until now.
                () = lost.cancelled() => return Err(Refusal::IntentLost),
            };
            match attempted {
                Ok(answer) => {
                    let write = match code_of(answer.response.headers()) {
                        None => Some(write),
                        Some(code) => {
                            settle_status(write, code).await?;
                            None
                        }
                    };
                    return Ok(Outcome::Node { answer, write });
                }
                Err(failure) => {
                    write.unreachable(primary.clone());
                    let settlement =
                        if failure.unsent { Settlement::NotApplied } else { Settlement::InDoubt };
                    // Before the next attempt, which would meet this one's intent. What could not be recorded has been
                    // logged, and the client hears of a failure either way.
                    let settled = write.settle(settlement).await;
                    if !(failure.unsent && failure.again) {
                        return Err(failure.refusal);
                    }
                    settled?;
                    self.shared.metrics.retries.inc();
                    last = failure.refusal;
                    refused.push(primary);
                }
            }
        }
        Err(last)
    }
}

fn name(named: Named<'_>) -> Result<RepositoryName, Refusal> {
    let path: RelativePath = named.relative_path.parse().map_err(Refusal::Path)?;
    Ok(RepositoryName { virtual_storage: named.virtual_storage.to_owned(), relative_path: path.into() })
}

/// The texts of section h.3 stand in front of what a coordinator says of a repository it does not know.
fn unknown_to_mutator(refusal: Refusal) -> Refusal {
    match refusal {
        Refusal::Status(status)
            if status.code() == Code::NotFound && status.message() == "repository not found" =>
        {
            Refusal::RepositoryNotFound { prefix: "mutator call: route repository mutator: " }
        }
        other => other,
    }
}
