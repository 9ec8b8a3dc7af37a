//! What the votes of one node tell of the node itself.
//!
//! A node that does not vote on its change gives itself away: it ends a push that it never asked about, has come to the hooks
//! that follow a change, or comes to a good end after it announced one. So does a Gitaly whose hooks are missing: git takes
//! a hook that is not there for one that allows everything, while Gitaly goes on to cast what it casts itself.

use crate::votes::ballot::{Ballot, Phase};

#[derive(Debug, Default)]
pub(super) struct Words {
    any: bool,
    /// It has voted on a change, or ended the write.
    asked: bool,
    /// It speaks as one that has made a change, and has not asked.
    ahead: bool,
    /// Its last vote announces a change.
    announced: bool,
}

impl Words {
    pub(super) fn hear(&mut self, ballot: Ballot) {
        self.asked |= ballot.permits_change() || ballot.tells_change();
        let ends = !self.any && ballot.is_final();
        self.ahead |= !self.asked && (ends || ballot.follows_change());
        self.announced = ballot.phase == Phase::Preparing;
        self.any = true;
    }

    /// It has ended the write, which only the primary does, whose hooks refuse it. So it has hooks, and ends a push that it has
    /// not changed.
    pub(super) fn stop(&mut self) {
        self.asked = true;
    }

    /// It may have changed something without asking. `ended`: its part of the RPC came to a good end.
    pub(super) fn went_ahead(&self, ended: bool) -> bool {
        self.ahead || (ended && self.announced && !self.asked)
    }
}
