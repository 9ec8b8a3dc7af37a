//! What a rebuild of the database found.

use serde::Serialize;
use tabularium_proto::coordinator::{RebuildFinding, RebuildFindingKind as Kind, RebuildSum};

/// Something to be looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct FindingView {
    pub(crate) kind: &'static str,
    pub(crate) virtual_storage: String,
    /// Empty when it is not known.
    pub(crate) relative_path: String,
    /// 0 when it is not known.
    pub(crate) repository_id: i64,
    /// Empty when it is about more than one.
    pub(crate) storage: String,
    pub(crate) replica_path: String,
    pub(crate) what: String,
}

impl From<RebuildFinding> for FindingView {
    fn from(finding: RebuildFinding) -> Self {
        Self {
            kind: match finding.kind() {
                Kind::Unreadable => "unreadable",
                Kind::Unrecorded => "unrecorded",
                Kind::NameTaken => "name taken",
                Kind::NoWholeReplica => "no whole replica",
                Kind::FewReplicas => "few replicas",
                Kind::Misplaced => "misplaced",
                Kind::Behind => "behind",
                Kind::Present => "present",
                Kind::Unspecified => "unknown",
            },
            virtual_storage: finding.virtual_storage,
            relative_path: finding.relative_path,
            repository_id: finding.repository_id,
            storage: finding.storage,
            replica_path: finding.replica_path,
            what: finding.what,
        }
    }
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct RebuildView {
    pub(crate) dry_run: bool,
    pub(crate) repositories: i64,
    pub(crate) replicas: i64,
    pub(crate) replicas_behind: i64,
    /// Storages that were read.
    pub(crate) storages: i64,
    pub(crate) last_repository_id: i64,
    pub(crate) findings: Vec<FindingView>,
}

impl RebuildView {
    pub(crate) fn sum(&mut self, sum: &RebuildSum) {
        self.repositories = sum.repositories;
        self.replicas = sum.replicas;
        self.replicas_behind = sum.replicas_behind;
        self.storages = sum.storages;
        self.last_repository_id = sum.last_repository_id;
    }
}
