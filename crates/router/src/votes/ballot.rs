//! One vote, and what hangs on it.

/// Bytes of a vote: a SHA-1 of what the node is about to do.
pub(crate) const BALLOT_BYTES: usize = 20;

/// What a node is about to do, or has done, when it votes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    /// Not told.
    Unknown,
    /// Nothing is locked yet.
    Preparing,
    /// Locked, and ready to change.
    Prepared,
    /// Changed.
    Committed,
    /// A hook waits for the other nodes.
    Synchronized,
}

/// One vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Ballot {
    /// The moment of it.
    pub(crate) phase: Phase,
    /// The hash.
    pub(crate) value: [u8; BALLOT_BYTES],
}

impl Ballot {
    /// The vote that ends a push, all zero: nothing hangs on it.
    pub(super) fn is_final(self) -> bool {
        self.value == [0; BALLOT_BYTES]
    }

    /// Whoever is told to go on after it changes something.
    pub(super) fn permits_change(self) -> bool {
        matches!(self.phase, Phase::Prepared | Phase::Unknown)
    }

    /// Whoever casts it has changed something.
    pub(super) fn tells_change(self) -> bool {
        matches!(self.phase, Phase::Committed | Phase::Unknown) && !self.is_final()
    }
}
