//! Reads: one up-to-date replica, or any storage, and others when the first does not answer as it should.
//!
//! A read goes from replica to replica until one answers with more than a word about itself, as long as the request can
//! be sent again: it is whole in its first message, or little enough of its stream was read to be kept. A node that is
//! silent is not given up; another one is asked beside it, and the first to answer wins. When a replica failed what another
//! one could do, a coordinator is told (`suspicions`).
//!
//! What is known of replicas was learned while certain processes served them. A node that was started since says so: what is
//! known is learned again, because its disk may not be the one it had.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use futures::future::OptionFuture;
use http::HeaderValue;
use hyper::body::Incoming;
use tabularium_common::records::expectation;
use tabularium_proto::{coordinator::Route, node::ExpectedReplica};
use tokio::time::{sleep, timeout};

use super::{
    Outcome, Relay,
    attempt::{Answer, Heard},
    beside::Front,
    request::{self, Call, Named},
};
use crate::{
    account::Account,
    limits::{HEALTH_GLANCE, LAST_RESORT_WAIT, STARTS_MET},
    nodes::{Node, Storages, is_healthy, named},
    refusal::Refusal,
    replay::Replay,
    routes::not_found,
    routing::{self, Reader},
    suspicions::Suspicion,
    table::Entry,
    wire,
};

/// A read on its way through the replicas.
pub(super) struct Search<'r> {
    pub(super) call: &'r Call,
    pub(super) message: Bytes,
    pub(super) target: &'r [u32],
    reader: Reader,
    pub(super) route: Arc<Route>,
    storages: &'r Storages,
    /// The processes of the storages that were known before the route was asked for.
    instances: Vec<Arc<str>>,
    replay: Option<Replay<Incoming>>,
    spread: usize,
}

/// What has been heard so far.
#[derive(Default)]
pub(super) struct Sofar {
    pub(super) tried: Vec<String>,
    /// What the client is told if nobody does better, and whether that is the primary's word.
    pub(super) word: Option<(Result<Answer, Refusal>, bool)>,
    suspicions: Vec<Suspicion>,
    /// A node was started since the route was asked for.
    started_anew: bool,
}

impl Sofar {
    /// Takes note of a node that was started anew.
    pub(super) fn meet(&mut self, word: &Result<Answer, Refusal>) {
        self.started_anew |= matches!(word, Err(Refusal::StartedAnew(_)));
    }
}

/// How a round through the replicas ended.
#[expect(clippy::large_enum_variant, reason = "made once for a read, and taken apart at once")]
pub(super) enum Ended {
    /// This goes to the client.
    Answered(Result<Outcome, Refusal>),
    /// Nobody had more than a word about itself; if none had that either, this is why.
    Unanswered(Refusal),
}

impl Search<'_> {
    /// The next to ask. Nodes that were silent just now come after all others.
    pub(super) fn next(&self, sofar: &mut Sofar) -> Result<Arc<Node>, Refusal> {
        let among = |usable: &dyn Fn(&str) -> bool| {
            routing::reader(&self.route, self.reader, usable, &sofar.tried, self.spread)
        };
        let prompt = |storage: &str| named(self.storages, storage).is_some_and(|node| node.prompt());
        let healthy = |storage: &str| is_healthy(self.storages, storage);
        let chosen = among(&prompt).or_else(|_| among(&healthy))?;
        let node = named(self.storages, chosen).ok_or(Refusal::NoSuitableNode)?;
        sofar.tried.push(chosen.to_owned());
        Ok(Arc::clone(node))
    }

    /// One that is believed to be down, when all that are not have failed: the belief may be wrong.
    pub(super) fn last_resort(&self, sofar: &mut Sofar) -> Option<Arc<Node>> {
        if self.reader == Reader::Primary || sofar.word.as_ref().is_some_and(|(word, _)| word.is_ok()) {
            return None;
        }
        let known = |storage: &str| named(self.storages, storage).is_some();
        let chosen = routing::reader(&self.route, self.reader, known, &sofar.tried, self.spread).ok()?;
        sofar.tried.push(chosen.to_owned());
        named(self.storages, chosen).cloned()
    }

    /// What the database knows of the replica there, for the node to see whether it still has that.
    pub(super) fn expected(&self, storage: &str) -> Option<HeaderValue> {
        let value = expectation(&ExpectedReplica {
            storage_name: storage.to_owned(),
            relative_path: self.route.replica_path.clone(),
            repository_id: self.route.repository_id,
            generation: routing::generation_of(&self.route, storage),
            node_instance: Some(self.instance(storage).to_owned()),
        });
        HeaderValue::from_bytes(value.as_encoded_bytes()).ok()
    }

    fn instance(&self, storage: &str) -> &str {
        let place = self.storages.iter().position(|node| &*node.storage == storage);
        place.and_then(|place| self.instances.get(place)).map_or("", |instance| instance)
    }

    fn can_begin_again(&self) -> bool {
        self.replay.as_ref().is_none_or(Replay::can_begin_again)
    }

    /// Takes note of what one node said; an answer for the client is handed back.
    pub(super) fn note(&self, sofar: &mut Sofar, node: &Node, heard: Heard) -> Option<Answer> {
        match heard {
            Heard::Answer(answer) => Some(answer),
            Heard::Elsewhere { word, suspicion } => {
                sofar.meet(&word);
                if let Some(what) = suspicion {
                    sofar.suspicions.push(Suspicion {
                        repository_id: self.route.repository_id,
                        storage: node.storage.to_string(),
                        generation: self.route.generation,
                        what,
                    });
                }
                let is_primary = *node.storage == *self.route.primary;
                // A node's own word counts for more than that there is none, and the primary's for most.
                let better = match &sofar.word {
                    None | Some((Err(_), _)) => true,
                    Some((Ok(_), of_the_primary)) => word.is_ok() && is_primary && !of_the_primary,
                };
                if better {
                    sofar.word = Some((word, is_primary));
                }
                None
            }
        }
    }
}

impl Relay {
    pub(super) async fn read(
        &self,
        mut call: Call,
        entry: &Entry,
        (target, reader): (&[u32], Reader),
        body: Incoming,
        account: &mut Account,
    ) -> Result<Outcome, Refusal> {
        let (message, rest) = request::first(body, &call).await?;
        let repository = request::repository(&message, target)?;
        call.say_virtual_storage(repository.virtual_storage);
        let call = &call;
        let directory = self.shared.nodes.directory();
        let storages = Self::storages(&directory, repository.virtual_storage)?;
        let reader = if call.primary_only { Reader::Primary } else { reader };
        let learn = || self.learn(call, entry, repository, storages, reader);
        let (route, instances) = learn().await?;
        let mut search = Search {
            call,
            message: message.clone(),
            target,
            reader,
            route,
            storages,
            instances,
            replay: rest.into_replay(),
            spread: self.spread(),
        };
        let mut front =
            if entry.method.has_sidechannel() { Some(Front::offered(call, entry)?) } else { None };
        self.allowance.earn();
        let mut rounds = 1..STARTS_MET;
        loop {
            account.route = Some(Arc::clone(&search.route));
            let mut sofar = Sofar::default();
            let ended = match &mut front {
                Some(front) => Box::pin(self.read_beside(&search, &mut sofar, front, entry, account)).await,
                None => self.read_in_messages(&search, &mut sofar, entry, account).await,
            };
            let refusal = match ended {
                Ended::Answered(answer) => return answer,
                Ended::Unanswered(refusal) => refusal,
            };
            let can_begin_again =
                search.can_begin_again() && front.as_ref().is_none_or(Front::can_begin_again);
            if !sofar.started_anew || !can_begin_again || rounds.next().is_none() {
                return sofar.word.map_or(Err(refusal), |(word, _)| word).map(Outcome::Node);
            }
            (search.route, search.instances) = learn().await?;
        }
    }

    /// The route, and the processes that were known before it was asked for.
    async fn learn(
        &self,
        call: &Call,
        entry: &Entry,
        named: Named<'_>,
        storages: &Storages,
        reader: Reader,
    ) -> Result<(Arc<Route>, Vec<Arc<str>>), Refusal> {
        let instances = storages.iter().map(|node| node.instance()).collect();
        let (name, correlation) = ((named.virtual_storage, named.relative_path), Some(&call.correlation));
        let route = if entry.method.precedes_a_push() {
            self.shared.routes.resolve(name.0, name.1, correlation).await
        } else {
            self.shared.confirmations.route(name.0, name.1, correlation).await
        };
        let route = route.map_err(not_found)?;
        let route = self.fresh_enough(route, call, named, reader).await.map_err(not_found)?;
        Ok((route, instances))
    }

    async fn read_in_messages(
        &self,
        search: &Search<'_>,
        sofar: &mut Sofar,
        entry: &Entry,
        account: &mut Account,
    ) -> Ended {
        let refusal = loop {
            let node = match search.next(sofar) {
                Ok(node) => node,
                Err(refusal) => break refusal,
            };
            if sofar.tried.len() > 1 {
                self.shared.metrics.retries.inc();
            }
            account.storage = Some(Arc::clone(&node.storage));
            if let Some(answer) = self.ask(search, entry, sofar, &node).await {
                return Ended::Answered(Ok(self.found(search, sofar, answer, account)));
            }
            if !search.can_begin_again() {
                break Refusal::Lost(node.storage.to_string());
            }
        };
        while search.can_begin_again()
            && let Some(node) = search.last_resort(sofar)
        {
            match timeout(LAST_RESORT_WAIT, self.ask_one(search, &node)).await {
                Ok(Heard::Answer(answer)) => {
                    return Ended::Answered(Ok(self.found(search, sofar, answer, account)));
                }
                Ok(Heard::Elsewhere { word, .. }) => sofar.meet(&word),
                Err(_) => {}
            }
        }
        Ended::Unanswered(refusal)
    }

    pub(super) fn found(
        &self,
        search: &Search<'_>,
        sofar: &mut Sofar,
        answer: Answer,
        account: &mut Account,
    ) -> Outcome {
        account.storage = Some(Arc::clone(&answer.storage));
        if let Some(replay) = &search.replay {
            replay.settle();
        }
        if answer.is_well() {
            for suspicion in sofar.suspicions.drain(..) {
                self.shared.suspicions.tell(&self.shared, suspicion, &search.call.correlation);
            }
        }
        Outcome::Node(answer)
    }

    async fn ask_one(&self, search: &Search<'_>, node: &Node) -> Heard {
        let (route, target) = (&search.route, search.target);
        match request::rewritten(&search.message, target, &node.storage, &route.replica_path) {
            Ok(head) => {
                let expected = search.expected(&node.storage);
                self.hear(search.call, node, head, search.replay.as_ref(), expected).await
            }
            Err(refusal) => Heard::Elsewhere { word: Err(refusal), suspicion: None },
        }
    }

    /// Asks a node, and another one beside it when it is silent for too long. `None`: they are of no use.
    async fn ask(
        &self,
        search: &Search<'_>,
        entry: &Entry,
        sofar: &mut Sofar,
        node: &Arc<Node>,
    ) -> Option<Answer> {
        let began = Instant::now();
        let mut first = pin!(self.ask_one(search, node));
        if search.replay.is_some() || search.reader == Reader::Primary || !self.shared.hedging.enabled() {
            let heard = unless_down(node, search, first.as_mut()).await;
            return search.note(sofar, node, heard);
        }
        let patience = entry.usual.patience(self.shared.hedging.after);
        let mut silence = pin!(sleep(patience));
        let mut waiting = true;
        let mut beside: Option<Arc<Node>> = None;
        let mut second = OptionFuture::from(None);
        loop {
            tokio::select! {
                biased;
                heard = &mut first, if waiting => {
                    entry.usual.observe(began.elapsed());
                    node.spoke();
                    let answer = search.note(sofar, node, heard);
                    if answer.is_some() || beside.is_none() {
                        return answer;
                    }
                    waiting = false;
                }
                Some(heard) = &mut second, if beside.is_some() => {
                    let other = beside.take()?;
                    second = OptionFuture::from(None);
                    let answer = search.note(sofar, &other, heard);
                    if answer.is_some() && waiting {
                        entry.usual.observe(began.elapsed());
                        node.was_silent();
                    }
                    if answer.is_some() || !waiting {
                        return answer;
                    }
                    silence.as_mut().reset(tokio::time::Instant::now());
                }
                () = &mut silence, if waiting && beside.is_none() => {
                    silence.as_mut().reset(tokio::time::Instant::now() + patience);
                    // A node that has gone down meanwhile is no reason to be sparing.
                    if (!node.healthy() || self.allowance.spend())
                        && let Ok(other) = search.next(sofar)
                    {
                        self.shared.metrics.hedges.inc();
                        let asked = Arc::clone(&other);
                        second = OptionFuture::from(Some(Box::pin(async move {
                            self.ask_one(search, &asked).await
                        })));
                        beside = Some(other);
                    }
                }
            }
        }
    }

    pub(super) async fn read_storage(
        &self,
        call: &Call,
        within: &[u32],
        name: u32,
        body: Incoming,
        account: &mut Account,
    ) -> Result<Outcome, Refusal> {
        let (message, rest) = request::first(body, call).await?;
        let holder = wire::message_at(&message, within)?.ok_or(Refusal::TargetStorage)?;
        let virtual_storage = wire::text(holder, name)?;
        if virtual_storage.is_empty() {
            return Err(Refusal::TargetStorage);
        }
        let directory = self.shared.nodes.directory();
        let storages = Self::storages(&directory, virtual_storage).map_err(|refusal| match refusal {
            Refusal::StorageNotFound => Refusal::VirtualStorage,
            other => other,
        })?;
        let replay = rest.into_replay();
        let spread = self.spread();
        let mut usable: Vec<bool> = storages.iter().map(|node| node.healthy()).collect();
        let mut last = None;
        loop {
            let place = match routing::any_storage(&usable, spread) {
                Ok(place) => place,
                Err(refusal) => return last.unwrap_or(Err(refusal)).map(Outcome::Node),
            };
            let node = &storages[place];
            let head = request::restored(&message, within, name, &node.storage)?;
            account.storage = Some(Arc::clone(&node.storage));
            match self.hear(call, node, head, replay.as_ref(), None).await {
                Heard::Answer(answer) => return Ok(Outcome::Node(answer)),
                // Storages differ: what one says of itself is its answer.
                Heard::Elsewhere { word, suspicion: Some(_) } => return word.map(Outcome::Node),
                Heard::Elsewhere { word, .. } => last = Some(word),
            }
            if !replay.as_ref().is_none_or(Replay::can_begin_again) {
                return last.unwrap_or(Err(Refusal::NoHealthyNodes)).map(Outcome::Node);
            }
            self.shared.metrics.retries.inc();
            usable[place] = false;
        }
    }
}

/// Gives a node up that goes down before it has answered, while the request can be sent elsewhere.
async fn unless_down(
    node: &Node,
    search: &Search<'_>,
    mut asked: Pin<&mut impl Future<Output = Heard>>,
) -> Heard {
    loop {
        match timeout(HEALTH_GLANCE, asked.as_mut()).await {
            Ok(heard) => return heard,
            Err(_) if !node.healthy() && search.can_begin_again() => {
                return Heard::refused(Refusal::Lost(node.storage.to_string()));
            }
            Err(_) => {}
        }
    }
}
