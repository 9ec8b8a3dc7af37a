//! What was taken over.

use serde::Serialize;
use tabularium_proto::coordinator::{ImportFinding, ImportSum};

/// Something to be looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ImportFindingView {
    pub(crate) repository_id: i64,
    pub(crate) virtual_storage: String,
    pub(crate) relative_path: String,
    pub(crate) left_out: bool,
    pub(crate) what: String,
}

impl From<ImportFinding> for ImportFindingView {
    fn from(finding: ImportFinding) -> Self {
        Self {
            repository_id: finding.repository_id,
            virtual_storage: finding.virtual_storage,
            relative_path: finding.relative_path,
            left_out: finding.left_out,
            what: finding.what,
        }
    }
}

/// An import of Praefect's records.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ImportView {
    pub(crate) dry_run: bool,
    pub(crate) repositories: i64,
    pub(crate) replicas: i64,
    /// Behind, or still to be made.
    pub(crate) replicas_behind: i64,
    pub(crate) known_before: i64,
    pub(crate) left_out: i64,
    pub(crate) last_repository_id: i64,
    pub(crate) findings: Vec<ImportFindingView>,
}

impl ImportView {
    pub(crate) fn sum(&mut self, sum: &ImportSum) {
        self.repositories = sum.repositories;
        self.replicas = sum.replicas;
        self.replicas_behind = sum.replicas_behind;
        self.known_before = sum.known_before;
        self.left_out = sum.left_out;
        self.last_repository_id = sum.last_repository_id;
    }
}

/// A repository on disk that was not taken in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct UntakenView {
    pub(crate) replica_path: String,
    pub(crate) storages: Vec<String>,
    pub(crate) what: String,
}

/// Repositories on disks, taken in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct TrackedView {
    pub(crate) dry_run: bool,
    pub(crate) tracked: i64,
    pub(crate) left_out: Vec<UntakenView>,
}
