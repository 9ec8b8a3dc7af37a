//! How a message is settled on the bus, decided from what became of its work. Nothing here asks or waits.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelValue;
use tabularium_proto::coordinator::{
    FinishSyncResponse, finish_duty_response::Disposition, finish_sync_response::Next,
};

/// First and longest wait for a coordinator that cannot be reached.
const COORDINATOR_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Longest delay taken from a coordinator.
const MAX_DELAY: Duration = Duration::from_secs(3600);
/// Delay when the coordinator's answer holds none that can be used.
const DEFAULT_DELAY: Duration = Duration::from_secs(5);
/// When to look again for a sync that somebody else seems to be at.
const UNDER_WAY_DELAY: Duration = Duration::from_secs(10);
/// When a removal is first tried again that found its mirror being synced.
const REMOVAL_DELAY: Duration = Duration::from_secs(1);
/// When to look again for a home site that is not in the configuration.
const UNKNOWN_SITE_DELAY: Duration = Duration::from_secs(60);
/// After so many deliveries an event of an unknown home site is dropped.
const UNKNOWN_SITE_DELIVERIES: u64 = 60;

/// What the bus is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settlement {
    /// Done; forget it.
    Ack,
    /// Deliver again, to anybody, after this time.
    Nak(Duration),
    /// Never deliver again.
    Term,
}

/// How work ended: a label of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Outcome {
    /// Done and recorded.
    Done,
    /// There was nothing to do any more.
    Nothing,
    /// Failed, recorded, to be tried again.
    Retried,
    /// Failed too often; set aside by the coordinator.
    Parked,
    /// No coordinator took the call.
    CoordinatorLost,
    /// Another worker has it.
    UnderWay,
    /// The mirror may not be written.
    Refused,
    /// The body cannot be read.
    Undecodable,
    /// No such site is configured here.
    UnknownSite,
    /// Not finished when the service stopped.
    Abandoned,
    /// Its lease ran out: another worker has it, or will.
    LeaseLost,
    /// The worker panicked.
    Panicked,
}

/// How work ended and how its message is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) outcome: Outcome,
    pub(crate) settlement: Settlement,
}

impl Verdict {
    pub(crate) const NOTHING: Self = Self { outcome: Outcome::Nothing, settlement: Settlement::Ack };
    pub(crate) const UNDECODABLE: Self = Self { outcome: Outcome::Undecodable, settlement: Settlement::Term };
    pub(crate) const ABANDONED: Self =
        Self { outcome: Outcome::Abandoned, settlement: Settlement::Nak(Duration::ZERO) };
    pub(crate) const PANICKED: Self =
        Self { outcome: Outcome::Panicked, settlement: Settlement::Nak(DEFAULT_DELAY) };
    /// An answer of a later version, which we cannot act on: somebody newer may.
    pub(crate) const UNKNOWN_ANSWER: Self =
        Self { outcome: Outcome::Retried, settlement: Settlement::Nak(DEFAULT_DELAY) };
    /// Whoever has it now, or is to have it, has a message of its own.
    pub(crate) const LEASE_LOST: Self = Self { outcome: Outcome::LeaseLost, settlement: Settlement::Ack };
    pub(crate) const REFUSED: Self = Self { outcome: Outcome::Refused, settlement: Settlement::Ack };

    /// No coordinator took the call; `deliveries` counts this one. The wait doubles with each.
    pub(crate) fn coordinator_lost(deliveries: u64) -> Self {
        let (first, longest) = COORDINATOR_RETRY;
        let doublings = u32::try_from(deliveries.saturating_sub(1)).unwrap_or(u32::MAX);
        let delay = first.saturating_mul(2_u32.saturating_pow(doublings)).min(longest);
        Self { outcome: Outcome::CoordinatorLost, settlement: Settlement::Nak(delay) }
    }

    /// The coordinator's word on a finished duty.
    pub(crate) fn of_duty(disposition: Option<&Disposition>) -> Self {
        match disposition {
            Some(Disposition::Done(_)) => Self { outcome: Outcome::Done, settlement: Settlement::Ack },
            Some(Disposition::Retry(retry)) => {
                Self { outcome: Outcome::Retried, settlement: Settlement::Nak(delay(retry.delay.as_ref())) }
            }
            Some(Disposition::Parked(_)) => Self { outcome: Outcome::Parked, settlement: Settlement::Term },
            // Another round is for whoever copies, who never asks here.
            Some(Disposition::AnotherRound(_)) | None => Self::UNKNOWN_ANSWER,
        }
    }

    /// The coordinator's word on a finished sync.
    pub(crate) fn of_sync(response: &FinishSyncResponse) -> Self {
        match &response.next {
            Some(Next::Settled(_)) => Self { outcome: Outcome::Done, settlement: Settlement::Ack },
            Some(Next::Again(again)) => {
                Self { outcome: Outcome::Retried, settlement: Settlement::Nak(delay(again.delay.as_ref())) }
            }
            None => Self::UNKNOWN_ANSWER,
        }
    }

    /// Another worker holds the claim and has been told to look again. A first delivery is acknowledged. A repeated one
    /// may be what is left of that very worker's work, if it died: it is kept until the claim has run out. So is a
    /// `removal`: looking again is all that the other worker will do, and only the removal itself takes anything away.
    pub(crate) fn under_way(deliveries: u64, removal: bool) -> Self {
        let settlement = match (deliveries, removal) {
            (2.., _) => Settlement::Nak(UNDER_WAY_DELAY),
            (_, true) => Settlement::Nak(REMOVAL_DELAY),
            (_, false) => Settlement::Ack,
        };
        Self { outcome: Outcome::UnderWay, settlement }
    }

    /// The event names a home site that is not configured here: perhaps not yet, so it is kept for an hour.
    pub(crate) fn unknown_site(deliveries: u64) -> Self {
        let settlement = if deliveries < UNKNOWN_SITE_DELIVERIES {
            Settlement::Nak(UNKNOWN_SITE_DELAY)
        } else {
            Settlement::Term
        };
        Self { outcome: Outcome::UnknownSite, settlement }
    }

    /// Of two pieces of work behind one message: done only if both are, and again as soon as one wants.
    pub(crate) fn both(self, other: Self) -> Self {
        match (self.settlement, other.settlement) {
            (Settlement::Nak(one), Settlement::Nak(two)) => {
                if one <= two {
                    self
                } else {
                    other
                }
            }
            (Settlement::Nak(_), _) => self,
            (_, Settlement::Nak(_)) => other,
            (Settlement::Term, _) => self,
            (_, Settlement::Term) => other,
            (Settlement::Ack, Settlement::Ack) => {
                if self.outcome == Outcome::Done {
                    other
                } else {
                    self
                }
            }
        }
    }
}

fn delay(given: Option<&prost_types::Duration>) -> Duration {
    given
        .and_then(|delay| Duration::try_from(*delay).ok())
        .map_or(DEFAULT_DELAY, |delay| delay.min(MAX_DELAY))
}

#[cfg(test)]
mod tests {
    use tabularium_proto::coordinator::{DutyDone, DutyParked, DutyRetry, SyncAgain, SyncSettled};

    use super::*;

    fn duty(disposition: Option<&Disposition>) -> Settlement {
        Verdict::of_duty(disposition).settlement
    }

    fn retry(seconds: i64) -> Disposition {
        Disposition::Retry(DutyRetry { delay: Some(prost_types::Duration { seconds, nanos: 0 }) })
    }

    #[test]
    fn a_duty_is_settled_as_the_coordinator_says() {
        assert_eq!(duty(Some(&Disposition::Done(DutyDone {}))), Settlement::Ack);
        assert_eq!(duty(Some(&Disposition::Parked(DutyParked { attempts: 10 }))), Settlement::Term);
        assert_eq!(duty(Some(&retry(7))), Settlement::Nak(Duration::from_secs(7)));
        assert_eq!(duty(Some(&retry(1_000_000))), Settlement::Nak(MAX_DELAY));
        assert_eq!(duty(Some(&retry(-1))), Settlement::Nak(DEFAULT_DELAY));
        assert_eq!(
            duty(None),
            Settlement::Nak(DEFAULT_DELAY),
            "an answer we do not know is no acknowledgement"
        );
    }

    #[test]
    fn a_sync_is_settled_as_the_coordinator_says() {
        let sync = |next| Verdict::of_sync(&FinishSyncResponse { next }).settlement;
        assert_eq!(sync(Some(Next::Settled(SyncSettled {}))), Settlement::Ack);
        assert_eq!(sync(Some(Next::Again(SyncAgain { delay: None }))), Settlement::Nak(DEFAULT_DELAY));
        assert_eq!(sync(None), Settlement::Nak(DEFAULT_DELAY));
    }

    #[test]
    fn a_lost_coordinator_is_never_an_acknowledgement() {
        let delays: Vec<_> = [1, 2, 3, 6, 60, u64::MAX]
            .map(|deliveries| match Verdict::coordinator_lost(deliveries).settlement {
                Settlement::Nak(delay) => delay.as_secs(),
                other => panic!("{other:?}"),
            })
            .into();
        assert_eq!(delays, [1, 2, 4, 30, 30, 30]);
    }

    #[test]
    fn a_claim_of_somebody_who_may_be_dead_is_waited_for() {
        assert_eq!(Verdict::under_way(1, false).settlement, Settlement::Ack);
        assert!(matches!(Verdict::under_way(2, false).settlement, Settlement::Nak(_)));
        for deliveries in 1..4 {
            let removal = Verdict::under_way(deliveries, true).settlement;
            assert!(matches!(removal, Settlement::Nak(_)), "a removal is nobody else's work");
        }
        assert!(matches!(Verdict::unknown_site(59).settlement, Settlement::Nak(_)));
        assert_eq!(Verdict::unknown_site(60).settlement, Settlement::Term);
    }

    #[test]
    fn a_rename_is_done_when_both_halves_are() {
        let done = Verdict { outcome: Outcome::Done, settlement: Settlement::Ack };
        let soon = Verdict { outcome: Outcome::Retried, settlement: Settlement::Nak(Duration::from_secs(1)) };
        let late = Verdict { outcome: Outcome::Retried, settlement: Settlement::Nak(Duration::from_secs(9)) };
        assert_eq!(done.both(done), done);
        assert_eq!(done.both(Verdict::REFUSED), Verdict::REFUSED);
        assert_eq!(done.both(late), late);
        assert_eq!(late.both(done), late);
        assert_eq!(late.both(soon), soon);
        assert_eq!(soon.both(late), soon);
    }
}
