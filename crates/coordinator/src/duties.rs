//! How often and how long a failing duty is tried, when a worker may take one over, and which copy is the source.

use std::time::Duration;

use rand::{Rng, seq::IndexedRandom as _};
use tabularium_common::ids::StorageName;

use crate::{config::Timing, repository::Repository};

/// What follows a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AfterFailure {
    /// Again after `delay`; `failures` is what counts towards parking now.
    Retry { delay: Duration, failures: u32 },
    /// Set aside.
    Park { failures: u32 },
}

/// Decides after one more failure of a duty with `attempts` tries so far, this one included, of which `failures` counted.
/// An unreachable other end never counts: it comes back by itself, and then the work is wanted.
pub(crate) fn after_failure(
    attempts: u32,
    failures: u32,
    unreachable: bool,
    timing: &Timing,
    rng: &mut impl Rng,
) -> AfterFailure {
    let failures = if unreachable { failures } else { failures.saturating_add(1) };
    if !unreachable && failures >= timing.parked_after {
        return AfterFailure::Park { failures };
    }
    AfterFailure::Retry {
        delay: back_off(attempts, timing.retry_delay.0, timing.max_retry_delay.0, rng),
        failures,
    }
}

/// Doubles from `first` with every try up to `cap`, less up to a quarter so that retries do not march in step.
pub(crate) fn back_off(tries: u32, first: Duration, cap: Duration, rng: &mut impl Rng) -> Duration {
    let doublings = tries.saturating_sub(1).min(20);
    let full = first.saturating_mul(1 << doublings).min(cap);
    full.mul_f64(rng.random_range(0.75..=1.0))
}

/// What a worker that asks for a duty is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handover {
    /// It may have it.
    Give,
    /// Another worker has it and may be at it still: ask again later.
    Wait,
}

/// Decides about a duty that is with a worker since `age`. The bus hands a message on when its worker has been silent
/// for [`tabularium_common::duties::ACK_WAIT`], so a younger one is a stray message, also when it is the same worker that
/// asks: two runs of one copy at once would let the end of the first vouch for what the second still does.
pub(crate) fn hand_over(age: Duration) -> Handover {
    if age >= tabularium_common::duties::ACK_WAIT { Handover::Give } else { Handover::Wait }
}

/// The replica to copy from: the newest there is; the primary before others, healthy before others. `None` when the
/// target has all there is.
pub(crate) fn source<'a>(
    repository: &'a Repository,
    target: &StorageName,
    healthy: impl Fn(&StorageName) -> bool,
    rng: &mut impl Rng,
) -> Option<&'a crate::repository::Replica> {
    let has = repository.replica(target)?.generation;
    let newest = repository.replicas.iter().map(|replica| replica.generation).max()?;
    if has >= newest {
        return None;
    }
    let candidates: Vec<_> =
        repository.replicas.iter().filter(|replica| replica.generation == newest).collect();
    let well: Vec<_> = candidates.iter().copied().filter(|replica| healthy(&replica.storage)).collect();
    let pool = if well.is_empty() { &candidates } else { &well };
    pool.iter()
        .copied()
        .find(|replica| replica.storage == repository.primary)
        .or_else(|| pool.choose(rng).copied())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::failover::tests::{node, repository};

    #[test]
    fn what_cannot_be_reached_is_never_given_up() {
        let timing = Timing::default();
        let mut rng = StdRng::seed_from_u64(1);
        assert!(matches!(
            after_failure(1_000_000, 9, true, &timing, &mut rng),
            AfterFailure::Retry { failures: 9, .. }
        ));
        assert!(matches!(
            after_failure(9, 8, false, &timing, &mut rng),
            AfterFailure::Retry { failures: 9, .. }
        ));
        assert_eq!(after_failure(10, 9, false, &timing, &mut rng), AfterFailure::Park { failures: 10 });
    }

    #[test]
    fn a_duty_is_taken_over_only_from_a_silent_worker() {
        let wait = tabularium_common::duties::ACK_WAIT;
        assert_eq!(hand_over(Duration::ZERO), Handover::Wait);
        assert_eq!(hand_over(wait / 2), Handover::Wait);
        assert_eq!(hand_over(wait), Handover::Give);
    }

    #[test]
    fn the_source_is_the_newest_copy_and_the_primary_if_it_can_be() {
        let mut rng = StdRng::seed_from_u64(1);
        let all = |_: &StorageName| true;
        let spread = repository(1, &[5, 5, 3]);
        assert_eq!(source(&spread, &node(2), all, &mut rng).unwrap().storage, node(1));
        let well = |storage: &StorageName| *storage == node(0);
        assert_eq!(source(&spread, &node(2), well, &mut rng).unwrap().storage, node(0));
        assert_eq!(source(&spread, &node(0), all, &mut rng), None);
        assert_eq!(source(&spread, &node(7), all, &mut rng), None);
    }

    proptest! {
        #[test]
        fn delays_grow_within_bounds(tries in 0_u32..100, seed in any::<u64>()) {
            let (first, cap) = (Duration::from_millis(500), Duration::from_secs(30));
            let delay = back_off(tries, first, cap, &mut StdRng::seed_from_u64(seed));
            prop_assert!(delay <= cap);
            prop_assert!(delay >= first.mul_f64(0.75));
            if tries > 8 {
                prop_assert!(delay >= cap.mul_f64(0.75));
            }
        }
    }
}
