//! What becomes of a write of which nobody knows whether it took effect.
//!
//! Nothing acknowledged is lost whatever is decided: the write itself was never acknowledged, and everything acknowledged
//! before it is on every replica that was up to date when it began. What must come out is one state: those that hold it
//! have the next generation, and of all others that may have been told to write nothing is known any more.

use std::collections::BTreeMap;

use tabularium_common::ids::StorageName;

use crate::repository::Repository;

/// What a storage said that it holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Held {
    /// Equal for equal replicas, and only for them.
    Digest(Vec<u8>),
    /// No repository.
    Nothing,
}

/// How a write in doubt is settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Settlement {
    /// These hold the state that counts, as one more generation. The first of them becomes the primary if the present one
    /// is not among them.
    Keep { holders: Vec<StorageName> },
    /// Nobody who holds everything acknowledged can be asked: later.
    Wait,
}

/// Decides by what those storages answered that could be reached.
///
/// The state that most participants hold counts, of equally many the primary's, then the first participant's; a storage
/// without the repository counts only when all are without. Those that did not take part and hold the same are up to date
/// with it. When no participant answers, those that did not take part have all there is: if they are enough for a quorum,
/// they go on without the others.
pub(crate) fn settle(
    repository: &Repository,
    participants: &[StorageName],
    answers: &BTreeMap<StorageName, Held>,
) -> Settlement {
    let up_to_date = |storage: &&StorageName| {
        repository.replica(storage).is_some_and(|replica| replica.generation == repository.generation)
    };
    let took_part: Vec<(&StorageName, &Held)> = participants
        .iter()
        .filter(up_to_date)
        .filter_map(|storage| Some((storage, answers.get(storage)?)))
        .collect();
    if took_part.is_empty() {
        let mut holders: Vec<StorageName> = repository
            .up_to_date()
            .filter(|storage| !participants.contains(storage))
            .filter(|storage| matches!(answers.get(*storage), Some(Held::Digest(_))))
            .cloned()
            .collect();
        if holders.is_empty() || holders.len() < repository.quorum() {
            return Settlement::Wait;
        }
        put_first(&mut holders, &repository.primary);
        return Settlement::Keep { holders };
    }
    let some_exist = took_part.iter().any(|(_, held)| **held != Held::Nothing);
    let votes = |state: &Held| took_part.iter().filter(|(_, held)| *held == state).count();
    let primarys = |state: &Held| answers.get(&repository.primary) == Some(state);
    // Of equals the first: the reversed order turns the last maximum into it.
    let winner = took_part
        .iter()
        .rev()
        .filter(|(_, held)| !some_exist || **held != Held::Nothing)
        .map(|(_, held)| *held)
        .max_by_key(|state| (votes(state), primarys(state)));
    let Some(winner) = winner else { return Settlement::Wait };
    let mut holders: Vec<StorageName> = participants
        .iter()
        .chain(repository.up_to_date().filter(|storage| !participants.contains(storage)))
        .filter(up_to_date)
        .filter(|storage| answers.get(*storage) == Some(winner))
        .cloned()
        .collect();
    put_first(&mut holders, &repository.primary);
    Settlement::Keep { holders }
}

fn put_first(storages: &mut [StorageName], first: &StorageName) {
    storages.sort_by_key(|storage| storage != first);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::failover::tests::{node, repository};

    fn answers(given: &[(usize, u8)]) -> BTreeMap<StorageName, Held> {
        given.iter().map(|&(number, state)| (node(number), held(state))).collect()
    }

    fn held(state: u8) -> Held {
        if state == 0 { Held::Nothing } else { Held::Digest(vec![state]) }
    }

    fn keep(numbers: &[usize]) -> Settlement {
        Settlement::Keep { holders: numbers.iter().copied().map(node).collect() }
    }

    #[test]
    fn the_state_of_most_counts_then_the_primarys_then_the_firsts() {
        let repository = repository(0, &[3, 3, 3, 3]);
        let all = [node(0), node(1), node(2), node(3)];
        let settled = |given: &[(usize, u8)]| settle(&repository, &all, &answers(given));
        assert_eq!(settled(&[(0, 1), (1, 1), (2, 1), (3, 1)]), keep(&[0, 1, 2, 3]));
        assert_eq!(settled(&[(0, 1), (1, 2), (2, 2)]), keep(&[1, 2]), "whichever is newer");
        assert_eq!(settled(&[(0, 2), (1, 2), (2, 1)]), keep(&[0, 1]));
        assert_eq!(settled(&[(0, 2), (1, 1)]), keep(&[0]), "of equally many the primary's");
        assert_eq!(settled(&[(1, 2), (2, 1)]), keep(&[1]), "or the first's");
        assert_eq!(settled(&[(2, 1)]), keep(&[2]));
        assert_eq!(settled(&[]), Settlement::Wait);
        assert_eq!(
            settled(&[(0, 0), (1, 0), (2, 1)]),
            keep(&[2]),
            "what is lost does not outvote what is there"
        );
        assert_eq!(settled(&[(0, 0), (1, 0)]), keep(&[0, 1]));
    }

    #[test]
    fn those_that_did_not_take_part_go_on_alone_when_they_are_a_quorum() {
        let three = repository(0, &[3, 3, 3]);
        assert_eq!(settle(&three, &[node(0)], &answers(&[(1, 1), (2, 1)])), keep(&[1, 2]));
        assert_eq!(settle(&three, &[node(0)], &answers(&[(1, 1)])), Settlement::Wait);
        assert_eq!(settle(&three, &[node(0), node(1)], &answers(&[(2, 1)])), Settlement::Wait);
        assert_eq!(settle(&three, &[node(0)], &answers(&[(0, 1), (1, 1), (2, 2)])), keep(&[0, 1]));
    }

    proptest! {
        #[test]
        fn one_state_comes_out_and_only_of_replicas_that_had_everything(
            generations in prop::collection::vec(2_i64..4, 1..6), primary in 0_usize..6,
            part in prop::collection::vec(any::<bool>(), 6), given in prop::collection::vec(prop::option::of(0_u8..4), 6),
        ) {
            let repository = repository(primary % generations.len(), &generations);
            let up_to_date: Vec<StorageName> = repository.up_to_date().cloned().collect();
            let participants: Vec<StorageName> =
                up_to_date.iter().zip(&part).filter(|(_, part)| **part).map(|(s, _)| s.clone()).collect();
            let answers: BTreeMap<_, _> = given
                .iter()
                .enumerate()
                .filter_map(|(number, state)| state.map(|state| (node(number), held(state))))
                .collect();
            let asked = |storage: &&StorageName| answers.contains_key(*storage);
            match settle(&repository, &participants, &answers) {
                Settlement::Wait => prop_assert!(!participants.iter().any(|s| asked(&s))),
                Settlement::Keep { holders } => {
                    prop_assert!(!holders.is_empty() && holders.iter().all(|holder| up_to_date.contains(holder)));
                    prop_assert!(holders.iter().all(|holder| answers.contains_key(holder)));
                    if participants.iter().any(|s| asked(&s)) {
                        let state = answers.get(&holders[0]);
                        prop_assert!(holders.iter().all(|holder| answers.get(holder) == state));
                        let count = |state: &Held| participants.iter().filter(|s| answers.get(*s) == Some(state)).count();
                        let most = participants.iter().filter_map(|s| answers.get(s))
                            .filter(|state| **state != Held::Nothing).map(count).max();
                        prop_assert!(most.is_none_or(|most| state.is_some_and(|state| count(state) == most)));
                        // Everybody with that state holds it: nobody is made again for nothing.
                        let same = up_to_date.iter().filter(|s| answers.get(*s) == state).count();
                        prop_assert_eq!(holders.len(), same);
                    } else {
                        prop_assert!(holders.len() >= repository.quorum());
                        prop_assert!(holders.iter().all(|holder| !participants.contains(holder)));
                    }
                    prop_assert!(!holders.contains(&repository.primary) || holders[0] == repository.primary);
                }
            }
        }
    }
}
