//! Workers that copy, clean up, notify and sync.
