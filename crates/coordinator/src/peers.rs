//! Whose lease as a coordinator still stands: the judgement. No I/O, no clock of the database: a lease is over when no
//! heartbeat was seen for the length of one by our own clock. Whoever finds that removes the row it saw, and only that one,
//! so a heartbeat that comes after all is refused.

use std::{collections::HashMap, time::Duration};

use crate::leases::{Moment, with_drift};

/// What changes with every heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Beat(pub(crate) i64);

#[derive(Debug)]
struct Seen {
    beat: Beat,
    since: Moment,
}

/// The coordinators that were seen in the database.
#[derive(Debug)]
pub(crate) struct Peers {
    lease: Duration,
    seen: HashMap<String, Seen>,
}

impl Peers {
    /// `lease`: what a heartbeat is good for.
    pub(crate) fn new(lease: Duration) -> Self {
        Self { lease, seen: HashMap::new() }
    }

    /// All that are registered, as they were read at some time before `now`.
    pub(crate) fn listed<'a>(&mut self, now: Moment, rows: impl Iterator<Item = (&'a str, Beat)>) {
        let mut before = std::mem::take(&mut self.seen);
        for (id, beat) in rows {
            let known = before.remove(id).filter(|seen| seen.beat == beat);
            self.seen.insert(id.to_owned(), known.unwrap_or(Seen { beat, since: now }));
        }
    }

    /// How long the lease of one may still stand; zero: it is over.
    pub(crate) fn remaining(&self, now: Moment, id: &str) -> Duration {
        let since = self.seen.get(id).map(|seen| seen.since);
        since.map_or(Duration::ZERO, |since| (since + with_drift(self.lease)).saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(4);

    fn at(seconds: u64) -> Moment {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_lease_is_over_when_no_heartbeat_was_seen_for_its_length() {
        let mut peers = Peers::new(LEASE);
        peers.listed(at(10), [("a", Beat(1)), ("b", Beat(1))].into_iter());
        peers.listed(at(13), [("a", Beat(1)), ("b", Beat(0))].into_iter());
        assert_eq!(peers.remaining(at(13), "a") + at(3), with_drift(LEASE));
        assert_eq!(peers.remaining(at(13), "b"), with_drift(LEASE), "wherever the database's clock went");
        assert_eq!(peers.remaining(at(15), "a"), Duration::ZERO);
        assert!(peers.remaining(at(15), "b") > Duration::ZERO);
    }

    #[test]
    fn who_has_retired_is_not_waited_for() {
        let mut peers = Peers::new(LEASE);
        peers.listed(at(1), [("a", Beat(1))].into_iter());
        peers.listed(at(2), std::iter::empty());
        assert_eq!(peers.remaining(at(2), "a"), Duration::ZERO);
        peers.listed(at(60), [("a", Beat(1))].into_iter());
        assert_eq!(peers.remaining(at(60), "a"), with_drift(LEASE));
    }
}
