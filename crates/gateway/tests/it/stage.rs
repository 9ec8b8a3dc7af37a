//! One gateway before one stand-in cluster, in a directory of its own.

use std::{path::PathBuf, time::Duration};

use tabularium_common::{config, grpc::Address, lifecycle::Tasks};
use tabularium_gateway::{Running, config::Config, start};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::fake::Fake;

pub(crate) struct Stage {
    pub(crate) fake: Fake,
    pub(crate) gateway: Option<Running>,
    /// `http://host:port`
    pub(crate) url: String,
    /// `host:port`
    pub(crate) host: String,
    pub(crate) directory: TempDir,
    /// What the gateway was configured with.
    pub(crate) config: String,
    _tasks: Tasks,
}

impl Stage {
    pub(crate) async fn new() -> Self {
        Self::with("", |address| format!("routers = [\"{address}\"]")).await
    }

    /// With more configuration.
    pub(crate) async fn configured(more: &str) -> Self {
        Self::with(more, |address| format!("routers = [\"{address}\"]")).await
    }

    pub(crate) async fn with(more: &str, routers: impl Fn(&Address) -> String) -> Self {
        Self::build(more, routers, false).await
    }

    /// Before a router that knows sidechannels.
    pub(crate) async fn multiplexed() -> Self {
        Self::multiplexed_with("").await
    }

    /// The same with more configuration.
    pub(crate) async fn multiplexed_with(more: &str) -> Self {
        Self::build(more, |address| format!("routers = [\"{address}\"]"), true).await
    }

    async fn build(more: &str, routers: impl Fn(&Address) -> String, multiplexed: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("storage")).unwrap();
        std::fs::write(directory.path().join("gitconfig"), "[user]\nname=t\nemail=t@example.com\n[init]\ndefaultBranch=main\n[protocol \"file\"]\nallow=always\n").unwrap();
        std::fs::write(directory.path().join("router.token"), "router secret").unwrap();
        let tasks = Tasks::new();
        let fake = Fake::new(&directory.path().join("storage"), tasks.clone());
        let address = if multiplexed {
            fake.serve_multiplexed(Some("router secret")).await
        } else {
            fake.serve(Some("router secret")).await
        };
        let token = directory.path().join("router.token");
        let text = format!(
            "listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n{}\ncoordinators = [\"{address}\"]\n\
             router_token_file = \"{1}\"\ncoordinator_token_file = \"{1}\"\ndrain_seconds = 10\n{more}\n",
            routers(&address),
            token.display(),
        );
        let config: Config = config::parse(&directory.path().join("gateway.toml"), &text).unwrap();
        let gateway = start(config).await.unwrap();
        let Address::Tcp(host) = gateway.http.clone() else { panic!("{}", gateway.http) };
        let url = format!("http://{host}");
        Self { fake, gateway: Some(gateway), url, host, directory, config: text, _tasks: tasks }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Waits until something that the stand-in saw is so.
    pub(crate) async fn until(&self, what: &str, so: impl Fn(&crate::fake::Seen) -> bool) {
        let wait = async {
            while !so(&self.fake.seen.lock().unwrap()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    /// A client goes away in the middle of a pack, and the call ends with it.
    pub(crate) async fn left_mid_pack(&self) {
        let tip = self.seed("g/p.git", 1, 48 * 1024 * 1024).await;
        let mut stream = TcpStream::connect(&self.host).await.unwrap();
        stream.write_all(fetch_everything("g/p.git", &tip).as_bytes()).await.unwrap();
        let mut start = vec![0; 200_000];
        stream.read_exact(&mut start).await.unwrap();
        assert!(start.starts_with(b"HTTP/1.1 200 OK\r\n"));
        assert_eq!(self.fake.seen.lock().unwrap().running, 1, "the pack is larger than all buffers");
        drop(stream);
        self.until("the call was cancelled", |seen| seen.abandoned == 1 && seen.running == 0).await;
    }
}

/// What git sends for a clone.
pub(crate) fn fetch_everything(path: &str, tip: &str) -> String {
    let body = format!("0032want {tip}\n00000009done\n");
    format!(
        "POST /{path}/git-upload-pack HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\
         Content-Type: application/x-git-upload-pack-request\r\n\r\n{body}",
        body.len()
    )
}

/// What git sends to hear of the references, in protocol version 2.
pub(crate) fn list_references(path: &str) -> String {
    let body = "0014command=ls-refs\n0000";
    format!(
        "POST /{path}/git-upload-pack HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\nGit-Protocol: version=2\r\n\
         Content-Type: application/x-git-upload-pack-request\r\n\r\n{body}",
        body.len()
    )
}
