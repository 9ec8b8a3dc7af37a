//! A storage node: repositories on local disks behind Gitaly's RPCs, over the system `git`.
//!
//! A node keeps bytes and knows nothing else: of whose repository they are it notes what it is told and uses none of it, and
//! of its copy being the primary it knows only what a request says. It never talks to the coordinator, to Postgres or to NATS;
//! the router and the replicators call it, and it calls another node only to copy a repository when it is told to.
//!
//! A request enters in [`server`], passes the call log ([`rpc_log`]), the token check and the guard against cut streams
//! ([`whole_requests`]), and reaches a service in [`services`]. There its `gitaly.Repository` becomes a checked path
//! ([`storage`]), and git is started through the one runner ([`git`]), which bounds how many processes run and sees to
//! it that none outlives its request. Whatever is created is built under `<storage>/+gitaly/tmp`, synced, and renamed
//! into place.
//!
//! A write that several replicas decide about together says so in its metadata. Before the node changes anything for
//! it, and again afterwards, it asks the router, over the connection that the request came on: [`votes`]. `git push`
//! and `git fetch` move references themselves, so their votes are cast by git's [`hooks`]; those are a second program of
//! this crate, `tabularium-hook`, which asks the node over a private socket. Who else has a say in a change, GitLab
//! ([`access`]) and custom hooks, is asked on the primary only, and a push that moves one reference is run there only: the
//! other replicas do the same in fewer steps ([`following`]). What replicas must have in common, and a digest of it, is in [`contents`].
//!
//! Whether a replica's objects are whole git looks up when it is told to: [`soundness`]. One that was found corrupt says so
//! in itself ([`corruption`]) until the next copy makes it again, which keeps the old one aside: [`kept`].
//!
//! In which languages a repository is written, and which of its files programs wrote, is told by [`linguist`].
//!
//! What is committed for users is signed, where there is a key: [`signing`].
//!
//! Backups of single repositories the node writes and restores itself: [`backup`].
//!
//! What is fetched goes beside the RPC that asked for it, where the client offers a sidechannel (`services/sidechannel.rs`).
//!
//! * [`storage_health`]: whether each disk can be used, found out by using it.
//! * [`config`]: the file; `deploy/config/node.toml` is an example.
//! * [`records`]: what stands beside each replica, for when the database is not there or lost.
//! * [`expectation`]: a disk that is older than it was gives itself away by them.
//! * [`copy_attempts`]: why a copy that comes late cannot undo a later one.
//! * [`fetch_proxy`]: the subcommand that git runs instead of `ssh` to fetch from another node.
//! * [`lfs_filter`]: the subcommand that git runs for files in archives that are kept elsewhere.
//! * [`error`]: codes and texts, word for word Gitaly's.
//!
//! Methods that are not written answer `UNIMPLEMENTED`.
//!
//! Tests: `cargo test -p tabularium-node`; the integration tests need git 2.39 or newer and `git-filter-repo` in `PATH`, and
//! nothing else.

mod access;
mod backup;
pub mod config;
mod contents;
mod copy_attempts;
mod corruption;
mod error;
mod expectation;
pub mod fetch_proxy;
mod following;
mod git;
mod hooks;
mod kept;
mod keyed_locks;
pub mod lfs_filter;
mod linguist;
mod metrics;
mod node;
mod peer;
mod place;
mod records;
mod remote_url;
mod rpc_log;
pub mod server;
mod services;
mod signing;
mod soundness;
mod ssh_keys;
mod storage;
mod storage_health;
mod votes;
mod whole_requests;
