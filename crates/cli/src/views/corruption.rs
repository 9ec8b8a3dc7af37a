//! What was found of replicas' objects, and what was kept of corrupt ones.

use serde::Serialize;
use tabularium_proto::coordinator as wire;

use super::timestamp;

/// What `verify --fsck` found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct CheckedView {
    pub(crate) replicas: Vec<ReplicaCheckView>,
    /// Storages whose replicas are out of reads and are made again.
    pub(crate) made_again: Vec<String>,
}

/// Of one replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ReplicaCheckView {
    pub(crate) storage: String,
    /// `whole`, `damaged` or `unknown`.
    pub(crate) state: String,
    /// What is wrong, in git's words, or why it is not known.
    pub(crate) findings: String,
}

impl From<wire::ReplicaCheck> for ReplicaCheckView {
    fn from(check: wire::ReplicaCheck) -> Self {
        Self { storage: check.storage, state: check.state, findings: check.findings }
    }
}

/// What `kept list` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct KeptListView {
    pub(crate) kept: Vec<KeptView>,
    pub(crate) unread: Vec<UnreadView>,
}

/// A corrupt replica that a node kept aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct KeptView {
    pub(crate) storage: String,
    pub(crate) id: String,
    pub(crate) replica_path: String,
    /// 0: its node did not know.
    pub(crate) repository_id: i64,
    pub(crate) relative_path: String,
    pub(crate) reason: String,
    pub(crate) found_at: Option<String>,
    pub(crate) kept_at: Option<String>,
    /// On the disk of its node.
    pub(crate) path: String,
    pub(crate) bytes: u64,
}

/// A storage whose node could not be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct UnreadView {
    pub(crate) storage: String,
    pub(crate) problem: String,
}

impl From<wire::ListKeptResponse> for KeptListView {
    fn from(listed: wire::ListKeptResponse) -> Self {
        let kept = listed.kept.into_iter().map(|kept| KeptView {
            storage: kept.storage.unwrap_or_default().storage,
            id: kept.kept_id,
            replica_path: kept.replica_path,
            repository_id: kept.repository_id,
            relative_path: kept.relative_path,
            reason: kept.reason,
            found_at: timestamp(kept.found_at),
            kept_at: timestamp(kept.kept_at),
            path: kept.path,
            bytes: kept.bytes,
        });
        let unread = listed.unread.into_iter();
        Self {
            kept: kept.collect(),
            unread: unread
                .map(|unread| UnreadView { storage: unread.storage, problem: unread.problem })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scripts read this: fields may be added, none renamed.
    #[test]
    fn the_json_of_what_is_kept_is_stable() {
        let at = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 });
        let listed = wire::ListKeptResponse {
            kept: vec![wire::KeptReplica {
                storage: Some(wire::StorageName {
                    virtual_storage: "default".into(),
                    storage: "node-1".into(),
                }),
                kept_id: "7-1700000000000".into(),
                replica_path: "@cluster/repositories/6b/86/7".into(),
                repository_id: 7,
                relative_path: "a/b.git".into(),
                reason: "missing blob 1".into(),
                found_at: at,
                kept_at: at,
                path: "/disk/+gitaly/kept/7-1700000000000/repository".into(),
                bytes: 9,
            }],
            unread: vec![wire::UnreadStorage { storage: "node-2".into(), problem: "gone".into() }],
        };
        let expected = serde_json::json!({
            "kept": [{
                "storage": "node-1", "id": "7-1700000000000", "replica_path": "@cluster/repositories/6b/86/7",
                "repository_id": 7, "relative_path": "a/b.git", "reason": "missing blob 1",
                "found_at": "2023-11-14T22:13:20Z", "kept_at": "2023-11-14T22:13:20Z",
                "path": "/disk/+gitaly/kept/7-1700000000000/repository", "bytes": 9,
            }],
            "unread": [{ "storage": "node-2", "problem": "gone" }],
        });
        assert_eq!(serde_json::to_value(KeptListView::from(listed)).unwrap(), expected);
        let checked = CheckedView {
            replicas: vec![
                wire::ReplicaCheck {
                    storage: "node-1".into(),
                    state: "damaged".into(),
                    findings: "missing blob 1".into(),
                }
                .into(),
            ],
            made_again: vec!["node-1".into()],
        };
        let expected = serde_json::json!({
            "replicas": [{ "storage": "node-1", "state": "damaged", "findings": "missing blob 1" }],
            "made_again": ["node-1"],
        });
        assert_eq!(serde_json::to_value(checked).unwrap(), expected);
    }
}
