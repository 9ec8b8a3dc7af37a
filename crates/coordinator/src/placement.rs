//! Where a new repository goes, and how the replicas of an old one come to be where they should be.

use rand::{Rng, seq::IndexedRandom as _, seq::SliceRandom as _};
use tabularium_common::ids::StorageName;

use crate::repository::Repository;

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

/// A storage that holds a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) storage: StorageName,
    /// On its way out.
    pub(crate) leaving: bool,
    pub(crate) primary: bool,
    pub(crate) up_to_date: bool,
}

/// A storage that might hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) storage: StorageName,
    /// Takes new replicas: neither drained nor gone from the configuration.
    pub(crate) open: bool,
    /// Can be reached now.
    pub(crate) usable: bool,
    /// Replicas that it holds.
    pub(crate) load: i64,
}

/// A step towards the wanted placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Rearrangement {
    /// A new replica is to be made there.
    Assign(StorageName),
    /// A replica that was to leave stays.
    Keep(StorageName),
    /// A replica is to leave as soon as [`farewell`] allows it.
    Release(StorageName),
}

/// What has to change so that `factor` storages hold a repository, all of them open ones (0: every open storage). New
/// replicas go where there are fewest; what is behind leaves before what is up to date, and the primary not at all unless
/// its storage is closed. Nothing is released from a closed storage before its replacement is assigned.
pub(crate) fn rearrange(holders: &[Holder], seats: &[Seat], factor: u16) -> Vec<Rearrangement> {
    let seat = |storage: &StorageName| seats.iter().find(|seat| seat.open && seat.storage == *storage);
    let open = seats.iter().filter(|seat| seat.open).count();
    let wanted = if factor == 0 { open } else { open.min(usize::from(factor)) };
    let mut staying: Vec<&Holder> =
        holders.iter().filter(|holder| !holder.leaving && seat(&holder.storage).is_some()).collect();
    let mut changes = Vec::new();
    let mut count = staying.len();

    let mut back: Vec<&Holder> =
        holders.iter().filter(|holder| holder.leaving && seat(&holder.storage).is_some()).collect();
    back.sort_by_key(|holder| (!holder.primary, !holder.up_to_date));
    let back = back.into_iter().take(wanted.saturating_sub(count));
    changes.extend(back.map(|holder| Rearrangement::Keep(holder.storage.clone())));
    count = count.max(staying.len() + changes.len());

    let mut free: Vec<&Seat> = seats
        .iter()
        .filter(|seat| seat.open && !holders.iter().any(|holder| holder.storage == seat.storage))
        .collect();
    free.sort_by(|one, other| {
        (!one.usable, one.load, &one.storage).cmp(&(!other.usable, other.load, &other.storage))
    });
    let assigned: Vec<_> = free.into_iter().take(wanted.saturating_sub(count)).collect();
    count += assigned.len();
    changes.extend(assigned.into_iter().map(|seat| Rearrangement::Assign(seat.storage.clone())));

    staying.retain(|holder| !holder.primary);
    staying.sort_by_key(|holder| {
        (holder.up_to_date, std::cmp::Reverse(seat(&holder.storage).map_or(0, |seat| seat.load)))
    });
    let surplus = staying.into_iter().take(count.saturating_sub(wanted));
    changes.extend(surplus.map(|holder| Rearrangement::Release(holder.storage.clone())));

    if count > 0 && count >= wanted {
        let closed = holders.iter().filter(|holder| !holder.leaving && seat(&holder.storage).is_none());
        changes.extend(closed.map(|holder| Rearrangement::Release(holder.storage.clone())));
    }
    changes
}

/// What becomes of a leaving replica now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Farewell {
    /// It may go.
    Now,
    /// It is the primary, which has to move first.
    HandOver(StorageName),
    /// The others are not ready.
    Wait,
}

/// Decides about a replica that is to leave: all that stay must be up to date, and one of them healthy.
pub(crate) fn farewell(
    repository: &Repository,
    leaving: &[StorageName],
    storage: &StorageName,
    healthy: impl Fn(&StorageName) -> bool,
) -> Farewell {
    let mut staying = repository.replicas.iter().filter(|replica| !leaving.contains(&replica.storage));
    if staying.clone().any(|replica| replica.generation != repository.generation) {
        return Farewell::Wait;
    }
    match staying.find(|replica| healthy(&replica.storage)) {
        None => Farewell::Wait,
        Some(heir) if repository.primary == *storage => Farewell::HandOver(heir.storage.clone()),
        Some(_) => Farewell::Now,
    }
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

    fn holder(number: usize, leaving: bool, primary: bool, up_to_date: bool) -> Holder {
        Holder { storage: format!("node-{number}").parse().unwrap(), leaving, primary, up_to_date }
    }

    fn seats(loads: &[(bool, i64)]) -> Vec<Seat> {
        loads
            .iter()
            .enumerate()
            .map(|(number, &(open, load))| Seat {
                storage: format!("node-{number}").parse().unwrap(),
                open,
                usable: true,
                load,
            })
            .collect()
    }

    fn assign(number: usize) -> Rearrangement {
        Rearrangement::Assign(format!("node-{number}").parse().unwrap())
    }

    fn release(number: usize) -> Rearrangement {
        Rearrangement::Release(format!("node-{number}").parse().unwrap())
    }

    #[test]
    fn the_least_loaded_comes_and_the_most_loaded_goes() {
        let one = [holder(0, false, true, true)];
        let loads = seats(&[(true, 1), (true, 9), (true, 3), (true, 4)]);
        assert_eq!(rearrange(&one, &loads, 3), [assign(2), assign(3)]);
        let all: Vec<_> = (0..4).map(|number| holder(number, false, number == 1, number != 2)).collect();
        assert_eq!(rearrange(&all, &loads, 3), [release(2)], "what is behind goes first");
        assert_eq!(rearrange(&all, &loads, 1), [release(2), release(3), release(0)], "the primary stays");
        assert_eq!(rearrange(&all, &loads, 0), []);
    }

    #[test]
    fn a_drained_storage_is_replaced_and_what_was_leaving_comes_back() {
        let two = [holder(0, false, true, true), holder(1, false, false, true)];
        let loads = seats(&[(false, 1), (true, 1), (true, 1)]);
        assert_eq!(rearrange(&two, &loads, 2), [assign(2), release(0)]);
        let undone = [holder(0, true, true, true), holder(1, false, false, true)];
        let loads = seats(&[(true, 1), (true, 1), (true, 1)]);
        assert_eq!(rearrange(&undone, &loads, 2), [Rearrangement::Keep("node-0".parse().unwrap())]);
        let nowhere = seats(&[(false, 1), (false, 1)]);
        assert_eq!(rearrange(&two, &nowhere, 2), [], "nothing leaves for nowhere");
    }

    #[test]
    fn nobody_leaves_before_the_others_are_ready() {
        use crate::failover::tests::{node, repository};
        let all = |_: &StorageName| true;
        let level = repository(0, &[5, 5, 5]);
        assert_eq!(farewell(&level, &[node(2)], &node(2), all), Farewell::Now);
        assert_eq!(farewell(&level, &[node(0)], &node(0), |s| *s != node(1)), Farewell::HandOver(node(2)));
        assert_eq!(farewell(&level, &[node(2)], &node(2), |s| *s == node(2)), Farewell::Wait);
        let everything = [node(0), node(1), node(2)];
        assert_eq!(farewell(&level, &everything, &node(2), all), Farewell::Wait, "one has to stay");
        assert_eq!(farewell(&repository(0, &[5, 4, 5]), &[node(2)], &node(2), all), Farewell::Wait);
    }

    proptest! {
        #[test]
        fn steps_lead_to_the_wanted_placement_and_never_below_one(
            holds in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>()), 1..8),
            seats in prop::collection::vec((any::<bool>(), 0_i64..5), 1..8),
            factor in 0_u16..9,
        ) {
            let mut holders: Vec<Holder> = holds
                .iter()
                .enumerate()
                .filter(|(number, (there, _, _))| *there || *number == 0)
                .map(|(number, (_, leaving, up_to_date))| holder(number, *leaving, number == 0, *up_to_date))
                .collect();
            let seats = self::seats(&seats);
            let changes = rearrange(&holders, &seats, factor);
            for change in &changes {
                match change {
                    Rearrangement::Assign(storage) => {
                        prop_assert!(holders.iter().all(|holder| holder.storage != *storage));
                        prop_assert!(seats.iter().any(|seat| seat.open && seat.storage == *storage));
                        holders.push(Holder { storage: storage.clone(), leaving: false, primary: false, up_to_date: false });
                    }
                    Rearrangement::Keep(storage) | Rearrangement::Release(storage) => {
                        let leaving = matches!(change, Rearrangement::Release(_));
                        let holder = holders.iter_mut().find(|holder| holder.storage == *storage).unwrap();
                        prop_assert_ne!(holder.leaving, leaving);
                        holder.leaving = leaving;
                    }
                }
            }
            prop_assert_eq!(rearrange(&holders, &seats, factor), vec![], "once is enough");
            let open = seats.iter().filter(|seat| seat.open).count();
            let wanted = if factor == 0 { open } else { open.min(usize::from(factor)) };
            let staying = holders.iter().filter(|holder| !holder.leaving).count();
            if wanted > 0 {
                prop_assert_eq!(staying, wanted);
            }
        }

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
