//! One write's votes: who has voted what, what was agreed, who gets which answer. No I/O, no clock of its own.
//!
//! A node that takes part is a *voter*; the first one is the primary. The n-th vote of each voter belongs to the n-th
//! *subtransaction*. A subtransaction is agreed once the primary and enough others have cast the same ballot. Those who
//! did are told to go on; whoever casts another one, or cannot vote any more, is out for good, so that no node that was
//! left behind is ever told to go on later.
//!
//! A node that only announces a change ([`Phase::Preparing`]) is told to go on at once, and belongs to no subtransaction: nothing
//! is locked yet, and nodes of other versions announce nothing, so that they would not be in step.
//!
//! Two answers are held back although everybody agrees. The first one of a push waits for the *ticket*: objects were
//! uploaded before it, refs move after it. The one that follows the change of the refs waits for the *record*: what it
//! releases are hooks that tell others of the write. Until the ticket is taken everybody is waited for, each voter for
//! its grace; from then on those that agree go ahead, and the others have their grace to catch up before the record.
//!
//! The primary's death leaves one question open, that of nodes that have already changed their refs: for their ballots
//! ([`Phase::Committed`]) a quorum without the primary counts.

mod conclusion;
mod words;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::ballot::{BALLOT_BYTES, Ballot, Phase};
use crate::limits::{EARLY_GRACE_CAP, PRIMARY_GRACE};
pub(crate) use conclusion::Conclusion;
use words::Words;

/// What a voter is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Go on.
    Commit,
    /// Take it back: the others do something else.
    Abort,
    /// Take it back: a node ended the write.
    Stop,
    /// The write, or this node's part in it, is over.
    Cancelled,
}

/// A voter, by its place; the primary's is 0.
pub(crate) type VoterId = usize;
/// In place of what is voted for on a repository that is made.
const ANY_REPOSITORY: [u8; BALLOT_BYTES] = [0xff; BALLOT_BYTES];
/// The primary's place.
pub(crate) const PRIMARY: VoterId = 0;

/// When the write gets its ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ticket {
    /// It is held.
    Held,
    /// It is taken once the first vote is agreed.
    Wanted,
    /// It is being taken.
    Asked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Record {
    None,
    Asked,
    Done,
}

/// What a switch for tests may leave out; everything, as it ships.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Safety {
    /// Votes wait for the ticket.
    pub(crate) ticket: bool,
    /// Votes need a quorum.
    pub(crate) quorum: bool,
    /// Hooks wait for the record.
    pub(crate) record: bool,
    /// Votes are answered under the lease only.
    pub(crate) fence: bool,
}

/// Something that happened.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Event<'e> {
    /// A node has voted.
    Voted(VoterId, Ballot),
    /// A node does not wait for the answer to its vote any more.
    Withdrawn(VoterId),
    /// A node's part of the RPC has ended.
    Ended {
        /// Which.
        voter: VoterId,
        /// With status OK.
        ok: bool,
    },
    /// A node is left behind: it cannot be reached, or holds up the others.
    Dropped(VoterId),
    /// A node has ended the write.
    Stopped,
    /// The ticket is held.
    Ticketed {
        /// Storages that may go on.
        participants: &'e [String],
        /// How many of them must agree.
        quorum: usize,
    },
    /// The ticket is not to be had.
    TicketRefused,
    /// The write is recorded.
    Recorded,
    /// It could not be.
    NotRecorded,
    /// Time has passed.
    Tick,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Answers the vote that a voter waits with.
    Answer(VoterId, Verdict),
    /// Resets a voter's part of the RPC: it was too late.
    Drop(VoterId),
    /// Takes the ticket.
    TakeTicket,
    /// Records the write as done by these.
    Record(Vec<VoterId>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    TakesPart,
    /// Its part of the RPC ended with OK.
    Ended,
    /// Out, and what it is told if it asks.
    Out(Verdict),
}

#[derive(Debug)]
struct Voter {
    storage: Arc<str>,
    grace: Duration,
    standing: Standing,
    /// The subtransaction of its next vote.
    next: usize,
    waits: bool,
    /// Its part of the RPC failed by itself.
    failed: bool,
    words: Words,
    /// What it voted for on a repository that is made.
    made: Vec<[u8; BALLOT_BYTES]>,
}

impl Voter {
    fn takes_part(&self) -> bool {
        self.standing == Standing::TakesPart
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// `since`: enough others wait for the primary alone.
    Open {
        since: Option<Instant>,
    },
    Agreed {
        ballot: Ballot,
        at: Instant,
        released: bool,
    },
    Refused,
}

#[derive(Debug)]
struct Subtransaction {
    ballots: Vec<Option<Ballot>>,
    state: State,
}

/// The votes of one write.
#[derive(Debug)]
pub(crate) struct Transaction {
    voters: Vec<Voter>,
    subtransactions: Vec<Subtransaction>,
    quorum: usize,
    /// The repository is being made.
    creates: bool,
    safety: Safety,
    started: Instant,
    ticket: Ticket,
    record: Record,
    /// Until when the intent is ours for certain.
    lease: Option<Instant>,
    /// When the primary ceased to take part.
    primary_gone: Option<Instant>,
    actions: Vec<Action>,
}

impl Transaction {
    /// Nobody has voted. `voters`: storages with their grace, the primary first; `quorum`: how many of them must agree.
    pub(crate) fn new(
        voters: impl IntoIterator<Item = (Arc<str>, Duration)>,
        quorum: usize,
        ticket: Ticket,
        safety: Safety,
        now: Instant,
    ) -> Self {
        let voter = |(storage, grace)| Voter {
            storage,
            grace,
            standing: Standing::TakesPart,
            next: 0,
            waits: false,
            failed: false,
            words: Words::default(),
            made: Vec::new(),
        };
        Self {
            voters: voters.into_iter().map(voter).collect(),
            subtransactions: Vec::new(),
            quorum: if safety.quorum { quorum.max(1) } else { 1 },
            creates: false,
            safety,
            started: now,
            ticket,
            record: Record::None,
            lease: None,
            primary_gone: None,
            actions: Vec::new(),
        }
    }

    /// Of a repository that is being made only the moments of the votes have to agree. Nodes of different versions vote on
    /// different things of it, and none has anything to lose yet: those that voted differently are compared at the end.
    pub(crate) fn creating(mut self) -> Self {
        self.creates = true;
        self
    }

    /// The voter of a storage.
    pub(crate) fn voter(&self, storage: &str) -> Option<VoterId> {
        self.voters.iter().position(|voter| &*voter.storage == storage)
    }

    /// It has a vote that is not answered.
    pub(crate) fn waits(&self, voter: VoterId) -> bool {
        self.voters[voter].waits
    }

    /// It may still be told to go on.
    pub(crate) fn takes_part(&self, voter: VoterId) -> bool {
        self.voters[voter].takes_part()
    }

    /// It has cast at least one vote.
    pub(crate) fn has_voted(&self, voter: VoterId) -> bool {
        self.subtransactions.first().is_some_and(|first| first.ballots[voter].is_some())
    }

    /// Nobody has voted, nor ended the write.
    pub(crate) fn is_untouched(&self) -> bool {
        let stopped = |voter: &Voter| voter.standing == Standing::Out(Verdict::Stop);
        self.subtransactions.is_empty() && !self.voters.iter().any(stopped)
    }

    /// The ticket was taken.
    pub(crate) fn is_ticketed(&self) -> bool {
        self.ticket == Ticket::Held
    }

    /// Somebody was told to go on with a change.
    pub(crate) fn may_be_applied(&self) -> bool {
        self.last_change().is_some()
    }

    /// The intent is ours until then.
    pub(crate) fn leased_until(&mut self, until: Instant) {
        self.lease = Some(until);
    }

    /// Takes an event in; answers what is to be done.
    pub(crate) fn handle(&mut self, event: Event<'_>, now: Instant) -> Vec<Action> {
        match event {
            Event::Voted(voter, ballot) => self.cast(voter, ballot),
            Event::Withdrawn(voter) if !self.voters[voter].waits => {}
            Event::Withdrawn(voter) => {
                self.voters[voter].waits = false;
                self.out(voter, Verdict::Cancelled);
            }
            Event::Dropped(voter) => self.out(voter, Verdict::Cancelled),
            Event::Ended { voter, ok } => {
                self.voters[voter].failed |= !ok && self.voters[voter].takes_part();
                if ok && self.voters[voter].takes_part() && !self.voters[voter].waits {
                    self.voters[voter].standing = Standing::Ended;
                } else {
                    self.out(voter, Verdict::Cancelled);
                }
            }
            Event::Stopped => {
                self.voters[PRIMARY].words.stop();
                self.all_out(Verdict::Stop);
            }
            Event::Ticketed { participants, quorum } => self.ticketed(participants, quorum),
            Event::TicketRefused => self.all_out(Verdict::Abort),
            Event::Recorded => self.record = Record::Done,
            Event::NotRecorded => {
                self.record = Record::Done;
                self.all_out(Verdict::Cancelled);
            }
            Event::Tick => self.tick(now),
        }
        loop {
            let before = self.actions.len();
            self.judge(now);
            if !self.voters[PRIMARY].takes_part() {
                self.primary_gone.get_or_insert(now);
            }
            if self.actions.len() == before {
                return std::mem::take(&mut self.actions);
            }
        }
    }

    fn cast(&mut self, voter: VoterId, ballot: Ballot) {
        // Also of one that is out: what it says of itself is true all the same.
        self.voters[voter].words.hear(ballot);
        match self.voters[voter].standing {
            Standing::TakesPart => {}
            Standing::Ended => return self.actions.push(Action::Answer(voter, Verdict::Cancelled)),
            Standing::Out(verdict) => return self.actions.push(Action::Answer(voter, verdict)),
        }
        if ballot.phase == Phase::Preparing {
            return self.actions.push(Action::Answer(voter, Verdict::Commit));
        }
        self.voters[voter].waits = true;
        if self.record == Record::Done && ballot.permits_change() {
            return self.out(voter, Verdict::Abort);
        }
        let index = self.voters[voter].next;
        if index == self.subtransactions.len() {
            let ballots = vec![None; self.voters.len()];
            self.subtransactions.push(Subtransaction { ballots, state: State::Open { since: None } });
        }
        let counted = if self.creates && !ballot.is_final() {
            self.voters[voter].made.push(ballot.value);
            Ballot { value: ANY_REPOSITORY, ..ballot }
        } else {
            ballot
        };
        self.subtransactions[index].ballots[voter] = Some(counted);
    }

    fn out(&mut self, voter: VoterId, verdict: Verdict) {
        let who = &mut self.voters[voter];
        if matches!(who.standing, Standing::Out(_)) {
            return;
        }
        who.standing = Standing::Out(verdict);
        if std::mem::take(&mut who.waits) {
            self.actions.push(Action::Answer(voter, verdict));
        }
    }

    fn all_out(&mut self, verdict: Verdict) {
        for voter in 0..self.voters.len() {
            if self.voters[voter].takes_part() {
                self.out(voter, verdict);
            }
        }
    }

    fn ticketed(&mut self, participants: &[String], quorum: usize) {
        self.ticket = Ticket::Held;
        self.quorum = if self.safety.quorum { quorum.max(1) } else { 1 };
        for voter in 0..self.voters.len() {
            if !participants.iter().any(|storage| **storage == *self.voters[voter].storage) {
                self.out(voter, Verdict::Cancelled);
            }
        }
    }

    /// One pass over all subtransactions.
    fn judge(&mut self, now: Instant) {
        for index in 0..self.subtransactions.len() {
            if let State::Open { .. } = self.subtransactions[index].state {
                self.count(index, now);
            }
            match self.subtransactions[index].state {
                State::Open { .. } => {}
                State::Refused => self.refuse_at(index),
                State::Agreed { ballot, released: true, .. } => self.compare(index, ballot, now),
                State::Agreed { ballot, .. } => self.try_release(index, ballot, now),
            }
        }
    }

    /// Those whose vote would still count and has not come.
    fn pending(&self, index: usize) -> usize {
        let ballots = &self.subtransactions[index].ballots;
        self.voters
            .iter()
            .zip(ballots)
            .filter(|(voter, ballot)| voter.takes_part() && ballot.is_none())
            .count()
    }

    fn counted(&self, index: usize, voter: VoterId) -> Option<Ballot> {
        self.subtransactions[index].ballots[voter].filter(|_| self.voters[voter].takes_part())
    }

    fn support(&self, index: usize, ballot: Ballot) -> usize {
        (0..self.voters.len()).filter(|voter| self.counted(index, *voter) == Some(ballot)).count()
    }

    /// The ballot that most of those who have changed their refs have cast, the first of equals.
    fn most_committed(&self, index: usize) -> Option<(Ballot, usize)> {
        let ballots = (0..self.voters.len()).filter_map(|voter| self.counted(index, voter));
        let committed = ballots.filter(|ballot| ballot.phase == Phase::Committed);
        committed
            .map(|ballot| (ballot, self.support(index, ballot)))
            .reduce(|best, next| if next.1 > best.1 { next } else { best })
    }

    fn count(&mut self, index: usize, now: Instant) {
        let pending = self.pending(index);
        let primary = &self.voters[PRIMARY];
        let waits_for_primary = primary.takes_part() && self.counted(index, PRIMARY).is_none();
        let (leader, may_change) = if let Some(ballot) = self.counted(index, PRIMARY) {
            (Some((ballot, self.support(index, ballot))), true)
        } else if waits_for_primary {
            let best = (0..self.voters.len())
                .filter_map(|voter| self.counted(index, voter))
                .map(|ballot| (ballot, self.support(index, ballot)))
                .max_by_key(|(_, support)| *support);
            (best, false)
        } else if matches!(primary.standing, Standing::Out(_)) && self.ticket == Ticket::Held {
            (self.most_committed(index), true)
        } else {
            (None, true)
        };
        let support = leader.map_or(0, |(_, support)| support);
        let committed = leader.is_some_and(|(ballot, _)| ballot.phase == Phase::Committed);
        let open = &mut self.subtransactions[index].state;
        *open = match leader {
            Some((ballot, _)) if may_change && support >= self.quorum => {
                State::Agreed { ballot, at: now, released: false }
            }
            // Nobody who is left could make it a quorum; without the primary only a change that has happened counts.
            None if !waits_for_primary => State::Refused,
            _ if support + pending < self.quorum => State::Refused,
            _ => {
                let State::Open { since } = *open else { return };
                let alone = waits_for_primary && committed && support >= self.quorum;
                State::Open { since: alone.then(|| since.unwrap_or(now)) }
            }
        };
    }

    /// Whoever has come as far as a subtransaction that was refused is out.
    fn refuse_at(&mut self, index: usize) {
        for voter in 0..self.voters.len() {
            if self.voters[voter].takes_part() && self.voters[voter].next == index {
                self.out(voter, Verdict::Abort);
            }
        }
    }

    fn try_release(&mut self, index: usize, ballot: Ballot, now: Instant) {
        // Who votes differently will not go on whatever happens next.
        for voter in 0..self.voters.len() {
            if self.counted(index, voter).is_some_and(|other| other != ballot) {
                self.out(voter, Verdict::Abort);
            }
        }
        if self.safety.ticket && !ballot.is_final() {
            match self.ticket {
                Ticket::Held => {}
                Ticket::Asked => return self.still_agreed(index, ballot),
                Ticket::Wanted => {
                    self.still_agreed(index, ballot);
                    if self.pending(index) == 0 && self.voters[PRIMARY].takes_part() {
                        self.ticket = Ticket::Asked;
                        self.actions.push(Action::TakeTicket);
                    }
                    return;
                }
            }
        }
        if !self.safety.ticket && self.ticket == Ticket::Wanted {
            self.ticket = Ticket::Asked;
            self.actions.push(Action::TakeTicket);
        }
        if self.safety.record && ballot.waits_for_record() {
            match (self.record, self.last_change()) {
                (Record::None, Some(last)) if self.tells_change(last) => return self.try_record(last),
                (Record::Asked, _) => return,
                _ => {}
            }
        }
        if ballot.phase != Phase::Committed {
            self.still_agreed(index, ballot);
        }
        if self.fenced(now) {
            return self.all_out(Verdict::Cancelled);
        }
        if let State::Agreed { released, .. } = &mut self.subtransactions[index].state {
            *released = true;
            self.compare(index, ballot, now);
        }
    }

    /// What was agreed while an answer was held back may not be any more.
    fn still_agreed(&mut self, index: usize, ballot: Ballot) {
        let primary = self.counted(index, PRIMARY) == Some(ballot);
        if self.record != Record::Done && !(primary && self.support(index, ballot) >= self.quorum) {
            self.subtransactions[index].state = State::Refused;
            self.refuse_at(index);
        }
    }

    fn try_record(&mut self, last: usize) {
        let behind = |voter: &Voter| voter.takes_part() && voter.next <= last;
        if self.voters.iter().any(behind) {
            return;
        }
        let holders = self.holders(last + 1, true);
        if holders.len() >= self.quorum {
            self.record = Record::Asked;
            self.actions.push(Action::Record(holders));
        } else {
            self.all_out(Verdict::Cancelled);
        }
    }

    /// Answers those who wait at a subtransaction that was agreed and released.
    fn compare(&mut self, index: usize, agreed: Ballot, now: Instant) {
        for voter in 0..self.voters.len() {
            let who = &self.voters[voter];
            if !who.waits || who.next != index {
                continue;
            }
            if self.subtransactions[index].ballots[voter] != Some(agreed) {
                self.out(voter, Verdict::Abort);
            } else if self.fenced(now) {
                return self.all_out(Verdict::Cancelled);
            } else {
                let who = &mut self.voters[voter];
                who.next += 1;
                who.waits = false;
                self.actions.push(Action::Answer(voter, Verdict::Commit));
            }
        }
    }

    /// Somebody else may settle the write by now.
    fn fenced(&self, now: Instant) -> bool {
        self.safety.fence
            && self.ticket == Ticket::Held
            && self.record != Record::Done
            && self.lease.is_some_and(|until| now >= until)
    }

    fn agreed(&self, index: usize) -> Option<(Ballot, bool)> {
        match self.subtransactions[index].state {
            State::Agreed { ballot, released, .. } => Some((ballot, released)),
            _ => None,
        }
    }

    fn tells_change(&self, index: usize) -> bool {
        self.agreed(index).is_some_and(|(ballot, _)| ballot.tells_change())
    }

    /// The last subtransaction after which somebody has changed something, or was allowed to.
    fn last_change(&self) -> Option<usize> {
        (0..self.subtransactions.len()).rev().find(|index| {
            self.agreed(*index).is_some_and(|(ballot, released)| {
                ballot.tells_change() || (ballot.permits_change() && released)
            })
        })
    }

    /// Voters that cast what was agreed in each of the first `count` subtransactions. `sound`: and whose part of the RPC
    /// did not fail by itself.
    fn holders(&self, count: usize, sound: bool) -> Vec<VoterId> {
        let holds = |voter: &VoterId| {
            (0..count).all(|index| {
                let ballot = self.subtransactions[index].ballots[*voter];
                ballot.is_some() && ballot == self.agreed(index).map(|(ballot, _)| ballot)
            })
        };
        (0..self.voters.len())
            .filter(|voter| !(sound && self.voters[*voter].failed && *voter != PRIMARY))
            .filter(holds)
            .collect()
    }

    /// Voters that kept up with the others until now.
    pub(crate) fn on_time(&self) -> impl Iterator<Item = VoterId> {
        let on_time = |voter: &VoterId| {
            !matches!(self.voters[*voter].standing, Standing::Out(_)) && self.has_voted(*voter)
        };
        (1..self.voters.len()).filter(on_time)
    }

    /// When a voter is waited for no longer, with the voter.
    fn deadlines(&self) -> Vec<(Instant, VoterId)> {
        if self.record == Record::Done {
            return Vec::new();
        }
        let mut deadlines = Vec::new();
        for (index, subtransaction) in self.subtransactions.iter().enumerate() {
            match subtransaction.state {
                State::Agreed { at, .. } => {
                    let early = match self.ticket {
                        Ticket::Held => Duration::ZERO,
                        _ => (at.saturating_duration_since(self.started) / 10).min(EARLY_GRACE_CAP),
                    };
                    for (id, voter) in self.voters.iter().enumerate().skip(1) {
                        if voter.takes_part() && voter.next <= index && subtransaction.ballots[id].is_none() {
                            deadlines.push((at + voter.grace.max(early), id));
                        }
                    }
                }
                State::Open { since: Some(since) } => deadlines.push((since + PRIMARY_GRACE, PRIMARY)),
                State::Open { since: None } | State::Refused => {}
            }
        }
        if let Some(gone) = self.primary_gone.filter(|_| self.ticket == Ticket::Held) {
            let ended = self.voters[PRIMARY].standing == Standing::Ended;
            for (id, voter) in self.voters.iter().enumerate() {
                if voter.takes_part() {
                    deadlines.push((gone + if ended { voter.grace } else { PRIMARY_GRACE }, id));
                }
            }
        }
        deadlines
    }

    /// When [`Event::Tick`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadlines().into_iter().map(|(at, _)| at).min()
    }

    fn tick(&mut self, now: Instant) {
        for (at, voter) in self.deadlines() {
            if now >= at && self.voters[voter].takes_part() {
                self.actions.push(Action::Drop(voter));
                self.out(voter, Verdict::Cancelled);
            }
        }
    }
}
