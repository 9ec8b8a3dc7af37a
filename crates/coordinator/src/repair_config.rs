//! What `coordinator.toml` says about repair.

use serde::Deserialize;
use tabularium_common::config::{ConfigDuration, Fault};

/// How replicas that are behind are brought up to date.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RepairConfig {
    /// A worker that does not renew its copy for so long loses it.
    pub lease: ConfigDuration,
    /// A round that took no longer is followed by one during which nobody writes.
    pub short_round: ConfigDuration,
    /// Longest that nobody may write because of a copy. A round that takes longer is given up, and writes go on.
    pub ticket_round: ConfigDuration,
    /// How long a copy waits for its turn among writes.
    pub ticket_wait: ConfigDuration,
    /// After so many rounds in a row a copy goes to the end of the queue.
    pub most_rounds: u32,
    /// How long after a copy was set aside it is tried again when the repository is written to.
    pub parked_pause: ConfigDuration,
    /// How long the end of an attempt is remembered for the operator.
    pub keep_history: ConfigDuration,
}

impl Default for RepairConfig {
    fn default() -> Self {
        Self {
            lease: ConfigDuration::from_secs(10),
            short_round: ConfigDuration::from_secs(2),
            ticket_round: ConfigDuration::from_secs(5),
            ticket_wait: ConfigDuration::from_secs(5),
            most_rounds: 100,
            parked_pause: ConfigDuration::from_secs(300),
            keep_history: ConfigDuration::from_secs(7 * 24 * 3600),
        }
    }
}

impl RepairConfig {
    pub(crate) fn faults(&self) -> Vec<Fault> {
        let shortest = ConfigDuration::from_millis(10);
        let mut faults: Vec<Fault> =
            [("lease", self.lease), ("ticket_round", self.ticket_round), ("ticket_wait", self.ticket_wait)]
                .into_iter()
                .filter(|(_, length)| *length < shortest)
                .map(|(key, length)| Fault::new(format!("repair.{key}"), length, "10ms or more"))
                .collect();
        // A report of a worker is answered within ten seconds, or it asks another coordinator.
        let longest = ConfigDuration::from_secs(8);
        if self.ticket_wait > longest {
            faults.push(Fault::new("repair.ticket_wait", self.ticket_wait, "8s or less"));
        }
        if self.most_rounds == 0 {
            faults.push(Fault::new("repair.most_rounds", self.most_rounds, "1 or more"));
        }
        faults
    }
}
