//! What is made from files, and made again when they have changed.

use std::{
    fmt, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::TlsError;

/// What tells a file from its successor; `None` when there is none.
#[derive(Debug, PartialEq, Eq)]
struct Fingerprint(Option<[i64; 5]>);

impl Fingerprint {
    fn of(path: &Path) -> Self {
        Self(fs::metadata(path).ok().map(|metadata| {
            let numbers = [metadata.dev(), metadata.ino(), metadata.len()].map(u64::cast_signed);
            [numbers[0], numbers[1], numbers[2], metadata.mtime(), metadata.mtime_nsec()]
        }))
    }
}

type Make<T> = dyn Fn() -> Result<Arc<T>, TlsError> + Send + Sync;

/// A value and the files it was made from.
///
/// It is looked at in the middle of handshakes, which are not async. A look is a few system calls on local files, less than
/// the arithmetic of the handshake; so no thread is asked to do it.
pub(super) struct FromFiles<T> {
    files: Vec<PathBuf>,
    look_interval: Duration,
    make: Box<Make<T>>,
    state: Mutex<State<T>>,
}

struct State<T> {
    value: Arc<T>,
    /// Of the files, before the value was made from them or could not be.
    seen: Vec<Fingerprint>,
    looked: Instant,
}

impl<T> FromFiles<T> {
    /// Makes the value for the first time.
    pub(super) fn new(
        files: Vec<PathBuf>,
        look_interval: Duration,
        make: impl Fn() -> Result<Arc<T>, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        let seen = fingerprints(&files);
        let state = Mutex::new(State { value: make()?, seen, looked: Instant::now() });
        Ok(Self { files, look_interval, make: Box::new(make), state })
    }

    /// The value as the files have it. When they cannot be used, as they had it last; a certificate that has been replaced
    /// while its key has not yet is such a case.
    pub(super) fn current(&self) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= self.look_interval {
            state.looked = Instant::now();
            let found = fingerprints(&self.files);
            if found != state.seen {
                state.seen = found;
                match (self.make)() {
                    Ok(value) => {
                        state.value = value;
                        tracing::info!(files = ?self.files, "files of TLS were read again");
                    }
                    Err(error) => {
                        tracing::error!(%error, "files of TLS have changed and cannot be used; what was read before is");
                    }
                }
            }
        }
        Arc::clone(&state.value)
    }
}

impl<T> fmt::Debug for FromFiles<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FromFiles").field("files", &self.files).finish_non_exhaustive()
    }
}

fn fingerprints(files: &[PathBuf]) -> Vec<Fingerprint> {
    files.iter().map(|file| Fingerprint::of(file)).collect()
}
