//! Where a new repository goes.

use rand::{Rng, seq::IndexedRandom as _, seq::SliceRandom as _};
use tabularium_common::ids::StorageName;

/// A storage that may be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) storage: StorageName,
    /// Whether it can take part now. One that cannot may still be assigned and gets its copy later.
    pub(crate) usable: bool,
}

/// The storages that will hold a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    pub(crate) primary: StorageName,
    /// The primary is not among them.
    pub(crate) secondaries: Vec<StorageName>,
}

/// No storage can take the first copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no healthy nodes")]
pub(crate) struct NoHealthyNode;

/// Picks a random usable primary, and `factor - 1` secondaries, usable ones first; factor 0: all storages.
pub(crate) fn place(
    candidates: &[Candidate],
    factor: u16,
    rng: &mut impl Rng,
) -> Result<Placement, NoHealthyNode> {
    let usable: Vec<&Candidate> = candidates.iter().filter(|candidate| candidate.usable).collect();
    let primary = usable.choose(rng).ok_or(NoHealthyNode)?.storage.clone();
    let mut others: Vec<&Candidate> =
        candidates.iter().filter(|candidate| candidate.storage != primary).collect();
    others.shuffle(rng);
    others.sort_by_key(|candidate| !candidate.usable);
    let wanted = if factor == 0 { others.len() } else { usize::from(factor) - 1 };
    let mut secondaries: Vec<StorageName> =
        others.into_iter().take(wanted).map(|candidate| candidate.storage.clone()).collect();
    secondaries.sort();
    Ok(Placement { primary, secondaries })
}

/// Puts a repository where another one is, which its nodes need beside it: on the same storages, and with the same
/// primary if that can take it.
pub(crate) fn place_beside(
    holders: &[Candidate],
    primary: &StorageName,
    rng: &mut impl Rng,
) -> Result<Placement, NoHealthyNode> {
    let usable: Vec<&Candidate> = holders.iter().filter(|candidate| candidate.usable).collect();
    let chosen = match usable.iter().find(|candidate| &candidate.storage == primary) {
        Some(candidate) => candidate,
        None => usable.choose(rng).ok_or(NoHealthyNode)?,
    };
    let mut secondaries: Vec<StorageName> = holders
        .iter()
        .filter(|candidate| candidate.storage != chosen.storage)
        .map(|candidate| candidate.storage.clone())
        .collect();
    secondaries.sort();
    Ok(Placement { primary: chosen.storage.clone(), secondaries })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    fn candidates(usable: &[bool]) -> Vec<Candidate> {
        usable
            .iter()
            .enumerate()
            .map(|(number, &usable)| Candidate { storage: format!("node-{number}").parse().unwrap(), usable })
            .collect()
    }

    #[test]
    fn every_usable_storage_gets_to_be_primary() {
        let candidates = candidates(&[true, true, false, true]);
        let mut rng = StdRng::seed_from_u64(7);
        let seen: BTreeSet<String> =
            (0..200).map(|_| place(&candidates, 0, &mut rng).unwrap().primary.to_string()).collect();
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["node-0", "node-1", "node-3"]);
    }

    #[test]
    fn a_pool_keeps_its_members_primary_while_that_is_usable() {
        let mut rng = StdRng::seed_from_u64(1);
        let holders = candidates(&[true, true, true]);
        let placement = place_beside(&holders, &"node-2".parse().unwrap(), &mut rng).unwrap();
        assert_eq!(placement.primary.as_str(), "node-2");
        let holders = candidates(&[true, false]);
        let placement = place_beside(&holders, &"node-1".parse().unwrap(), &mut rng).unwrap();
        assert_eq!((placement.primary.as_str(), placement.secondaries[0].as_str()), ("node-0", "node-1"));
        assert_eq!(
            place_beside(&candidates(&[false]), &"node-0".parse().unwrap(), &mut rng),
            Err(NoHealthyNode)
        );
    }

    proptest! {
        #[test]
        fn a_placement_is_a_set_of_the_asked_size_with_a_usable_primary(
            usable in prop::collection::vec(any::<bool>(), 0..8), factor in 0_u16..10, seed in any::<u64>(),
        ) {
            let candidates = candidates(&usable);
            let again = || place(&candidates, factor, &mut StdRng::seed_from_u64(seed));
            let placed = again();
            prop_assert_eq!(&placed, &again(), "the same seed places alike");
            if !usable.contains(&true) {
                prop_assert_eq!(placed, Err(NoHealthyNode));
                return Ok(());
            }
            let placement = placed.unwrap();
            prop_assert!(candidates.iter().any(|c| c.usable && c.storage == placement.primary));
            let chosen: BTreeSet<_> = placement.secondaries.iter().chain([&placement.primary]).collect();
            prop_assert_eq!(chosen.len(), placement.secondaries.len() + 1);
            let wanted = if factor == 0 { usable.len() } else { usize::from(factor).min(usable.len()) };
            prop_assert_eq!(chosen.len(), wanted);
            let unusable_chosen = candidates.iter().any(|c| !c.usable && chosen.contains(&c.storage));
            let usable_left = candidates.iter().any(|c| c.usable && !chosen.contains(&c.storage));
            prop_assert!(!(unusable_chosen && usable_left));
        }
    }
}
