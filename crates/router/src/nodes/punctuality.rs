//! How long a node is waited for when it votes: less with every write in which it was late, more with every one in which
//! it was not. A node that is always slow holds up writes only for a moment; one that was slow once is forgiven.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::limits::VOTE_GRACE;

/// What is remembered of one node.
#[derive(Debug)]
pub(crate) struct Punctuality(AtomicU64);

impl Default for Punctuality {
    fn default() -> Self {
        Self(AtomicU64::new(milliseconds(VOTE_GRACE.0)))
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Punctuality {
    /// How long it is waited for.
    pub(crate) fn grace(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    /// It was late in a write.
    pub(crate) fn late(&self) {
        // Two writes that end at once may count as one; the next one makes up for it.
        let next = (self.0.load(Ordering::Relaxed) / 2).max(milliseconds(VOTE_GRACE.1));
        self.0.store(next, Ordering::Relaxed);
    }

    /// It was on time in a write.
    pub(crate) fn on_time(&self) {
        let next = (self.0.load(Ordering::Relaxed) * 2).min(milliseconds(VOTE_GRACE.0));
        self.0.store(next, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_always_late_is_hardly_waited_for_and_one_that_mends_is_again() {
        let punctuality = Punctuality::default();
        assert_eq!(punctuality.grace(), VOTE_GRACE.0);
        punctuality.late();
        assert_eq!(punctuality.grace(), VOTE_GRACE.0 / 2);
        for _ in 0..10 {
            punctuality.late();
        }
        assert_eq!(punctuality.grace(), VOTE_GRACE.1);
        for _ in 0..10 {
            punctuality.on_time();
        }
        assert_eq!(punctuality.grace(), VOTE_GRACE.0);
    }
}
