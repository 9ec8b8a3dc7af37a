//! The storage nodes: one connection to each, dialled when it is first needed.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::ExposeSecret as _;
use tabularium_common::{
    auth::NodeTokens,
    grpc::{Address, channel},
    telemetry::CorrelationId,
};
use tabularium_proto::{
    coordinator::StorageAddress,
    gitaly::{
        CalculateChecksumRequest, FsckRequest, Repository, repository_service_client::RepositoryServiceClient,
    },
};
use tonic::{Code, metadata::MetadataValue, transport::Channel};

use crate::{
    calls::{LOOKUP_DEADLINE, Signed, attempt, request, within},
    failure::Failure,
};

/// Connections kept. Past it all are dropped and dialled anew: addresses only pile up when nodes move.
const MAX_CONNECTIONS: usize = 1024;

/// How long looking through all objects of a replica may take.
const FSCK_DEADLINE: Duration = Duration::from_secs(120);

/// Metadata key under which a node is told how to reach another (wire reference, section f).
pub(crate) const GITALY_SERVERS: &str = "gitaly-servers";

/// Connections to storage nodes.
pub(crate) struct Nodes {
    tokens: NodeTokens,
    channels: Mutex<HashMap<Address, Channel>>,
}

impl Nodes {
    pub(crate) fn new(tokens: NodeTokens) -> Self {
        Self { tokens, channels: Mutex::new(HashMap::new()) }
    }

    /// A client of the node that keeps `storage`.
    pub(crate) fn repositories(
        &self,
        storage: &StorageAddress,
    ) -> Result<RepositoryServiceClient<Signed>, Failure> {
        let address = address(storage)?;
        let token = self.tokens.to_send(&address);
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if channels.len() >= MAX_CONNECTIONS {
            channels.clear();
        }
        let channel = channels.entry(address).or_insert_with_key(channel).clone();
        Ok(RepositoryServiceClient::with_interceptor(channel, token))
    }

    /// The value of `gitaly-servers` that tells a node how to reach `storage`.
    pub(crate) fn introduction(
        &self,
        storage: &StorageAddress,
    ) -> Result<MetadataValue<tonic::metadata::Ascii>, Failure> {
        let address = address(storage)?;
        let token = self.tokens.of(&address).map_or("", |token| token.expose_secret());
        let json =
            serde_json::json!({ storage.storage.as_str(): { "address": storage.address, "token": token } });
        let mut value: MetadataValue<_> = STANDARD
            .encode(json.to_string())
            .parse()
            .map_err(|_| Failure::refused("the gitaly-servers header cannot be formed"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// The checksum over the refs of one replica.
    pub(crate) async fn checksum(
        &self,
        storage: &StorageAddress,
        replica_path: &str,
        correlation_id: &CorrelationId,
    ) -> Result<String, Failure> {
        let body = CalculateChecksumRequest { repository: Some(replica(storage, replica_path)) };
        let mut client = self.repositories(storage)?;
        let doing = format!("reading the checksum on {}", storage.storage);
        let call = client.calculate_checksum(request(body, correlation_id, LOOKUP_DEADLINE));
        attempt(&doing, LOOKUP_DEADLINE, call).await.map(|response| response.checksum)
    }

    /// As [`Self::checksum`], of a replica that is to be copied from. One that is not there or cannot be read is a bad source.
    pub(crate) async fn source_checksum(
        &self,
        storage: &StorageAddress,
        replica_path: &str,
        correlation_id: &CorrelationId,
    ) -> Result<String, Failure> {
        let body = CalculateChecksumRequest { repository: Some(replica(storage, replica_path)) };
        let mut client = self.repositories(storage)?;
        let call = client.calculate_checksum(request(body, correlation_id, LOOKUP_DEADLINE));
        match within(LOOKUP_DEADLINE, call).await {
            Ok(response) => Ok(response.checksum),
            Err(status) => {
                let failure =
                    Failure::of_call(&format!("reading the checksum on {}", storage.storage), &status);
                let bad_source =
                    matches!(status.code(), Code::NotFound | Code::FailedPrecondition | Code::DataLoss);
                Err(Failure { bad_source: bad_source && !failure.unreachable, ..failure })
            }
        }
    }

    /// Whether a replica lacks objects that it needs. Takes as long as looking at all of them; false when it cannot be said.
    pub(crate) async fn is_broken(
        &self,
        storage: &StorageAddress,
        replica_path: &str,
        correlation_id: &CorrelationId,
    ) -> bool {
        let body = FsckRequest { repository: Some(replica(storage, replica_path)), ..FsckRequest::default() };
        let Ok(mut client) = self.repositories(storage) else { return false };
        match within(FSCK_DEADLINE, client.fsck(request(body, correlation_id, FSCK_DEADLINE))).await {
            Ok(response) => lacks_objects(&response.error),
            Err(status) => {
                tracing::warn!(%correlation_id, storage = storage.storage, %status, "not looked through");
                false
            }
        }
    }
}

/// Whether `git fsck` said that something is missing or cannot be read, and not merely that something is odd.
fn lacks_objects(output: &[u8]) -> bool {
    let output = String::from_utf8_lossy(output);
    output.lines().any(|line| {
        ["missing ", "broken link from"].iter().any(|start| line.starts_with(start))
            || ["object corrupt or missing", "invalid sha1 pointer", "does not point to a valid object"]
                .iter()
                .any(|part| line.contains(part))
    })
}

fn address(storage: &StorageAddress) -> Result<Address, Failure> {
    storage.address.parse().map_err(|error| {
        Failure::refused(format!(
            "storage {} has the address `{}`: {error}",
            storage.storage, storage.address
        ))
    })
}

/// A replica as its node names it.
pub(crate) fn replica(storage: &StorageAddress, replica_path: &str) -> Repository {
    Repository {
        storage_name: storage.storage.clone(),
        relative_path: replica_path.to_owned(),
        ..Repository::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_odd_is_not_what_is_missing() {
        assert!(lacks_objects(b"broken link from  commit 11\n              to    tree 22\n"));
        assert!(lacks_objects(b"warning in tree 1: zeroPaddedFilemode\nmissing blob 33\n"));
        assert!(lacks_objects(b"error: refs/heads/main: invalid sha1 pointer 44\n"));
        assert!(!lacks_objects(b""));
        assert!(!lacks_objects(b"error in commit 11: missingSpaceBeforeDate: invalid author line\n"));
    }

    #[test]
    fn a_node_is_introduced_as_gitaly_expects() {
        let own = ("tcp://127.0.0.1:1".parse().unwrap(), Some("t".to_owned().into()));
        let nodes = Nodes::new(NodeTokens::new(Some("another's".to_owned().into()), [own]));
        let storage = StorageAddress { storage: "node-1".into(), address: "tcp://127.0.0.1:1".into() };
        let value = nodes.introduction(&storage).unwrap();
        let json = STANDARD.decode(value.as_bytes()).unwrap();
        assert_eq!(
            serde_json::from_slice::<serde_json::Value>(&json).unwrap(),
            serde_json::json!({"node-1": {"address": "tcp://127.0.0.1:1", "token": "t"}})
        );
        assert!(value.is_sensitive());
    }
}
