//! The gRPC services. Each is a struct around `Arc<Node>`; what they share is in the modules beside them.

pub(crate) mod analysis;
pub(crate) mod blob_service;
pub(crate) mod cleanup;
pub(crate) mod commit_service;
pub(crate) mod diff_service;
pub(crate) mod object_pool;
pub(crate) mod operation_service;
pub(crate) mod ref_service;

pub(crate) mod internal;
pub(crate) mod listing;
mod push;
pub(crate) mod remote;
mod remote_mirror;
pub(crate) mod replica;
pub(crate) mod repository;
pub(crate) mod server_info;
mod sidechannel;
pub(crate) mod smart_http;
pub(crate) mod ssh;
pub(crate) mod streams;
pub(crate) mod upload_pack;
