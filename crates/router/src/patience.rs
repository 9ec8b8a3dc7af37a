//! How long a read waits for a node that is silent before another one is asked as well, and how often that may happen.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use crate::limits::{HEDGE_BURST, MAX_HEDGE_WAIT};

/// How many times what is usual a node may be silent.
const TIMES: u32 = 4;
/// What a read costs that is asked twice, in hundredths.
const WHOLE: u32 = 100;

/// How long answers to one method usually take to begin: a moving 0.99 expectile. It is like the 99th percentile, and
/// quick to learn that a method is slow.
#[derive(Debug, Default)]
pub(crate) struct Usual(AtomicU64);

impl Usual {
    /// An answer began after that long.
    pub(crate) fn observe(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let usual = self.0.load(Ordering::Relaxed);
        // Two that are observed at once may count as one.
        let next = if took > usual { usual + (took - usual) / 4 } else { usual - (usual - took) / 400 };
        self.0.store(next, Ordering::Relaxed);
    }

    /// How long a node may be silent, at least `floor`.
    pub(crate) fn patience(&self, floor: Duration) -> Duration {
        let usual = Duration::from_micros(self.0.load(Ordering::Relaxed));
        usual.saturating_mul(TIMES).min(MAX_HEDGE_WAIT).max(floor)
    }
}

/// The share of reads that may be asked twice, so that nodes that are slow because they have too much to do do not get
/// more. A few may always.
#[derive(Debug)]
pub(crate) struct Allowance {
    percent: u32,
    hundredths: AtomicU32,
}

impl Allowance {
    /// That many of a hundred.
    pub(crate) fn new(percent: u32) -> Self {
        let most = if percent == 0 { 0 } else { HEDGE_BURST * WHOLE };
        Self { percent, hundredths: AtomicU32::new(most) }
    }

    /// A read began.
    pub(crate) fn earn(&self) {
        let had = self.hundredths.load(Ordering::Relaxed);
        self.hundredths.store((had + self.percent).min(HEDGE_BURST * WHOLE), Ordering::Relaxed);
    }

    /// One may be asked twice now.
    pub(crate) fn spend(&self) -> bool {
        let spent =
            self.hundredths.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |had| had.checked_sub(WHOLE));
        spent.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_method_is_waited_for_longer_and_a_quick_one_at_least_the_floor() {
        let (usual, floor) = (Usual::default(), Duration::from_millis(100));
        assert_eq!(usual.patience(floor), floor);
        for _ in 0..20 {
            usual.observe(Duration::from_millis(200));
        }
        let patience = usual.patience(floor);
        assert!((700..=800).contains(&patience.as_millis()), "{patience:?}");
        usual.observe(Duration::from_secs(3600));
        assert_eq!(usual.patience(floor), MAX_HEDGE_WAIT);
    }

    #[test]
    fn one_answer_in_a_hundred_that_is_slow_counts() {
        let usual = Usual::default();
        for number in 0..2000 {
            usual.observe(Duration::from_millis(if number % 100 == 0 { 200 } else { 1 }));
        }
        let patience = usual.patience(Duration::ZERO);
        assert!((100..800).contains(&patience.as_millis()), "{patience:?}");
    }

    #[test]
    fn few_reads_are_asked_twice() {
        let allowance = Allowance::new(5);
        let burst = (0..1000).filter(|_| allowance.spend()).count();
        assert_eq!(burst, HEDGE_BURST as usize);
        let later = (0..1000)
            .filter(|_| {
                allowance.earn();
                allowance.spend()
            })
            .count();
        assert_eq!(later, 50);
        let none = Allowance::new(0);
        none.earn();
        assert!(!none.spend());
    }
}
