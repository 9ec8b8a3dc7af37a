//! What becomes of a write of which nobody knows whether it took effect.
//!
//! Nothing acknowledged is lost either way: the write itself was never acknowledged, and everything acknowledged before
//! it is on every replica of the newest generation, which stays the source of what the others get.

use rand::Rng;
use tabularium_common::ids::StorageName;

use crate::{failover::replacement, repository::Repository};

/// How a write in doubt is settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Settlement {
    /// The repository was being created: its name is given back and what the primary may have is removed.
    CancelCreation,
    /// As if it had taken effect on the primary, which the others then follow, whatever it holds.
    CountAsWritten,
    /// What the primary holds is unknown and cannot be looked at; another replica that has everything acknowledged
    /// takes its place.
    Fence { to: StorageName },
}

/// Decides for an intent on `repository`, whose lock is held, so that the primary is the one the write went to.
pub(crate) fn settle(
    repository: &Repository,
    creation: bool,
    primary_reachable: bool,
    unreachable: &[StorageName],
    tainted: &[StorageName],
    healthy: impl Fn(&StorageName) -> bool,
    rng: &mut impl Rng,
) -> Settlement {
    if creation {
        return Settlement::CancelCreation;
    }
    if primary_reachable {
        return Settlement::CountAsWritten;
    }
    let others: Vec<&StorageName> =
        repository.up_to_date().filter(|storage| **storage != repository.primary).collect();
    let healthy = |storage: &StorageName| !unreachable.contains(storage) && healthy(storage);
    match replacement(&others, tainted, healthy, rng) {
        Some(storage) => Settlement::Fence { to: storage.clone() },
        None => Settlement::CountAsWritten,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::failover::tests::{node, repository};

    #[test]
    fn the_primary_is_believed_while_it_can_be_reached_or_is_the_only_one() {
        let mut rng = StdRng::seed_from_u64(1);
        let all = |_: &StorageName| true;
        let spread = repository(0, &[3, 3, 2]);
        assert_eq!(settle(&spread, true, true, &[], &[], all, &mut rng), Settlement::CancelCreation);
        assert_eq!(settle(&spread, false, true, &[], &[], all, &mut rng), Settlement::CountAsWritten);
        assert_eq!(settle(&spread, false, false, &[], &[], all, &mut rng), Settlement::Fence { to: node(1) });
        let alone = repository(0, &[3, 2, 2]);
        assert_eq!(settle(&alone, false, false, &[], &[], all, &mut rng), Settlement::CountAsWritten);
    }

    proptest! {
        #[test]
        fn the_new_primary_has_everything_that_was_acknowledged(
            generations in prop::collection::vec(-1_i64..4, 1..6), primary in 0_usize..6,
            reachable in any::<bool>(), seed in any::<u64>(),
        ) {
            let primary = primary % generations.len();
            let repository = repository(primary, &generations);
            let mut rng = StdRng::seed_from_u64(seed);
            let other_is_newest =
                repository.up_to_date().any(|storage| *storage != repository.primary);
            match settle(&repository, false, reachable, &[], &[], |_| seed % 2 == 0, &mut rng) {
                Settlement::Fence { to } => {
                    prop_assert!(!reachable && to != repository.primary);
                    prop_assert!(repository.up_to_date().any(|storage| *storage == to));
                }
                Settlement::CountAsWritten => prop_assert!(reachable || !other_is_newest),
                Settlement::CancelCreation => prop_assert!(false),
            }
        }
    }
}
