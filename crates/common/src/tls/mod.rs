//! Transport security: rustls on every listener that says `tls://` and every dialer of such an address.
//!
//! * [`TlsConfig`]: the `[tls]` table that every service has.
//! * [`Acceptor`]: the side that listens. [`crate::grpc::Listener`] has one for each of its `tls://` addresses and hands out
//!   connections whose handshake is still to be done, so that one that says nothing holds up nobody.
//! * [`Dialer`]: the side that dials. What a process trusts is a property of the process, as `SSL_CERT_FILE` is: its program
//!   calls [`install`] once, and whatever dials a `tls://` address uses that.
//!
//! Certificates, keys and authorities are read again when their files have changed, at the next handshake, without a
//! restart. Files that cannot be used are told of in the log, and what was read last stays in force.

mod accept;
mod authorities;
mod config;
mod dial;
mod files;
mod identity;
#[cfg(test)]
mod tests;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use rustls::crypto::CryptoProvider;

pub use accept::{Acceptor, Application};
pub use config::{TlsConfig, check_authorities, check_pair};
pub use dial::{Dialer, ca_path, dialer, install};

/// How long a peer may take for its part of the handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often files are looked at, at most.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Why a file of certificates or keys cannot be used. Never shows what is in it.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It holds something else than it should.
    #[error("{}: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Nobody is trusted, so that nobody can be dialled.
    #[error("no certificate authorities are known: {0}")]
    NoAuthorities(String),
    /// The TLS library refuses its own settings.
    #[error("TLS: {0}")]
    Library(#[from] rustls::Error),
    /// A listener is to speak TLS and there is no certificate.
    #[error("tls.certificate_path and tls.key_path are needed to listen at a tls:// address")]
    NoCertificate,
}

/// The one implementation of the arithmetic. Named each time, because another crate may bring a second one.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// What a failed handshake is to say in the log: rustls knows only bytes that are no TLS.
fn explained(error: &io::Error, peer: &str) -> io::Error {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    match cause {
        Some(rustls::Error::InvalidMessage(_)) => {
            io::Error::new(error.kind(), format!("{peer} does not speak TLS here ({error})"))
        }
        _ => io::Error::new(error.kind(), format!("TLS handshake: {error}")),
    }
}

/// Whether what a client says first is the beginning of a handshake.
pub(crate) fn is_handshake(head: &[u8]) -> bool {
    head.starts_with(&[0x16, 3])
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "TLS handshake: the peer does not go on with it")
}
