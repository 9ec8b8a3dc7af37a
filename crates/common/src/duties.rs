//! What travels on the message bus, and how its streams are set up. Coordinators and receivers publish, replicators
//! consume; all of them make the streams with the same words.
//!
//! A message is a doorbell: Postgres holds what is owed. Everything here runs on nats-server 2.9: one filter per
//! consumer, back-off by delayed negative acknowledgement. A message id stays refused for the whole duplicate window,
//! even after its message was acknowledged, so ids carry the attempt.

use std::time::Duration;

use async_nats::jetstream::{consumer, stream};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ids::{RelativePath, SiteName, StorageName, VirtualStorageName};

/// Version of the message bodies.
pub const BODY_VERSION: u32 = 1;
/// How long the server refuses a repeated message id.
pub const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);
/// How long a worker may go without a sign of life before the message goes to another.
pub const ACK_WAIT: Duration = Duration::from_secs(30);
/// How often a worker signals progress.
pub const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// Largest message body read.
pub const MAX_BODY_BYTES: usize = 64 * 1024;

/// A class of work, with a stream and a durable consumer of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Bring a replica up to date.
    Replication,
    /// Remove what is left of a deleted repository.
    Cleanup,
    /// Tell a subscribed site.
    GeoNotify,
    /// Fetch from a home site.
    GeoSync,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Replication, Self::Cleanup, Self::GeoNotify, Self::GeoSync];

    /// Name of the stream.
    pub const fn stream(self) -> &'static str {
        match self {
            Self::Replication => "TABULARIUM_REPLICATION",
            Self::Cleanup => "TABULARIUM_CLEANUP",
            Self::GeoNotify => "TABULARIUM_GEO_NOTIFY",
            Self::GeoSync => "TABULARIUM_GEO_SYNC",
        }
    }

    /// Name of the durable pull consumer that all workers of the class share.
    pub const fn consumer(self) -> &'static str {
        match self {
            Self::Replication => "replication-workers",
            Self::Cleanup => "cleanup-workers",
            Self::GeoNotify => "geo-notify-workers",
            Self::GeoSync => "geo-sync-workers",
        }
    }

    /// Subjects of the class.
    pub const fn subjects(self) -> &'static str {
        match self {
            Self::Replication => "replication.>",
            Self::Cleanup => "cleanup.>",
            Self::GeoNotify => "geo.notify.>",
            Self::GeoSync => "geo.sync.>",
        }
    }

    /// Settings of the stream: a work queue on disk.
    pub fn stream_config(self) -> stream::Config {
        stream::Config {
            name: self.stream().to_owned(),
            subjects: vec![self.subjects().to_owned()],
            retention: stream::RetentionPolicy::WorkQueue,
            storage: stream::StorageType::File,
            duplicate_window: DUPLICATE_WINDOW,
            ..stream::Config::default()
        }
    }

    /// Settings of the consumer. Deliveries are unlimited: when to give up is the coordinator's word, not the bus's.
    pub fn consumer_config(self, max_in_flight: i64) -> consumer::pull::Config {
        consumer::pull::Config {
            durable_name: Some(self.consumer().to_owned()),
            filter_subject: self.subjects().to_owned(),
            ack_policy: consumer::AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_deliver: -1,
            max_ack_pending: max_in_flight,
            ..consumer::pull::Config::default()
        }
    }
}

/// Subject of a replication duty.
pub fn replication_subject(virtual_storage: &VirtualStorageName, target: &StorageName) -> String {
    format!("replication.{virtual_storage}.{target}")
}

/// Subject of a cleanup duty.
pub fn cleanup_subject(virtual_storage: &VirtualStorageName, target: &StorageName) -> String {
    format!("cleanup.{virtual_storage}.{target}")
}

/// Subject of a notification.
pub fn notify_subject(site: &SiteName) -> String {
    format!("geo.notify.{site}")
}

/// How many shards `geo.sync` has. Events of one repository keep to one shard.
pub const SYNC_SHARDS: u32 = 16;

/// Subject of an event that asks for a sync.
pub fn sync_subject(home_site: &SiteName, relative_path: &RelativePath) -> String {
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(format!("{home_site}\n{relative_path}").as_bytes());
    format!("geo.sync.{}", u32::from(digest[0]) % SYNC_SHARDS)
}

/// Body of a duty's message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DutyMessage {
    /// [`BODY_VERSION`].
    pub version: u32,
    /// The row of the outbox.
    pub duty_id: Uuid,
}

/// Body of a message that asks for a sync.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncMessage {
    /// [`BODY_VERSION`].
    pub version: u32,
    /// Unique per accepted event; part of the message id.
    pub event_id: Uuid,
    /// Where the repository lives.
    pub home_site: SiteName,
    /// Local virtual storage of the mirror.
    pub virtual_storage: VirtualStorageName,
    /// Name of the repository, here and there.
    pub relative_path: RelativePath,
    /// What happened there: a hint, to be checked against the home site.
    pub event: SyncEvent,
}

/// What an event of a home site says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum SyncEvent {
    /// Refs changed, or the repository is new.
    Updated,
    /// It was removed there.
    Removed,
    /// It has a new name there; `relative_path` of the message is the new one.
    Renamed {
        /// The name it had.
        from: RelativePath,
    },
}

/// A body that cannot be read. Redelivery would not mend it.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Larger than [`MAX_BODY_BYTES`].
    #[error("message body of {0} bytes")]
    Size(usize),
    /// Not the JSON expected.
    #[error("message body: {0}")]
    Json(#[from] serde_json::Error),
    /// From a later version of the program.
    #[error("message body of version {0}")]
    Version(u32),
}

/// Reads a body of either kind, bounds and version checked.
pub fn read_body<M: serde::de::DeserializeOwned>(body: &[u8]) -> Result<M, BodyError> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    if body.len() > MAX_BODY_BYTES {
        return Err(BodyError::Size(body.len()));
    }
    let Versioned { version } = serde_json::from_slice(body)?;
    if version != BODY_VERSION {
        return Err(BodyError::Version(version));
    }
    Ok(serde_json::from_slice(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_of_another_version_is_refused() {
        let message = SyncMessage {
            version: BODY_VERSION,
            event_id: Uuid::nil(),
            home_site: "amsterdam".parse().unwrap(),
            virtual_storage: "default".parse().unwrap(),
            relative_path: "a/b.git".parse().unwrap(),
            event: SyncEvent::Renamed { from: "a/c.git".parse().unwrap() },
        };
        let body = serde_json::to_vec(&message).unwrap();
        assert_eq!(read_body::<SyncMessage>(&body).unwrap(), message);
        let newer = String::from_utf8(body).unwrap().replace("\"version\":1", "\"version\":2");
        assert!(matches!(read_body::<SyncMessage>(newer.as_bytes()), Err(BodyError::Version(2))));
        assert!(matches!(read_body::<SyncMessage>(&vec![b' '; MAX_BODY_BYTES + 1]), Err(BodyError::Size(_))));
    }

    #[test]
    fn a_path_from_the_bus_is_checked_too() {
        let body = br#"{"version":1,"event_id":"00000000-0000-0000-0000-000000000000","home_site":"a",
            "virtual_storage":"default","relative_path":"../x","event":{"kind":"updated"}}"#;
        assert!(matches!(read_body::<SyncMessage>(body), Err(BodyError::Json(_))));
    }
}
