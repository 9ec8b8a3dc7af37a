//! What the records of all replicas amount to: the repositories of a lost database.
//!
//! The newest record of a repository counts, however many replicas have older ones: an acknowledged write is on a majority
//! of replicas, but disks may have been restored to different days since. A replica that stands elsewhere than the newest is
//! behind and is made again. Nothing is guessed: what cannot be told is left out and told to a person.

use std::collections::{BTreeMap, BTreeSet};

use tabularium_common::{
    ids::{Epoch, Generation, RelativePath, ReplicaPath, RepositoryId, StorageName, VirtualStorageName},
    records::standing,
};
use tabularium_proto::{
    coordinator::{RebuildFinding, RebuildFindingKind as Kind},
    node::ReplicaRecord,
};

use crate::repository::{Replica, RepositoryKey};

/// A repository that was found on a storage.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) virtual_storage: VirtualStorageName,
    pub(crate) storage: StorageName,
    pub(crate) replica_path: String,
    pub(crate) record: Option<ReplicaRecord>,
}

/// A repository as it is to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rebuilt {
    pub(crate) id: RepositoryId,
    pub(crate) key: RepositoryKey,
    pub(crate) replica_path: ReplicaPath,
    pub(crate) generation: Generation,
    /// Above all that routers may know.
    pub(crate) epoch: Epoch,
    pub(crate) primary: StorageName,
    pub(crate) replicas: Vec<Replica>,
}

impl Rebuilt {
    pub(crate) fn behind(&self) -> usize {
        self.replicas.iter().filter(|replica| replica.generation < self.generation).count()
    }
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Merged {
    /// By virtual storage and id.
    pub(crate) repositories: Vec<Rebuilt>,
    pub(crate) findings: Vec<RebuildFinding>,
    /// The highest id that was ever seen, also of what is left out.
    pub(crate) last_id: i64,
}

/// A replica with a record.
struct Recorded {
    storage: StorageName,
    replica_path: String,
    record: ReplicaRecord,
}

fn finding(kind: Kind, found: (&VirtualStorageName, &str, &str), what: String) -> RebuildFinding {
    let (virtual_storage, storage, replica_path) = found;
    RebuildFinding {
        kind: kind.into(),
        virtual_storage: virtual_storage.to_string(),
        storage: storage.to_owned(),
        replica_path: replica_path.to_owned(),
        what,
        ..RebuildFinding::default()
    }
}

fn about(finding: RebuildFinding, record: &ReplicaRecord) -> RebuildFinding {
    RebuildFinding {
        relative_path: record.relative_path.clone(),
        repository_id: record.repository_id,
        ..finding
    }
}

/// The id in a replica path that was made from one: its last component.
fn id_in(replica_path: &str) -> Option<i64> {
    replica_path.starts_with("@cluster/").then(|| replica_path.rsplit('/').next()?.parse().ok())?
}

/// Merges what was found. `storages`: how many each virtual storage has.
pub(crate) fn merge(found: Vec<Found>, storages: &BTreeMap<VirtualStorageName, usize>) -> Merged {
    let mut merged = Merged::default();
    let mut recorded: BTreeMap<(VirtualStorageName, i64), Vec<Recorded>> = BTreeMap::new();
    for Found { virtual_storage, storage, replica_path, record } in found {
        merged.last_id = merged.last_id.max(id_in(&replica_path).unwrap_or(0));
        let place = (&virtual_storage, storage.as_str(), replica_path.as_str());
        match record {
            Some(record)
                if record.virtual_storage == virtual_storage.as_str() && record.repository_id > 0 =>
            {
                merged.last_id = merged.last_id.max(record.repository_id);
                let all = recorded.entry((virtual_storage, record.repository_id)).or_default();
                all.push(Recorded { storage, replica_path, record });
            }
            Some(record) => {
                let text = format!("its record is of virtual storage `{}`", record.virtual_storage);
                merged.findings.push(about(finding(Kind::Misplaced, place, text), &record));
            }
            None => {
                let text = "there is no record of it; `track-repository` takes it in".to_owned();
                merged.findings.push(finding(Kind::Unrecorded, place, text));
            }
        }
    }
    for ((virtual_storage, _), replicas) in recorded {
        if let Some(rebuilt) = rebuild(&virtual_storage, &replicas, &mut merged.findings) {
            let all = storages.get(&virtual_storage).copied().unwrap_or(0);
            if rebuilt.replicas.len() * 2 <= all {
                let text = format!("found on {} of {all} storages; was it removed?", rebuilt.replicas.len());
                let place = (&virtual_storage, "", rebuilt.replica_path.as_str());
                merged.findings.push(named(finding(Kind::FewReplicas, place, text), &rebuilt));
            }
            merged.repositories.push(rebuilt);
        }
    }
    name_once(&mut merged);
    merged
}

fn named(finding: RebuildFinding, rebuilt: &Rebuilt) -> RebuildFinding {
    RebuildFinding {
        relative_path: rebuilt.key.relative_path.to_string(),
        repository_id: rebuilt.id.0,
        ..finding
    }
}

/// One repository from its replicas.
fn rebuild(
    virtual_storage: &VirtualStorageName,
    replicas: &[Recorded],
    findings: &mut Vec<RebuildFinding>,
) -> Option<Rebuilt> {
    let whole = replicas.iter().filter(|replica| replica.record.complete && replica.record.generation >= 0);
    let Some(newest) = whole.max_by_key(|replica| standing(&replica.record)) else {
        for Recorded { storage, replica_path, record } in replicas {
            let text = "a copy to it was under way, and no other replica was found".to_owned();
            let place = (virtual_storage, storage.as_str(), replica_path.as_str());
            findings.push(about(finding(Kind::NoWholeReplica, place, text), record));
        }
        return None;
    };
    let (path, name) = (newest.replica_path.clone(), newest.record.relative_path.clone());
    let (top, generation) = (standing(&newest.record), newest.record.generation);
    let parsed = (path.parse::<ReplicaPath>(), name.parse::<RelativePath>());
    let (Ok(replica_path), Ok(relative_path)) = parsed else {
        let place = (virtual_storage, newest.storage.as_str(), path.as_str());
        let text = format!("its name `{name}` cannot be used");
        findings.push(about(finding(Kind::Misplaced, place, text), &newest.record));
        return None;
    };
    let epoch = replicas.iter().map(|replica| replica.record.epoch).max().unwrap_or(0) + 1;
    let mut kept: Vec<Replica> = Vec::new();
    for Recorded { storage, replica_path: own_path, record } in replicas {
        let place = (virtual_storage, storage.as_str(), own_path.as_str());
        if *own_path != path {
            let text = format!("the repository is at {path}");
            findings.push(about(finding(Kind::Misplaced, place, text), record));
            continue;
        }
        let own = if !record.complete {
            Generation::UNKNOWN
        } else if standing(record) == top {
            Generation(generation)
        } else if record.generation < generation {
            Generation(record.generation)
        } else {
            // It has other parts of the same write.
            Generation::UNKNOWN
        };
        if own.0 < generation {
            let text = match own {
                Generation::UNKNOWN => "it is not known what it holds".to_owned(),
                Generation(own) => format!("it has generation {own} of {generation}"),
            };
            findings.push(about(finding(Kind::Behind, place, text), record));
        }
        kept.push(Replica { storage: storage.clone(), generation: own });
    }
    kept.sort_by(|one, other| one.storage.cmp(&other.storage));
    let primary = kept.iter().find(|replica| replica.generation.0 == generation)?.storage.clone();
    Some(Rebuilt {
        id: RepositoryId(newest.record.repository_id),
        key: RepositoryKey { virtual_storage: virtual_storage.clone(), relative_path },
        replica_path,
        generation: Generation(generation),
        epoch: Epoch(epoch),
        primary,
        replicas: kept,
    })
}

/// Of several repositories with one name the last one has it: names are used again when what had them is gone.
fn name_once(merged: &mut Merged) {
    let mut taken = BTreeSet::new();
    let mut repositories = std::mem::take(&mut merged.repositories);
    repositories.sort_by_key(|rebuilt| rebuilt.id.0);
    let (mut kept, mut ids) = (Vec::with_capacity(repositories.len()), BTreeSet::new());
    for rebuilt in repositories.into_iter().rev() {
        let place = (&rebuilt.key.virtual_storage, "", rebuilt.replica_path.as_str());
        if !ids.insert(rebuilt.id.0) {
            let text = "another virtual storage has a repository with this id".to_owned();
            merged.findings.push(named(finding(Kind::Misplaced, place, text), &rebuilt));
        } else if taken.insert(rebuilt.key.clone()) {
            kept.push(rebuilt);
        } else {
            let text = "a later repository has its name; it was removed or renamed".to_owned();
            merged.findings.push(named(finding(Kind::NameTaken, place, text), &rebuilt));
        }
    }
    kept.reverse();
    merged.repositories = kept;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(id: i64, name: &str, generation: i64, changes: u32) -> ReplicaRecord {
        ReplicaRecord {
            repository_id: id,
            virtual_storage: "default".into(),
            relative_path: name.into(),
            generation,
            epoch: 3,
            changes,
            complete: true,
            ..ReplicaRecord::default()
        }
    }

    fn found(storage: usize, record: ReplicaRecord) -> Found {
        Found {
            virtual_storage: "default".parse().unwrap(),
            storage: format!("node-{storage}").parse().unwrap(),
            replica_path: format!("@cluster/repositories/aa/bb/{}", record.repository_id),
            record: Some(record),
        }
    }

    fn merged(found: Vec<Found>) -> Merged {
        merge(found, &BTreeMap::from([("default".parse().unwrap(), 3)]))
    }

    fn kinds(merged: &Merged) -> Vec<Kind> {
        merged.findings.iter().map(RebuildFinding::kind).collect()
    }

    fn generations(rebuilt: &Rebuilt) -> Vec<i64> {
        rebuilt.replicas.iter().map(|replica| replica.generation.0).collect()
    }

    #[test]
    fn the_newest_counts_and_not_most() {
        let merged = merged(vec![
            found(1, record(7, "a.git", 4, 1)),
            found(2, record(7, "a.git", 4, 1)),
            found(3, record(7, "renamed.git", 9, 1)),
        ]);
        let rebuilt = &merged.repositories[0];
        assert_eq!((rebuilt.generation.0, rebuilt.epoch.0), (9, 4));
        assert_eq!(rebuilt.primary.as_str(), "node-3");
        assert_eq!(rebuilt.key.relative_path.as_str(), "renamed.git");
        assert_eq!((generations(rebuilt), rebuilt.behind()), (vec![4, 4, 9], 2));
        assert_eq!(kinds(&merged), [Kind::Behind, Kind::Behind]);
        assert_eq!(merged.last_id, 7);
    }

    #[test]
    fn half_a_push_and_half_a_copy_are_made_again() {
        let mixture = ReplicaRecord { complete: false, ..record(7, "a.git", 5, 2) };
        let merged = merged(vec![
            found(1, record(7, "a.git", 5, 1)),
            found(2, record(7, "a.git", 5, 2)),
            found(3, mixture.clone()),
            found(1, ReplicaRecord { repository_id: 8, relative_path: "b.git".into(), ..mixture }),
        ]);
        assert_eq!(merged.repositories.len(), 1);
        assert_eq!(generations(&merged.repositories[0]), [-1, 5, -1]);
        assert_eq!(kinds(&merged), [Kind::Behind, Kind::Behind, Kind::NoWholeReplica]);
        assert_eq!(merged.last_id, 8);
    }

    #[test]
    fn what_cannot_be_told_is_left_out_and_told() {
        let mut elsewhere = found(2, record(7, "a.git", 5, 1));
        elsewhere.replica_path = "old/place.git".into();
        let foreign = ReplicaRecord { virtual_storage: "other".into(), ..record(9, "c.git", 1, 1) };
        let mut unrecorded = found(3, record(30, "x", 1, 1));
        unrecorded.record = None;
        let merged = merged(vec![
            found(1, record(7, "a.git", 5, 1)),
            elsewhere,
            found(1, foreign),
            unrecorded,
            found(1, record(3, "a.git", 50, 1)),
            found(2, record(3, "a.git", 50, 1)),
        ]);
        assert_eq!(merged.repositories.iter().map(|rebuilt| rebuilt.id.0).collect::<Vec<_>>(), [7]);
        assert_eq!(
            kinds(&merged),
            [Kind::Misplaced, Kind::Unrecorded, Kind::Misplaced, Kind::FewReplicas, Kind::NameTaken]
        );
        assert_eq!(merged.last_id, 30, "ids of what is left out are not given again");
    }

    proptest! {
        #[test]
        fn no_acknowledged_write_is_lost_however_old_some_disks_are(
            ages in prop::collection::vec((0_i64..6, 0_u32..3, any::<bool>()), 1..6)
        ) {
            let replicas = ages.iter().enumerate().map(|(number, (generation, changes, complete))| {
                let record = record(7, "a.git", *generation, *changes);
                found(number, ReplicaRecord { complete: *complete, ..record })
            });
            let merged = merged(replicas.collect());
            let newest = ages.iter().filter(|(.., whole)| *whole).map(|(g, c, _)| (*g, *c)).max();
            match (newest, merged.repositories.first()) {
                (None, rebuilt) => prop_assert!(rebuilt.is_none()),
                (Some((generation, changes)), Some(rebuilt)) => {
                    prop_assert_eq!(rebuilt.generation.0, generation);
                    prop_assert_eq!(rebuilt.replicas.len(), ages.len());
                    for (replica, (own, parts, whole)) in rebuilt.replicas.iter().zip(&ages) {
                        let level = *whole && (*own, *parts) == (generation, changes);
                        prop_assert_eq!(replica.generation.0 == generation, level);
                    }
                    let primary = rebuilt.replicas.iter().find(|replica| replica.storage == rebuilt.primary);
                    prop_assert_eq!(primary.map(|replica| replica.generation.0), Some(generation));
                }
                (Some(_), None) => prop_assert!(false),
            }
        }
    }
}
