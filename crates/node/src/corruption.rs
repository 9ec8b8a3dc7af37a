//! What was found to be corrupt: a file in the replica says so until the next copy, which keeps aside what is there.
//! It is no part of what replicas have in common.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};
use tonic::Status;

use crate::{
    error::internal_io,
    place::{blocking, replace_file},
    storage::RepositoryPath,
};

/// Name of the file in the replica.
const FILE: &str = "tabularium-corrupt";
/// Longest reason that is written.
const MAX_REASON: usize = 8 * 1024;

/// Why a replica is to be made again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Corruption {
    pub(crate) reason: String,
    /// Seconds since 1970.
    pub(crate) found_at: i64,
    /// Its objects cannot be relied upon.
    pub(crate) rebuild: bool,
}

impl Corruption {
    /// Found now.
    pub(crate) fn now(reason: &str, rebuild: bool) -> Self {
        let reason = reason.chars().take(MAX_REASON).collect();
        Self { reason, found_at: time::OffsetDateTime::now_utc().unix_timestamp(), rebuild }
    }
}

/// What the replica in this directory was found to be. A note that cannot be read is as bad as any.
pub(crate) fn read(replica: &Path) -> io::Result<Option<Corruption>> {
    match fs::read(replica.join(FILE)) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text).unwrap_or_else(|error| {
            Corruption::now(&format!("the note of what was found cannot be read: {error}"), true)
        }))),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Remembers it, durably. What called for more stays.
pub(crate) async fn mark(replica: &RepositoryPath, corruption: Corruption) -> Result<(), Status> {
    let replica = replica.clone();
    let marked = move || {
        if read(&replica.path)?.is_some_and(|present| present.rebuild && !corruption.rebuild) {
            return Ok(());
        }
        replace_file(&replica, FILE, &serde_json::to_vec(&corruption)?)
    };
    blocking(move || marked().map_err(internal_io("marking a corrupt replica"))).await
}

/// Its objects were found to be whole after all; what else was found stays.
pub(crate) async fn clear_rebuild(replica: &RepositoryPath) -> Result<(), Status> {
    let path = replica.path.clone();
    let reading = internal_io("reading what was found of the replica");
    match blocking(move || read(&path).map_err(reading)).await? {
        Some(corruption) if corruption.rebuild => clear(replica).await,
        _ => Ok(()),
    }
}

/// It is not, or not any more.
pub(crate) async fn clear(replica: &RepositoryPath) -> Result<(), Status> {
    let file = replica.path.join(FILE);
    let clearing = internal_io("clearing the mark of a corrupt replica");
    blocking(move || match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(clearing(error)),
        _ => Ok(()),
    })
    .await
}
