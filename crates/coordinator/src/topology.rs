//! Virtual storages and storages as this coordinator knows them: those of its configuration, and those that only the
//! database has (added by an operator, or from another coordinator's configuration, or an older one of ours). Storages that
//! were removed are not known, whoever configures them.

use std::sync::Arc;

use tabularium_common::{
    grpc::Address,
    ids::{SiteName, StorageName, VirtualStorageName},
};
use tabularium_proto::coordinator as wire;
use tokio::sync::watch;

use crate::{
    config::Config,
    db::storages::{StorageState, StoredStorage},
};

/// A storage of a virtual storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KnownStorage {
    pub(crate) name: StorageName,
    pub(crate) address: Address,
    /// New replicas may go there: it is in our configuration or was added by an operator, and is not drained.
    pub(crate) configured: bool,
    pub(crate) state: StorageState,
    /// The file system that its replicas are on; `None` while none was seen.
    pub(crate) filesystem_id: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KnownVirtualStorage {
    pub(crate) name: VirtualStorageName,
    pub(crate) default_replication_factor: u16,
    pub(crate) storages: Vec<KnownStorage>,
}

/// Everything known at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Snapshot {
    site: SiteName,
    pub(crate) virtual_storages: Vec<KnownVirtualStorage>,
}

impl Snapshot {
    /// What the configuration says, and what else is in the database.
    pub(crate) fn new(config: &Config, stored: &[StoredStorage]) -> Self {
        let mut virtual_storages: Vec<KnownVirtualStorage> = config
            .virtual_storages
            .iter()
            .map(|virtual_storage| KnownVirtualStorage {
                name: virtual_storage.name.clone(),
                default_replication_factor: virtual_storage.default_replication_factor,
                storages: virtual_storage
                    .storages
                    .iter()
                    .map(|storage| KnownStorage {
                        name: storage.name.clone(),
                        address: storage.address.clone(),
                        configured: true,
                        state: StorageState::Active,
                        filesystem_id: None,
                    })
                    .collect(),
            })
            .collect();
        for storage in stored {
            let place = &storage.storage;
            let at = virtual_storages.iter().position(|known| known.name == place.virtual_storage);
            let at = at.unwrap_or_else(|| {
                virtual_storages.push(KnownVirtualStorage {
                    name: place.virtual_storage.clone(),
                    default_replication_factor: 0,
                    storages: Vec::new(),
                });
                virtual_storages.len() - 1
            });
            let storages = &mut virtual_storages[at].storages;
            let configured = storages.iter().position(|known| known.name == place.name);
            if storage.state == StorageState::Removed {
                configured.map(|at| storages.remove(at));
                continue;
            }
            let at = configured.unwrap_or_else(|| {
                storages.push(KnownStorage {
                    name: place.name.clone(),
                    address: place.address.clone(),
                    configured: storage.added,
                    state: storage.state,
                    filesystem_id: None,
                });
                storages.len() - 1
            });
            let known = &mut storages[at];
            known.state = storage.state;
            known.filesystem_id.clone_from(&storage.filesystem_id);
            known.configured &= storage.state == StorageState::Active;
        }
        Self { site: config.site.clone(), virtual_storages }
    }

    pub(crate) fn virtual_storage(&self, name: &VirtualStorageName) -> Option<&KnownVirtualStorage> {
        self.virtual_storages.iter().find(|known| known.name == *name)
    }

    /// One storage.
    pub(crate) fn storage(
        &self,
        virtual_storage: &VirtualStorageName,
        storage: &StorageName,
    ) -> Option<&KnownStorage> {
        self.virtual_storage(virtual_storage)?.storages.iter().find(|known| known.name == *storage)
    }

    /// Where a storage is reached.
    pub(crate) fn address(
        &self,
        virtual_storage: &VirtualStorageName,
        storage: &StorageName,
    ) -> Option<&Address> {
        self.storage(virtual_storage, storage).map(|known| &known.address)
    }

    /// Every storage with its virtual storage.
    pub(crate) fn storages(&self) -> impl Iterator<Item = (&VirtualStorageName, &KnownStorage)> {
        self.virtual_storages
            .iter()
            .flat_map(|known| known.storages.iter().map(|storage| (&known.name, storage)))
    }
}

impl From<&Snapshot> for wire::Topology {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            site: snapshot.site.to_string(),
            virtual_storages: snapshot
                .virtual_storages
                .iter()
                .map(|known| wire::VirtualStorage {
                    name: known.name.to_string(),
                    storages: known
                        .storages
                        .iter()
                        .map(|storage| wire::Storage {
                            name: storage.name.to_string(),
                            address: storage.address.to_string(),
                            filesystem_id: storage.filesystem_id.clone().unwrap_or_default(),
                        })
                        .collect(),
                })
                .collect(),
        }
    }
}

/// The present snapshot, and word of its changes.
pub(crate) struct Topology(watch::Sender<Arc<Snapshot>>);

impl Topology {
    pub(crate) fn new(snapshot: Snapshot) -> Self {
        Self(watch::Sender::new(Arc::new(snapshot)))
    }

    pub(crate) fn get(&self) -> Arc<Snapshot> {
        Arc::clone(&self.0.borrow())
    }

    /// Puts a new snapshot in place. True: it differs.
    pub(crate) fn set(&self, snapshot: Snapshot) -> bool {
        self.0.send_if_modified(|present| {
            let differs = **present != snapshot;
            if differs {
                *present = Arc::new(snapshot);
            }
            differs
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::storages::Storage;

    fn stored(name: &str, state: StorageState, added: bool) -> StoredStorage {
        StoredStorage {
            storage: Storage {
                virtual_storage: "default".parse().unwrap(),
                name: name.parse().unwrap(),
                address: "tcp://old:1".parse().unwrap(),
            },
            state,
            added,
            filesystem_id: Some(format!("disk of {name}")),
        }
    }

    #[test]
    fn what_operators_did_counts_beside_the_configuration() {
        let config: Config = toml::from_str(include_str!("../../../deploy/config/coordinator.toml")).unwrap();
        let stored = [
            stored("gitaly-1", StorageState::Draining, false),
            stored("gitaly-2", StorageState::Removed, false),
            stored("new", StorageState::Active, true),
        ];
        let snapshot = Snapshot::new(&config, &stored);
        let known = snapshot.virtual_storage(&"default".parse().unwrap()).unwrap();
        let shown: Vec<_> = known
            .storages
            .iter()
            .map(|storage| (storage.name.as_str(), storage.configured, storage.filesystem_id.as_deref()))
            .collect();
        let expected = [
            ("gitaly-1", false, Some("disk of gitaly-1")),
            ("gitaly-3", true, None),
            ("new", true, Some("disk of new")),
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_storage_that_left_the_configuration_is_known_and_not_placed_on() {
        let config: Config = toml::from_str(include_str!("../../../deploy/config/coordinator.toml")).unwrap();
        let stored = ["gitaly-1", "retired"].map(|name| stored(name, StorageState::Active, false));
        let snapshot = Snapshot::new(&config, &stored);
        let known = snapshot.virtual_storage(&"default".parse().unwrap()).unwrap();
        let shown: Vec<_> =
            known.storages.iter().map(|storage| (storage.name.as_str(), storage.configured)).collect();
        assert_eq!(shown, [("gitaly-1", true), ("gitaly-2", true), ("gitaly-3", true), ("retired", false)]);
        assert_eq!(known.storages[0].address.to_string(), "tcp://gitaly-1:8075", "the configuration wins");
    }
}
