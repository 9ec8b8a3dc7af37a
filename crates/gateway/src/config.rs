//! The configuration file.

use std::net::SocketAddr;

use serde::Deserialize;
use tabularium_common::{
    config::{ConfigDuration, ConfigError, Fault, SecretFile, Validate},
    grpc::{Address, ListenAddress, ListenAddresses},
    ids::VirtualStorageName,
    program::ServiceConfig,
    telemetry::TelemetryConfig,
    tls::TlsConfig,
};

/// Every key of `gateway.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where git clients and the JSON API are served, one address or a list of them: `host:port`, `tls://host:port` (https),
    /// `unix:/path`. Port 0 lets the kernel choose.
    pub listen: ListenAddresses,
    /// Where metrics, liveness and readiness are served.
    pub admin_listen: SocketAddr,
    /// Base of the URLs told to clients, such as `https://git.example.com`. Absent: the request's `Host` after `https://` when
    /// the first address of `listen` is one of TLS, else after `http://`.
    #[serde(default)]
    pub external_url: Option<String>,
    /// Routers, used in turn; one that cannot be dialled is passed over.
    pub routers: Vec<Address>,
    /// Secret shared with the routers. Absent: calls are not signed.
    #[serde(default)]
    pub router_token_file: Option<SecretFile>,
    /// Coordinators, asked about mirrors and by the JSON API.
    pub coordinators: Vec<Address>,
    /// Secret shared with the coordinators. Absent: calls are not signed.
    #[serde(default)]
    pub coordinator_token_file: Option<SecretFile>,
    /// The virtual storage whose repositories are served.
    #[serde(default = "default_virtual_storage")]
    pub virtual_storage: VirtualStorageName,
    /// Secret that every request must carry, as `Authorization: Bearer` or as the password of Basic. Absent: open to all.
    #[serde(default)]
    pub access_token_file: Option<SecretFile>,
    /// Requests served at once; one more is answered 503.
    #[serde(default = "default_max_requests")]
    pub max_requests: usize,
    /// Connections open at once; further ones wait to be accepted.
    #[serde(default = "default_max_connections")]
    pub max_connections: usize,
    /// Bytes of one fetch request (wants and haves) after decompression.
    #[serde(default = "default_max_negotiation_bytes")]
    pub max_negotiation_bytes: u64,
    /// Bytes of one push after decompression. Absent: no limit.
    #[serde(default)]
    pub max_push_bytes: Option<u64>,
    /// From the first wish for a request to the end of its headers; also how long an idle connection is kept.
    #[serde(default = "default_header_timeout")]
    pub header_timeout: ConfigDuration,
    /// How long the beginning of what is read is held at most, from its first bytes on: an answer that is whole by then, and less
    /// than 64 KiB, is asked of another router when the first one dies while it is at it.
    #[serde(default = "default_hold_answers")]
    pub hold_answers: ConfigDuration,
    /// A transfer in which no byte moves either way for this long is broken off.
    #[serde(default = "default_stall_timeout")]
    pub stall_timeout: ConfigDuration,
    /// How long running requests may take to end after a stop signal, in seconds.
    #[serde(default = "default_drain_seconds")]
    pub drain_seconds: u64,
    /// Certificates, keys, and whom to believe.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Logs and traces.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

fn default_virtual_storage() -> VirtualStorageName {
    #[expect(clippy::expect_used, reason = "a constant")]
    "default".parse().expect("a valid name")
}

const fn default_max_requests() -> usize {
    512
}

const fn default_max_connections() -> usize {
    4096
}

const fn default_max_negotiation_bytes() -> u64 {
    64 * 1024 * 1024
}

const fn default_header_timeout() -> ConfigDuration {
    ConfigDuration::from_secs(30)
}

const fn default_hold_answers() -> ConfigDuration {
    ConfigDuration::from_millis(20)
}

const fn default_stall_timeout() -> ConfigDuration {
    ConfigDuration::from_secs(600)
}

const fn default_drain_seconds() -> u64 {
    30
}

impl Config {
    /// What the URLs begin with that are told to clients.
    pub(crate) fn scheme(&self) -> &'static str {
        match self.listen.iter().next() {
            Some(ListenAddress::Tls(_)) => "https",
            _ => "http",
        }
    }
}

impl ServiceConfig for Config {
    fn telemetry(&self) -> &TelemetryConfig {
        &self.telemetry
    }

    fn tls(&self) -> &TlsConfig {
        &self.tls
    }

    fn check_secrets(&self) -> Result<(), ConfigError> {
        let files = [&self.router_token_file, &self.coordinator_token_file, &self.access_token_file];
        files.into_iter().flatten().try_for_each(|file| file.read().map(drop))
    }
}

impl Validate for Config {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = self.telemetry.faults();
        faults.extend(self.tls.faults(self.listen.iter()));
        for (key, addresses) in [("routers", &self.routers), ("coordinators", &self.coordinators)] {
            if addresses.is_empty() {
                faults.push(Fault::new(key, "[]", "one or more addresses such as tcp://host:port"));
            }
        }
        if let Some(url) = &self.external_url
            && !is_base_url(url)
        {
            faults.push(Fault::new("external_url", url, "http:// or https:// and a host, without a query"));
        }
        for (key, value) in [("max_requests", self.max_requests), ("max_connections", self.max_connections)] {
            if value == 0 || value > 1_000_000 {
                faults.push(Fault::new(key, value, "1 to 1000000"));
            }
        }
        if self.max_negotiation_bytes == 0 {
            faults.push(Fault::new("max_negotiation_bytes", 0, "1 or more"));
        }
        if self.max_push_bytes == Some(0) {
            faults.push(Fault::new("max_push_bytes", 0, "1 or more; leave it out for no limit"));
        }
        for (key, value) in [("header_timeout", self.header_timeout), ("stall_timeout", self.stall_timeout)] {
            if value < ConfigDuration::from_secs(1) {
                faults.push(Fault::new(key, value, "1s or more"));
            }
        }
        faults
    }
}

fn is_base_url(url: &str) -> bool {
    let Ok(uri) = url.parse::<http::Uri>() else { return false };
    matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some() && uri.query().is_none()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tabularium_common::config::{example, parse};

    use super::*;

    const MINIMAL: &str = r#"
        listen = "127.0.0.1:0"
        admin_listen = "127.0.0.1:0"
        routers = ["tcp://127.0.0.1:1"]
        coordinators = ["tcp://127.0.0.1:2"]
    "#;

    #[test]
    fn the_example_is_accepted() {
        let example = include_str!("../../../deploy/config/gateway.toml");
        let config: Config = parse(Path::new("gateway.toml"), example).unwrap();
        assert_eq!(config.virtual_storage.as_str(), "default");
    }

    #[test]
    fn the_example_shows_every_key() {
        let example = example::uncommented(include_str!("../../../deploy/config/gateway.toml"));
        assert_eq!(example::missing_keys::<Config>(&example).unwrap(), [""; 0]);
    }

    #[test]
    fn faults_are_named_all_at_once() {
        let text = MINIMAL.replace("[\"tcp://127.0.0.1:1\"]", "[]")
            + "max_requests = 0\nexternal_url = \"git.example.com\"\n";
        let error = parse::<Config>(Path::new("gateway.toml"), &text).unwrap_err().to_string();
        for part in ["`routers` is `[]`", "`max_requests` is `0`", "`external_url` is `git.example.com`"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn an_unknown_key_and_a_bad_address_are_refused() {
        let unknown = parse::<Config>(Path::new("g"), &(MINIMAL.to_owned() + "router = 1\n")).unwrap_err();
        assert!(unknown.to_string().contains("router"), "{unknown}");
        let address = parse::<Config>(Path::new("g"), &MINIMAL.replace("tcp://127.0.0.1:1", "127.0.0.1:1"))
            .unwrap_err();
        assert!(address.to_string().contains("tcp://host:port"), "{address}");
    }
}
