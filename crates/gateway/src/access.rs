//! Who may ask, and in whose name a push is made.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, header::AUTHORIZATION};
use secrecy::{ExposeSecret as _, SecretString};
use subtle::ConstantTimeEq as _;

use crate::limits::MAX_USER_NAME_BYTES;

/// The name of a caller that gave none.
const ANONYMOUS: &str = "anonymous";

/// The caller, as hooks on the nodes see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    name: String,
}

impl Caller {
    /// `gl_username`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `gl_id`: `user-<name>`.
    pub(crate) fn id(&self) -> String {
        format!("user-{}", self.name)
    }
}

/// The secret is missing or wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("authentication required: the access token, as Bearer or as the password of Basic")]
pub(crate) struct Unauthenticated;

/// Checks a request's credentials and names the caller. Without a secret everybody may ask, and a Basic user name is
/// still taken at its word.
pub(crate) fn caller(secret: Option<&SecretString>, headers: &HeaderMap) -> Result<Caller, Unauthenticated> {
    let credential = headers.get(AUTHORIZATION).and_then(|value| Credential::parse(value.as_bytes()));
    if let Some(secret) = secret {
        let given = credential.as_ref().map(|credential| credential.secret.as_slice()).unwrap_or_default();
        if !bool::from(secret.expose_secret().as_bytes().ct_eq(given)) {
            return Err(Unauthenticated);
        }
    }
    let name = credential.and_then(|credential| credential.user).unwrap_or_else(|| ANONYMOUS.to_owned());
    Ok(Caller { name })
}

struct Credential {
    user: Option<String>,
    secret: Vec<u8>,
}

impl Credential {
    fn parse(header: &[u8]) -> Option<Self> {
        let space = header.iter().position(|byte| *byte == b' ')?;
        let (scheme, value) = header.split_at(space);
        let value = value.trim_ascii();
        if scheme.eq_ignore_ascii_case(b"bearer") {
            return Some(Self { user: None, secret: value.to_vec() });
        }
        if !scheme.eq_ignore_ascii_case(b"basic") {
            return None;
        }
        let pair = STANDARD.decode(value).ok()?;
        let colon = pair.iter().position(|byte| *byte == b':')?;
        let user = std::str::from_utf8(&pair[..colon]).ok().filter(|user| is_user_name(user));
        Some(Self { user: user.map(str::to_owned), secret: pair[colon + 1..].to_vec() })
    }
}

fn is_user_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_USER_NAME_BYTES && !text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(secret: Option<&str>, header: Option<&str>) -> Result<String, Unauthenticated> {
        let mut headers = HeaderMap::new();
        if let Some(header) = header {
            headers.insert(AUTHORIZATION, header.parse().unwrap());
        }
        let secret = secret.map(|text| SecretString::from(text.to_owned()));
        caller(secret.as_ref(), &headers).map(|caller| caller.id())
    }

    fn basic(pair: &str) -> String {
        format!("bAsic {}", STANDARD.encode(pair))
    }

    #[test]
    fn the_secret_is_taken_as_bearer_or_as_a_password() {
        assert_eq!(ask(Some("s"), Some("Bearer s")).unwrap(), "user-anonymous");
        assert_eq!(ask(Some("s"), Some(&basic("alice:s"))).unwrap(), "user-alice");
        assert_eq!(ask(Some("s:t"), Some(&basic(":s:t"))).unwrap(), "user-anonymous");
        for wrong in [None, Some("Bearer"), Some("Bearer S"), Some("s"), Some("Digest s"), Some("Basic s")] {
            assert_eq!(ask(Some("s"), wrong), Err(Unauthenticated), "{wrong:?}");
        }
        assert_eq!(ask(Some("s"), Some(&basic("s:"))), Err(Unauthenticated));
    }

    #[test]
    fn without_a_secret_everybody_may_ask() {
        assert_eq!(ask(None, None).unwrap(), "user-anonymous");
        assert_eq!(ask(None, Some(&basic("bob:x"))).unwrap(), "user-bob");
        assert_eq!(ask(None, Some(&basic("a\nb:x"))).unwrap(), "user-anonymous");
    }
}
