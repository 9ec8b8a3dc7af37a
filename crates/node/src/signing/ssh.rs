//! Keys and signatures of OpenSSH (PROTOCOL.key, PROTOCOL.sshsig), as `git` takes them with `gpg.format=ssh`.

use ssh_encoding::{Decode as _, Encode as _, Reader as _};
use ssh_key::{Algorithm, HashAlg, PrivateKey, Signature, SshSig, private::KeypairData, public::KeyData};

use super::{
    KeyError, SigningError, armor,
    pair::{Digest, Pair, RsaNumbers},
};

/// How such a file begins.
pub(super) const BEGINNING: &[u8] = b"-----BEGIN OPENSSH";
/// What git has signatures made for.
const NAMESPACE: &str = "git";
const LABEL: &str = "SSH SIGNATURE";

/// A key pair.
pub(super) struct SshKey {
    pair: Pair,
    public: KeyData,
}

impl SshKey {
    /// From the text of a file.
    pub(super) fn parse(text: &[u8]) -> Result<Self, KeyError> {
        let key = PrivateKey::from_openssh(text).map_err(|error| match error {
            ssh_key::Error::AlgorithmUnknown => KeyError::Kind("another one".to_owned()),
            error => KeyError::Rejected(error.to_string()),
        })?;
        let negative = || KeyError::Rejected("a number is negative".to_owned());
        let pair = match key.key_data() {
            KeypairData::Encrypted(_) => return Err(KeyError::Encrypted),
            KeypairData::Ed25519(found) => Pair::ed25519(found.private.as_ref(), found.public.as_ref())?,
            KeypairData::Rsa(found) => Pair::rsa(&RsaNumbers {
                modulus: found.public.n.as_positive_bytes().ok_or_else(negative)?,
                public_exponent: found.public.e.as_positive_bytes().ok_or_else(negative)?,
                private_exponent: found.private.d.as_positive_bytes().ok_or_else(negative)?,
                primes: [
                    found.private.p.as_positive_bytes().ok_or_else(negative)?,
                    found.private.q.as_positive_bytes().ok_or_else(negative)?,
                ],
            })?,
            _ => return Err(KeyError::Kind(key.algorithm().to_string())),
        };
        Ok(Self { pair, public: key.public_key().key_data().clone() })
    }

    fn algorithm(&self) -> Algorithm {
        match self.pair {
            Pair::Ed25519(_) => Algorithm::Ed25519,
            Pair::Rsa(_) => Algorithm::Rsa { hash: Some(HashAlg::Sha512) },
        }
    }

    /// The text of a signature.
    pub(super) fn sign(&self, text: &[u8]) -> Result<Vec<u8>, SigningError> {
        let signed = SshSig::signed_data(NAMESPACE, HashAlg::Sha512, text)?;
        let signature = self.pair.sign(Digest::Sha512, &signed)?;
        let signature = Signature::new(self.algorithm(), signature)?;
        let signature = SshSig::new(self.public.clone(), NAMESPACE, HashAlg::Sha512, signature)?;
        let mut bytes = Vec::new();
        signature.encode(&mut bytes)?;
        // In lines of this length, and not OpenSSH's: another text would make another commit than on a Gitaly.
        Ok(armor::write_ssh(&bytes, LABEL))
    }

    /// Whether this key signed that text for git.
    pub(super) fn made(&self, signature: &[u8], text: &[u8]) -> bool {
        let Some(signature) = armor::read_ssh(signature, LABEL).and_then(|bytes| parse_signature(&bytes))
        else {
            return false;
        };
        let digest = match signature.algorithm() {
            Algorithm::Rsa { hash: Some(HashAlg::Sha256) } => Digest::Sha256,
            _ => Digest::Sha512,
        };
        signature.namespace() == NAMESPACE
            && *signature.public_key() == self.public
            && SshSig::signed_data(NAMESPACE, signature.hash_alg(), text)
                .is_ok_and(|signed| self.pair.made(digest, &signed, signature.signature_bytes()))
    }

    /// A line as in `authorized_keys`.
    pub(super) fn public_key(&self) -> Result<Vec<u8>, SigningError> {
        let line = ssh_key::PublicKey::from(self.public.clone()).to_openssh()?;
        Ok(format!("{line}\n").into_bytes())
    }
}

fn parse_signature(mut bytes: &[u8]) -> Option<SshSig> {
    let signature = SshSig::decode(&mut bytes).ok()?;
    bytes.is_finished().then_some(signature)
}
