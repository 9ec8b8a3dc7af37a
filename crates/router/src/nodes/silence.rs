//! A node that did not answer a read for so long that another one was asked is left alone for a moment.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use crate::limits::SILENCE_REST;

/// Until when it is left alone.
#[derive(Debug)]
pub(super) struct Silence {
    base: Instant,
    /// Milliseconds after `base`; 0: it is not.
    until: AtomicU64,
}

impl Default for Silence {
    fn default() -> Self {
        Self { base: Instant::now(), until: AtomicU64::new(0) }
    }
}

impl Silence {
    fn at(&self, instant: Instant) -> u64 {
        u64::try_from(instant.saturating_duration_since(self.base).as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn begins(&self) {
        self.until.store(self.at(Instant::now() + SILENCE_REST), Ordering::Relaxed);
    }

    pub(super) fn ends(&self) {
        // Most of the time nothing is written, so that workers do not take turns at the memory.
        if self.until.load(Ordering::Relaxed) != 0 {
            self.until.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn lasts(&self) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until != 0 && self.at(Instant::now()) < until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_ends_it() {
        let silence = Silence::default();
        assert!(!silence.lasts());
        silence.begins();
        assert!(silence.lasts());
        silence.ends();
        assert!(!silence.lasts());
    }
}
