//! Where a write goes when its primary may not be able to take it.

use rand::{Rng, seq::IndexedRandom as _};
use tabularium_common::ids::StorageName;

use crate::repository::Repository;

/// What is to be done before a write may begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The primary takes it.
    Stay,
    /// This replica becomes the primary; the epoch rises.
    Move { to: StorageName },
    /// No replica that has everything can be reached.
    ReadOnly,
}

/// Decides by what the repository's row says, by the storages that the router could not reach, and by which storages
/// we think healthy. The router's word moves a primary; our own opinion only chooses among replacements. A `tainted`
/// replica, which may hold a part of a write that is still open, is the last choice.
pub(crate) fn decide(
    repository: &Repository,
    unreachable: &[StorageName],
    tainted: &[StorageName],
    healthy: impl Fn(&StorageName) -> bool,
    rng: &mut impl Rng,
) -> Decision {
    let able: Vec<&StorageName> =
        repository.up_to_date().filter(|storage| !unreachable.contains(storage)).collect();
    if able.contains(&&repository.primary) {
        return Decision::Stay;
    }
    match replacement(&able, tainted, healthy, rng) {
        Some(storage) => Decision::Move { to: storage.clone() },
        None => Decision::ReadOnly,
    }
}

/// One of `able`: an untainted one before others, a healthy one before others.
pub(crate) fn replacement<'a>(
    able: &[&'a StorageName],
    tainted: &[StorageName],
    healthy: impl Fn(&StorageName) -> bool,
    rng: &mut impl Rng,
) -> Option<&'a StorageName> {
    let clean: Vec<&StorageName> =
        able.iter().copied().filter(|storage| !tainted.contains(storage)).collect();
    let pool = if clean.is_empty() { able } else { &clean };
    let well: Vec<&StorageName> = pool.iter().copied().filter(|storage| healthy(storage)).collect();
    well.choose(rng).or_else(|| pool.choose(rng)).copied()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};
    use tabularium_common::ids::{Epoch, Generation, ReplicaPath, RepositoryId};

    use super::*;
    use crate::repository::{Replica, RepositoryKey};

    /// A repository on `node-0`, `node-1`, ... with these generations; the newest of them is the repository's.
    pub(crate) fn repository(primary: usize, generations: &[i64]) -> Repository {
        Repository {
            id: RepositoryId(1),
            key: RepositoryKey {
                virtual_storage: "default".parse().unwrap(),
                relative_path: "a.git".parse().unwrap(),
            },
            replica_path: ReplicaPath::for_repository(RepositoryId(1)),
            primary: node(primary),
            generation: Generation(generations.iter().copied().max().unwrap_or(0)),
            epoch: Epoch(0),
            home_site: None,
            replicas: generations
                .iter()
                .enumerate()
                .map(|(number, &generation)| Replica {
                    storage: node(number),
                    generation: Generation(generation),
                })
                .collect(),
        }
    }

    pub(crate) fn node(number: usize) -> StorageName {
        format!("node-{number}").parse().unwrap()
    }

    #[test]
    fn the_routers_word_moves_the_primary_and_ours_chooses_where_to() {
        let mut rng = StdRng::seed_from_u64(1);
        let repository = repository(0, &[5, 5, 5, 4]);
        let all = |_: &StorageName| true;
        assert_eq!(decide(&repository, &[], &[], |_| false, &mut rng), Decision::Stay);
        assert_eq!(
            decide(&repository, &[node(0), node(1)], &[], all, &mut rng),
            Decision::Move { to: node(2) }
        );
        let well = |storage: &StorageName| *storage == node(1);
        assert_eq!(decide(&repository, &[node(0)], &[], well, &mut rng), Decision::Move { to: node(1) });
        assert!(matches!(decide(&repository, &[node(0)], &[], |_| false, &mut rng), Decision::Move { .. }));
        assert_eq!(decide(&repository, &[node(0), node(1), node(2)], &[], all, &mut rng), Decision::ReadOnly);
    }

    #[test]
    fn a_replica_that_may_hold_a_part_of_an_open_write_is_the_last_choice() {
        let mut rng = StdRng::seed_from_u64(1);
        let repository = repository(0, &[5, 5, 5]);
        let sick = |storage: &StorageName| *storage != node(2);
        let decided = decide(&repository, &[node(0)], &[node(1)], sick, &mut rng);
        assert_eq!(decided, Decision::Move { to: node(2) }, "even if the clean one looks unhealthy");
        let decided = decide(&repository, &[node(0), node(2)], &[node(1)], sick, &mut rng);
        assert_eq!(decided, Decision::Move { to: node(1) });
    }

    proptest! {
        #[test]
        fn a_write_never_goes_to_a_replica_that_lacks_something(
            generations in prop::collection::vec(-1_i64..4, 1..6), primary in 0_usize..6,
            unreachable in prop::collection::vec(0_usize..6, 0..6), seed in any::<u64>(),
        ) {
            let repository = repository(primary % generations.len(), &generations);
            let unreachable: Vec<StorageName> = unreachable.into_iter().map(node).collect();
            let mut rng = StdRng::seed_from_u64(seed);
            let able: Vec<_> = repository.up_to_date().filter(|s| !unreachable.contains(s)).cloned().collect();
            match decide(&repository, &unreachable, &[], |_| seed % 2 == 0, &mut rng) {
                Decision::Stay => prop_assert!(able.contains(&repository.primary)),
                Decision::Move { to } => prop_assert!(able.contains(&to) && to != repository.primary),
                Decision::ReadOnly => prop_assert!(able.is_empty()),
            }
        }
    }
}
