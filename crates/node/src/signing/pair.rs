//! The kinds of keys that sign the same text in the same way each time: Ed25519 (RFC 8032) and RSA with the padding of
//! PKCS #1 v1.5 (RFC 8017).

use num_bigint::BigUint;
use ring::{
    rand::SystemRandom,
    signature::{
        ED25519, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384,
        RSA_PKCS1_2048_8192_SHA512, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RsaEncoding,
        RsaKeyPair, RsaParameters, UnparsedPublicKey,
    },
};

use super::KeyError;

/// What an RSA signature is made over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Digest {
    Sha256,
    Sha384,
    Sha512,
}

impl Digest {
    fn encoding(self) -> &'static dyn RsaEncoding {
        match self {
            Self::Sha256 => &RSA_PKCS1_SHA256,
            Self::Sha384 => &RSA_PKCS1_SHA384,
            Self::Sha512 => &RSA_PKCS1_SHA512,
        }
    }

    fn parameters(self) -> &'static RsaParameters {
        match self {
            Self::Sha256 => &RSA_PKCS1_2048_8192_SHA256,
            Self::Sha384 => &RSA_PKCS1_2048_8192_SHA384,
            Self::Sha512 => &RSA_PKCS1_2048_8192_SHA512,
        }
    }
}

/// What files hold of an RSA key: big-endian, without leading zeros.
pub(super) struct RsaNumbers<'a> {
    pub(super) modulus: &'a [u8],
    pub(super) public_exponent: &'a [u8],
    pub(super) private_exponent: &'a [u8],
    pub(super) primes: [&'a [u8]; 2],
}

/// A private key with its public one.
pub(super) enum Pair {
    Ed25519(Ed25519KeyPair),
    Rsa(Box<RsaKeyPair>),
}

impl Pair {
    pub(super) fn ed25519(seed: &[u8], public: &[u8]) -> Result<Self, KeyError> {
        let pair = Ed25519KeyPair::from_seed_and_public_key(seed, public);
        pair.map(Self::Ed25519).map_err(|rejected| KeyError::Rejected(rejected.to_string()))
    }

    pub(super) fn rsa(numbers: &RsaNumbers<'_>) -> Result<Self, KeyError> {
        let rejected = |why: &str| KeyError::Rejected(why.to_owned());
        let number = BigUint::from_bytes_be;
        let [p, q] = numbers.primes.map(number);
        // Files have them in either order.
        let (p, q) = if p > q { (p, q) } else { (q, p) };
        let one = BigUint::from(1_u8);
        if q <= one {
            return Err(rejected("no prime numbers"));
        }
        let private = number(numbers.private_exponent);
        let inverse = q.modinv(&p).ok_or_else(|| rejected("the prime numbers are none"))?;
        let components = ring::rsa::KeyPairComponents {
            public_key: ring::rsa::PublicKeyComponents { n: numbers.modulus, e: numbers.public_exponent },
            d: numbers.private_exponent.to_vec(),
            dP: (&private % (&p - &one)).to_bytes_be(),
            dQ: (&private % (&q - &one)).to_bytes_be(),
            qInv: inverse.to_bytes_be(),
            p: p.to_bytes_be(),
            q: q.to_bytes_be(),
        };
        let pair = RsaKeyPair::from_components(&components)
            .map_err(|error| rejected(&format!("{error}; RSA keys have 2048, 3072 or 4096 bits")))?;
        let pair = Self::Rsa(Box::new(pair));
        // Whether the exponents belong to the modulus shows when something is signed.
        pair.sign(Digest::Sha256, b"").map_err(|_| rejected("its numbers do not belong together"))?;
        Ok(pair)
    }

    /// A few milliseconds of work, with an RSA key. Ed25519 has its own digest.
    pub(super) fn sign(&self, digest: Digest, message: &[u8]) -> Result<Vec<u8>, ring::error::Unspecified> {
        match self {
            Self::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_vec()),
            Self::Rsa(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                // This padding takes nothing from it.
                pair.sign(digest.encoding(), &SystemRandom::new(), message, &mut signature)?;
                Ok(signature)
            }
        }
    }

    /// Whether the signature was made with this key.
    pub(super) fn made(&self, digest: Digest, message: &[u8], signature: &[u8]) -> bool {
        match self {
            Self::Ed25519(pair) => {
                UnparsedPublicKey::new(&ED25519, pair.public_key().as_ref()).verify(message, signature)
            }
            Self::Rsa(pair) => {
                let key = UnparsedPublicKey::new(digest.parameters(), pair.public_key().as_ref());
                key.verify(message, signature)
            }
        }
        .is_ok()
    }

    /// How long a signature is.
    pub(super) fn signature_bytes(&self) -> usize {
        match self {
            Self::Ed25519(_) => 64,
            Self::Rsa(pair) => pair.public().modulus_len(),
        }
    }
}
