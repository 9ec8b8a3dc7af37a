//! One replicator and what surrounds it.

use std::time::Duration;

use tabularium_common::{
    config::parse,
    duties::{BODY_VERSION, Class, DutyMessage, SyncMessage},
    grpc::{Listener, server},
};
use tabularium_proto::{
    coordinator::duty_service_server::DutyServiceServer,
    gitaly::{ref_service_server::RefServiceServer, repository_service_server::RepositoryServiceServer},
};
use tabularium_replicator::{Running, config::ReplicatorConfig, start};
use tabularium_testkit::nats::Nats;
use uuid::Uuid;

use crate::{bus::Bus, coordinator::Coordinator, node::Node, site::Site};

/// Longest any condition is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !condition().await {
        assert!(tokio::time::Instant::now() < end, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Everything around a replicator.
pub(crate) struct World {
    pub(crate) nats: Nats,
    pub(crate) bus: Bus,
    pub(crate) coordinator: Coordinator,
    pub(crate) node: Node,
    pub(crate) site: Site,
    directory: tempfile::TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        let nats = Nats::start_own().await;
        let directory = tempfile::tempdir().unwrap();
        for (file, secret) in [("hook", "hook-secret"), ("home", "home-secret"), ("node", "node-secret")] {
            std::fs::write(directory.path().join(file), secret).unwrap();
        }
        Self {
            bus: Bus::connect(nats.url()).await,
            nats,
            coordinator: Coordinator::start().await,
            node: Node::start().await,
            site: Site::start().await,
            directory,
        }
    }

    pub(crate) fn config(&self) -> ReplicatorConfig {
        parse(std::path::Path::new("test.toml"), &self.config_text()).unwrap()
    }

    /// A directory of this world's own.
    pub(crate) fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    pub(crate) fn config_text(&self) -> String {
        let file = |name: &str| self.directory.path().join(name).display().to_string();
        format!(
            "admin_listen = '127.0.0.1:0'\n\
             coordinators = ['{coordinator}']\n\
             nats_url = '{nats}'\n\
             node_token_file = '{node_token}'\n\
             router = '{node}'\n\
             router_token_file = '{node_token}'\n\
             concurrency = {{ replication = 2, cleanup = 1, geo_notify = 1, geo_sync = 2 }}\n\
             drain_seconds = 10\n\
             [[subscriber]]\nname = 'oslo'\nhook_url = '{site}/api/v4/geo/receive_events'\nhook_token_file = '{hook}'\n\
             [[home_site]]\nname = 'rome'\nurl = '{site}'\ntoken_file = '{home}'\n",
            coordinator = self.coordinator.address,
            nats = self.nats.url(),
            node = self.node.address,
            node_token = file("node"),
            site = self.site.url,
            hook = file("hook"),
            home = file("home"),
        )
    }

    pub(crate) async fn replicator(&self) -> Running {
        start(self.config()).await.unwrap()
    }

    /// Publishes the doorbell of a duty.
    pub(crate) async fn ring(&self, class: Class, duty: Uuid) {
        let body = serde_json::to_vec(&DutyMessage { version: BODY_VERSION, duty_id: duty }).unwrap();
        self.bus.publish(class, body).await;
    }

    /// Publishes an event of a home site.
    pub(crate) async fn event(&self, event: &SyncMessage) {
        self.bus.publish(Class::GeoSync, serde_json::to_vec(event).unwrap()).await;
    }

    pub(crate) async fn settled(&self, class: Class) {
        until("the message is settled", || async { self.bus.messages(class).await == 0 }).await;
    }
}

/// A metric's line, or the endpoint's answer, from the admin listener.
pub(crate) async fn admin(running: &Running, path: &str) -> (u16, String) {
    crate::site::get_text(&format!("http://{}{path}", running.admin_address().unwrap())).await
}

/// Serves stand-ins until the test ends; answers the address.
pub(crate) async fn serve_coordinator(
    service: impl tabularium_proto::coordinator::duty_service_server::DutyService,
) -> String {
    let listener = Listener::bind(&listen_address()).await.unwrap();
    let address = listener.address().unwrap().to_string();
    let serving =
        server().add_service(DutyServiceServer::new(service)).serve_with_incoming(listener.connections());
    tabularium_common::lifecycle::Tasks::new().spawn("coordinator", serving);
    address
}

/// As [`serve_coordinator`], for the services of a node.
pub(crate) async fn serve_node<N>(node: N) -> String
where
    N: tabularium_proto::gitaly::repository_service_server::RepositoryService
        + tabularium_proto::gitaly::ref_service_server::RefService
        + Clone,
{
    let listener = Listener::bind(&listen_address()).await.unwrap();
    let address = listener.address().unwrap().to_string();
    let serving = server()
        .add_service(RepositoryServiceServer::new(node.clone()))
        .add_service(RefServiceServer::new(node))
        .serve_with_incoming(listener.connections());
    tabularium_common::lifecycle::Tasks::new().spawn("node", serving);
    address
}

fn listen_address() -> tabularium_common::grpc::ListenAddress {
    tabularium_common::grpc::ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())
}
