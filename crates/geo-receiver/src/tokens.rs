//! Who is calling: the site whose token was sent.

use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};
use tabularium_common::ids::SiteName;

/// The tokens of all home sites, as digests, so that comparing takes the same time whatever their lengths.
pub(crate) struct Tokens(Vec<(SiteName, [u8; 32])>);

impl Tokens {
    pub(crate) fn new(tokens: &[(SiteName, SecretString)]) -> Self {
        Self(
            tokens
                .iter()
                .map(|(site, token)| (site.clone(), digest(token.expose_secret().as_bytes())))
                .collect(),
        )
    }

    /// The site that `token` belongs to. Every token is compared, whichever matches.
    pub(crate) fn site(&self, token: &[u8]) -> Option<&SiteName> {
        let given = digest(token);
        let mut found = 0_u64;
        let mut any = Choice::from(0);
        for (index, (_, known)) in (0_u64..).zip(&self.0) {
            let equal = known.ct_eq(&given);
            found.conditional_assign(&index, equal);
            any |= equal;
        }
        let index = bool::from(any).then_some(found)?;
        self.0.get(usize::try_from(index).ok()?).map(|(site, _)| site)
    }
}

fn digest(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_finds_its_site_and_no_other() {
        let token = |site: &str, token: &str| (site.parse().unwrap(), SecretString::from(token.to_owned()));
        let tokens = Tokens::new(&[token("oslo", "a"), token("lima", "bb"), token("rome", "c")]);
        let site = |token: &str| tokens.site(token.as_bytes()).map(SiteName::as_str);
        assert_eq!((site("a"), site("bb"), site("c")), (Some("oslo"), Some("lima"), Some("rome")));
        assert_eq!((site(""), site("b"), site("a ")), (None, None, None));
        assert_eq!(Tokens::new(&[]).site(b""), None);
    }
}
