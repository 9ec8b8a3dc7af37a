//! Signatures on the commits that the node makes for users, with a key that all nodes have.
//!
//! A commit's id is what replicas vote on, so the same request has to lead to the same signature everywhere. That decides
//! which keys are taken: Ed25519 and RSA ([`pair`]); signatures of the other kinds hold random numbers. It decides too what
//! the time of a signature is, where it has one: the commit's. The bytes are those that Gitaly makes with the same key.
//!
//! A file holds one key, as OpenSSH ([`ssh`]) or OpenPGP ([`open_pgp`]) write it, without a passphrase. It is read when the
//! node starts; so is whatever was used before, by which older commits are known again. `services/operation_service` puts
//! signatures into commits.

mod armor;
mod open_pgp;
mod pair;
mod ssh;

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use secrecy::{ExposeSecret as _, SecretSlice};

use self::{open_pgp::OpenPgpKey, ssh::SshKey};
use crate::config::SigningConfig;

/// Most that is read of a file.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// Why a file is no signing key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    /// It cannot be read.
    #[error("{0}")]
    Read(#[from] io::Error),
    /// Nobody could type it in.
    #[error("it has a passphrase")]
    Encrypted,
    /// Replicas would make different commits with it.
    #[error("its kind is {0}; only Ed25519 and RSA make the same signature on every replica")]
    Kind(String),
    /// It is none.
    #[error("{0}")]
    Rejected(String),
}

/// Why something was not signed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SigningError {
    /// The key and the commit's time do not fit.
    #[error("the signing key is not valid at the commit's time")]
    NotValid,
    /// The key does not sign.
    #[error("the signing key does not sign")]
    Refused,
    /// Its signature cannot be written down.
    #[error("the signature cannot be encoded: {0}")]
    Encoding(String),
}

impl From<ssh_key::Error> for SigningError {
    fn from(error: ssh_key::Error) -> Self {
        Self::Encoding(error.to_string())
    }
}

impl From<ssh_encoding::Error> for SigningError {
    fn from(error: ssh_encoding::Error) -> Self {
        Self::Encoding(error.to_string())
    }
}

impl From<ring::error::Unspecified> for SigningError {
    fn from(_: ring::error::Unspecified) -> Self {
        Self::Refused
    }
}

/// A key file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("signing key {}: {source}", path.display())]
pub struct UnusableKey {
    path: PathBuf,
    source: KeyError,
}

/// One key of either kind.
enum SigningKey {
    Ssh(SshKey),
    OpenPgp(OpenPgpKey),
}

impl SigningKey {
    fn read(path: &Path) -> Result<Self, KeyError> {
        let mut content = Vec::new();
        File::open(path)?.take(MAX_FILE_BYTES).read_to_end(&mut content)?;
        let content = SecretSlice::from(content);
        let content = content.expose_secret();
        if content.starts_with(ssh::BEGINNING) {
            SshKey::parse(content).map(Self::Ssh)
        } else {
            OpenPgpKey::parse(content).map(Self::OpenPgp)
        }
    }

    fn made(&self, signature: &[u8], text: &[u8]) -> bool {
        match self {
            Self::Ssh(key) => key.made(signature, text),
            Self::OpenPgp(key) => key.made(signature, text),
        }
    }
}

/// Who is said to have committed what is signed.
pub(crate) struct Committer {
    pub(crate) name: Vec<u8>,
    pub(crate) email: Vec<u8>,
}

/// The keys of a node that signs.
pub(crate) struct Signing {
    key: SigningKey,
    rotated: Vec<SigningKey>,
    /// The user, if it is nobody else.
    pub(crate) committer: Option<Committer>,
    unasked: bool,
}

impl Signing {
    /// Whether there is a key in this file.
    pub(crate) fn check(path: &Path) -> Result<(), KeyError> {
        SigningKey::read(path).map(drop)
    }

    /// Reads all keys.
    pub(crate) fn read(config: &SigningConfig) -> Result<Self, UnusableKey> {
        let read = |path: &PathBuf| {
            SigningKey::read(path).map_err(|source| UnusableKey { path: path.clone(), source })
        };
        let committer = Committer {
            name: config.committer_name.clone().into_bytes(),
            email: config.committer_email.clone().into_bytes(),
        };
        Ok(Self {
            key: read(&config.signing_key)?,
            rotated: config.rotated_signing_keys.iter().map(read).collect::<Result<_, _>>()?,
            committer: (!committer.name.is_empty() && !committer.email.is_empty()).then_some(committer),
            unasked: config.sign_unasked,
        })
    }

    /// Whether a commit is to be signed, of a request that asks for it or does not.
    pub(crate) fn wanted(&self, asked: bool) -> bool {
        asked || self.unasked
    }

    /// The signature of a commit that was written at this time (Unix seconds), as it stands in the commit.
    pub(crate) fn sign(&self, commit: &[u8], written: i64) -> Result<Vec<u8>, SigningError> {
        let mut signature = match &self.key {
            SigningKey::Ssh(key) => key.sign(commit)?,
            SigningKey::OpenPgp(key) => key.sign(commit, written)?,
        };
        // Gitaly ends the last line of both kinds, whether or not it has an end.
        signature.push(b'\n');
        Ok(signature)
    }

    /// Whether one of the keys signed that.
    pub(crate) fn made(&self, signature: &[u8], text: &[u8]) -> bool {
        std::iter::once(&self.key).chain(&self.rotated).any(|key| key.made(signature, text))
    }

    /// The public part of the key that signs, as clients take it.
    pub(crate) fn public_key(&self) -> Result<Vec<u8>, SigningError> {
        match &self.key {
            SigningKey::Ssh(key) => key.public_key(),
            SigningKey::OpenPgp(key) => Ok(key.public_key()),
        }
    }
}

#[cfg(test)]
mod tests;
