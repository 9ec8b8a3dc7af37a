//! This coordinator's opinion of the storage nodes, from asking each every second. In memory only: another coordinator
//! may see the network differently and be right.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::StreamExt as _;
use tabularium_common::{
    auth::{NodeTokens, SendToken},
    grpc::{Address, channel},
    ids::{StorageName, VirtualStorageName},
};
use tabularium_proto::gitaly::{ServerInfoRequest, server_service_client::ServerServiceClient};
use tokio::time::Instant;
use tonic::{service::interceptor::InterceptedService, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::topology::{KnownStorage, Snapshot};

/// How long a node may take to answer.
const PROBE_DEADLINE: Duration = Duration::from_secs(1);
/// Nodes asked at once.
const PROBES_AT_ONCE: usize = 64;
/// Answers a node may miss before it counts as unhealthy; a refused connection counts at once.
const MISSES_ALLOWED: u32 = 1;

/// What one node said when it was asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Dialled {
    pub(crate) reachable: bool,
    /// It serves a storage of that name, to be read and written.
    pub(crate) storage_served: bool,
    pub(crate) server_version: String,
    pub(crate) git_version: String,
    /// Of the file system that it has there now; empty when it did not say.
    pub(crate) filesystem_id: String,
    /// Empty when all is well.
    pub(crate) problem: String,
    pub(crate) round_trip: Duration,
    refused: bool,
}

/// What we think of a storage.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Opinion {
    pub(crate) healthy: bool,
    /// Why not, when not.
    pub(crate) problem: String,
    misses: u32,
}

impl Opinion {
    /// The opinion after one more probe.
    fn after(&self, dialled: &Dialled) -> Self {
        if dialled.storage_served {
            return Self { healthy: true, problem: String::new(), misses: 0 };
        }
        let misses = self.misses.saturating_add(1);
        let excused = self.healthy && !dialled.reachable && !dialled.refused && misses <= MISSES_ALLOWED;
        Self { healthy: excused, problem: dialled.problem.clone(), misses }
    }
}

/// One storage.
pub(crate) type Place = (VirtualStorageName, StorageName);

/// Opinions and the connections behind them.
pub(crate) struct Health {
    tokens: NodeTokens,
    opinions: Mutex<HashMap<Place, Opinion>>,
    /// Storages that have become healthy, for whoever takes them. Bounded by the storages there are.
    recovered: Mutex<HashSet<Place>>,
    channels: Mutex<HashMap<Address, Channel>>,
}

impl Health {
    pub(crate) fn new(tokens: NodeTokens) -> Self {
        Self { tokens, opinions: Mutex::default(), recovered: Mutex::default(), channels: Mutex::default() }
    }

    /// A connection that signs its calls, shared by everything that is asked of that node.
    pub(crate) fn signed(&self, address: &Address) -> InterceptedService<Channel, SendToken> {
        InterceptedService::new(self.channel(address), self.tokens.to_send(address))
    }

    fn channel(&self, address: &Address) -> Channel {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.entry(address.clone()).or_insert_with(|| channel(address)).clone()
    }

    /// What we think of a storage; unhealthy as long as it was never asked.
    pub(crate) fn opinion(&self, virtual_storage: &VirtualStorageName, storage: &StorageName) -> Opinion {
        let opinions = self.opinions.lock().unwrap_or_else(PoisonError::into_inner);
        opinions.get(&(virtual_storage.clone(), storage.clone())).cloned().unwrap_or_else(|| Opinion {
            healthy: false,
            problem: "not asked yet".to_owned(),
            misses: 0,
        })
    }

    fn recovered(&self) -> MutexGuard<'_, HashSet<Place>> {
        self.recovered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Storages that have become healthy since this was asked before.
    pub(crate) fn take_recovered(&self) -> HashSet<Place> {
        std::mem::take(&mut *self.recovered())
    }

    /// Whether we think a storage healthy.
    pub(crate) fn is_healthy(&self, virtual_storage: &VirtualStorageName, storage: &StorageName) -> bool {
        self.opinion(virtual_storage, storage).healthy
    }

    /// Asks one storage's node, now, and remembers the answer. A node with another file system than the known one is not
    /// healthy.
    pub(crate) async fn dial(&self, virtual_storage: &VirtualStorageName, known: &KnownStorage) -> Dialled {
        let storage = &known.name;
        let begun = Instant::now();
        let asked = tokio::time::timeout(PROBE_DEADLINE, self.ask(storage, &known.address)).await;
        let mut dialled = asked.unwrap_or_else(|_| Dialled {
            problem: format!("no answer within {} ms", PROBE_DEADLINE.as_millis()),
            ..Dialled::default()
        });
        dialled.round_trip = begun.elapsed();
        if let Some(expected) = &known.filesystem_id
            && dialled.storage_served
            && dialled.filesystem_id != *expected
        {
            dialled.storage_served = false;
            dialled.problem = format!(
                "another file system is in the storage: id `{}` instead of `{expected}`; bring the old disk back, or give it up \
                 with `tabularium storage accept {storage}`",
                dialled.filesystem_id
            );
        }
        let place = (virtual_storage.clone(), storage.clone());
        let mut opinions = self.opinions.lock().unwrap_or_else(PoisonError::into_inner);
        let opinion = opinions.entry(place).or_default();
        let after = opinion.after(&dialled);
        if after.healthy != opinion.healthy {
            let problem = &after.problem;
            tracing::info!(%virtual_storage, %storage, healthy = after.healthy, problem, "storage health");
        }
        let recovered = after.healthy && !opinion.healthy;
        *opinion = after;
        drop(opinions);
        if recovered {
            self.recovered().insert((virtual_storage.clone(), storage.clone()));
        }
        dialled
    }

    async fn ask(&self, storage: &StorageName, address: &Address) -> Dialled {
        // Dialled apart, so that a node that is gone is told from one that answers an error.
        if let Err(error) = address.connect().await {
            let refused =
                matches!(error.kind(), std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound);
            return Dialled { problem: error.to_string(), refused, ..Dialled::default() };
        }
        let channel = self.signed(address);
        let checked = HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await;
        match checked {
            Ok(answer) if answer.get_ref().status() == ServingStatus::Serving => {}
            Ok(answer) => {
                let problem = format!("health: {}", answer.get_ref().status().as_str_name());
                return Dialled { reachable: true, problem, ..Dialled::default() };
            }
            Err(status) => {
                let problem = format!("health: {}: {}", status.code(), status.message());
                let reachable = status.code() != tonic::Code::Unavailable;
                return Dialled { reachable, problem, ..Dialled::default() };
            }
        }
        let info = match ServerServiceClient::new(channel).server_info(ServerInfoRequest {}).await {
            Ok(info) => info.into_inner(),
            Err(status) => {
                let problem = format!("ServerInfo: {}: {}", status.code(), status.message());
                return Dialled { reachable: true, problem, ..Dialled::default() };
            }
        };
        let status = info.storage_statuses.iter().find(|status| status.storage_name == storage.as_str());
        let filesystem_id = status.map(|status| status.filesystem_id.clone()).unwrap_or_default();
        let problem = match status {
            None => format!("serves no storage `{storage}`"),
            Some(status) if !status.readable => "storage is not readable".to_owned(),
            Some(status) if !status.writeable => "storage is not writeable".to_owned(),
            Some(_) => String::new(),
        };
        Dialled {
            reachable: true,
            storage_served: problem.is_empty(),
            server_version: info.server_version,
            git_version: info.git_version,
            filesystem_id,
            problem,
            ..Dialled::default()
        }
    }

    /// Asks every storage's node.
    pub(crate) async fn dial_all(
        &self,
        snapshot: &Snapshot,
    ) -> Vec<(VirtualStorageName, KnownStorage, Dialled)> {
        let places: Vec<_> = snapshot
            .storages()
            .map(|(virtual_storage, known)| (virtual_storage.clone(), known.clone()))
            .collect();
        futures::stream::iter(places)
            .map(|(virtual_storage, known)| async move {
                let dialled = self.dial(&virtual_storage, &known).await;
                (virtual_storage, known, dialled)
            })
            .buffered(PROBES_AT_ONCE)
            .collect()
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_missed_answer_is_excused_and_a_refused_connection_is_not() {
        let served = Dialled { reachable: true, storage_served: true, ..Dialled::default() };
        let late = Dialled { problem: "no answer".into(), ..Dialled::default() };
        let refused = Dialled { refused: true, ..late.clone() };
        let healthy = Opinion::default().after(&served);
        assert!(healthy.healthy);
        assert!(healthy.after(&late).healthy);
        assert!(!healthy.after(&late).after(&late).healthy);
        assert!(!healthy.after(&refused).healthy);
        assert!(!Opinion::default().after(&late).healthy, "a storage is not healthy before it said so");
    }
}
