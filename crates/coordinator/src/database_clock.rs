//! Whether the database's clock goes like ours. Leases on writes end by the database's clock and are held by their holders'
//! own, so for as long as a lease no end is believed after the database's clock was stepped. No I/O: readings go in.

use std::time::Duration;

/// What the clocks may differ by over the length of a lease: one part in this many. Also what nobody can tell from a slow
/// answer.
const TOLERATED_PART: u32 = 20;

/// One look at both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reading {
    /// By our monotonic clock, before the database was asked, since any fixed moment.
    pub(crate) asked: Duration,
    /// The same when it had answered.
    pub(crate) answered: Duration,
    /// What the database's clock showed, in microseconds since the epoch.
    pub(crate) shown: i64,
}

/// Compares readings.
#[derive(Debug)]
pub(crate) struct DatabaseClock {
    lease: Duration,
    /// What later readings are compared with.
    anchor: Option<Reading>,
    /// What takes the anchor's place when that is a lease old.
    next: Option<Reading>,
}

impl DatabaseClock {
    /// `lease`: how long what is decided by the clock may depend on it.
    pub(crate) fn new(lease: Duration) -> Self {
        Self { lease, anchor: None, next: None }
    }

    /// Takes a reading in. True: the clock was stepped since the ones before, or goes much faster or slower than ours.
    pub(crate) fn stepped(&mut self, reading: Reading) -> bool {
        let Some(anchor) = self.anchor else {
            self.anchor = Some(reading);
            return false;
        };
        let least = micros(reading.asked.saturating_sub(anchor.answered));
        let most = micros(reading.answered.saturating_sub(anchor.asked));
        let tolerance = micros(self.lease / TOLERATED_PART);
        let shown = i128::from(reading.shown) - i128::from(anchor.shown);
        if shown < least - tolerance || shown > most + tolerance {
            self.anchor = Some(reading);
            self.next = None;
            return true;
        }
        // Clocks drift apart, and nobody is hurt by what adds up over many leases.
        let age = |of: Reading| reading.asked.saturating_sub(of.asked);
        match self.next {
            None => self.next = Some(reading),
            Some(next) if age(anchor) >= self.lease * 2 => {
                self.anchor = Some(next);
                self.next = Some(reading);
            }
            Some(_) => {}
        }
        false
    }
}

fn micros(length: Duration) -> i128 {
    i128::try_from(length.as_micros()).unwrap_or(i128::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEASE: Duration = Duration::from_secs(4);
    const START: i64 = 1_700_000_000_000_000;

    fn reading(asked_ms: u64, took_ms: u64, shown_ms: i64) -> Reading {
        Reading {
            asked: Duration::from_millis(asked_ms),
            answered: Duration::from_millis(asked_ms + took_ms),
            shown: START + shown_ms * 1000,
        }
    }

    #[test]
    fn a_step_is_seen_once_in_either_direction() {
        for step in [-3_600_000, -20_000, -300, 300, 20_000, 3_600_000] {
            let mut clock = DatabaseClock::new(LEASE);
            for beat in 0..100 {
                assert!(!clock.stepped(reading(beat * 250, 5, beat.cast_signed() * 250)), "{beat}");
            }
            let seen: Vec<bool> = (100..200)
                .map(|beat| clock.stepped(reading(beat * 250, 5, beat.cast_signed() * 250 + step)))
                .collect();
            assert_eq!(seen.iter().filter(|seen| **seen).count(), 1, "{step}");
            assert!(seen[0], "{step}");
        }
    }

    #[test]
    fn a_slow_answer_is_no_step() {
        let mut clock = DatabaseClock::new(LEASE);
        assert!(!clock.stepped(reading(0, 3000, 2900)));
        assert!(!clock.stepped(reading(3250, 3000, 3260)));
        assert!(!clock.stepped(reading(6500, 1, 6500)));
    }

    #[test]
    fn many_small_steps_in_one_lease_are_one_large_one() {
        let mut clock = DatabaseClock::new(LEASE);
        let seen = (0..16).any(|beat: u64| clock.stepped(reading(beat * 250, 1, beat.cast_signed() * 300)));
        assert!(seen);
    }

    proptest! {
        #[test]
        fn a_clock_that_drifts_like_clocks_do_is_believed(
            parts_in_a_million in -500_i64..500, pauses in prop::collection::vec((1_u64..20_000, 0_u64..2000), 1..200)
        ) {
            let mut clock = DatabaseClock::new(LEASE);
            let mut now = 0;
            for (pause, took) in pauses {
                now += pause;
                let moment = (now + took / 2).cast_signed();
                let shown = moment + moment * parts_in_a_million / 1_000_000;
                prop_assert!(!clock.stepped(reading(now, took, shown)), "at {now}");
                now += took;
            }
        }
    }
}
