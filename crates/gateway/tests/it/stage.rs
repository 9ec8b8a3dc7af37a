//! One gateway before one stand-in cluster, in a directory of its own.

use std::{path::PathBuf, time::Duration};

use tabularium_common::{config, grpc::Address, lifecycle::Tasks};
use tabularium_gateway::{Running, config::Config, start};
use tempfile::TempDir;

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
}
