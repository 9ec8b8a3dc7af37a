//! Everything about the `git` program: how it is started and stopped, and how what it prints is read.

pub(crate) mod command;
pub(crate) mod leftovers;

pub(crate) use command::{CHUNK_BYTES, Exit, Git, GitCommand, GitProcess};
