//! Reads while no coordinator answers: the replicas themselves say which of them is the newest.
//!
//! A remembered route tells which replicas there are, not which are up to date. Every read has that confirmed: by records
//! that were asked for after it began, because another router may reach a coordinator that we do not, and go on writing.
//! Reads of one repository that wait at the same time share the next confirmation; its outcome is not kept.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tabularium_proto::{
    coordinator::{Replica, Route},
    gitaly::Repository,
    node::{ReadRecordRequest, replica_service_client::ReplicaServiceClient},
};
use tokio::time::timeout;
use tonic::Code;

use super::{
    Routes, is_outage,
    records::{self, Answer, Verdict, WithoutRecords},
};
use crate::{
    coordinator::Correlation,
    limits::{RECORD_PATIENCE, RESOLVE_HEAD_START},
    nodes::{Node, Nodes, named},
    refusal::Refusal,
};

/// What the last confirmation of a repository brought, and when it began.
type Last = Option<(Instant, Result<Arc<Route>, Refusal>)>;
/// Confirmations of one repository, one at a time.
type Turns = tokio::sync::Mutex<Last>;

/// Routes for reads, whoever can be asked.
pub(crate) struct Confirmations {
    routes: Arc<Routes>,
    nodes: Arc<Nodes>,
    policy: WithoutRecords,
    /// By the id of the repository; those that nobody waits for are forgotten.
    turns: Mutex<HashMap<i64, Weak<Turns>>>,
}

impl Confirmations {
    /// None under way.
    pub(crate) fn new(routes: Arc<Routes>, nodes: Arc<Nodes>, policy: WithoutRecords) -> Self {
        Self { routes, nodes, policy, turns: Mutex::default() }
    }

    /// The route for a read: from the cache or a coordinator; else the remembered one, confirmed by the replicas.
    pub(crate) async fn route(
        &self,
        virtual_storage: &str,
        relative_path: &str,
        correlation: Correlation<'_>,
    ) -> Result<Arc<Route>, Refusal> {
        let mut resolving = pin!(self.routes.resolve(virtual_storage, relative_path, correlation));
        let head_start = if self.routes.is_unanswered() { Duration::ZERO } else { RESOLVE_HEAD_START };
        let resolved = timeout(head_start, &mut resolving).await;
        match resolved {
            Ok(Err(refusal)) if is_outage(&refusal) => {
                let Some(route) = self.routes.remembered(virtual_storage, relative_path) else {
                    return Err(refusal);
                };
                return self.confirmed(virtual_storage, &route).await;
            }
            Ok(resolved) => return resolved,
            Err(_) => {}
        }
        let Some(route) = self.routes.remembered(virtual_storage, relative_path) else {
            return resolving.await;
        };
        let mut confirming = pin!(self.confirmed(virtual_storage, &route));
        tokio::select! {
            biased;
            resolved = &mut resolving => match resolved {
                Err(refusal) if is_outage(&refusal) => confirming.await,
                resolved => resolved,
            },
            confirmed = &mut confirming => match confirmed {
                Ok(route) => {
                    self.routes.given_up();
                    Ok(route)
                }
                Err(unconfirmed) => match resolving.await {
                    Err(refusal) if is_outage(&refusal) => Err(unconfirmed),
                    resolved => resolved,
                },
            },
        }
    }

    fn turns(&self, repository_id: i64) -> Arc<Turns> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turn) = turns.get(&repository_id).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::<Turns>::default();
        turns.insert(repository_id, Arc::downgrade(&turn));
        turn
    }

    /// The outcome of a confirmation that begins after this was called.
    async fn confirmed(&self, virtual_storage: &str, route: &Arc<Route>) -> Result<Arc<Route>, Refusal> {
        let arrived = Instant::now();
        let turns = self.turns(route.repository_id);
        let mut last = turns.lock().await;
        if let Some((_, outcome)) = last.as_ref().filter(|(began, _)| *began > arrived) {
            return outcome.clone();
        }
        let began = Instant::now();
        let outcome = self.confirm(virtual_storage, route).await;
        *last = Some((began, outcome.clone()));
        outcome
    }

    async fn confirm(&self, virtual_storage: &str, route: &Arc<Route>) -> Result<Arc<Route>, Refusal> {
        let directory = self.nodes.directory();
        let storages = directory.storages(virtual_storage).ok_or(Refusal::NoTopology)?;
        let mut asked: FuturesUnordered<_> = route
            .replicas
            .iter()
            .filter_map(|replica| named(storages, &replica.storage))
            .map(|node| async { (node.storage.to_string(), ask(node, route).await) })
            .collect();
        let mut answers = Vec::with_capacity(asked.len());
        let mut verdict = records::judge(route, &answers, self.policy);
        while let Some(answer) = asked.next().await {
            answers.push(answer);
            verdict = records::judge(route, &answers, self.policy);
            // Others may be silent, and are not needed.
            if matches!(verdict, Verdict::Newest { .. }) {
                break;
            }
        }
        let relative_path = route.name.as_ref().map(|name| name.relative_path.as_str());
        match verdict {
            Verdict::Newest { storages, generation, epoch } => {
                tracing::debug!(
                    relative_path,
                    generation,
                    ?storages,
                    "the newest replicas, by their records"
                );
                Ok(Arc::new(narrowed(route, &storages, generation, epoch)))
            }
            Verdict::AsRemembered { storages } => {
                tracing::warn!(
                    relative_path,
                    ?storages,
                    "replicas are read that have no record and may be out of date"
                );
                Ok(Arc::new(narrowed(route, &storages, route.generation, route.epoch)))
            }
            Verdict::TooFew { answered, needed } => Err(Refusal::Unconfirmed { answered, needed }),
        }
    }
}

async fn ask(node: &Node, route: &Route) -> Answer {
    let mut client = ReplicaServiceClient::new(node.channel());
    let repository = Repository {
        storage_name: node.storage.to_string(),
        relative_path: route.replica_path.clone(),
        ..Repository::default()
    };
    let request = ReadRecordRequest { repository: Some(repository) };
    match timeout(RECORD_PATIENCE, client.read_record(request)).await {
        Ok(Ok(answer)) => match answer.into_inner() {
            answer if !answer.exists => Answer::Nothing,
            answer => answer.record.map_or(Answer::Unrecorded, Answer::Record),
        },
        Ok(Err(status)) if status.code() == Code::Unimplemented => Answer::Unrecorded,
        Ok(Err(status)) => {
            tracing::debug!(storage = %node.storage, error = status.message(), "no record of a replica");
            Answer::Nothing
        }
        Err(_) => Answer::Nothing,
    }
}

/// The route, with those storages as the only ones that are up to date.
fn narrowed(route: &Route, storages: &[String], generation: i64, epoch: i64) -> Route {
    let newest = |storage: &String| storages.contains(storage);
    let primary = if newest(&route.primary) { Some(&route.primary) } else { storages.first() };
    let replicas = route.replicas.iter().map(|replica| Replica {
        storage: replica.storage.clone(),
        generation: if newest(&replica.storage) { generation } else { -1 },
    });
    Route {
        primary: primary.cloned().unwrap_or_default(),
        generation,
        epoch,
        replicas: replicas.collect(),
        ..route.clone()
    }
}
