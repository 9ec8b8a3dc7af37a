//! All refs of a repository as one number, so that two repositories are compared without holding either's refs.

use sha2::{Digest as _, Sha256};

/// Sum over a set of refs: the exclusive or of each ref's SHA-256. The order does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RefsDigest {
    sum: [u8; 32],
    /// How many refs.
    pub(crate) count: u64,
}

impl RefsDigest {
    /// Adds a ref that is not in it yet.
    pub(crate) fn add(&mut self, name: &[u8], object_id: &[u8]) {
        let digest = Sha256::new().chain_update(object_id).chain_update(b" ").chain_update(name).finalize();
        for (sum, byte) in self.sum.iter_mut().zip(digest) {
            *sum ^= byte;
        }
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(refs: &[(&str, &str)]) -> RefsDigest {
        let mut digest = RefsDigest::default();
        for (name, id) in refs {
            digest.add(name.as_bytes(), id.as_bytes());
        }
        digest
    }

    #[test]
    fn the_order_does_not_matter_and_the_values_do() {
        let (a, b) = (("refs/heads/a", "1"), ("refs/heads/b", "2"));
        assert_eq!(digest(&[a, b]), digest(&[b, a]));
        assert_ne!(digest(&[a, b]), digest(&[a]));
        assert_ne!(digest(&[a, b]), digest(&[(a.0, b.1), (b.0, a.1)]));
    }
}
