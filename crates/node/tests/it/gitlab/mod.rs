//! The node asks GitLab.

pub(crate) mod fake;
mod lfs;
mod operations;
mod pushes;
mod transports;

pub(crate) use fake::{Call, Gitlab, Reply, SECRET, config};
