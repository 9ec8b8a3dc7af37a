//! What a node wants to see of us.

use std::sync::{Mutex, PoisonError};

use http::HeaderValue;
use tabularium_common::auth::{SendToken, unix_now};

/// A node's token as one worker sends it, made anew every second.
pub(super) struct Token {
    secret: SendToken,
    made: Mutex<(i64, Option<HeaderValue>)>,
}

impl Token {
    pub(super) fn new(secret: SendToken) -> Self {
        Self { secret, made: Mutex::new((0, None)) }
    }

    pub(super) fn header(&self) -> Option<HeaderValue> {
        self.secret.0.as_ref()?;
        let now = unix_now();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.0 != now {
            *made = (now, self.secret.header());
        }
        made.1.clone()
    }
}
