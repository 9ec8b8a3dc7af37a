//! The node asks GitLab.

mod fake;
mod operations;
mod pushes;
mod transports;

pub(crate) use fake::{Call, Gitlab, Reply, SECRET, config};
