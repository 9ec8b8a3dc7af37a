//! A repository as every part of this service speaks of it.

use std::fmt;

use tabularium_common::ids::{
    Epoch, Generation, RelativePath, ReplicaPath, RepositoryId, SiteName, StorageName, VirtualStorageName,
};
use tabularium_proto::coordinator as wire;

use crate::quorum::QuorumPolicy;

/// The name by which clients know a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RepositoryKey {
    pub(crate) virtual_storage: VirtualStorageName,
    pub(crate) relative_path: RelativePath,
}

impl fmt::Display for RepositoryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.virtual_storage, self.relative_path)
    }
}

impl From<&RepositoryKey> for wire::RepositoryName {
    fn from(key: &RepositoryKey) -> Self {
        Self {
            virtual_storage: key.virtual_storage.to_string(),
            relative_path: key.relative_path.to_string(),
        }
    }
}

/// One storage's copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Replica {
    pub(crate) storage: StorageName,
    pub(crate) generation: Generation,
}

/// A repository with its copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Repository {
    pub(crate) id: RepositoryId,
    pub(crate) key: RepositoryKey,
    pub(crate) replica_path: ReplicaPath,
    pub(crate) primary: StorageName,
    pub(crate) generation: Generation,
    pub(crate) epoch: Epoch,
    pub(crate) home_site: Option<SiteName>,
    pub(crate) write_quorum: QuorumPolicy,
    /// Replicas that count towards the quorum: all but those that are being made for the first time.
    pub(crate) members: usize,
    pub(crate) replicas: Vec<Replica>,
}

impl Repository {
    /// Storages that have the newest generation.
    pub(crate) fn up_to_date(&self) -> impl Iterator<Item = &StorageName> {
        self.replicas
            .iter()
            .filter(|replica| replica.generation == self.generation)
            .map(|replica| &replica.storage)
    }

    /// How many replicas must have a write before it is acknowledged.
    pub(crate) fn quorum(&self) -> usize {
        self.write_quorum.of(self.members)
    }

    /// The copy on `storage`.
    pub(crate) fn replica(&self, storage: &StorageName) -> Option<&Replica> {
        self.replicas.iter().find(|replica| &replica.storage == storage)
    }
}

impl From<&Repository> for wire::Route {
    fn from(repository: &Repository) -> Self {
        Self {
            repository_id: repository.id.0,
            name: Some((&repository.key).into()),
            replica_path: repository.replica_path.to_string(),
            primary: repository.primary.to_string(),
            generation: repository.generation.0,
            epoch: repository.epoch.0,
            replicas: repository
                .replicas
                .iter()
                .map(|replica| wire::Replica {
                    storage: replica.storage.to_string(),
                    generation: replica.generation.0,
                })
                .collect(),
            home_site: repository.home_site.as_ref().map(ToString::to_string).unwrap_or_default(),
            write_quorum: u32::try_from(repository.quorum()).unwrap_or(u32::MAX),
        }
    }
}

/// A change after which routes of an older generation must not be used any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RevokedRoute {
    pub(crate) key: RepositoryKey,
    pub(crate) id: RepositoryId,
    pub(crate) generation: Generation,
}
