//! What `coordinator.toml` says about looking through objects.

use std::time::Duration;

use serde::Deserialize;
use tabularium_common::config::{ConfigDuration, Fault};

/// How often git looks through the objects of replicas, beside what operators ask for.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FsckConfig {
    /// Each replica once in this time, if `share_percent` allows it.
    pub every: ConfigDuration,
    /// How much of its time a storage spends on it, in percent; 0: none.
    pub share_percent: u32,
    /// How often it is looked whether a storage has a replica that is due.
    pub interval: ConfigDuration,
    /// Longest look through one replica.
    pub limit: ConfigDuration,
    /// How long after a replica could not be looked through it is tried again.
    pub retry_after: ConfigDuration,
}

impl Default for FsckConfig {
    fn default() -> Self {
        Self {
            every: ConfigDuration::from_secs(30 * 24 * 3600),
            share_percent: 10,
            interval: ConfigDuration::from_secs(60),
            limit: ConfigDuration::from_secs(2 * 3600),
            retry_after: ConfigDuration::from_secs(3600),
        }
    }
}

/// Longest time a node can be told.
const LONGEST: ConfigDuration = ConfigDuration::from_secs(24 * 3600);

impl FsckConfig {
    pub(crate) fn faults(&self) -> Vec<Fault> {
        let shortest = ConfigDuration::from_millis(10);
        let lengths = [
            ("every", self.every),
            ("interval", self.interval),
            ("limit", self.limit),
            ("retry_after", self.retry_after),
        ];
        let short = lengths.into_iter().filter(|(_, length)| *length < shortest);
        let mut faults: Vec<Fault> =
            short.map(|(key, length)| Fault::new(format!("fsck.{key}"), length, "10ms or more")).collect();
        if self.limit > LONGEST {
            faults.push(Fault::new("fsck.limit", self.limit, "24h or less"));
        }
        if self.share_percent > 100 {
            faults.push(Fault::new("fsck.share_percent", self.share_percent, "0 to 100"));
        }
        faults
    }

    /// How long a storage is left alone after a look that took so long. `None`: it is never looked through unasked.
    pub(crate) fn rest(&self, took: Duration) -> Option<Duration> {
        let share = self.share_percent.min(100);
        (share > 0).then(|| took.saturating_mul(100 - share) / share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storage_rests_in_proportion() {
        let rest = |share_percent, seconds| {
            FsckConfig { share_percent, ..FsckConfig::default() }.rest(Duration::from_secs(seconds))
        };
        assert_eq!(rest(10, 5), Some(Duration::from_secs(45)));
        assert_eq!(rest(100, 5), Some(Duration::ZERO));
        assert_eq!(rest(0, 5), None);
    }

    #[test]
    fn bounds_are_named() {
        let config = FsckConfig {
            share_percent: 101,
            limit: ConfigDuration::from_secs(1 << 20),
            ..FsckConfig::default()
        };
        let faults: Vec<String> = config.faults().iter().map(ToString::to_string).collect();
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(FsckConfig::default().faults().is_empty());
    }
}
