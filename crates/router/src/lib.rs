//! Stateless Gitaly proxy in front of the storage nodes.
