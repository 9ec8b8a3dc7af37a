//! Whether replicas that are recorded as equal are equal: the decision. A task asks them at leisure, while nobody writes.

use std::collections::BTreeMap;

use tabularium_common::ids::StorageName;

use crate::settlement::Held;

/// What a comparison found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// They hold the same, which counts.
    pub(crate) sound: Vec<StorageName>,
    /// They hold something else, or nothing.
    pub(crate) different: Vec<StorageName>,
}

/// Compares what storages that are recorded as up to date hold. What most of them hold counts; of equally many what the
/// primary holds, because it was written there first; if the primary did not answer, nobody can say. A storage without the
/// repository never counts. One alone is sound if it has anything: there is nothing to compare it with.
pub(crate) fn compare(answers: &BTreeMap<StorageName, Held>, primary: &StorageName) -> Verdict {
    let mut votes: BTreeMap<&Held, usize> = BTreeMap::new();
    for held in answers.values().filter(|held| **held != Held::Nothing) {
        *votes.entry(held).or_default() += 1;
    }
    let most = votes.values().copied().max().unwrap_or(0);
    let mut leading = votes.into_iter().filter(|(_, count)| *count == most).map(|(held, _)| held);
    let truth = match (leading.next(), leading.next()) {
        (None, _) => return Verdict::default(),
        (Some(only), None) => only,
        (Some(first), Some(second)) => {
            let primarys = answers.get(primary);
            match [first, second].into_iter().chain(leading).find(|held| Some(*held) == primarys) {
                Some(held) => held,
                None => return Verdict::default(),
            }
        }
    };
    let (sound, different) = answers.keys().cloned().partition(|storage| answers.get(storage) == Some(truth));
    Verdict { sound, different }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::failover::tests::node;

    fn answers(states: &[Option<u8>]) -> BTreeMap<StorageName, Held> {
        let held = |state: &Option<u8>| state.map_or(Held::Nothing, |state| Held::Digest(vec![state]));
        states.iter().enumerate().map(|(number, state)| (node(number), held(state))).collect()
    }

    #[test]
    fn most_count_and_then_the_primary() {
        let verdict = compare(&answers(&[Some(1), Some(2), Some(1)]), &node(1));
        assert_eq!(verdict.different, [node(1)]);
        let verdict = compare(&answers(&[Some(1), Some(2)]), &node(1));
        assert_eq!((verdict.sound, verdict.different), (vec![node(1)], vec![node(0)]));
        assert_eq!(compare(&answers(&[Some(1), Some(2)]), &node(7)), Verdict::default(), "nobody can say");
        let verdict = compare(&answers(&[None, Some(1), None]), &node(0));
        assert_eq!((verdict.sound, verdict.different), (vec![node(1)], vec![node(0), node(2)]));
        assert_eq!(compare(&answers(&[None, None]), &node(0)), Verdict::default(), "nothing to go by");
    }

    proptest! {
        #[test]
        fn somebody_sound_is_always_left(
            states in prop::collection::vec(prop::option::of(0_u8..3), 0..6), primary in 0_usize..6,
        ) {
            let answers = answers(&states);
            let verdict = compare(&answers, &node(primary));
            prop_assert!(verdict.different.is_empty() || !verdict.sound.is_empty());
            if !verdict.sound.is_empty() {
                prop_assert_eq!(verdict.sound.len() + verdict.different.len(), answers.len());
                prop_assert!(verdict.sound.iter().all(|storage| answers[storage] == answers[&verdict.sound[0]]));
            }
        }
    }
}
