//! The `[signing]` table.

use std::path::PathBuf;

use serde::Deserialize;
use tabularium_common::config::{Fault, Validate};

use crate::signing::Signing;

/// The keys of commits that are made for users; Gitaly has the same in its `[git]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SigningConfig {
    /// A file with a private key of OpenSSH, or one of OpenPGP in binary form, without a passphrase: Ed25519, or RSA of
    /// 2048, 3072 or 4096 bits. The same on all nodes, and read when they start.
    pub signing_key: PathBuf,
    /// Keys that were used before: what they signed is still known to be ours.
    #[serde(default)]
    pub rotated_signing_keys: Vec<PathBuf>,
    /// Who is said to have committed what is signed. Empty: the user.
    #[serde(default)]
    pub committer_name: String,
    /// Their address.
    #[serde(default)]
    pub committer_email: String,
    /// Signs although the request does not ask for it: what clients before GitLab 17 expect, which cannot ask.
    #[serde(default)]
    pub sign_unasked: bool,
}

impl Validate for SigningConfig {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        if self.committer_name.is_empty() != self.committer_email.is_empty() {
            let (key, value) = if self.committer_name.is_empty() {
                ("signing.committer_name", &self.committer_name)
            } else {
                ("signing.committer_email", &self.committer_email)
            };
            faults.push(Fault::new(key, value, "a name and an address, or neither"));
        }
        let unusable = |key: &'static str, path: &PathBuf| {
            let why = Signing::check(path).err()?;
            let allowed = format!(
                "a private key of OpenSSH or OpenPGP, Ed25519 or RSA, without a passphrase; this is none: {why}"
            );
            Some(Fault::new(key, path.display(), allowed))
        };
        faults.extend(unusable("signing.signing_key", &self.signing_key));
        let rotated = self.rotated_signing_keys.iter();
        faults.extend(rotated.filter_map(|path| unusable("signing.rotated_signing_keys", path)));
        faults
    }
}
