//! What is written into the configuration files of a local cluster.

use serde_json::{Value, json};

use super::tokens::SiteTokens;

/// The one virtual storage of a local cluster.
pub const VIRTUAL_STORAGE: &str = "default";

/// What all services of a site share.
pub(crate) struct SiteFacts<'a> {
    pub(crate) name: &'a str,
    pub(crate) database_url: &'a str,
    pub(crate) nats_url: String,
    pub(crate) tokens: &'a SiteTokens,
    pub(crate) log_filter: &'a str,
}

/// A site that is mirrored here.
pub(crate) struct HomeSite<'a> {
    pub(crate) name: &'a str,
    /// Base URL of its gateway.
    pub(crate) url: &'a str,
}

/// A site that mirrors this one.
pub(crate) struct Subscriber<'a> {
    pub(crate) name: &'a str,
    /// `host:port` of its geo-receiver.
    pub(crate) receiver: &'a str,
    /// File with the secret sent there.
    pub(crate) hook_token: &'a std::path::Path,
}

/// Turns JSON, which is convenient to write here, into TOML.
fn table(mut value: Value, facts: &SiteFacts<'_>) -> toml::Table {
    value["telemetry"] = json!({ "log_filter": facts.log_filter });
    toml_table(&value)
}

fn toml_table(value: &Value) -> toml::Table {
    #[expect(clippy::expect_used, reason = "the literals in this file are objects without nulls")]
    toml::Table::try_from(value).expect("an object without nulls")
}

fn loopback(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

pub(crate) fn node(facts: &SiteFacts<'_>, storage: &str, path: &std::path::Path, port: u16) -> toml::Table {
    let config = json!({
        "listen": loopback(port),
        "admin_listen": loopback(0),
        "token_file": facts.tokens.node,
        "storage": [{ "name": storage, "path": path }],
        // The disk is somebody's own machine's.
        "kept": { "minimum_free_mebibytes": 256 },
    });
    table(config, facts)
}

pub(crate) fn coordinator(
    facts: &SiteFacts<'_>,
    ports: (u16, u16),
    storages: &[(String, String)],
    subscriber: Option<&str>,
    home_site: Option<&HomeSite<'_>>,
    timing: &[(String, String)],
) -> toml::Table {
    let storages: Vec<_> =
        storages.iter().map(|(name, address)| json!({ "name": name, "address": address })).collect();
    let mut config = json!({
        "site": facts.name,
        "listen": loopback(ports.0),
        "http_listen": loopback(ports.1),
        "token_file": facts.tokens.coordinator,
        "database_url": facts.database_url,
        "nats_url": facts.nats_url,
        "node_token_file": facts.tokens.node,
        "virtual_storage": [{ "name": VIRTUAL_STORAGE, "storage": storages }],
    });
    if let Some(name) = subscriber {
        config["subscriber"] = json!([{ "name": name }]);
    }
    if let Some(site) = home_site {
        config["home_site"] = json!([{ "name": site.name, "url": site.url }]);
    }
    if !timing.is_empty() {
        config["timing"] = timing.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    }
    table(config, facts)
}

pub(crate) fn router(facts: &SiteFacts<'_>, port: u16, coordinators: &[String]) -> toml::Table {
    let config = json!({
        "listen": loopback(port),
        "admin_listen": loopback(0),
        "coordinators": coordinators,
        "token_file": facts.tokens.router,
        "node_token_file": facts.tokens.node,
        "coordinator_token_file": facts.tokens.coordinator,
    });
    table(config, facts)
}

pub(crate) fn gateway(
    facts: &SiteFacts<'_>,
    port: u16,
    routers: &[String],
    coordinators: &[String],
) -> toml::Table {
    let config = json!({
        "listen": loopback(port),
        "admin_listen": loopback(0),
        "routers": routers,
        "router_token_file": facts.tokens.router,
        "coordinators": coordinators,
        "coordinator_token_file": facts.tokens.coordinator,
        "virtual_storage": VIRTUAL_STORAGE,
    });
    table(config, facts)
}

/// Whom a replicator works with.
pub(crate) struct Peers<'a> {
    pub(crate) coordinators: &'a [String],
    pub(crate) router: &'a str,
    /// Base URL of the site's gateway.
    pub(crate) external_url: Option<&'a str>,
    pub(crate) subscriber: Option<&'a Subscriber<'a>>,
    pub(crate) home_site: Option<&'a HomeSite<'a>>,
}

pub(crate) fn replicator(facts: &SiteFacts<'_>, peers: &Peers<'_>) -> toml::Table {
    let mut config = json!({
        "admin_listen": loopback(0),
        "coordinators": peers.coordinators,
        "coordinator_token_file": facts.tokens.coordinator,
        "nats_url": facts.nats_url,
        "node_token_file": facts.tokens.node,
        "router": peers.router,
        "router_token_file": facts.tokens.router,
    });
    if let Some(url) = peers.external_url {
        config["external_url"] = json!(url);
    }
    if let Some(subscriber) = peers.subscriber {
        config["subscriber"] = json!([{
            "name": subscriber.name,
            "hook_url": format!("http://{}/api/v4/geo/receive_events", subscriber.receiver),
            "hook_token_file": subscriber.hook_token,
        }]);
    }
    if let Some(site) = peers.home_site {
        config["home_site"] = json!([{ "name": site.name, "url": site.url }]);
    }
    table(config, facts)
}

pub(crate) fn geo_receiver(facts: &SiteFacts<'_>, port: u16, home_site: &str) -> toml::Table {
    let config = json!({
        "listen": loopback(port),
        "admin_listen": loopback(0),
        "nats_url": facts.nats_url,
        "virtual_storage": VIRTUAL_STORAGE,
        "home_site": [{ "name": home_site, "hook_token_file": facts.tokens.hook }],
    });
    table(config, facts)
}
