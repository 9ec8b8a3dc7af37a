//! Writes that several replicas decide about together: which votes a node casts, and what it does with the answers.

mod mutators;
mod operations;
mod pushes;
mod quiesce;
mod repositories;
mod rewritten_histories;
pub(crate) mod router;
