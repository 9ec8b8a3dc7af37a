//! Writes: who takes part, and how often it is tried.
//!
//! A write is a task of its own, a [`Story`], because it must come to its end although the client has gone. It chooses
//! who takes part and lets [`Drive`] carry the RPC through. What changes nothing before its ticket is there takes it
//! first; a push asks all up-to-date replicas by the route that is known, and takes the ticket when they have voted for
//! the first time. A write that comes to nothing before anybody was told to change anything begins again, on a fresh
//! route, while the client has heard nothing and its stream is small: it sees a pause.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use hyper::body::Incoming;
use tabularium_common::{grpc::NOT_BEGUN, ids::RelativePath};
use tabularium_proto::coordinator::{AskedNodes, BeginWriteRequest, RepositoryName, Route, WriteKind};
use tokio::time::timeout_at;
use tonic::{Code, metadata::MetadataValue};

use super::{
    Outcome, Relay, Shared,
    client::Client,
    drive::Drive,
    fan_out::Upload,
    request::{self, Call, Named, Target},
};
use crate::{
    account::{Account, Notes},
    limits::{WRITE_BACKOFF, WRITE_PATIENCE},
    nodes::{Node, Storages, is_healthy, named},
    refusal::Refusal,
    routes::not_found,
    routing::{current, unreachable_storages},
    table::{Action, Entry},
    turns::Turn,
    writes::{ActiveWrite, Settlement},
};

impl Relay {
    pub(super) async fn write(
        &self,
        mut call: Call,
        entry: &Arc<Entry>,
        body: Incoming,
        account: &mut Account,
    ) -> Result<Outcome, Refusal> {
        let (message, rest) = request::first(body, &call).await?;
        let message = request::timestamped(message, entry.method.timestamp.as_deref(), SystemTime::now())?;
        let (target, kind) = aim(entry)?;
        let repository = request::repository(&message, target.target)?;
        let additional = request::additional(&message, target.additional, repository)?;
        let hint = call.take_partitioning_hint();
        let beside = if additional.is_some() {
            None
        } else {
            request::beside(&message, &entry.method, hint.as_ref(), repository)?
        };
        Self::storages(&self.shared.nodes.directory(), repository.virtual_storage).map_err(not_begun)?;
        call.say_virtual_storage(repository.virtual_storage);
        let hinted = beside.is_some();
        let additional = additional.map(name).transpose()?.or(beside);
        let name = name(repository)?;

        let notes = Notes::default();
        account.notes = Some(notes.clone());
        let (client, started) = Client::new();
        let (leftover, rest) = rest.into_parts();
        let story = Story {
            shared: Arc::clone(&self.shared),
            worker: self.worker,
            call,
            entry: Arc::clone(entry),
            kind,
            name,
            additional,
            hinted,
            message,
            upload: Upload::new(leftover, rest),
            client,
            notes,
            avoided: Vec::new(),
        };
        self.shared.tasks.spawn("write", story.run());
        started.await.unwrap_or(Err(Refusal::Abandoned)).map(Outcome::Written)
    }
}

fn aim(entry: &Entry) -> Result<(Target<'_>, WriteKind), Refusal> {
    match &entry.action {
        Action::Write { target, additional, kind } => {
            Ok((Target { target, additional: additional.as_deref() }, *kind))
        }
        _ => Err(Refusal::NotBuilt(entry.method.path.clone())),
    }
}

pub(super) fn name(named: Named<'_>) -> Result<RepositoryName, Refusal> {
    let path: RelativePath = named.relative_path.parse().map_err(Refusal::Path)?;
    Ok(RepositoryName { virtual_storage: named.virtual_storage.to_owned(), relative_path: path.into() })
}

/// The right to write, and the turn at it. The turn ends when the right has been given back.
pub(super) struct Held {
    pub(super) write: ActiveWrite,
    pub(super) turn: Turn,
}

/// An attempt that came to nothing.
pub(super) struct Failed {
    /// What the client is told if there is no other attempt.
    pub(super) refusal: Refusal,
    /// Another attempt may do better.
    pub(super) again: bool,
    /// For certain no node has changed anything, and none will.
    pub(super) untouched: bool,
    /// A storage that cannot take part in it.
    pub(super) avoid: Option<String>,
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, again: false, untouched: true, avoid: None }
    }
}

/// Who takes part in one attempt.
pub(super) struct Cast {
    pub(super) route: Arc<Route>,
    /// The primary first.
    pub(super) nodes: Vec<Arc<Node>>,
    /// The ticket, unless it is taken at the first vote.
    pub(super) held: Option<Held>,
}

/// All that is known of one write.
pub(super) struct Story {
    pub(super) shared: Arc<Shared>,
    pub(super) worker: usize,
    pub(super) call: Call,
    pub(super) entry: Arc<Entry>,
    pub(super) kind: WriteKind,
    name: RepositoryName,
    additional: Option<RepositoryName>,
    /// Nodes hear of it beside the message, not in it.
    hinted: bool,
    message: Bytes,
    pub(super) upload: Upload,
    pub(super) client: Client,
    pub(super) notes: Notes,
    /// Storages that could not take part, whatever their health is believed to be.
    avoided: Vec<String>,
}

impl Story {
    /// Tries until it is done, refused, or out of patience.
    async fn run(mut self) {
        let mut patience = None;
        let mut first = true;
        loop {
            let failed = match self.attempt(first).await {
                Ok(()) => return,
                Err(failed) => failed,
            };
            first = false;
            let until = *patience.get_or_insert_with(|| Instant::now() + WRITE_PATIENCE);
            let again = failed.again
                && self.upload.can_begin_again()
                && !self.client.is_answered()
                && !self.client.is_gone()
                && Instant::now() + WRITE_BACKOFF < until;
            if !again {
                let refusal = if failed.untouched { not_begun(failed.refusal) } else { failed.refusal };
                return self.client.refuse(refusal).await;
            }
            tracing::info!(
                correlation_id = self.call.correlation.to_str().ok(),
                error = %failed.refusal,
                storage = failed.avoid,
                "a write that has not begun begins again"
            );
            self.shared.metrics.retries.inc();
            self.avoided.extend(failed.avoid);
            self.client.begin_again();
            tokio::time::sleep(WRITE_BACKOFF).await;
        }
    }

    async fn attempt(&mut self, first: bool) -> Result<(), Failed> {
        let cast = self.cast(first).await?;
        let primary = &cast.nodes[0];
        self.notes.route(&cast.route, &primary.storage);
        if let Some(held) = &cast.held {
            self.notes.write_id(held.write.id());
        }
        let (target, _) = aim(&self.entry)?;
        let additional = cast.held.as_ref().filter(|_| self.additional.is_some());
        let additional = additional.map(|held| held.write.additional_replica_path());
        if let (true, Some(path)) = (self.hinted, additional) {
            self.call.hint_partition(path);
        }
        let head = |node: &Arc<Node>| {
            let path = &cast.route.replica_path;
            request::rewritten_twice(&self.message, target, &node.storage, path, additional)
        };
        let heads = cast.nodes.iter().map(head).collect::<Result<Vec<_>, _>>()?;
        let branches = self.upload.branches(heads, cast.route.write_quorum as usize);
        Drive::begin(self, cast, branches)?.run().await
    }

    /// Chooses who takes part.
    async fn cast(&mut self, first: bool) -> Result<Cast, Failed> {
        let directory = self.shared.nodes.directory();
        let storages = Relay::storages(&directory, &self.name.virtual_storage)?.clone();
        let usable = |storage: &str| {
            is_healthy(&storages, storage) && !self.avoided.iter().any(|avoided| *avoided == storage)
        };
        if !(self.entry.method.votes() && self.entry.method.uploads_before_it_votes()) {
            let held = self.take_ticket(None)?.await?;
            let route = Arc::clone(held.write.route());
            let asked = if self.entry.method.votes() {
                nodes(&storages, held.write.participants())
            } else {
                nodes(&storages, std::slice::from_ref(&route.primary))
            };
            return Ok(Cast { nodes: asked?, route, held: Some(held) });
        }
        let (virtual_storage, path) = (&self.name.virtual_storage, &self.name.relative_path);
        let correlation = Some(&self.call.correlation);
        let routes = &self.shared.routes;
        let known = if first {
            routes.resolve(virtual_storage, path, correlation).await
        } else {
            routes.resolve_anew(virtual_storage, path, correlation).await
        };
        let route = known.map_err(not_found)?;
        let primary = &route.primary;
        if usable(primary) && current(&route).any(|storage| storage == primary) {
            let others = current(&route).filter(|storage| *storage != primary && usable(storage));
            let asked: Vec<String> =
                std::iter::once(primary.as_str()).chain(others).map(str::to_owned).collect();
            return Ok(Cast { nodes: nodes(&storages, &asked)?, route, held: None });
        }
        // The primary has to move before anything is uploaded to it, and only a ticket moves it. It is given back at
        // once: the upload may take long.
        let Held { write, turn } = self.take_ticket(None)?.await?;
        let route = Arc::clone(write.route());
        let nodes = nodes(&storages, write.participants());
        write.settle(Settlement::NotApplied).await?;
        drop(turn);
        Ok(Cast { nodes: nodes?, route, held: None })
    }

    /// Queues for the ticket and takes it. `asked`: the route and the nodes that have been asked already.
    pub(super) fn take_ticket(
        &self,
        asked: Option<(&Route, Vec<String>)>,
    ) -> Result<BoxFuture<'static, Result<Held, Failed>>, Refusal> {
        let directory = self.shared.nodes.directory();
        let storages = Relay::storages(&directory, &self.name.virtual_storage)?;
        let reachable = storages.iter().map(|node| {
            (&*node.storage, node.healthy() && !self.avoided.iter().any(|name| **name == *node.storage))
        });
        let request = BeginWriteRequest {
            name: Some(self.name.clone()),
            kind: self.kind.into(),
            method: self.call.path().to_owned(),
            additional_repository: self.additional.clone(),
            unreachable_storages: unreachable_storages(reachable).ok_or(Refusal::NoHealthyNodes)?,
            sync_from_site: self.call.sync_from_site.clone(),
            correlation_id: self.call.correlation.to_str().unwrap_or_default().to_owned(),
            asked_nodes: asked.map(|(route, storages)| AskedNodes {
                repository_id: route.repository_id,
                epoch: route.epoch,
                primary: route.primary.clone(),
                storages,
                can_ask_again: self.upload.can_begin_again() && !self.client.is_answered(),
            }),
            ..BeginWriteRequest::default()
        };
        let (shared, name) = (Arc::clone(&self.shared), self.name.clone());
        let correlation = self.call.correlation.clone();
        let take = async move {
            let until = Instant::now() + WRITE_PATIENCE;
            let turn = shared.turns.wait(&name.virtual_storage, &name.relative_path);
            let turn = timeout_at(until.into(), turn).await.map_err(|_| Refusal::Busy)?;
            let patience = until.saturating_duration_since(Instant::now());
            match shared.writes.begin(request, correlation, patience).await {
                Ok(write) => Ok(Held { write, turn }),
                Err(refusal) => {
                    let again = refusal.code() == Code::Aborted;
                    Err(Failed { again, ..refusal.into() })
                }
            }
        };
        Ok(take.boxed())
    }
}

/// The nodes of those storages; one that the topology does not have is left out, unless it is the primary.
fn nodes(storages: &Storages, names: &[String]) -> Result<Vec<Arc<Node>>, Failed> {
    let mut nodes = Vec::with_capacity(names.len());
    for (place, storage) in names.iter().enumerate() {
        if let Some(node) = named(storages, storage) {
            nodes.push(Arc::clone(node));
            continue;
        }
        tracing::error!(storage, "the coordinator chose a storage that its topology does not have");
        if place == 0 {
            return Err(Refusal::Unreachable(storage.clone()).into());
        }
    }
    Ok(nodes)
}

/// Says so in the refusal of a write that another router can be asked for.
fn not_begun(refusal: Refusal) -> Refusal {
    if refusal.code() != Code::Unavailable {
        return refusal;
    }
    let mut status = refusal.status();
    status.metadata_mut().insert(NOT_BEGUN, MetadataValue::from_static("1"));
    Refusal::Status(status)
}
