//! What every service of the node works with.

use std::{path::PathBuf, sync::Arc};

use tabularium_common::{lifecycle::Tasks, tls::TlsConfig};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    backup::Backups,
    config::{FollowingConfig, KeptConfig},
    copy_attempts::CopyAttempts,
    following::HeadListing,
    git::Git,
    hooks::{Hooks, Judges},
    keyed_locks::KeyedLocks,
    metrics::Metrics,
    services::commit_service::RememberedLanguages,
    signing::Signing,
    storage::Storages,
    storage_health::StorageHealth,
    votes::Sections,
};

/// The node, handed to each service as `Arc<Node>`.
pub(crate) struct Node {
    /// Where repositories are.
    pub(crate) storages: Storages,
    /// Whether they can be used.
    pub(crate) storage_health: Arc<StorageHealth>,
    /// Starts git.
    pub(crate) git: Git,
    /// Owns every task that outlives a handler.
    pub(crate) tasks: Tasks,
    /// Answers git's hooks.
    pub(crate) hooks: Hooks,
    /// Who has a say in changes.
    pub(crate) judges: Arc<Judges>,
    /// Changes that are being decided and made.
    pub(crate) sections: Arc<Sections>,
    /// The program that git runs instead of `ssh` to fetch from another node: `<this> fetch-proxy`; and for files in
    /// archives: `<this> lfs-filter`.
    pub(crate) fetch_proxy: PathBuf,
    /// As that program dials.
    pub(crate) tls: TlsConfig,
    /// What `git --version` says, without the words.
    pub(crate) git_version: String,
    /// What git's hooks are told of a branch that `HEAD` stands for.
    pub(crate) head_listing: HeadListing,
    /// A UUID of this process, by which its locks are told from those of earlier ones.
    pub(crate) instance: String,
    /// One at a time: two fetches into the same repository would only fail each other.
    pub(crate) copying: KeyedLocks,
    /// Sees to it that no copy undoes what a later one brought.
    pub(crate) copy_attempts: CopyAttempts,
    /// One at a time: so would two repacks.
    pub(crate) upkeep: KeyedLocks,
    /// One at a time: looking through a whole replica is what a disk is busy with.
    pub(crate) checking: Semaphore,
    /// Where repositories are backed up to, if anywhere.
    pub(crate) backups: Option<Backups>,
    /// What commits are signed with, if anything.
    pub(crate) signing: Option<Signing>,
    /// What is kept aside of corrupt replicas.
    pub(crate) kept: KeptConfig,
    /// What trees counted up to.
    pub(crate) languages: RememberedLanguages,
    /// What is counted.
    pub(crate) metrics: Metrics,
    /// What a secondary does about a push without git.
    pub(crate) following: FollowingConfig,
    /// Told to stop: what takes long and can be asked for again is given up.
    pub(crate) shutdown: CancellationToken,
}
