//! Where a write goes when its primary may not be able to take it.

use rand::{Rng, seq::IndexedRandom as _};
use tabularium_common::ids::StorageName;

use crate::repository::Repository;

/// What is to be done before a write may begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The primary takes it.
    Stay { participants: Vec<StorageName> },
    /// This replica becomes the primary, and the first participant; the epoch rises.
    Move { participants: Vec<StorageName> },
    /// Too few replicas that have everything can be reached, and more will have it soon: they are being copied to.
    Soon,
    /// Too few replicas that have everything can be reached.
    ReadOnly,
}

/// Decides by what the repository's row says, by the storages that the router could not reach, and by which storages
/// we think healthy. The router's word moves a primary; our own opinion only chooses among replacements, and says whether
/// it is worth waiting for a replica that is behind. Without `votes` the primary alone takes part.
pub(crate) fn decide(
    repository: &Repository,
    unreachable: &[StorageName],
    votes: bool,
    healthy: impl Fn(&StorageName) -> bool,
    rng: &mut impl Rng,
) -> Decision {
    let mut able: Vec<&StorageName> =
        repository.up_to_date().filter(|storage| !unreachable.contains(storage)).collect();
    let quorum = if votes { repository.quorum() } else { 1 };
    if able.len() < quorum {
        let reachable = |storage: &&StorageName| !unreachable.contains(storage) && healthy(storage);
        let well = repository.replicas.iter().map(|replica| &replica.storage).filter(reachable).count();
        return if votes && well >= quorum && !able.is_empty() { Decision::Soon } else { Decision::ReadOnly };
    }
    let stays = able.contains(&&repository.primary);
    let Some(primary) = (if stays { Some(&repository.primary) } else { replacement(&able, healthy, rng) })
    else {
        return Decision::ReadOnly;
    };
    able.sort_by_key(|storage| *storage != primary);
    let taking_part = if votes { able.len() } else { 1 };
    let participants = able.into_iter().take(taking_part).cloned().collect();
    if stays { Decision::Stay { participants } } else { Decision::Move { participants } }
}

/// One of `able`, a healthy one before others.
fn replacement<'a>(
    able: &[&'a StorageName],
    healthy: impl Fn(&StorageName) -> bool,
    rng: &mut impl Rng,
) -> Option<&'a StorageName> {
    let well: Vec<&StorageName> = able.iter().copied().filter(|storage| healthy(storage)).collect();
    well.choose(rng).or_else(|| able.choose(rng)).copied()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};
    use tabularium_common::ids::{Epoch, Generation, ReplicaPath, RepositoryId};

    use super::*;
    use crate::{
        quorum::QuorumPolicy,
        repository::{Replica, RepositoryKey},
    };

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
            write_quorum: QuorumPolicy::Majority,
            members: generations.len(),
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

    fn on(numbers: &[usize]) -> Vec<StorageName> {
        numbers.iter().copied().map(node).collect()
    }

    #[test]
    fn the_routers_word_moves_the_primary_and_ours_chooses_where_to() {
        let mut rng = StdRng::seed_from_u64(1);
        let repository = repository(0, &[5, 5, 5, 5, 4]);
        let all = |_: &StorageName| true;
        let stay = Decision::Stay { participants: on(&[0, 1, 2, 3]) };
        assert_eq!(decide(&repository, &[], true, |_| false, &mut rng), stay);
        let well = |storage: &StorageName| *storage == node(2);
        let moved = Decision::Move { participants: on(&[2, 1, 3]) };
        assert_eq!(decide(&repository, &[node(0)], true, well, &mut rng), moved);
        let alone = Decision::Move { participants: on(&[2]) };
        assert_eq!(decide(&repository, &[node(0)], false, well, &mut rng), alone);
        let gone = [node(0), node(1)];
        assert_eq!(decide(&repository, &gone, true, |_| false, &mut rng), Decision::ReadOnly);
        assert_eq!(
            decide(&repository, &gone, true, all, &mut rng),
            Decision::Soon,
            "the fifth is being copied to"
        );
        assert_eq!(decide(&repository, &on(&[0, 1, 2]), true, all, &mut rng), Decision::ReadOnly);
        assert_eq!(decide(&repository, &on(&[0, 1, 2, 3]), false, all, &mut rng), Decision::ReadOnly);
    }

    proptest! {
        #[test]
        fn a_write_never_goes_to_a_replica_that_lacks_something(
            generations in prop::collection::vec(-1_i64..4, 1..6), primary in 0_usize..6, votes in any::<bool>(),
            unreachable in prop::collection::vec(0_usize..6, 0..6), seed in any::<u64>(),
        ) {
            let repository = repository(primary % generations.len(), &generations);
            let unreachable: Vec<StorageName> = unreachable.into_iter().map(node).collect();
            let mut rng = StdRng::seed_from_u64(seed);
            let able: Vec<_> = repository.up_to_date().filter(|s| !unreachable.contains(s)).cloned().collect();
            let quorum = if votes { repository.quorum() } else { 1 };
            match decide(&repository, &unreachable, votes, |_| seed % 2 == 0, &mut rng) {
                Decision::Stay { participants } => {
                    prop_assert!(participants[0] == repository.primary);
                    prop_assert!(participants.len() >= quorum && participants.iter().all(|s| able.contains(s)));
                }
                Decision::Move { participants } => {
                    prop_assert!(!able.contains(&repository.primary));
                    prop_assert!(participants.len() >= quorum && participants.iter().all(|s| able.contains(s)));
                }
                Decision::Soon => prop_assert!(votes && able.len() < quorum && !able.is_empty()),
                Decision::ReadOnly => prop_assert!(able.len() < quorum),
            }
        }
    }
}
