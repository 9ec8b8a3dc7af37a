//! What git prints of differences, read as it prints it. The parsers do no I/O: they are given records or pieces of lines
//! in order, and hold no more than one file's patch and the list of files that git prints before the patches.
//!
//! * [`raw`]: which files changed, of `--raw -z` and `diff-tree -z`.
//! * [`patch`]: how they changed, within the [`limits`] that a client set.
//! * [`numstat`]: by how many lines.
//! * [`range`]: how one series of commits became another one.

pub(crate) mod limits;
pub(crate) mod numstat;
pub(crate) mod patch;
pub(crate) mod range;
pub(crate) mod raw;

/// Largest patch of one file that is held. Git takes larger files than half of this for binary (`core.bigFileThreshold`).
pub(crate) const MAX_PATCH_BYTES: usize = 256 * 1024 * 1024;

/// Output that is not of the form git documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Malformed(pub(crate) &'static str);
