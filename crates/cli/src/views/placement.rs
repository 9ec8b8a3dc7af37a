//! Storages, and all that is known of replicas.

use serde::Serialize;
use tabularium_proto::coordinator as wire;

use super::timestamp;

/// A storage as `storage list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct StorageDetailsView {
    pub(crate) virtual_storage: String,
    pub(crate) name: String,
    pub(crate) address: String,
    /// `active` or `draining`.
    pub(crate) state: String,
    pub(crate) healthy: bool,
    pub(crate) problem: String,
    pub(crate) takes_replicas: bool,
    pub(crate) replicas: i64,
    pub(crate) replicas_behind: i64,
    pub(crate) primaries: i64,
    /// Replicas that are being made there for the first time.
    pub(crate) arriving: i64,
    /// Replicas that go as soon as others are up to date.
    pub(crate) leaving: i64,
    pub(crate) filesystem_id: String,
}

impl From<wire::StorageDetails> for StorageDetailsView {
    fn from(storage: wire::StorageDetails) -> Self {
        Self {
            virtual_storage: storage.virtual_storage,
            name: storage.name,
            address: storage.address,
            state: storage.state,
            healthy: storage.healthy,
            problem: storage.problem,
            takes_replicas: storage.takes_replicas,
            replicas: storage.replicas,
            replicas_behind: storage.replicas_behind,
            primaries: storage.primaries,
            arriving: storage.arriving,
            leaving: storage.leaving,
            filesystem_id: storage.filesystem_id,
        }
    }
}

/// One replica with its condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ReplicaDetailsView {
    pub(crate) storage: String,
    /// -1: nothing is known to be there.
    pub(crate) generation: i64,
    /// How many writes it lacks at most; `null` when nothing is known of it.
    pub(crate) behind_by: Option<i64>,
    pub(crate) up_to_date: bool,
    pub(crate) primary: bool,
    pub(crate) healthy: bool,
    pub(crate) assigned: bool,
    /// It could serve as the primary now.
    pub(crate) valid_primary: bool,
    pub(crate) behind_since: Option<String>,
    pub(crate) verified_at: Option<String>,
    /// When its objects were last found whole.
    pub(crate) checked_at: Option<String>,
    /// What was wrong with them, in git's words; empty: nothing is known.
    pub(crate) damage: String,
}

/// A repository as `metadata` and `dataloss` show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct RepositoryReplicasView {
    pub(crate) virtual_storage: String,
    pub(crate) relative_path: String,
    pub(crate) repository_id: i64,
    pub(crate) replica_path: String,
    pub(crate) primary: String,
    pub(crate) generation: i64,
    pub(crate) epoch: i64,
    /// 0: all storages.
    pub(crate) replication_factor: u32,
    pub(crate) write_quorum_policy: String,
    pub(crate) write_quorum: u32,
    pub(crate) unavailable: bool,
    pub(crate) written_at: Option<String>,
    pub(crate) replicas: Vec<ReplicaDetailsView>,
}

impl From<wire::RepositoryReplicas> for RepositoryReplicasView {
    fn from(repository: wire::RepositoryReplicas) -> Self {
        let name = repository.name.unwrap_or_default();
        let newest = repository.generation;
        let mut replicas: Vec<_> = repository
            .replicas
            .into_iter()
            .map(|replica| ReplicaDetailsView {
                behind_by: (replica.generation >= 0).then_some(newest - replica.generation),
                valid_primary: replica.up_to_date && replica.healthy,
                storage: replica.storage,
                generation: replica.generation,
                up_to_date: replica.up_to_date,
                primary: replica.primary,
                healthy: replica.healthy,
                assigned: replica.assigned,
                behind_since: timestamp(replica.behind_since),
                verified_at: timestamp(replica.verified_at),
                checked_at: timestamp(replica.checked_at),
                damage: replica.damage,
            })
            .collect();
        replicas.sort_by(|one, other| one.storage.cmp(&other.storage));
        Self {
            virtual_storage: name.virtual_storage,
            relative_path: name.relative_path,
            repository_id: repository.repository_id,
            replica_path: repository.replica_path,
            primary: repository.primary,
            generation: newest,
            epoch: repository.epoch,
            replication_factor: repository.replication_factor,
            write_quorum_policy: repository.write_quorum_policy,
            write_quorum: repository.write_quorum,
            unavailable: repository.unavailable,
            written_at: timestamp(repository.written_at),
            replicas,
        }
    }
}

/// A repository on a disk that is in no record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct UntrackedView {
    pub(crate) virtual_storage: String,
    pub(crate) storage: String,
    pub(crate) replica_path: String,
    pub(crate) modified_at: Option<String>,
}

impl From<wire::ListUntrackedResponse> for UntrackedView {
    fn from(found: wire::ListUntrackedResponse) -> Self {
        Self {
            virtual_storage: found.virtual_storage,
            storage: found.storage,
            replica_path: found.replica_path,
            modified_at: timestamp(found.modified_at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scripts read this: fields may be added, none renamed.
    #[test]
    fn the_json_of_replicas_is_stable() {
        let name =
            wire::RepositoryName { virtual_storage: "default".into(), relative_path: "a/b.git".into() };
        let at = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 });
        let view = RepositoryReplicasView::from(wire::RepositoryReplicas {
            name: Some(name),
            repository_id: 1,
            replica_path: "@cluster/repositories/6b/86/1".into(),
            primary: "node-1".into(),
            generation: 3,
            epoch: 1,
            replication_factor: 2,
            write_quorum_policy: "majority".into(),
            write_quorum: 2,
            unavailable: false,
            written_at: at,
            replicas: vec![
                wire::ReplicaDetails {
                    storage: "node-2".into(),
                    generation: 1,
                    assigned: true,
                    behind_since: at,
                    damage: "missing blob 1".into(),
                    ..wire::ReplicaDetails::default()
                },
                wire::ReplicaDetails {
                    storage: "node-1".into(),
                    generation: 3,
                    up_to_date: true,
                    primary: true,
                    healthy: true,
                    assigned: true,
                    verified_at: at,
                    checked_at: at,
                    ..wire::ReplicaDetails::default()
                },
            ],
        });
        let expected = serde_json::json!({
            "virtual_storage": "default",
            "relative_path": "a/b.git",
            "repository_id": 1,
            "replica_path": "@cluster/repositories/6b/86/1",
            "primary": "node-1",
            "generation": 3,
            "epoch": 1,
            "replication_factor": 2,
            "write_quorum_policy": "majority",
            "write_quorum": 2,
            "unavailable": false,
            "written_at": "2023-11-14T22:13:20Z",
            "replicas": [
                {
                    "storage": "node-1", "generation": 3, "behind_by": 0, "up_to_date": true, "primary": true,
                    "healthy": true, "assigned": true, "valid_primary": true, "behind_since": null,
                    "verified_at": "2023-11-14T22:13:20Z", "checked_at": "2023-11-14T22:13:20Z", "damage": "",
                },
                {
                    "storage": "node-2", "generation": 1, "behind_by": 2, "up_to_date": false, "primary": false,
                    "healthy": false, "assigned": true, "valid_primary": false,
                    "behind_since": "2023-11-14T22:13:20Z", "verified_at": null, "checked_at": null,
                    "damage": "missing blob 1",
                },
            ],
        });
        assert_eq!(serde_json::to_value(view).unwrap(), expected);
    }
}
