//! Keys and signatures of OpenPGP (RFC 9580), as `gpg --export-secret-keys` writes keys and git takes signatures.
//!
//! Written here because the libraries that could be used bring every algorithm that there ever was, some ninety crates, of
//! which two would be used. Only what a signature needs is read: version 4, Ed25519 and RSA. That a key's own statements
//! about itself are signed by it is not checked; whoever can write the file has the key.

mod packets;
mod signature;

use sha1::{Digest as _, Sha1};

use self::{
    packets::{Reader, packet, packet_type, padded},
    signature::{KeyId, Signature, key_id, signature_type},
};
use super::{
    KeyError, SigningError, armor,
    pair::{Pair, RsaNumbers},
};

const SIGNATURE_LABEL: &str = "PGP SIGNATURE";
const PUBLIC_KEY_LABEL: &str = "PGP PUBLIC KEY BLOCK";

const VERSION: u8 = 4;
/// Public-key algorithms (RFC 9580, section 9.1).
const RSA: u8 = 1;
const RSA_SIGN_ONLY: u8 = 3;
const EDDSA_LEGACY: u8 = 22;
/// The curve Ed25519, 1.3.6.1.4.1.11591.15.1, with its length.
const ED25519: [u8; 10] = [9, 0x2b, 0x06, 0x01, 0x04, 0x01, 0xda, 0x47, 0x0f, 0x01];
/// What begins a point that is written in the curve's own way.
const NATIVE_POINT: u8 = 0x40;
const POINT_BYTES: usize = 32;

/// One key that may sign.
struct Signer {
    pair: Pair,
    algorithm: u8,
    fingerprint: [u8; 20],
    created: u32,
    expires: Option<u32>,
    /// When it was said that it may sign.
    bound: u32,
}

impl Signer {
    fn is_valid_at(&self, time: u32) -> bool {
        self.created <= time && self.expires.is_none_or(|expires| time < expires)
    }
}

/// A primary key and its subkeys.
pub(super) struct OpenPgpKey {
    /// Those that may sign: subkeys, the last that was made one first, then the primary key.
    signers: Vec<Signer>,
    public: Vec<u8>,
}

/// A key of the file while the packets that follow it are read.
struct Draft {
    parsed: Result<(Pair, u8), KeyError>,
    fingerprint: [u8; 20],
    created: u32,
    is_primary: bool,
    bound: u32,
    expires_after: Option<u32>,
    may_sign: bool,
    revoked: bool,
}

impl Draft {
    /// What the key is said to be for; the last word counts.
    fn hear(&mut self, said: &Signature<'_>) {
        let about_this = if self.is_primary {
            signature_type::CERTIFICATION.contains(&said.kind) || said.kind == signature_type::DIRECT_KEY
        } else {
            said.kind == signature_type::SUBKEY_BINDING
        };
        let revocation =
            if self.is_primary { signature_type::KEY_REVOCATION } else { signature_type::SUBKEY_REVOCATION };
        if said.kind == revocation {
            self.revoked = true;
        } else if about_this && said.created >= self.bound {
            self.bound = said.created;
            self.expires_after = said.key_expires_after;
            self.may_sign = said.may_sign.unwrap_or(self.may_sign && self.is_primary);
        }
    }

    fn signer(self) -> Result<Option<Signer>, KeyError> {
        if !self.may_sign || self.revoked {
            return Ok(None);
        }
        let (pair, algorithm) = self.parsed?;
        let expires = self.expires_after.map(|after| self.created.saturating_add(after));
        let Self { fingerprint, created, bound, .. } = self;
        Ok(Some(Signer { pair, algorithm, fingerprint, created, expires, bound }))
    }
}

impl OpenPgpKey {
    /// From the bytes of a file; what stands behind the first key in it is not looked at.
    pub(super) fn parse(content: &[u8]) -> Result<Self, KeyError> {
        let rejected = |why: &str| KeyError::Rejected(why.to_owned());
        let mut reader = Reader(content);
        let mut drafts: Vec<Draft> = Vec::new();
        let mut public = Vec::new();
        let mut primary: Option<KeyId> = None;
        // Signatures of subkeys that are left out are left out.
        let mut is_public = true;
        while !reader.is_empty() {
            let Some((kind, body)) = reader.packet() else {
                return Err(rejected(
                    "it holds neither a private key of OpenSSH nor one of OpenPGP in binary form",
                ));
            };
            match kind {
                packet_type::SECRET_KEY if primary.is_some() => break,
                packet_type::SECRET_KEY | packet_type::SECRET_SUBKEY => {
                    let is_primary = kind == packet_type::SECRET_KEY;
                    let key = SecretKey::parse(body).ok_or_else(|| rejected("a key in it cannot be read"))?;
                    is_public = key.public.is_some();
                    if let Some(body) = key.public {
                        let kind =
                            if is_primary { packet_type::PUBLIC_KEY } else { packet_type::PUBLIC_SUBKEY };
                        public.extend(packet(kind, body));
                    }
                    if is_primary {
                        primary = Some(key_id(&key.fingerprint));
                    }
                    drafts.push(Draft {
                        parsed: key.pair,
                        fingerprint: key.fingerprint,
                        created: key.created,
                        is_primary,
                        bound: 0,
                        expires_after: None,
                        may_sign: is_primary,
                        revoked: false,
                    });
                }
                _ if primary.is_none() => {
                    return Err(rejected("it begins with something else than a private key"));
                }
                packet_type::USER_ID => public.extend(packet(kind, body)),
                packet_type::SIGNATURE => {
                    if is_public {
                        public.extend(packet(kind, body));
                    }
                    let said = Signature::parse(body)
                        .filter(|said| primary.is_some_and(|primary| said.claims(primary)));
                    if let (Some(draft), Some(said)) = (drafts.last_mut(), said) {
                        draft.hear(&said);
                    }
                }
                _ => {}
            }
        }
        if drafts.iter().any(|draft| draft.is_primary && draft.revoked) {
            return Err(rejected("the key is revoked"));
        }
        let (mut primary, mut signers) = (Vec::new(), Vec::new());
        for draft in drafts {
            let signers = if draft.is_primary { &mut primary } else { &mut signers };
            signers.extend(draft.signer()?);
        }
        signers.sort_by_key(|signer| std::cmp::Reverse(signer.bound));
        signers.extend(primary);
        if signers.is_empty() {
            return Err(rejected("no key in it may sign"));
        }
        Ok(Self { signers, public })
    }

    /// The text of a signature of a commit that was written at this time. A commit that is older than the key, because a
    /// user picked an old one, is signed with the time of the key, for nobody would believe that it signed before.
    pub(super) fn sign(&self, text: &[u8], written: i64) -> Result<Vec<u8>, SigningError> {
        let earliest = self.signers.iter().map(|signer| signer.created).min().unwrap_or_default();
        let time = u32::try_from(written.max(0)).map_err(|_| SigningError::NotValid)?.max(earliest);
        let signer = self.signers.iter().find(|signer| signer.is_valid_at(time));
        let Signer { pair, algorithm, fingerprint, .. } = signer.ok_or(SigningError::NotValid)?;
        let signature = signature::sign(pair, *algorithm, fingerprint, time, text)?;
        Ok(armor::write_open_pgp(&signature, SIGNATURE_LABEL))
    }

    /// Whether one of these keys signed that text.
    pub(super) fn made(&self, signature: &[u8], text: &[u8]) -> bool {
        let Some(bytes) = armor::read_open_pgp(signature, SIGNATURE_LABEL) else { return false };
        let Some((packet_type::SIGNATURE, body)) = Reader(&bytes).packet() else { return false };
        let Some(signature) = Signature::parse(body) else { return false };
        self.signers.iter().any(|signer| {
            signature.algorithm == signer.algorithm
                && signature.claims(key_id(&signer.fingerprint))
                && signature.is_of(&signer.pair, text)
        })
    }

    /// Without what is private, as text.
    pub(super) fn public_key(&self) -> Vec<u8> {
        let mut text = armor::write_open_pgp(&self.public, PUBLIC_KEY_LABEL);
        text.push(b'\n');
        text
    }
}

/// A packet with a private key.
struct SecretKey<'a> {
    created: u32,
    fingerprint: [u8; 20],
    /// Of what can be read.
    pair: Result<(Pair, u8), KeyError>,
    /// The body of the packet with the public key; `None` if the kind of key is not known.
    public: Option<&'a [u8]>,
}

impl<'a> SecretKey<'a> {
    fn parse(body: &'a [u8]) -> Option<Self> {
        let mut reader = Reader(body);
        let version = reader.byte()?;
        let created = reader.time()?;
        let algorithm = reader.byte()?;
        let unknown = |kind: String| Self {
            created,
            fingerprint: [0; 20],
            pair: Err(KeyError::Kind(kind)),
            public: None,
        };
        if version != VERSION {
            return Some(unknown(format!("OpenPGP version {version}")));
        }
        let public = match algorithm {
            RSA | RSA_SIGN_ONLY => {
                Public::Rsa { modulus: reader.multiprecision()?, exponent: reader.multiprecision()? }
            }
            EDDSA_LEGACY if reader.0.starts_with(&ED25519) => {
                reader.take(ED25519.len())?;
                let (NATIVE_POINT, point) = reader.multiprecision()?.split_first().map(|(a, b)| (*a, b))?
                else {
                    return None;
                };
                Public::Ed25519(point)
            }
            other => return Some(unknown(format!("OpenPGP algorithm {other}"))),
        };
        let public_body = body.get(..body.len() - reader.0.len())?;
        // A public key that a packet's length can tell of.
        let length = u16::try_from(public_body.len()).ok()?;
        let fingerprint =
            Sha1::new().chain_update([0x99]).chain_update(length.to_be_bytes()).chain_update(public_body);
        let pair = match reader.byte()? {
            0 => public.pair(&mut reader)?,
            _ => Err(KeyError::Encrypted),
        };
        Some(Self {
            created,
            fingerprint: fingerprint.finalize().into(),
            pair: pair.map(|pair| (pair, algorithm)),
            public: Some(public_body),
        })
    }
}

/// The public part of a key.
enum Public<'a> {
    Rsa { modulus: &'a [u8], exponent: &'a [u8] },
    Ed25519(&'a [u8]),
}

impl Public<'_> {
    /// With the private part; `None` if that is not there.
    fn pair(&self, reader: &mut Reader<'_>) -> Option<Result<Pair, KeyError>> {
        Some(match self {
            Self::Rsa { modulus, exponent } => Pair::rsa(&RsaNumbers {
                modulus,
                public_exponent: exponent,
                private_exponent: reader.multiprecision()?,
                primes: [reader.multiprecision()?, reader.multiprecision()?],
            }),
            Self::Ed25519(point) => Pair::ed25519(&padded(reader.multiprecision()?, POINT_BYTES)?, point),
        })
    }
}
