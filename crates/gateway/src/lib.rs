//! Git over smart HTTP for ordinary clients.
