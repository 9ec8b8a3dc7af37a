//! Everything about the `git` program: how it is started and stopped, and how what it prints is read.

pub(crate) mod catfile;
pub(crate) mod command;
pub(crate) mod diff;
pub(crate) mod durable;
pub(crate) mod leftovers;
pub(crate) mod lines;
pub(crate) mod log;
pub(crate) mod merge;
pub(crate) mod negotiation;
pub(crate) mod object_listing;
pub(crate) mod objects;
mod output;
pub(crate) mod quarantine;
mod reaper;
pub(crate) mod references;
pub(crate) mod revision;
pub(crate) mod transport;
pub(crate) mod update_ref;

pub(crate) use command::{CHUNK_BYTES, Git, GitCommand, GitProcess, Slot};
pub(crate) use output::{Exit, Output};
