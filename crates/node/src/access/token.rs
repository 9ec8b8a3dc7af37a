//! The token that GitLab's internal API takes: a JSON Web Token signed with HMAC-SHA256 (RFC 7515, RFC 7519).
//!
//! Written here because it is three lines over crates that the node has already; a library would bring key formats and
//! algorithms that must never be accepted.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;
use sha2::Sha256;

/// For how long a token is good, in seconds.
const VALIDITY_SECONDS: i64 = 60;

/// A token for a call made at `now` (Unix seconds).
pub(super) fn token(secret: &SecretString, now: i64) -> String {
    let claims = json!({"iss": "gitlab-shell", "iat": now, "exp": now.saturating_add(VALIDITY_SECONDS)});
    sign(secret.expose_secret().as_bytes(), br#"{"alg":"HS256","typ":"JWT"}"#, claims.to_string().as_bytes())
}

fn sign(secret: &[u8], header: &[u8], claims: &[u8]) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    #[expect(clippy::expect_used, reason = "HMAC takes a key of any length")]
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes a key of any length");
    mac.update(signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_standard_is_signed_as_there() {
        // RFC 7515, appendix A.1.
        let key = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow";
        let key = URL_SAFE_NO_PAD.decode(key).unwrap();
        let header = b"{\"typ\":\"JWT\",\r\n \"alg\":\"HS256\"}";
        let claims = b"{\"iss\":\"joe\",\r\n \"exp\":1300819380,\r\n \"http://example.com/is_root\":true}";
        let expected = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9\
            .eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ\
            .dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
        assert_eq!(sign(&key, header, claims), expected);
    }

    #[test]
    fn a_token_says_who_and_for_how_long() {
        let token = token(&SecretString::from("s".to_owned()), 1_700_000_000);
        let parts: Vec<&str> = token.split('.').collect();
        let part = |number: usize| -> serde_json::Value {
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(parts[number]).unwrap()).unwrap()
        };
        assert_eq!(part(0), json!({"alg": "HS256", "typ": "JWT"}));
        assert_eq!(part(1), json!({"iss": "gitlab-shell", "iat": 1_700_000_000, "exp": 1_700_000_060}));
        assert_eq!(parts.len(), 3);
    }
}
