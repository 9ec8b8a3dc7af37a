//! One attempt at a write, from the first byte to the nodes until the last of them has ended.
//!
//! Everything that can happen arrives in one place, [`Drive::run`]: the client's stream goes on, a node votes, the
//! primary answers, a secondary ends, the ticket is there, the write is recorded, time passes, the client goes away.
//! What it means is decided by [`Transaction`]; here it is carried out. How it ends is in [`ending`].

mod comparison;
mod ending;

use std::{future::poll_fn, sync::Arc, task::Poll, time::Instant};

use bytes::Bytes;
use futures::{
    FutureExt as _, StreamExt as _,
    future::{AbortHandle, Abortable, BoxFuture},
    stream::FuturesUnordered,
};
use http_body::Frame;
use tabularium_common::faults::{CrashPoint, SafetyStep, crash_point, is_off};
use tabularium_proto::coordinator::{Route, WriteKind};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    client::Client,
    fan_out::{Branch, Flow},
    participants::{self, Part, Primary, Said},
    write::{Cast, Failed, Held, Story},
};
use crate::{
    limits::{HEALTH_GLANCE, ORPHAN_PATIENCE},
    metrics::StorageLabels,
    nodes::Node,
    refusal::Refusal,
    votes::{
        Answer, Ears, Heard, VoteError,
        transaction::{Action, Event, PRIMARY, Safety, Ticket, Transaction, Verdict, VoterId},
    },
    writes::Settlement,
};
use ending::{End, Outcome, Settling, settled};

pub(super) struct Drive<'s> {
    story: &'s mut Story,
    route: Arc<Route>,
    nodes: Vec<Arc<Node>>,
    transaction: Transaction,
    /// `None`: the nodes do not vote on this method.
    ears: Option<Ears>,
    /// Votes that wait.
    answers: Vec<(VoterId, Answer)>,
    primary: Primary,
    secondaries: FuturesUnordered<Abortable<BoxFuture<'static, (VoterId, Part)>>>,
    /// By voter.
    aborts: Vec<Option<AbortHandle>>,
    taking: Option<BoxFuture<'static, Result<Held, Failed>>>,
    held: Option<Held>,
    lost: CancellationToken,
    /// What nodes hold whose votes do not tell is being found out; these storages hold what the primary holds.
    comparing: Option<BoxFuture<'static, Vec<String>>>,
    settling: Option<Settling>,
    outcome: Outcome,
    /// Why the outcome could not be recorded.
    unrecorded: Option<Refusal>,
    /// A frame for the client.
    outbox: Option<Frame<Bytes>>,
    end: Option<End>,
    /// A participant was lost, not only of another mind.
    wounded: bool,
    /// The ticket is taken for what was done without it.
    ticket_is_late: bool,
    upload_is_over: bool,
    orphaned: Option<Instant>,
    /// When the client had its answer.
    answered: Option<Instant>,
}

impl<'s> Drive<'s> {
    /// Asks everybody.
    pub(super) fn begin(story: &'s mut Story, cast: Cast, branches: Vec<Branch>) -> Result<Self, Failed> {
        let Cast { route, nodes, mut held } = cast;
        let ears = story.entry.method.votes().then(|| story.shared.transactions.open());
        let mut requests = Vec::with_capacity(nodes.len());
        for (voter, (node, branch)) in nodes.iter().zip(branches).enumerate() {
            let introduction = ears.as_ref();
            let introduction = introduction
                .map(|ears| participants::introduction(ears.id, &node.storage, voter == PRIMARY))
                .transpose()?;
            let token = node.token(story.worker);
            requests.push(participants::request(&story.call, token, introduction, branch)?);
        }
        let worker = story.worker;
        let mut requests = requests.into_iter();
        let (Some(request), Some(first)) = (requests.next(), nodes.first()) else {
            return Err(Refusal::NoHealthyNodes.into());
        };
        if let Some(held) = &mut held {
            held.write.sending();
            if let Some(ears) = &ears {
                ears.announce(&held.write.record());
            }
        }
        let primary = Primary::ask(first, worker, request);
        let secondaries = FuturesUnordered::new();
        let mut aborts = vec![None];
        for (voter, (node, request)) in
            nodes.iter().zip(std::iter::once(None).chain(requests.map(Some))).enumerate()
        {
            let Some(request) = request else { continue };
            let part = participants::secondary(Arc::clone(node), worker, request);
            let (abort, registration) = AbortHandle::new_pair();
            secondaries.push(Abortable::new(part.map(move |part| (voter, part)).boxed(), registration));
            aborts.push(Some(abort));
        }
        let voters = nodes.iter().map(|node| (Arc::clone(&node.storage), node.punctuality.grace()));
        let ticket = if held.is_some() { Ticket::Held } else { Ticket::Wanted };
        let quorum = route.write_quorum as usize;
        let mut transaction = Transaction::new(voters, quorum, ticket, safety(), Instant::now());
        if story.kind == WriteKind::Create {
            transaction = transaction.creating();
        }
        let lost = held.as_ref().map_or_else(CancellationToken::new, |held| held.write.lost());
        Ok(Self {
            story,
            route,
            nodes,
            transaction,
            ears,
            answers: Vec::new(),
            primary,
            secondaries,
            aborts,
            taking: None,
            held,
            lost,
            comparing: None,
            settling: None,
            outcome: Outcome::Nothing,
            unrecorded: None,
            outbox: None,
            end: None,
            wounded: false,
            ticket_is_late: false,
            upload_is_over: false,
            orphaned: None,
            answered: None,
        })
    }

    /// Runs until the client has its answer and nobody is at work any more.
    pub(super) async fn run(mut self) -> Result<(), Failed> {
        let mut glance = tokio::time::interval(HEALTH_GLANCE);
        glance.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.conclude();
            if self.is_ready_to_answer() {
                self.answer_client().await?;
            }
            if self.is_done() {
                return Ok(());
            }
            let deadline = self.transaction.deadline();
            let Story { upload, client, .. } = &mut *self.story;
            let listens = self.ears.is_some();
            tokio::select! {
                said = self.primary.next(), if self.outbox.is_none() => self.on_primary(said),
                heard = hear(&mut self.ears), if listens => self.on_heard(heard),
                place = withdrawn(&mut self.answers), if !self.answers.is_empty() => {
                    let (voter, _) = self.answers.swap_remove(place);
                    self.handle(Event::Withdrawn(voter));
                }
                Some(part) = self.secondaries.next(), if !self.secondaries.is_empty() => {
                    // One that was aborted has been counted out already.
                    if let Ok((voter, part)) = part {
                        self.on_secondary(voter, part);
                    }
                }
                taken = ready(&mut self.taking), if self.taking.is_some() => self.on_ticket(taken),
                alike = ready(&mut self.comparing), if self.comparing.is_some() => self.on_compared(alike),
                told = settled(&mut self.settling), if self.settling.is_some() => self.on_settled(told),
                flow = upload.step(), if !self.upload_is_over => self.on_flow(flow),
                gone = tell_or_leave(client, &mut self.outbox), if self.answered.is_none() && self.orphaned.is_none() => {
                    if gone {
                        self.on_client_gone();
                    }
                }
                () = self.lost.cancelled(), if self.held.is_some() => self.on_intent_lost(),
                () = sleep_until(deadline), if deadline.is_some() => self.handle(Event::Tick),
                _ = glance.tick() => self.on_glance(),
            }
        }
    }

    fn handle(&mut self, event: Event<'_>) {
        if let Some(held) = &self.held {
            self.transaction.leased_until(held.write.leased_until());
        }
        for action in self.transaction.handle(event, Instant::now()) {
            match action {
                Action::Answer(voter, verdict) => self.answer(voter, verdict),
                Action::Drop(voter) => self.leave_behind(voter),
                Action::TakeTicket => {
                    let storages = (0..self.nodes.len())
                        .filter(|voter| self.transaction.takes_part(*voter))
                        .map(|voter| self.nodes[voter].storage.to_string())
                        .collect();
                    self.start_taking(Some(storages));
                }
                Action::Record(holders) => {
                    crash_point(CrashPoint::RouterBeforeRecord);
                    let storages = self.names(&holders);
                    self.settle(Settlement::Commit { storages, unvoted: false }, true);
                }
            }
        }
        self.give_up_if_wounded();
    }

    fn names(&self, voters: &[VoterId]) -> Vec<String> {
        voters.iter().map(|voter| self.nodes[*voter].storage.to_string()).collect()
    }

    fn answer(&mut self, voter: VoterId, verdict: Verdict) {
        let Some(place) = self.answers.iter().position(|(waiting, _)| *waiting == voter) else { return };
        let (_, answer) = self.answers.swap_remove(place);
        // A node that does not wait any more is noticed as withdrawn by its next vote or its end.
        let _ = answer.send(Ok(verdict));
        if voter == PRIMARY && verdict == Verdict::Commit && self.transaction.may_be_applied() {
            crash_point(CrashPoint::RouterAfterVote);
        }
    }

    /// A node holds up the others: they go on without it.
    fn leave_behind(&mut self, voter: VoterId) {
        let node = &self.nodes[voter];
        tracing::info!(
            storage = %node.storage,
            correlation_id = self.story.call.correlation.to_str().ok(),
            grace_ms = node.punctuality.grace().as_millis(),
            "a node is late and is left behind in this write"
        );
        node.punctuality.late();
        let virtual_storage = self.route.name.as_ref().map(|name| name.virtual_storage.clone());
        let labels = StorageLabels {
            virtual_storage: virtual_storage.unwrap_or_default(),
            storage: node.storage.to_string(),
        };
        self.story.shared.metrics.late_votes.get_or_create(&labels).inc();
        self.cut(voter, true);
    }

    fn cut(&mut self, voter: VoterId, again: bool) {
        if let Some(abort) = self.aborts[voter].take() {
            abort.abort();
        }
        if voter == PRIMARY {
            self.primary.abandon();
            self.outbox = None;
            let refusal = Refusal::Lost(self.nodes[PRIMARY].storage.to_string());
            self.end.get_or_insert(End::Broken { refusal, again });
        }
        self.story.upload.cut(voter);
    }

    /// Without some participant no quorum is left, and nobody has changed anything: others may do better.
    fn give_up_if_wounded(&mut self) {
        if self.wounded
            && self.end.is_none()
            && !self.transaction.takes_part(PRIMARY)
            && !self.transaction.may_be_applied()
            && self.may_begin_again()
        {
            self.cut(PRIMARY, true);
        }
    }

    fn may_begin_again(&self) -> bool {
        self.story.upload.can_begin_again() && !self.story.client.is_answered() && self.orphaned.is_none()
    }

    fn start_taking(&mut self, asked: Option<Vec<String>>) {
        let asked = asked.map(|storages| (&*self.route, storages));
        self.taking = Some(match self.story.take_ticket(asked) {
            Ok(taking) => taking,
            Err(refusal) => std::future::ready(Err(refusal.into())).boxed(),
        });
    }

    fn on_heard(&mut self, heard: Heard) {
        match heard {
            Heard::Stop => self.handle(Event::Stopped),
            Heard::Vote { node, ballot, answer } => {
                let refused = match self.transaction.voter(&node) {
                    None => VoteError::UnknownNode(node),
                    Some(voter) if self.transaction.waits(voter) => VoteError::Duplicate(node),
                    Some(voter) => {
                        self.answers.push((voter, answer));
                        return self.handle(Event::Voted(voter, ballot));
                    }
                };
                tracing::warn!(error = %refused, "a vote is refused");
                let _ = answer.send(Err(refused));
            }
        }
    }

    fn on_primary(&mut self, said: Said) {
        let end = match said {
            Said::Head(head) => return self.story.client.head(head),
            Said::Data(frame) => {
                if !self.story.client.is_gone() {
                    self.outbox = Some(frame);
                }
                return;
            }
            Said::Trailers(trailers, code) => End::Trailers(trailers, code),
            Said::Whole(parts, code) => End::Whole(parts, code),
            Said::Lost(refusal) => {
                self.wounded = true;
                // One that was never asked has not done anything, whether it votes or not.
                let unsent = matches!(refusal, Refusal::Unreachable(_));
                End::Broken { refusal, again: self.ears.is_some() || unsent }
            }
        };
        let ok = end.code() == Some(Code::Ok);
        self.end = Some(end);
        self.handle(Event::Ended { voter: PRIMARY, ok });
    }

    fn on_secondary(&mut self, voter: VoterId, part: Part) {
        self.aborts[voter] = None;
        self.wounded |= part == Part::Lost;
        self.handle(Event::Ended { voter, ok: part == Part::Status(Code::Ok) });
    }

    fn on_ticket(&mut self, taken: Result<Held, Failed>) {
        self.taking = None;
        match taken {
            Err(failed) => {
                self.handle(Event::TicketRefused);
                self.primary.abandon();
                self.outbox = None;
                if self.ticket_is_late && self.end.as_ref().and_then(End::code) == Some(Code::Ok) {
                    let refusal = Refusal::NotRecorded(failed.refusal.to_string());
                    self.end = Some(End::Broken { refusal, again: false });
                } else if self.end.is_none() {
                    self.end = Some(End::Broken { refusal: failed.refusal, again: failed.again });
                }
                self.story.upload.cut_all();
            }
            Ok(mut held) => {
                crash_point(CrashPoint::RouterAfterTicket);
                held.write.sending();
                if let Some(ears) = &self.ears {
                    ears.announce(&held.write.record());
                }
                self.story.notes.write_id(held.write.id());
                self.lost = held.write.lost();
                let participants = held.write.participants().to_vec();
                let quorum = held.write.route().write_quorum as usize;
                let same = held.write.route().primary == *self.nodes[PRIMARY].storage;
                self.held = Some(held);
                if self.ticket_is_late {
                    if !same {
                        return self.settle(Settlement::InDoubt, false);
                    }
                    if self.transaction.is_untouched() {
                        let settlement = self.unvoted();
                        return self.settle(settlement, false);
                    }
                }
                self.handle(Event::Ticketed { participants: &participants, quorum });
                for voter in 1..self.nodes.len() {
                    if !participants.iter().any(|storage| **storage == *self.nodes[voter].storage) {
                        self.cut(voter, false);
                    }
                }
            }
        }
    }

    fn on_flow(&mut self, flow: Flow) {
        match flow {
            Flow::On => {}
            Flow::Ended => self.upload_is_over = true,
            Flow::Stalled(voter) => {
                self.handle(Event::Dropped(voter));
                self.leave_behind(voter);
            }
            Flow::Lost => {
                self.upload_is_over = true;
                // A push that has its ticket has uploaded all that it needs.
                if !(self.uploads_first() && self.transaction.is_ticketed()) {
                    self.story.upload.pass_on_the_loss();
                }
            }
        }
    }

    fn uploads_first(&self) -> bool {
        self.story.entry.method.uploads_before_it_votes()
    }

    /// What has its ticket, and may have changed something or soon will, goes on without the client. All else ends.
    fn on_client_gone(&mut self) {
        self.orphaned = Some(Instant::now());
        self.outbox = None;
        let goes_on = self.transaction.is_ticketed()
            && self.ears.is_some()
            && (self.uploads_first() || self.transaction.may_be_applied());
        if !goes_on {
            self.stop_all();
        }
    }

    /// Resets every participant.
    fn stop_all(&mut self) {
        self.taking = None;
        for voter in 0..self.nodes.len() {
            self.handle(Event::Dropped(voter));
        }
        for voter in 0..self.nodes.len() {
            self.cut(voter, false);
        }
    }

    /// The coordinator has settled the intent already; told that it is in doubt, it knows that nodes were at it until
    /// now.
    fn on_intent_lost(&mut self) {
        self.comparing = None;
        self.settle(Settlement::InDoubt, false);
        self.stop_all();
        self.end = Some(End::Broken { refusal: Refusal::IntentLost, again: false });
    }

    fn on_glance(&mut self) {
        let orphaned = self.orphaned.is_some_and(|since| since.elapsed() > ORPHAN_PATIENCE);
        if orphaned && self.end.is_none() {
            return self.stop_all();
        }
        if self.answered.is_some() || !(self.held.is_some() || self.may_begin_again()) || self.ears.is_none()
        {
            return;
        }
        for voter in 0..self.nodes.len() {
            if self.transaction.takes_part(voter) && !self.nodes[voter].healthy() {
                self.wounded = true;
                self.handle(Event::Dropped(voter));
                self.cut(voter, true);
            }
        }
    }
}

fn safety() -> Safety {
    Safety {
        ticket: !is_off(SafetyStep::RouterTicket),
        quorum: !is_off(SafetyStep::RouterQuorum),
        record: !is_off(SafetyStep::RouterRecordBeforeAnswer),
        fence: !is_off(SafetyStep::RouterWriteFence),
    }
}

async fn hear(ears: &mut Option<Ears>) -> Heard {
    match ears {
        Some(ears) => ears.hear().await,
        None => std::future::pending().await,
    }
}

/// The place of a vote for whose answer nobody waits any more.
async fn withdrawn(answers: &mut [(VoterId, Answer)]) -> usize {
    poll_fn(|cx| {
        let closed = answers.iter_mut().position(|(_, answer)| answer.poll_closed(cx).is_ready());
        closed.map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

/// Tells the client what there is to tell, else waits until it goes away; `true`: it has.
async fn tell_or_leave(client: &mut Client, frame: &mut Option<Frame<Bytes>>) -> bool {
    if frame.is_some() {
        client.tell(frame).await;
        return client.is_gone();
    }
    client.gone().await;
    true
}

async fn ready<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
