//! One receiver, and a client that posts to it.

use std::{fmt::Write as _, time::Duration};

use async_nats::jetstream::{self, Context};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tabularium_common::{
    config::parse,
    duties::{Class, SyncMessage, read_body},
    grpc::Address,
};
use tabularium_geo_receiver::{Running, config::GeoReceiverConfig, start};
use tabularium_testkit::nats::Nats;

/// Longest any condition is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) async fn until<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !condition().await {
        assert!(tokio::time::Instant::now() < end, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) struct World {
    pub(crate) nats: Nats,
    pub(crate) receiver: Running,
    _directory: tempfile::TempDir,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::on(Nats::start_own().await).await
    }

    pub(crate) async fn on(nats: Nats) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut sites = String::new();
        for site in ["rome", "lima"] {
            let file = directory.path().join(site);
            std::fs::write(&file, format!("{site}-secret\n")).unwrap();
            sites += "[[home_site]]\n";
            writeln!(sites, "name = '{site}'\nhook_token_file = '{}'", file.display()).unwrap();
        }
        let text = format!(
            "listen = '127.0.0.1:0'\nadmin_listen = '127.0.0.1:0'\nnats_url = '{}'\nmax_body_bytes = 4096\n\
             max_concurrent_requests = 2\ndrain_seconds = 5\n{sites}",
            nats.url()
        );
        let config: GeoReceiverConfig = parse(std::path::Path::new("test.toml"), &text).unwrap();
        Self { receiver: start(config).await.unwrap(), nats, _directory: directory }
    }

    /// As [`World::new`], once the receiver has found the bus.
    pub(crate) async fn ready() -> Self {
        let world = Self::new().await;
        world.wait_ready(true).await;
        world
    }

    pub(crate) async fn wait_ready(&self, ready: bool) {
        let expected = if ready { 200 } else { 503 };
        until("readiness", || async { self.admin("/ready").await.status == expected }).await;
    }

    pub(crate) async fn admin(&self, path: &str) -> Answer {
        get(&format!("http://{}{path}", self.receiver.admin_address())).await
    }

    /// `host:port`.
    pub(crate) fn host(&self) -> &str {
        match self.receiver.http_address() {
            Address::Tcp(host) => host,
            other => panic!("{other}"),
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/api/v4/geo/receive_events", self.host())
    }

    /// Posts as GitLab does, with these headers beside or instead of the usual ones; an empty value leaves one out.
    pub(crate) async fn post(&self, headers: &[(&str, &str)], body: &str) -> Answer {
        let usual = [
            ("content-type", "application/json"),
            ("x-gitlab-event", "System Hook"),
            ("x-gitlab-token", "rome-secret"),
        ];
        let mut request = Request::post(self.url());
        for (name, value) in usual.iter().chain(headers) {
            let headers = request.headers_mut().unwrap();
            headers.insert(name.parse::<http::HeaderName>().unwrap(), value.parse().unwrap());
            if value.is_empty() {
                headers.remove(*name);
            }
        }
        send(request.body(Full::from(body.to_owned())).unwrap()).await
    }

    async fn bus(&self) -> Context {
        jetstream::new(async_nats::connect(self.nats.url()).await.unwrap())
    }

    /// What the stream holds.
    pub(crate) async fn events(&self) -> Vec<SyncMessage> {
        let bus = self.bus().await;
        let mut stream = bus.get_stream(Class::GeoSync.stream()).await.unwrap();
        let count = usize::try_from(stream.info().await.unwrap().state.messages).unwrap();
        let consumer = stream
            .get_or_create_consumer(Class::GeoSync.consumer(), Class::GeoSync.consumer_config(100))
            .await;
        let consumer = consumer.unwrap();
        let messages = consumer.stream().max_messages_per_batch(10).messages().await.unwrap().take(count);
        let bodies = messages.map(|message| read_body(&message.unwrap().payload).unwrap()).collect();
        let bodies = tokio::time::timeout(PATIENCE, bodies).await.unwrap();
        stream.delete_consumer(Class::GeoSync.consumer()).await.unwrap();
        bodies
    }
}

pub(crate) async fn get(url: &str) -> Answer {
    send(Request::get(url).body(Full::default()).unwrap()).await
}

async fn send(request: Request<Full<Bytes>>) -> Answer {
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let response = client.request(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    Answer { status: parts.status.as_u16(), headers: parts.headers, text }
}

/// A body as GitLab sends it.
pub(crate) fn update(path: &str) -> String {
    serde_json::json!({
        "event_name": "repository_update", "user_id": 77, "user_name": "Ada Voss", "user_email": "ada@foundry.test",
        "user_avatar": null, "project_id": 4117,
        "project": {"id": 4117, "name": "Kiln", "path_with_namespace": path, "default_branch": "main",
            "git_ssh_url": "git@elsewhere.test:x.git", "git_http_url": "https://elsewhere.test/x.git", "visibility_level": 10},
        "changes": [{"before": "0000000000000000000000000000000000000000",
            "after": "9a8b7c6d5e4f30211203948576a1b2c3d4e5f607", "ref": "refs/heads/main"}],
        "refs": ["refs/heads/main"],
    })
    .to_string()
}
