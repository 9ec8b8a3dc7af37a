//! Gitaly-compatible storage node over the system git.
