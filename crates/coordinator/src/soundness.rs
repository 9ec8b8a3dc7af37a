//! Whether replicas are to be made again because of what git found in their objects: the decision. Nodes look ([`tasks::check`]
//! has them do it), and what they find was found twice.
//!
//! [`tasks::check`]: crate::tasks::check

use std::collections::BTreeMap;

use tabularium_common::ids::StorageName;

use crate::verification::Verdict;

/// What a node found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Looked {
    Whole,
    /// In git's words.
    Damaged(String),
    /// Why.
    Unknown(String),
}

/// Which replicas are to be made again, from which. None, unless one was found whole: a damaged replica that may be the best
/// there is goes on serving. The primary is the first of the whole ones if it is one.
pub(crate) fn judge(found: &BTreeMap<StorageName, Looked>, primary: &StorageName) -> Verdict {
    let those = |wanted: fn(&Looked) -> bool| -> Vec<StorageName> {
        found.iter().filter(|(_, looked)| wanted(looked)).map(|(storage, _)| storage.clone()).collect()
    };
    let mut sound = those(|looked| *looked == Looked::Whole);
    sound.sort_by_key(|storage| storage != primary);
    if sound.is_empty() {
        return Verdict::default();
    }
    Verdict { sound, different: those(|looked| matches!(looked, Looked::Damaged(_))) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::failover::tests::node;

    fn found(states: &[u8]) -> BTreeMap<StorageName, Looked> {
        let looked = |state: &u8| match state {
            0 => Looked::Whole,
            1 => Looked::Damaged("missing blob".into()),
            _ => Looked::Unknown("the node is gone".into()),
        };
        states.iter().enumerate().map(|(number, state)| (node(number), looked(state))).collect()
    }

    #[test]
    fn what_is_damaged_goes_when_something_whole_is_left() {
        let verdict = judge(&found(&[0, 1, 0]), &node(2));
        assert_eq!((verdict.sound, verdict.different), (vec![node(2), node(0)], vec![node(1)]));
        assert_eq!(judge(&found(&[1, 1, 1]), &node(0)), Verdict::default(), "all of them");
        assert_eq!(judge(&found(&[1, 2]), &node(0)), Verdict::default(), "nobody knows of the other");
        assert!(judge(&found(&[0, 0, 2]), &node(0)).different.is_empty());
    }

    proptest! {
        #[test]
        fn somebody_whole_is_always_left(states in prop::collection::vec(0_u8..3, 0..6), primary in 0_usize..6) {
            let found = found(&states);
            let verdict = judge(&found, &node(primary));
            prop_assert!(verdict.different.is_empty() || !verdict.sound.is_empty());
            prop_assert!(verdict.sound.iter().all(|storage| found[storage] == Looked::Whole));
            prop_assert!(verdict.different.iter().all(|storage| matches!(found[storage], Looked::Damaged(_))));
        }
    }
}
