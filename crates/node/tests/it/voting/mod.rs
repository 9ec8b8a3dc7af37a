//! Writes that several replicas decide about together: which votes a node casts, and what it does with the answers.

mod pushes;
mod router;
