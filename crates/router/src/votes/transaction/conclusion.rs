//! What is to be recorded of a write that has come to its end.
//!
//! Votes tell who has made the change that was agreed. They tell nothing of a node that did not ask: see
//! [`Transaction::is_unasked`].

use super::{PRIMARY, Record, Standing, Ticket, Transaction, Verdict, Voter, VoterId};

/// What is to be recorded of a write under a ticket that has come to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Conclusion {
    /// These have it.
    Commit(Vec<VoterId>),
    /// The primary went through without a single vote.
    Unvoted,
    /// Votes do not tell who has it: somebody may have changed something without asking about it, or the nodes voted
    /// differently on a repository that is made. These may have it, and what they hold says whether they do.
    Compare(Vec<VoterId>),
    /// Nobody was told to change anything.
    NotApplied,
    /// Some may have it.
    InDoubt,
}

impl Transaction {
    /// So many have it who have it on as many nodes as they must.
    pub(crate) fn is_quorum(&self, count: usize) -> bool {
        count >= self.quorum
    }

    /// The primary heard that the write was ended: what it answers is that it was refused, with status OK or not.
    pub(crate) fn primary_was_stopped(&self) -> bool {
        self.voters[PRIMARY].standing == Standing::Out(Verdict::Stop)
    }

    /// Somebody went ahead without asking.
    pub(crate) fn is_unasked(&self) -> bool {
        self.voters.iter().any(|voter| voter.words.went_ahead(voter.standing == Standing::Ended))
    }

    /// What is to be recorded, once nobody is to be waited for. `None` also when a record is made or being made already,
    /// or no ticket is held.
    pub(crate) fn conclusion(&self) -> Option<Conclusion> {
        if self.ticket != Ticket::Held || self.record != Record::None {
            return None;
        }
        let primary = &self.voters[PRIMARY];
        let ended = primary.standing == Standing::Ended;
        if primary.takes_part() {
            return None;
        }
        if ended && !self.has_voted(PRIMARY) && !self.is_unasked() {
            return Some(Conclusion::Unvoted);
        }
        let Some(last) = self.last_change() else {
            return self.conclusion_without_change();
        };
        let told = self.tells_change(last);
        let awaited = |voter: &Voter| voter.takes_part() && (voter.next <= last || !told);
        if self.voters.iter().any(awaited) {
            return None;
        }
        let mut holders = self.holders(last + 1, ended);
        if !told {
            // Ready to change is not changed; only a node that came to a good end has done it.
            holders.retain(|voter| self.voters[*voter].standing == Standing::Ended);
        }
        let enough = !holders.is_empty() && holders.len() >= self.quorum;
        let first = holders.first().map(|voter| &self.voters[*voter].made);
        let alike = holders.iter().all(|voter| Some(&self.voters[*voter].made) == first);
        Some(match (enough, alike) {
            (true, true) => Conclusion::Commit(holders),
            (true, false) if ended => Conclusion::Compare(holders),
            (true, false) | (false, _) => Conclusion::InDoubt,
        })
    }

    /// The same, when nobody was told to change anything.
    fn conclusion_without_change(&self) -> Option<Conclusion> {
        if !self.is_unasked() {
            // Gitaly 16 fetches first and votes then.
            let mut cast = self.subtransactions.iter().flat_map(|votes| votes.ballots.iter().flatten());
            let changed = cast.any(|ballot| ballot.tells_change());
            return Some(if changed { Conclusion::InDoubt } else { Conclusion::NotApplied });
        }
        if self.voters[PRIMARY].standing != Standing::Ended {
            return Some(Conclusion::InDoubt);
        }
        if self.voters.iter().any(Voter::takes_part) {
            return None;
        }
        let mut alike = self.holders(self.subtransactions.len(), true);
        alike.retain(|voter| self.voters[*voter].standing == Standing::Ended);
        let enough = alike.first() == Some(&PRIMARY) && self.is_quorum(alike.len());
        Some(if enough { Conclusion::Compare(alike) } else { Conclusion::InDoubt })
    }
}
