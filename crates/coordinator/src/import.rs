//! What Praefect's records of a repository amount to here. Nothing here asks or waits.
//!
//! Ids and replica paths stay, so that what is on the disks is found, and no new repository is given the path of an old one.
//! Praefect counts a repository's generations from 0 and we from 1: all of them are one higher here.

use std::collections::{BTreeMap, BTreeSet};

use tabularium_common::ids::{Epoch, Generation, ReplicaPath, RepositoryId, StorageName, VirtualStorageName};
use tabularium_proto::coordinator::ImportFinding;

use crate::{
    db::praefect::PraefectRepository,
    rebuild::Rebuilt,
    repository::{Replica, RepositoryKey},
};

/// A repository as it is to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Imported {
    pub(crate) rebuilt: Rebuilt,
    /// How many storages are to hold it, if it has a number of its own; 0: all.
    pub(crate) factor: Option<u16>,
    /// Replicas that are on their way out.
    pub(crate) leaving: Vec<StorageName>,
}

/// What is known here of a virtual storage.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    pub(crate) storages: BTreeSet<StorageName>,
    /// 0: all.
    pub(crate) default_factor: u16,
    /// Of the days when it had one primary for all of its repositories.
    pub(crate) shard_primary: Option<String>,
}

/// What became of one of Praefect's rows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Judged {
    /// `None`: it cannot be recorded here.
    pub(crate) imported: Option<Imported>,
    /// What a person should look at.
    pub(crate) findings: Vec<ImportFinding>,
}

fn finding(row: &PraefectRepository, what: String, left_out: bool) -> ImportFinding {
    ImportFinding {
        repository_id: row.repository_id,
        virtual_storage: row.virtual_storage.clone(),
        relative_path: row.relative_path.clone(),
        what,
        left_out,
    }
}

/// Judges one row.
pub(crate) fn judge(row: &PraefectRepository, known: &BTreeMap<VirtualStorageName, Known>) -> Judged {
    let mut findings = Vec::new();
    match import(row, known, &mut findings) {
        Ok(imported) => Judged { imported: Some(imported), findings },
        Err(what) => {
            findings.push(finding(row, what, true));
            Judged { imported: None, findings }
        }
    }
}

fn import(
    row: &PraefectRepository,
    known: &BTreeMap<VirtualStorageName, Known>,
    findings: &mut Vec<ImportFinding>,
) -> Result<Imported, String> {
    let name = row.virtual_storage.parse::<VirtualStorageName>();
    let found = name.ok().and_then(|name| known.get_key_value(&name));
    let (virtual_storage, known) =
        found.ok_or_else(|| format!("virtual storage `{}` is not configured", row.virtual_storage))?;
    let relative_path =
        row.relative_path.parse().map_err(|error| format!("its name cannot be used: {error}"))?;
    // Repositories of the first days lie where their name says.
    let replica_path = row.replica_path.as_deref().filter(|path| !path.is_empty());
    let replica_path: ReplicaPath = replica_path
        .unwrap_or(&row.relative_path)
        .parse()
        .map_err(|error| format!("its replica path cannot be used: {error}"))?;
    let mut held = BTreeMap::new();
    for (storage, generation) in row.storages.iter().zip(&row.generations) {
        match configured(known, storage) {
            Some(storage) if *generation >= 0 => _ = held.insert(storage, Generation(generation + 1)),
            Some(_) => {}
            None => {
                let text = format!("storage `{storage}`, which has a replica, is not configured");
                findings.push(finding(row, text, false));
            }
        }
    }
    let assigned: BTreeSet<&StorageName> =
        row.assigned.iter().filter_map(|storage| configured(known, storage)).collect();
    let (assigned, factor) = if assigned.is_empty() {
        // All of them, now and later; it is only said where the virtual storage says otherwise.
        (known.storages.iter().collect(), (known.default_factor != 0).then_some(0))
    } else {
        let factor = u16::try_from(assigned.len()).unwrap_or(u16::MAX);
        (assigned, Some(factor))
    };
    let newest = held.values().copied().max().ok_or("no configured storage has a replica")?;
    let generation = row.generation.map_or(newest, |generation| newest.max(Generation(generation + 1)));
    if newest < generation {
        findings.push(finding(row, "no configured storage has its newest state".to_owned(), false));
    }
    let leaving: Vec<StorageName> = held
        .keys()
        .filter(|storage| !assigned.contains(*storage))
        .map(|storage| (*storage).clone())
        .collect();
    let places: BTreeSet<&StorageName> = assigned.iter().copied().chain(held.keys().copied()).collect();
    let replicas: Vec<Replica> = places
        .into_iter()
        .map(|storage| Replica {
            storage: storage.clone(),
            generation: held.get(storage).copied().unwrap_or(Generation::UNKNOWN),
        })
        .collect();
    let primary = primary(row, known, &replicas, newest, &leaving);
    let primary = primary.ok_or("no configured storage has a replica")?;
    Ok(Imported {
        rebuilt: Rebuilt {
            id: RepositoryId(row.repository_id),
            key: RepositoryKey { virtual_storage: virtual_storage.clone(), relative_path },
            replica_path,
            generation,
            epoch: Epoch(1),
            primary,
            replicas,
        },
        factor,
        leaving,
    })
}

fn configured<'k>(known: &'k Known, storage: &str) -> Option<&'k StorageName> {
    known.storages.iter().find(|known| known.as_str() == storage)
}

/// Praefect's own choice while it is among the newest, or that of the days before; else the first of the newest, rather one
/// that is to stay.
fn primary(
    row: &PraefectRepository,
    known: &Known,
    replicas: &[Replica],
    newest: Generation,
    leaving: &[StorageName],
) -> Option<StorageName> {
    let mut candidates: Vec<&StorageName> = replicas
        .iter()
        .filter(|replica| replica.generation == newest)
        .map(|replica| &replica.storage)
        .collect();
    let chosen = [row.primary.as_deref(), known.shard_primary.as_deref()];
    candidates.sort_by_key(|storage| {
        let rank = chosen.iter().position(|chosen| *chosen == Some(storage.as_str()));
        (rank.unwrap_or(chosen.len()), leaving.contains(*storage))
    });
    candidates.first().copied().cloned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn known(default_factor: u16) -> BTreeMap<VirtualStorageName, Known> {
        let storages = ["g-1", "g-2", "g-3"].iter().map(|name| name.parse().unwrap()).collect();
        let known = Known { storages, default_factor, shard_primary: None };
        BTreeMap::from([("default".parse().unwrap(), known)])
    }

    fn row(held: &[(&str, i64)], assigned: &[&str]) -> PraefectRepository {
        PraefectRepository {
            repository_id: 7,
            virtual_storage: "default".into(),
            relative_path: "@hashed/aa/bb/aabb.git".into(),
            replica_path: Some("@cluster/repositories/79/02/7".into()),
            generation: held.iter().map(|(_, generation)| *generation).max(),
            primary: Some("g-2".into()),
            storages: held.iter().map(|(storage, _)| (*storage).to_owned()).collect(),
            generations: held.iter().map(|(_, generation)| *generation).collect(),
            assigned: assigned.iter().map(|storage| (*storage).to_owned()).collect(),
        }
    }

    fn replicas(imported: &Imported) -> Vec<(&str, i64)> {
        let replicas = imported.rebuilt.replicas.iter();
        replicas.map(|replica| (replica.storage.as_str(), replica.generation.0)).collect()
    }

    #[test]
    fn a_repository_on_all_storages_keeps_its_id_its_path_and_what_is_behind() {
        let judged = judge(&row(&[("g-1", 4), ("g-2", 4), ("g-3", 2)], &[]), &known(0));
        let imported = judged.imported.unwrap();
        assert_eq!(imported.rebuilt.id, RepositoryId(7));
        assert_eq!(imported.rebuilt.replica_path.as_str(), "@cluster/repositories/79/02/7");
        assert_eq!(imported.rebuilt.generation, Generation(5));
        assert_eq!(replicas(&imported), [("g-1", 5), ("g-2", 5), ("g-3", 3)]);
        assert_eq!(imported.rebuilt.primary.as_str(), "g-2");
        assert_eq!((imported.factor, imported.leaving.len(), judged.findings.len()), (None, 0, 0));
        let imported = judge(&row(&[("g-1", 4)], &[]), &known(2)).imported.unwrap();
        assert_eq!(imported.factor, Some(0), "the virtual storage says otherwise");
        assert_eq!(replicas(&imported), [("g-1", 5), ("g-2", -1), ("g-3", -1)]);
        assert_eq!(imported.rebuilt.primary.as_str(), "g-1", "the chosen one has nothing");
    }

    #[test]
    fn assignments_say_what_stays() {
        let imported =
            judge(&row(&[("g-1", 0), ("g-3", 0)], &["g-1", "g-2", "gone"]), &known(0)).imported.unwrap();
        assert_eq!(imported.factor, Some(2));
        assert_eq!(imported.leaving.iter().map(StorageName::as_str).collect::<Vec<_>>(), ["g-3"]);
        assert_eq!(replicas(&imported), [("g-1", 1), ("g-2", -1), ("g-3", 1)]);
        assert_eq!(imported.rebuilt.primary.as_str(), "g-1");
    }

    #[test]
    fn what_cannot_be_recorded_is_named() {
        let left_out = |row: &PraefectRepository| {
            let judged = judge(row, &known(0));
            assert!(judged.imported.is_none());
            let last = judged.findings.last().unwrap().clone();
            assert!(last.left_out);
            last.what
        };
        let good = row(&[("g-1", 1)], &[]);
        assert_eq!(
            left_out(&PraefectRepository { virtual_storage: "other".into(), ..good.clone() }),
            "virtual storage `other` is not configured"
        );
        assert!(left_out(&PraefectRepository { relative_path: "../x".into(), ..good }).contains("escapes"));
        assert_eq!(left_out(&row(&[("gone", 1)], &[])), "no configured storage has a replica");
        assert_eq!(left_out(&row(&[], &[])), "no configured storage has a replica");
    }

    #[test]
    fn a_loss_stays_a_loss() {
        let lost = PraefectRepository { generation: Some(9), ..row(&[("g-1", 3), ("g-2", 4)], &[]) };
        let judged = judge(&lost, &known(0));
        let imported = judged.imported.unwrap();
        assert_eq!((imported.rebuilt.generation, imported.rebuilt.primary.as_str()), (Generation(10), "g-2"));
        assert_eq!(imported.rebuilt.behind(), 3);
        assert_eq!(judged.findings[0].what, "no configured storage has its newest state");
        let early = PraefectRepository { replica_path: None, generation: None, primary: None, ..lost };
        let mut known = known(0);
        for known in known.values_mut() {
            known.shard_primary = Some("g-2".into());
        }
        let imported = judge(&early, &known).imported.unwrap();
        assert_eq!(imported.rebuilt.replica_path.as_str(), early.relative_path);
        assert_eq!((imported.rebuilt.generation, imported.rebuilt.primary.as_str()), (Generation(5), "g-2"));
    }

    proptest! {
        #[test]
        fn whatever_the_rows_say_the_record_is_sound(
            held in proptest::collection::btree_map(0..5_usize, -1..4_i64, 0..5),
            assigned in proptest::collection::btree_set(0..5_usize, 0..5),
            generation in proptest::option::of(0..6_i64),
            primary in proptest::option::of(0..5_usize),
        ) {
            let names = ["g-1", "g-2", "g-3", "gone-1", "gone-2"];
            let held: Vec<_> = held.into_iter().map(|(index, generation)| (names[index], generation)).collect();
            let assigned: Vec<_> = assigned.into_iter().map(|index| names[index]).collect();
            let row = PraefectRepository {
                generation,
                primary: primary.map(|index| names[index].to_owned()),
                ..row(&held, &assigned)
            };
            let judged = judge(&row, &known(0));
            if let Some(imported) = judged.imported {
                let rebuilt = &imported.rebuilt;
                let newest = rebuilt.replicas.iter().map(|replica| replica.generation).max().unwrap();
                let of_primary = rebuilt.replicas.iter().find(|replica| replica.storage == rebuilt.primary);
                prop_assert_eq!(of_primary.unwrap().generation, newest);
                prop_assert!(newest <= rebuilt.generation);
                prop_assert!(imported.leaving.len() < rebuilt.replicas.len(), "somebody stays");
                for storage in &imported.leaving {
                    prop_assert!(!assigned.contains(&storage.as_str()));
                }
            } else {
                prop_assert!(judged.findings.iter().any(|finding| finding.left_out));
            }
        }
    }
}
