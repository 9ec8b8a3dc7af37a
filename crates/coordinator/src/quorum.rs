//! How many replicas must have a write before it is acknowledged.

use std::str::FromStr;

use serde::Deserialize;

/// The rule by which a repository's write quorum is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuorumPolicy {
    /// More than half of the storages that hold it: nothing acknowledged is lost with any minority of them.
    #[default]
    Majority,
    /// Whoever takes part: one replica is enough, and what it alone has is lost with it.
    Available,
}

/// A text that names no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no quorum policy; there are `majority` and `available`")]
pub struct UnknownPolicy(String);

impl QuorumPolicy {
    /// As it is configured and stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Majority => "majority",
            Self::Available => "available",
        }
    }

    /// How many of `assigned` replicas a write needs.
    pub(crate) fn of(self, assigned: usize) -> usize {
        match self {
            Self::Majority => assigned / 2 + 1,
            Self::Available => 1,
        }
    }
}

impl FromStr for QuorumPolicy {
    type Err = UnknownPolicy;
    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        [Self::Majority, Self::Available]
            .into_iter()
            .find(|policy| policy.as_str() == text)
            .ok_or_else(|| UnknownPolicy(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_majorities_always_share_a_replica() {
        for assigned in 1..20 {
            let quorum = QuorumPolicy::Majority.of(assigned);
            assert!(quorum <= assigned && quorum * 2 > assigned, "{quorum} of {assigned}");
            assert_eq!(QuorumPolicy::Available.of(assigned), 1);
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for policy in [QuorumPolicy::Majority, QuorumPolicy::Available] {
            assert_eq!(policy.as_str().parse(), Ok(policy));
        }
        assert!("most".parse::<QuorumPolicy>().is_err());
    }
}
