//! What becomes of duties: how often and how long a failing one is tried, when a worker may take one over, which replica a
//! copy is made from, and what follows a round of it. Nothing here asks or waits.

use std::time::Duration;

use rand::{Rng, seq::IndexedRandom as _};
use tabularium_common::ids::{Epoch, Generation, StorageName};

use crate::{
    config::Timing,
    repair_config::RepairConfig,
    repository::{Replica, Repository},
};

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

/// Decides about a duty that is with a worker since `age`. One that is held under a lease is given away when `lease_over`,
/// and no sooner. Of others: the bus hands a message on when its worker has been silent
/// for [`tabularium_common::duties::ACK_WAIT`], so a younger one is a stray message, also when it is the same worker that
/// asks: two runs of one copy at once would let the end of the first vouch for what the second still does.
pub(crate) fn hand_over(age: Duration, lease_over: Option<bool>) -> Handover {
    let given_up = lease_over.unwrap_or(age >= tabularium_common::duties::ACK_WAIT);
    if given_up { Handover::Give } else { Handover::Wait }
}

/// The replica to copy from: the newest there is. Healthy before others, then those from which no copy has failed yet, then
/// those that are not busy being the primary. `None` when the target has all there is.
pub(crate) fn source<'a>(
    repository: &'a Repository,
    target: &StorageName,
    avoid: &[StorageName],
    healthy: impl Fn(&StorageName) -> bool,
    rng: &mut impl Rng,
) -> Option<&'a Replica> {
    let has = repository.replica(target)?.generation;
    let newest = repository.replicas.iter().map(|replica| replica.generation).max()?;
    if has >= newest {
        return None;
    }
    let rank = |replica: &Replica| {
        (!healthy(&replica.storage), avoid.contains(&replica.storage), replica.storage == repository.primary)
    };
    let candidates = || repository.replicas.iter().filter(|replica| replica.generation == newest);
    let best = candidates().map(rank).min()?;
    let equals: Vec<_> = candidates().filter(|replica| rank(replica) == best).collect();
    equals.choose(rng).copied()
}

/// Another replica that has what the source has, against which it can be checked: the primary if it can be.
pub(crate) fn witness<'a>(
    repository: &'a Repository,
    source: &StorageName,
    healthy: impl Fn(&StorageName) -> bool,
) -> Option<&'a StorageName> {
    repository
        .up_to_date()
        .filter(|storage| *storage != source && healthy(storage))
        .min_by_key(|storage| **storage != repository.primary)
}

/// Whether a source that turned out bad may be taken out of service: others that are well go on without it.
pub(crate) fn may_be_doubted(
    repository: &Repository,
    storage: &StorageName,
    healthy: impl Fn(&StorageName) -> bool,
) -> bool {
    let others: Vec<_> =
        repository.up_to_date().filter(|other| *other != storage && healthy(other)).collect();
    others.contains(&&repository.primary) && others.len() >= repository.quorum()
}

/// Who holds a repository's write ticket, as a copy sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ticket {
    Free,
    /// The copy itself.
    Ours,
    /// A write, or another copy.
    Others,
}

/// A round of a copy that is over, and how things stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RoundEnd {
    /// What was copied: as it was read before the round.
    pub(crate) copied: (Generation, Epoch),
    /// What there is.
    pub(crate) present: (Generation, Epoch),
    pub(crate) ticket: Ticket,
    /// The source still counts as holding what was copied.
    pub(crate) source_stands: bool,
    pub(crate) took: Duration,
    /// Rounds since the worker began, this one included.
    pub(crate) rounds: u32,
    /// Tickets given back unused since then.
    pub(crate) tickets_lost: u32,
    /// The ticket was asked for after this round; whether or not it was got shows in `ticket`.
    pub(crate) asked: bool,
}

/// What follows a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AfterRound {
    /// The copy is up to date.
    Promote,
    /// Another round while writes go on.
    Again,
    /// The ticket is asked for.
    AskTicket,
    /// Another round, under the ticket that is held.
    UnderTicket,
    /// Others are to have the worker: the rest is owed anew.
    Rest,
}

/// Decides. A copy is up to date when nothing can have been written since the round began: generation and epoch are what
/// they were, and no write is under way whose traces it may hold.
pub(crate) fn after_round(end: &RoundEnd, config: &RepairConfig) -> AfterRound {
    let still = end.copied == end.present && end.source_stands;
    match end.ticket {
        Ticket::Free | Ticket::Ours if still => AfterRound::Promote,
        Ticket::Ours if end.asked => AfterRound::UnderTicket,
        _ if end.rounds >= config.most_rounds => AfterRound::Rest,
        // What was copied from does not stand any more; others may write while that is copied from elsewhere.
        Ticket::Ours => AfterRound::Again,
        // Every ticket that was not enough is followed by one more round without.
        _ if !end.asked
            && end.took <= config.short_round.0
            && end.rounds > end.tickets_lost.saturating_mul(2) =>
        {
            AfterRound::AskTicket
        }
        _ => AfterRound::Again,
    }
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
        assert_eq!(hand_over(Duration::ZERO, None), Handover::Wait);
        assert_eq!(hand_over(wait / 2, None), Handover::Wait);
        assert_eq!(hand_over(wait, None), Handover::Give);
        assert_eq!(hand_over(wait * 100, Some(false)), Handover::Wait, "its lease is what counts");
        assert_eq!(hand_over(Duration::ZERO, Some(true)), Handover::Give);
    }

    #[test]
    fn the_source_is_the_newest_copy_and_spares_the_primary_if_it_can() {
        let mut rng = StdRng::seed_from_u64(1);
        let all = |_: &StorageName| true;
        let spread = repository(1, &[5, 5, 3]);
        let from = |avoid: &[StorageName], well: &[usize], rng: &mut StdRng| {
            let healthy = |storage: &StorageName| well.iter().any(|number| *storage == node(*number));
            source(&spread, &node(2), avoid, healthy, rng).unwrap().storage.clone()
        };
        assert_eq!(from(&[], &[0, 1, 2], &mut rng), node(0));
        assert_eq!(from(&[], &[1, 2], &mut rng), node(1), "health comes first");
        assert_eq!(from(&[node(0)], &[0, 1], &mut rng), node(1));
        assert_eq!(from(&[node(0), node(1)], &[0, 1], &mut rng), node(0), "all have failed: begin again");
        assert_eq!(from(&[], &[], &mut rng), node(0), "nobody is well: it is tried all the same");
        assert_eq!(source(&spread, &node(0), &[], all, &mut rng), None);
        assert_eq!(source(&spread, &node(7), &[], all, &mut rng), None);
        assert_eq!(witness(&spread, &node(0), all), Some(&node(1)));
        assert_eq!(witness(&repository(0, &[5, 3, 3]), &node(0), all), None);
    }

    #[test]
    fn a_bad_source_is_taken_out_only_while_enough_others_go_on() {
        let all = |_: &StorageName| true;
        assert!(may_be_doubted(&repository(0, &[5, 5, 5, 5, 3]), &node(1), all));
        assert!(!may_be_doubted(&repository(0, &[5, 5, 3]), &node(1), all), "one of three takes no writes");
        assert!(!may_be_doubted(&repository(0, &[5, 5, 5]), &node(0), all), "the primary");
        assert!(!may_be_doubted(&repository(0, &[5, 5, 5]), &node(1), |storage| *storage != node(0)));
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

        #[test]
        fn a_copy_is_up_to_date_only_when_nothing_can_have_been_written(end in round_end()) {
            let after = after_round(&end, &RepairConfig::default());
            let disturbed = end.copied != end.present || !end.source_stands || end.ticket == Ticket::Others;
            prop_assert_eq!(after == AfterRound::Promote, !disturbed);
            if after == AfterRound::UnderTicket {
                prop_assert_eq!(end.ticket, Ticket::Ours);
            }
            if end.asked {
                prop_assert!(after != AfterRound::AskTicket, "asked once after each round");
            }
        }

        /// Against a repository that is written to all the time: rounds copy what was there when they began, and writes come
        /// as often as `gap` says, unless the copy holds the ticket.
        #[test]
        fn a_copy_catches_up_with_a_repository_that_is_written_all_the_time(
            gap in 1_u64..400, fixed in 10_u64..900, each in 0_u64..60, behind in 0_u64..5000, refused in 0_u32..6,
        ) {
            // A copy that is slower than the writes never gets short; that is what the bound is for.
            prop_assume!(each * 2 < gap);
            let config = RepairConfig::default();
            let (mut clock, mut missing, mut tickets_refused) = (0_u64, behind, 0);
            for rounds in 1.. {
                prop_assert!(rounds < config.most_rounds, "after {clock} ms");
                let took = fixed + each * missing;
                clock += took;
                missing = took / gap + 1;
                let end = RoundEnd {
                    copied: (Generation(1), Epoch(0)),
                    present: (Generation(2), Epoch(0)),
                    ticket: Ticket::Others,
                    source_stands: true,
                    took: Duration::from_millis(took),
                    rounds,
                    tickets_lost: tickets_refused,
                    asked: false,
                };
                match after_round(&end, &config) {
                    AfterRound::AskTicket if tickets_refused < refused => tickets_refused += 1,
                    AfterRound::AskTicket => {
                        let got = RoundEnd { ticket: Ticket::Ours, asked: true, ..end };
                        prop_assert_eq!(after_round(&got, &config), AfterRound::UnderTicket);
                        let done = RoundEnd { copied: end.present, ticket: Ticket::Ours, ..end };
                        prop_assert_eq!(after_round(&done, &config), AfterRound::Promote);
                        break;
                    }
                    after => prop_assert_eq!(after, AfterRound::Again),
                }
            }
        }
    }

    fn round_end() -> impl Strategy<Value = RoundEnd> {
        let state =
            || (0_i64..3, 0_i64..3).prop_map(|(generation, epoch)| (Generation(generation), Epoch(epoch)));
        let ticket = prop_oneof![Just(Ticket::Free), Just(Ticket::Ours), Just(Ticket::Others)];
        (state(), state(), ticket, any::<bool>(), 0_u64..5000, 1_u32..200, 0_u32..5, any::<bool>()).prop_map(
            |(copied, present, ticket, source_stands, took, rounds, tickets_lost, asked)| RoundEnd {
                copied,
                present,
                ticket,
                source_stands,
                took: Duration::from_millis(took),
                rounds,
                tickets_lost,
                asked,
            },
        )
    }
}
