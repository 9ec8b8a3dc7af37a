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
    /// Enough replicas could take part, if the router had asked them: it must begin anew, by a fresh route.
    AskAnew,
    /// Too few replicas that have everything can be reached, and more will have it soon: they are being copied to.
    Soon,
    /// Too few replicas that have everything can be reached.
    ReadOnly,
}

/// What the router that wants to write can do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reach<'a> {
    /// Storages that it cannot reach.
    pub(crate) unreachable: &'a [StorageName],
    /// It counts the nodes' votes. Without them the primary alone takes part.
    pub(crate) votes: bool,
    /// It has asked these already, and nobody else can take part.
    pub(crate) asked: Option<&'a [StorageName]>,
    /// It can ask anew, unseen by its client.
    pub(crate) can_ask_again: bool,
}

impl Reach<'_> {
    fn has_asked(&self, storage: &StorageName) -> bool {
        self.asked.is_none_or(|asked| asked.contains(storage))
    }
}

/// Decides by what the repository's row says, by what the router can reach, and by which storages we think healthy. The
/// router's word moves a primary; our own opinion only chooses among replacements, and says whether it is worth waiting
/// for a replica that is behind, or asking one that the router left out because it could not reach it then.
pub(crate) fn decide(
    repository: &Repository,
    router: Reach<'_>,
    healthy: impl Fn(&StorageName) -> bool,
    rng: &mut impl Rng,
) -> Decision {
    let reached = |storage: &&StorageName| !router.unreachable.contains(storage);
    let mut able: Vec<&StorageName> = repository.up_to_date().filter(reached).collect();
    let quorum = if router.votes { repository.quorum() } else { 1 };
    if able.len() < quorum {
        let replicas = repository.replicas.iter().map(|replica| &replica.storage);
        let well = replicas.filter(|storage| reached(storage) && healthy(storage)).count();
        let soon = router.votes && well >= quorum && !able.is_empty();
        let left_out = |storage: &&StorageName| !router.has_asked(storage) && healthy(storage);
        let askable = repository.up_to_date().filter(|storage| reached(storage) || left_out(storage)).count();
        return if askable >= quorum && (router.can_ask_again || !soon) {
            Decision::AskAnew
        } else if soon {
            Decision::Soon
        } else {
            Decision::ReadOnly
        };
    }
    let stays = able.contains(&&repository.primary);
    if router.asked.is_some() && !stays {
        return Decision::AskAnew;
    }
    let Some(primary) = (if stays { Some(&repository.primary) } else { replacement(&able, healthy, rng) })
    else {
        return Decision::ReadOnly;
    };
    able.retain(|storage| router.has_asked(storage));
    if able.len() < quorum {
        return Decision::AskAnew;
    }
    able.sort_by_key(|storage| *storage != primary);
    let taking_part = if router.votes { able.len() } else { 1 };
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

    /// A router that counts votes and has asked nobody yet.
    fn cut_off_from(unreachable: &[StorageName]) -> Reach<'_> {
        Reach { unreachable, votes: true, asked: None, can_ask_again: false }
    }

    #[test]
    fn the_routers_word_moves_the_primary_and_ours_chooses_where_to() {
        let mut rng = StdRng::seed_from_u64(1);
        let repository = repository(0, &[5, 5, 5, 5, 4]);
        let all = |_: &StorageName| true;
        let stay = Decision::Stay { participants: on(&[0, 1, 2, 3]) };
        assert_eq!(decide(&repository, cut_off_from(&[]), |_| false, &mut rng), stay);
        let well = |storage: &StorageName| *storage == node(2);
        let moved = Decision::Move { participants: on(&[2, 1, 3]) };
        assert_eq!(decide(&repository, cut_off_from(&on(&[0])), well, &mut rng), moved);
        let alone = Decision::Move { participants: on(&[2]) };
        let without_votes = Reach { votes: false, ..cut_off_from(&[]) };
        let gone = on(&[0]);
        assert_eq!(decide(&repository, Reach { unreachable: &gone, ..without_votes }, well, &mut rng), alone);
        let gone = on(&[0, 1]);
        assert_eq!(decide(&repository, cut_off_from(&gone), |_| false, &mut rng), Decision::ReadOnly);
        let copied_to = "the fifth is being copied to";
        assert_eq!(decide(&repository, cut_off_from(&gone), all, &mut rng), Decision::Soon, "{copied_to}");
        let gone = on(&[0, 1, 2]);
        assert_eq!(decide(&repository, cut_off_from(&gone), all, &mut rng), Decision::ReadOnly);
        let gone = on(&[0, 1, 2, 3]);
        let without_votes = Reach { unreachable: &gone, ..without_votes };
        assert_eq!(decide(&repository, without_votes, all, &mut rng), Decision::ReadOnly);
    }

    #[test]
    fn who_was_asked_by_an_old_route_is_asked_anew_when_a_quorum_can_be_had() {
        let mut rng = StdRng::seed_from_u64(1);
        let newest = repository(0, &[5, 5, 4]);
        let mut decide = |asked: &[usize], unreachable: &[usize], can_ask_again, well: &[usize]| {
            let (asked, unreachable, well) = (on(asked), on(unreachable), on(well));
            let router = Reach { unreachable: &unreachable, votes: true, asked: Some(&asked), can_ask_again };
            decide(&newest, router, |storage| well.contains(storage), &mut rng)
        };
        assert_eq!(decide(&[0, 1, 2], &[], false, &[]), Decision::Stay { participants: on(&[0, 1]) });
        assert_eq!(decide(&[0, 2], &[], false, &[]), Decision::AskAnew, "the second was not asked");
        assert_eq!(decide(&[0, 1, 2], &[0], false, &[1]), Decision::ReadOnly, "the second alone is left");
        assert_eq!(decide(&[0, 2], &[1, 2], false, &[1]), Decision::AskAnew, "the second is well, we think");
        assert_eq!(decide(&[0, 2], &[1, 2], true, &[]), Decision::ReadOnly, "and here it is not");
        assert_eq!(decide(&[0, 1], &[1, 2], true, &[1]), Decision::ReadOnly, "it was asked, and is gone");
        let all = &[0, 1, 2];
        assert_eq!(decide(&[0, 2], &[1], true, all), Decision::AskAnew, "nobody has to wait for the third");
        assert_eq!(decide(&[0, 2], &[1], false, all), Decision::Soon, "who cannot ask again had better wait");
    }

    proptest! {
        #[test]
        fn a_write_never_goes_to_a_replica_that_lacks_something(
            generations in prop::collection::vec(-1_i64..4, 1..6), primary in 0_usize..6, votes in any::<bool>(),
            unreachable in prop::collection::vec(0_usize..6, 0..6), seed in any::<u64>(),
            asked in prop::option::of(prop::collection::vec(0_usize..6, 0..6)), can_ask_again in any::<bool>(),
        ) {
            let repository = repository(primary % generations.len(), &generations);
            let unreachable: Vec<StorageName> = unreachable.into_iter().map(node).collect();
            let asked: Option<Vec<StorageName>> = asked.filter(|_| votes).map(|asked| on(&asked));
            let router =
                Reach { unreachable: &unreachable, votes, asked: asked.as_deref(), can_ask_again };
            let mut rng = StdRng::seed_from_u64(seed);
            let able: Vec<_> = repository.up_to_date().filter(|s| !unreachable.contains(s)).cloned().collect();
            let quorum = if votes { repository.quorum() } else { 1 };
            let may_take_part = |storage: &StorageName| able.contains(storage) && router.has_asked(storage);
            match decide(&repository, router, |_| seed % 2 == 0, &mut rng) {
                Decision::Stay { participants } => {
                    prop_assert!(participants[0] == repository.primary);
                    prop_assert!(participants.len() >= quorum && participants.iter().all(may_take_part));
                }
                Decision::Move { participants } => {
                    prop_assert!(!able.contains(&repository.primary) && asked.is_none());
                    prop_assert!(participants.len() >= quorum && participants.iter().all(may_take_part));
                }
                Decision::AskAnew => {
                    prop_assert!(asked.is_some() && repository.up_to_date().count() >= quorum);
                }
                Decision::Soon => prop_assert!(votes && able.len() < quorum && !able.is_empty()),
                Decision::ReadOnly => prop_assert!(able.len() < quorum),
            }
        }
    }
}
