//! The configuration file, and the secrets it names.

use std::{collections::BTreeSet, net::SocketAddr};

use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tabularium_common::{
    config::{ConfigError, Fault, SecretFile, Validate},
    grpc::ListenAddresses,
    ids::{SiteName, VirtualStorageName},
    program::ServiceConfig,
    telemetry::TelemetryConfig,
    tls::TlsConfig,
};

/// Largest body that may be allowed, in bytes: GitLab's own bound.
pub const MAX_BODY_BYTES_LIMIT: usize = 25 * 1024 * 1024;
/// Most requests at once that may be allowed.
pub const MAX_CONCURRENT_REQUESTS_LIMIT: usize = 10_000;

/// `geo-receiver.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeoReceiverConfig {
    /// Where home sites post to, one address or a list of them: `host:port`, `tls://host:port` (https), `unix:/path`.
    pub listen: ListenAddresses,
    /// Address and port of metrics, liveness and readiness.
    pub admin_listen: SocketAddr,
    /// The message bus: `nats://host:port`.
    pub nats_url: String,
    /// Virtual storage in which the mirrors are kept.
    #[serde(default = "default_virtual_storage")]
    pub virtual_storage: VirtualStorageName,
    /// Largest body taken, in bytes. A push of many commits sends some hundred KiB.
    #[serde(default = "default_max_body_bytes")]
    pub max_body_bytes: usize,
    /// Requests at once; one more is answered 503.
    #[serde(default = "default_max_concurrent_requests")]
    pub max_concurrent_requests: usize,
    /// Sites whose events are taken.
    pub home_site: Vec<HomeSite>,
    /// How long running requests may go on after the signal to stop, in seconds.
    #[serde(default = "default_drain_seconds")]
    pub drain_seconds: u64,
    /// Certificates, keys, and whom to believe.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// A site whose events are taken.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HomeSite {
    /// Its name, as the coordinator has it.
    pub name: SiteName,
    /// Holds the token it sends as `X-Gitlab-Token`. Each site has one of its own: it says who is calling.
    pub hook_token_file: SecretFile,
}

fn default_virtual_storage() -> VirtualStorageName {
    #[expect(clippy::expect_used, reason = "a constant that a test parses")]
    "default".parse().expect("a valid name")
}

fn default_max_body_bytes() -> usize {
    1024 * 1024
}

fn default_max_concurrent_requests() -> usize {
    64
}

fn default_drain_seconds() -> u64 {
    30
}

impl GeoReceiverConfig {
    /// Reads the token of every site. Two sites with one token are refused: a token tells them apart.
    pub fn read_tokens(&self) -> Result<Vec<(SiteName, SecretString)>, ConfigError> {
        let mut tokens: Vec<(SiteName, SecretString)> = Vec::new();
        for site in &self.home_site {
            let token = site.hook_token_file.read()?;
            if let Some((other, _)) =
                tokens.iter().find(|(_, known)| known.expose_secret() == token.expose_secret())
            {
                return Err(ConfigError::Invalid {
                    path: site.hook_token_file.0.clone(),
                    faults: vec![Fault::new(
                        "home_site.hook_token_file",
                        format!("the token of {} and {other}", site.name),
                        "a token of its own for each site",
                    )],
                });
            }
            tokens.push((site.name.clone(), token));
        }
        Ok(tokens)
    }
}

impl ServiceConfig for GeoReceiverConfig {
    fn telemetry(&self) -> &TelemetryConfig {
        &self.telemetry
    }

    fn tls(&self) -> &TlsConfig {
        &self.tls
    }

    fn check_secrets(&self) -> Result<(), ConfigError> {
        self.read_tokens().map(drop)
    }
}

impl Validate for GeoReceiverConfig {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = self.telemetry.faults();
        faults.extend(self.tls.faults(self.listen.iter()));
        // The URL may hold a password: it is not repeated.
        if self.nats_url.parse::<async_nats::ServerAddr>().is_err() {
            faults.push(Fault::new("nats_url", "(not shown)", "nats://host:port or tls://host:port"));
        }
        if !(1..=MAX_BODY_BYTES_LIMIT).contains(&self.max_body_bytes) {
            faults.push(Fault::new(
                "max_body_bytes",
                self.max_body_bytes,
                format!("1 to {MAX_BODY_BYTES_LIMIT}"),
            ));
        }
        if !(1..=MAX_CONCURRENT_REQUESTS_LIMIT).contains(&self.max_concurrent_requests) {
            let allowed = format!("1 to {MAX_CONCURRENT_REQUESTS_LIMIT}");
            faults.push(Fault::new("max_concurrent_requests", self.max_concurrent_requests, allowed));
        }
        if self.home_site.is_empty() {
            faults.push(Fault::new("home_site", "[]", "one site or more"));
        }
        let mut names = BTreeSet::new();
        for site in &self.home_site {
            if !names.insert(&site.name) {
                faults.push(Fault::new("home_site.name", &site.name, "each name once"));
            }
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tabularium_common::config::{example, parse};

    use super::*;

    const MINIMAL: &str =
        "listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\nnats_url = \"nats://n:4222\"\n";

    fn error(text: &str) -> String {
        parse::<GeoReceiverConfig>(Path::new("g.toml"), &format!("{MINIMAL}{text}")).unwrap_err().to_string()
    }

    #[test]
    fn the_example_parses() {
        let text = include_str!("../../../deploy/config/geo-receiver.toml");
        let config: GeoReceiverConfig = parse(Path::new("geo-receiver.toml"), text).unwrap();
        assert_eq!(config.virtual_storage.as_str(), "default");
        assert_eq!(config.max_body_bytes, 1024 * 1024);
    }

    #[test]
    fn the_example_shows_every_key() {
        let example = example::uncommented(include_str!("../../../deploy/config/geo-receiver.toml"));
        assert_eq!(example::missing_keys::<GeoReceiverConfig>(&example).unwrap(), [""; 0]);
    }

    #[test]
    fn faults_name_the_key() {
        let site = "[[home_site]]\nname = \"oslo\"\nhook_token_file = \"/t\"\n";
        assert!(error("home_site = []\n").contains("home_site"));
        assert!(error(&format!("max_body_bytes = 0\n{site}")).contains("max_body_bytes"));
        assert!(error(&format!("max_concurrent_requests = 0\n{site}")).contains("max_concurrent_requests"));
        assert!(error(&format!("{site}{site}")).contains("each name once"));
        assert!(error(&format!("max_bodies = 1\n{site}")).contains("max_bodies"));
    }

    #[test]
    fn a_token_names_one_site() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        std::fs::write(&path, "hunter2").unwrap();
        let site = |name: &str| {
            format!("[[home_site]]\nname = \"{name}\"\nhook_token_file = \"{}\"\n", path.display())
        };
        let text = format!("{MINIMAL}{}{}", site("oslo"), site("lima"));
        let config: GeoReceiverConfig = parse(Path::new("g.toml"), &text).unwrap();
        let error = config.read_tokens().unwrap_err().to_string();
        assert!(error.contains("oslo") && error.contains("lima") && !error.contains("hunter2"), "{error}");
    }
}
