//! What is written into the configuration files of a local cluster.

use serde_json::{Value, json};

use super::{
    tokens::SiteTokens,
    transport::{TlsFiles, base_url},
};

/// The one virtual storage of a local cluster.
pub const VIRTUAL_STORAGE: &str = "default";

/// What all services of a site share.
pub(crate) struct SiteFacts<'a> {
    pub(crate) name: &'a str,
    pub(crate) database_url: &'a str,
    pub(crate) nats_url: String,
    pub(crate) tokens: &'a SiteTokens,
    pub(crate) log_filter: &'a str,
    pub(crate) tls: Option<&'a TlsFiles>,
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
    /// Where its geo-receiver is, as announced.
    pub(crate) receiver: &'a str,
    /// File with the secret sent there.
    pub(crate) hook_token: &'a std::path::Path,
}

/// Turns JSON, which is convenient to write here, into TOML.
fn table(mut value: Value, facts: &SiteFacts<'_>) -> toml::Table {
    value["telemetry"] = json!({ "log_filter": facts.log_filter });
    if let Some(files) = facts.tls {
        value["tls"] = json!({
            "certificate_path": files.certificate_path,
            "key_path": files.key_path,
            "ca_path": files.ca_path,
        });
    }
    toml_table(&value)
}

/// As [`table`], for services whose clients are ours: they have certificates.
fn guarded_table(value: Value, facts: &SiteFacts<'_>) -> toml::Table {
    let mut table = table(value, facts);
    let mutual = facts.tls.filter(|files| files.mutual);
    if let (Some(files), Some(toml::Value::Table(tls))) = (mutual, table.get_mut("tls")) {
        tls.insert("client_ca_path".to_owned(), files.ca_path.display().to_string().into());
    }
    table
}

fn toml_table(value: &Value) -> toml::Table {
    #[expect(clippy::expect_used, reason = "the literals in this file are objects without nulls")]
    toml::Table::try_from(value).expect("an object without nulls")
}

/// Of the kernel's choice.
const ANY_PORT: &str = "127.0.0.1:0";

pub(crate) fn node(
    facts: &SiteFacts<'_>,
    storage: &str,
    path: &std::path::Path,
    listen: &str,
) -> toml::Table {
    let config = json!({
        "listen": listen,
        "admin_listen": ANY_PORT,
        "token_file": facts.tokens.node,
        "storage": [{ "name": storage, "path": path }],
        // The disk is somebody's own machine's.
        "kept": { "minimum_free_mebibytes": 256 },
    });
    guarded_table(config, facts)
}

pub(crate) fn coordinator(
    facts: &SiteFacts<'_>,
    (listen, http_listen): (&str, &str),
    storages: &[(String, String)],
    subscriber: Option<&str>,
    home_site: Option<&HomeSite<'_>>,
    timing: &[(String, String)],
) -> toml::Table {
    let storages: Vec<_> =
        storages.iter().map(|(name, address)| json!({ "name": name, "address": address })).collect();
    let mut config = json!({
        "site": facts.name,
        "listen": listen,
        "http_listen": http_listen,
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
    guarded_table(config, facts)
}

pub(crate) fn router(facts: &SiteFacts<'_>, listen: &str, coordinators: &[String]) -> toml::Table {
    let config = json!({
        "listen": listen,
        "admin_listen": ANY_PORT,
        "coordinators": coordinators,
        "token_file": facts.tokens.router,
        "node_token_file": facts.tokens.node,
        "coordinator_token_file": facts.tokens.coordinator,
    });
    guarded_table(config, facts)
}

pub(crate) fn gateway(
    facts: &SiteFacts<'_>,
    listen: &str,
    routers: &[String],
    coordinators: &[String],
) -> toml::Table {
    let config = json!({
        "listen": listen,
        "admin_listen": ANY_PORT,
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
        "admin_listen": ANY_PORT,
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
            "hook_url": format!("{}/api/v4/geo/receive_events", base_url(subscriber.receiver)),
            "hook_token_file": subscriber.hook_token,
        }]);
    }
    if let Some(site) = peers.home_site {
        config["home_site"] = json!([{ "name": site.name, "url": site.url }]);
    }
    table(config, facts)
}

pub(crate) fn geo_receiver(facts: &SiteFacts<'_>, listen: &str, home_site: &str) -> toml::Table {
    let config = json!({
        "listen": listen,
        "admin_listen": ANY_PORT,
        "nats_url": facts.nats_url,
        "virtual_storage": VIRTUAL_STORAGE,
        "home_site": [{ "name": home_site, "hook_token_file": facts.tokens.hook }],
    });
    table(config, facts)
}
