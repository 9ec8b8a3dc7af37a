//! Gitaly's v2 tokens: `authorization: Bearer v2.<signature>.<timestamp>` (wire reference, section c).
//!
//! The signature is the HMAC-SHA256 of the decimal Unix time under the shared secret. A token is checked once, when an
//! RPC starts, and is valid thirty seconds around its time stamp. Neither secrets nor tokens are ever written into logs or
//! answers.

use std::{
    collections::HashMap,
    num::{IntErrorKind, ParseIntError},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use hmac::{Hmac, KeyInit as _, Mac as _};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::Sha256;
use tonic::{Status, metadata::MetadataValue, service::Interceptor};

use crate::grpc::Address;

/// How far a token's time stamp may be from the server's clock, either way, in seconds; inclusive.
pub const VALIDITY_SECONDS: i64 = 30;

/// Why a call was refused. The text is Gitaly's (19.x) word for word.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No header, another scheme, too few parts, or a signature that is not hexadecimal.
    #[error("authentication required")]
    Required,
    /// Not a v2 token.
    #[error("permission denied: invalid token version")]
    Version,
    /// Signed with another secret.
    #[error("permission denied: wrong hmac signature")]
    Signature,
    /// Signed, but the time stamp is not a number. Holds what it is instead, and why not, in the words of Go's library.
    #[error("permission denied: cannot parse timestamp: strconv.ParseInt: parsing {0:?}: {1}")]
    Timestamp(String, &'static str),
    /// More than thirty seconds old.
    #[error("permission denied: token has expired")]
    Expired,
    /// More than thirty seconds ahead.
    #[error("permission denied: token's validity window is in future")]
    Future,
}

impl From<AuthError> for Status {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::Required => Self::unauthenticated(error.to_string()),
            AuthError::Version
            | AuthError::Signature
            | AuthError::Timestamp(..)
            | AuthError::Expired
            | AuthError::Future => Self::permission_denied(error.to_string()),
        }
    }
}

fn mac(secret: &SecretString) -> Hmac<Sha256> {
    #[expect(clippy::expect_used, reason = "HMAC takes a key of any length")]
    Hmac::<Sha256>::new_from_slice(secret.expose_secret().as_bytes()).expect("HMAC takes a key of any length")
}

/// Seconds since the epoch by the system's clock; 0 before 1970.
pub fn unix_now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX))
}

/// The value of an `authorization` header for a call made at `now` (Unix seconds).
pub fn bearer(secret: &SecretString, now: i64) -> String {
    let timestamp = now.to_string();
    let mut mac = mac(secret);
    mac.update(timestamp.as_bytes());
    format!("Bearer v2.{}.{timestamp}", hex::encode(mac.finalize().into_bytes()))
}

/// Checks an `authorization` header's value against the secret, in Gitaly's order: shape, signature (constant time),
/// time stamp, window.
pub fn verify(secret: &SecretString, header: Option<&str>, now: i64) -> Result<(), AuthError> {
    let (scheme, token) = header.and_then(|value| value.split_once(' ')).ok_or(AuthError::Required)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(AuthError::Required);
    }
    let mut parts = token.splitn(3, '.');
    let (Some(version), Some(signature), Some(timestamp)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(AuthError::Required);
    };
    let signature = hex::decode(signature).map_err(|_| AuthError::Required)?;
    if version != "v2" {
        return Err(AuthError::Version);
    }
    let mut mac = mac(secret);
    mac.update(timestamp.as_bytes());
    mac.verify_slice(&signature).map_err(|_| AuthError::Signature)?;
    let timestamp: i64 =
        timestamp.parse().map_err(|error| AuthError::Timestamp(timestamp.to_owned(), in_go(&error)))?;
    if timestamp < now - VALIDITY_SECONDS {
        return Err(AuthError::Expired);
    }
    if timestamp > now + VALIDITY_SECONDS {
        return Err(AuthError::Future);
    }
    Ok(())
}

fn in_go(error: &ParseIntError) -> &'static str {
    match error.kind() {
        IntErrorKind::PosOverflow | IntErrorKind::NegOverflow => "value out of range",
        _ => "invalid syntax",
    }
}

/// How a check came out, in Gitaly's words.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    enforced: &'static str,
    status: &'static str,
}

/// Checks every call a server takes. Without a secret authentication is off, as in Gitaly.
#[derive(Clone, Default)]
pub struct RequireToken {
    secret: Option<SecretString>,
    transitioning: bool,
    outcomes: Family<Outcome, Counter>,
}

impl RequireToken {
    /// Lets in who knows the secret.
    pub fn new(secret: Option<SecretString>) -> Self {
        Self { secret, ..Self::default() }
    }

    /// Whether everybody is let in and the outcome only counted: how a secret is introduced or changed without an outage.
    #[must_use]
    pub fn transitioning(self, transitioning: bool) -> Self {
        Self { transitioning, ..self }
    }

    /// Has the outcomes counted in the registry, as `tabularium_<service>_authentications_total`.
    #[must_use]
    pub fn counted(self, registry: &mut Registry, service: &str) -> Self {
        let name = format!("tabularium_{service}_authentications");
        registry.register(name, "Calls, by how their token was", self.outcomes.clone());
        self
    }

    /// For calls to others that want the same secret.
    pub fn to_send(&self) -> SendToken {
        SendToken(self.secret.clone())
    }

    /// Checks the headers of one call.
    pub fn check(&self, headers: &http::HeaderMap) -> Result<(), AuthError> {
        let Some(secret) = &self.secret else {
            self.count("server disabled authentication");
            return Ok(());
        };
        let header = headers.get(http::header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let checked = verify(secret, header, unix_now());
        self.count(match &checked {
            Ok(()) if self.transitioning => "would be ok",
            Ok(()) => "ok",
            Err(AuthError::Required) => "unauthenticated",
            Err(_) => "denied",
        });
        if self.transitioning { Ok(()) } else { checked }
    }

    fn count(&self, status: &'static str) {
        let enforced = if self.transitioning { "false" } else { "true" };
        self.outcomes.get_or_create(&Outcome { enforced, status }).inc();
    }
}

impl Interceptor for RequireToken {
    fn call(&mut self, request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        let headers = request.metadata().clone().into_headers();
        self.check(&headers)?;
        Ok(request)
    }
}

/// Signs every call a client makes. Without a secret no header is sent, as in Gitaly.
#[derive(Clone, Default)]
pub struct SendToken(pub Option<SecretString>);

impl SendToken {
    /// The header's value for a call made now.
    pub fn header(&self) -> Option<http::HeaderValue> {
        let secret = self.0.as_ref()?;
        let mut value = http::HeaderValue::from_str(&bearer(secret, unix_now())).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl Interceptor for SendToken {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(secret) = &self.0 {
            let mut value: MetadataValue<_> = bearer(secret, unix_now())
                .parse()
                .map_err(|_| Status::internal("the authorization header cannot be formed"))?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

/// What storage nodes want: one secret for all, but for those that have their own.
#[derive(Clone, Default)]
pub struct NodeTokens {
    of_all: Option<SecretString>,
    own: Arc<HashMap<Address, Option<SecretString>>>,
}

impl NodeTokens {
    /// `own` is for the servers at these addresses and for nobody else; `None`: they want none.
    pub fn new(
        of_all: Option<SecretString>,
        own: impl IntoIterator<Item = (Address, Option<SecretString>)>,
    ) -> Self {
        Self { of_all, own: Arc::new(own.into_iter().collect()) }
    }

    /// The secret of the server at an address.
    pub fn of(&self, address: &Address) -> Option<&SecretString> {
        self.own.get(address).unwrap_or(&self.of_all).as_ref()
    }

    /// For calls to the server at an address.
    pub fn to_send(&self, address: &Address) -> SendToken {
        SendToken(self.of(address).cloned())
    }

    /// All of them, to be struck out of texts that others see.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretString> {
        self.of_all.iter().chain(self.own.values().flatten())
    }
}

impl From<Option<SecretString>> for NodeTokens {
    fn from(of_all: Option<SecretString>) -> Self {
        Self::new(of_all, [])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_700_000_000;
    /// Vector from the wire reference, appendix 3.
    const VECTOR: &str =
        "Bearer v2.4b227f8831b3763d066901751ad4c583ed08832bf1924a4ec50c2e871b1e8586.1700000000";

    fn secret() -> SecretString {
        SecretString::from("secret".to_owned())
    }

    #[test]
    fn the_token_is_gitalys() {
        assert_eq!(bearer(&secret(), NOW), VECTOR);
        assert_eq!(verify(&secret(), Some(VECTOR), NOW), Ok(()));
        assert_eq!(verify(&secret(), Some(&VECTOR.replace("Bearer", "bEARER")), NOW), Ok(()));
    }

    #[test]
    fn the_window_is_thirty_seconds_both_ways_inclusive() {
        for (now, expected) in [
            (NOW + 30, Ok(())),
            (NOW + 31, Err(AuthError::Expired)),
            (NOW - 30, Ok(())),
            (NOW - 31, Err(AuthError::Future)),
        ] {
            assert_eq!(verify(&secret(), Some(VECTOR), now), expected, "{now}");
        }
    }

    #[test]
    fn malformed_tokens_are_unauthenticated_and_wrong_ones_denied() {
        let zeros = "0".repeat(64);
        for (header, expected) in [
            (None, AuthError::Required),
            (Some("Basic abc".to_owned()), AuthError::Required),
            (Some("Bearer c2VjcmV0".to_owned()), AuthError::Required),
            (Some(format!("Bearer v2.xyz.{NOW}")), AuthError::Required),
            (Some(VECTOR.replace("v2", "v1")), AuthError::Version),
            (Some(format!("Bearer v2.{zeros}.{NOW}")), AuthError::Signature),
        ] {
            assert_eq!(verify(&secret(), header.as_deref(), NOW), Err(expected), "{header:?}");
        }
        for (timestamp, why) in [
            ("", "parsing \"\": invalid syntax"),
            ("1e9", "parsing \"1e9\": invalid syntax"),
            ("9223372036854775808", "parsing \"9223372036854775808\": value out of range"),
        ] {
            let mut mac = mac(&secret());
            mac.update(timestamp.as_bytes());
            let header = format!("Bearer v2.{}.{timestamp}", hex::encode(mac.finalize().into_bytes()));
            let error = verify(&secret(), Some(&header), NOW).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("permission denied: cannot parse timestamp: strconv.ParseInt: {why}")
            );
        }
        let other = bearer(&SecretString::from("other".to_owned()), NOW);
        assert_eq!(verify(&secret(), Some(&other), NOW), Err(AuthError::Signature));
        assert_eq!(Status::from(AuthError::Required).code(), tonic::Code::Unauthenticated);
        assert_eq!(Status::from(AuthError::Signature).code(), tonic::Code::PermissionDenied);
    }

    fn headers(value: &str) -> http::HeaderMap {
        let value = http::HeaderValue::from_str(value).unwrap();
        [(http::header::AUTHORIZATION, value)].into_iter().collect()
    }

    #[test]
    fn the_first_of_several_headers_is_the_one_that_counts() {
        let require = RequireToken::new(Some(secret()));
        let mut several = headers(&bearer(&secret(), unix_now()));
        several.append("authorization", "Bearer v2.00.0".parse().unwrap());
        assert_eq!(require.check(&several), Ok(()));
        let mut wrong_first = headers("Bearer v2.00.0");
        wrong_first.append("authorization", bearer(&secret(), unix_now()).parse().unwrap());
        assert_eq!(require.check(&wrong_first), Err(AuthError::Signature));
    }

    #[test]
    fn while_transitioning_everybody_is_let_in_and_counted() {
        let mut registry = Registry::default();
        let require = RequireToken::new(Some(secret())).transitioning(true).counted(&mut registry, "router");
        let enforcing = require.clone().transitioning(false);
        let good = headers(&bearer(&secret(), unix_now()));
        let wrong = headers(&bearer(&SecretString::from("other".to_owned()), unix_now()));
        for headers in [&good, &wrong, &http::HeaderMap::new()] {
            assert_eq!(require.check(headers), Ok(()));
        }
        assert_eq!(enforcing.check(&good), Ok(()));
        assert_eq!(enforcing.check(&wrong), Err(AuthError::Signature));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            r#"{enforced="false",status="would be ok"} 1"#,
            r#"{enforced="false",status="denied"} 1"#,
            r#"{enforced="false",status="unauthenticated"} 1"#,
            r#"{enforced="true",status="ok"} 1"#,
            r#"{enforced="true",status="denied"} 1"#,
        ] {
            assert!(
                text.contains(&format!("tabularium_router_authentications_total{line}")),
                "{line} in {text}"
            );
        }
    }

    #[test]
    fn without_a_secret_nobody_is_asked_and_nothing_is_sent() {
        let require = RequireToken::new(None);
        assert_eq!(require.check(&headers("Bearer nonsense")), Ok(()));
        assert_eq!(require.to_send().header(), None);
        let sent = SendToken(None).call(tonic::Request::new(())).unwrap();
        assert!(sent.metadata().is_empty());
    }

    #[test]
    fn neither_secret_nor_token_is_shown() {
        let secret = SecretString::from("hunter2".to_owned());
        let send = SendToken(Some(secret.clone()));
        let request = send.clone().call(tonic::Request::new(())).unwrap();
        let token = request.metadata().get("authorization").unwrap().to_str().unwrap().to_owned();
        let header = send.header().unwrap();
        let headers = request.metadata().clone().into_headers();
        for shown in
            [format!("{request:?}"), format!("{header:?}"), format!("{headers:?}"), format!("{secret:?}")]
        {
            assert!(
                !shown.contains("hunter2") && !shown.contains(&token) && !shown.contains("v2."),
                "{shown}"
            );
        }
        let wrong = verify(&SecretString::from("other".to_owned()), Some(&token), unix_now()).unwrap_err();
        let status = Status::from(wrong);
        let signature = token.split('.').nth(1).unwrap();
        assert!(!format!("{status:?}").contains(signature), "{status:?}");
    }

    #[test]
    fn a_node_gets_its_own_secret_and_no_other_nodes() {
        let at = |text: &str| text.parse::<Address>().unwrap();
        let given = |text: &str| SecretString::from(text.to_owned());
        let own = [(at("tcp://a:1"), Some(given("a"))), (at("tcp://b:1"), None)];
        let tokens = NodeTokens::new(Some(given("all")), own);
        let of = |text: &str| tokens.of(&at(text)).map(|secret| secret.expose_secret().to_owned());
        assert_eq!(of("tcp://a:1").as_deref(), Some("a"));
        assert_eq!(of("tcp://b:1"), None, "and not that of all");
        assert_eq!(of("tcp://c:1").as_deref(), Some("all"));
        assert_eq!(tokens.secrets().count(), 2);
        assert!(tokens.to_send(&at("tcp://b:1")).header().is_none());
    }
}
