//! One vote, and what hangs on it.

/// Bytes of a vote: a SHA-1 of what the node is about to do.
pub(crate) const BALLOT_BYTES: usize = 20;

/// The vote before the hook that is asked about one reference: the SHA-1 of `synchronize update hook`. In a push that is not
/// atomic it stands before each reference, so that it follows the change of the one before.
pub(super) const BEFORE_UPDATE_HOOK: [u8; BALLOT_BYTES] = [
    0x95, 0x90, 0x87, 0xc3, 0x0d, 0x48, 0x3e, 0x52, 0xb9, 0xe8, 0x57, 0x4a, 0x4b, 0xd5, 0x8c, 0x4c, 0xd7,
    0x07, 0x06, 0x92,
];

/// The vote before the hooks that tell others of a push: the SHA-1 of `synchronize post-receive hook`. Git and Gitaly run
/// them only when something has changed.
pub(super) const BEFORE_LAST_HOOKS: [u8; BALLOT_BYTES] = [
    0x17, 0x70, 0x9b, 0xa9, 0xf2, 0x6e, 0xcc, 0x0b, 0x01, 0x09, 0xe3, 0x01, 0x5e, 0xd9, 0xe8, 0x24, 0x79,
    0x28, 0x41, 0xfb,
];

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

    /// Whoever is told to go on after it changes nothing more, and may tell others of what was changed.
    pub(super) fn waits_for_record(self) -> bool {
        self.phase == Phase::Synchronized && self.value != BEFORE_UPDATE_HOOK
    }

    /// Whoever casts it has come to the hooks that follow a change.
    pub(super) fn follows_change(self) -> bool {
        self.phase == Phase::Synchronized && self.value == BEFORE_LAST_HOOKS
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
