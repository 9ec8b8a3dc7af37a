//! The same repository cloned through gateway, router and node, and through nginx with `git http-backend`.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tabularium_cli::local::{
    process::{Guarded, Launch, tail},
    service::Kind,
};
use tokio::process::Command;

use crate::{
    figures::{Bar, Figures, median},
    generated::{self, Content, Measured},
};

const RELATIVE_PATH: &str = "bench/clone.git";

/// Measures and prints.
pub(crate) async fn run(rounds: usize, mebibytes: u64) -> Result<Figures> {
    let directory = tempfile::Builder::new().prefix("tabularium-bench-").tempdir_in("/tmp")?;
    let source = directory.path().join("source.git");
    generated::repository(&source, mebibytes, Content::Text).await?;
    let measured = Measured::start(directory.path().join("cluster")).await?;
    let ours = measured.create_and_push(RELATIVE_PATH, &source).await?;
    measured.converged(RELATIVE_PATH).await?;
    measured.optimize(RELATIVE_PATH).await?;

    let details = measured.converged(RELATIVE_PATH).await?;
    let route = details.route.context("no route")?;
    let primary = measured
        .site
        .processes
        .iter()
        .find(|process| process.kind == Kind::Node && process.name.ends_with(&route.primary))
        .context("the primary's process")?;
    let storage = primary.storage.clone().context("the primary's storage")?;
    let nginx = Nginx::start(&directory.path().join("nginx"), &storage).await?;
    let theirs = format!("http://127.0.0.1:{}/{}", nginx.port, route.replica_path);

    // Once each, so that both start with the same caches.
    generated::clone_seconds(directory.path(), &ours).await?;
    generated::clone_seconds(directory.path(), &theirs).await?;
    let (mut our_seconds, mut their_seconds, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let (ours, theirs) = if round % 2 == 0 {
            let ours = generated::clone_seconds(directory.path(), &ours).await?;
            (ours, generated::clone_seconds(directory.path(), &theirs).await?)
        } else {
            let theirs = generated::clone_seconds(directory.path(), &theirs).await?;
            (generated::clone_seconds(directory.path(), &ours).await?, theirs)
        };
        our_seconds.push(ours);
        their_seconds.push(theirs);
        ratios.push(ours / theirs);
    }
    let mut figures = Figures::new();
    figures.print("clone.tabularium_seconds", median(our_seconds), Bar::Told);
    figures.print("clone.nginx_seconds", median(their_seconds), Bar::Told);
    figures.print("clone.wall_ratio", median(ratios), Bar::AtMost(1.10));
    drop(nginx);
    measured.cluster.stop().await?;
    Ok(figures)
}

/// nginx in front of `git http-backend`, the way its documentation shows it. Both have children of their own, which end
/// with them, and with this process however it ends.
struct Nginx {
    _processes: [Guarded; 2],
    port: u16,
}

impl Nginx {
    async fn start(directory: &Path, storage: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let fcgi = directory.join("fcgi.sock");
        let backend = git_http_backend().await?;
        // nginx is not able to choose a port. A bench runs alone, so one that was free a moment ago still is.
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let user = if fs::metadata("/proc/self")?.uid() == 0 { "user root;" } else { "" };
        let d = directory.display();
        let configuration = format!(
            "{user} daemon off; pid {d}/nginx.pid; error_log {d}/error.log warn; worker_processes 2;\n\
             events {{ worker_connections 64; }}\n\
             http {{ access_log off; client_body_temp_path {d}/body; fastcgi_temp_path {d}/fastcgi;\n\
             proxy_temp_path {d}/proxy; scgi_temp_path {d}/scgi; uwsgi_temp_path {d}/uwsgi;\n\
             sendfile on; tcp_nodelay on;\n\
             server {{ listen 127.0.0.1:{port}; client_max_body_size 0;\n\
             location / {{ fastcgi_pass unix:{fcgi}; include /etc/nginx/fastcgi_params;\n\
             fastcgi_param SCRIPT_FILENAME {backend}; fastcgi_param GIT_PROJECT_ROOT {storage};\n\
             fastcgi_param GIT_HTTP_EXPORT_ALL 1; fastcgi_param PATH_INFO $uri;\n\
             fastcgi_param HTTP_GIT_PROTOCOL $http_git_protocol; fastcgi_param GIT_PROTOCOL $http_git_protocol;\n\
             fastcgi_buffering off; }} }} }}\n",
            fcgi = fcgi.display(),
            backend = backend.display(),
            storage = storage.display(),
        );
        let file = directory.join("nginx.conf");
        fs::write(&file, configuration)?;
        let log = directory.join("servers.log");
        let mut wrap =
            Launch::new("fcgiwrap", &log).arg("-c4").arg("-s").arg(format!("unix:{}", fcgi.display()));
        wrap.environment = vec![("GIT_CONFIG_NOSYSTEM".into(), "1".into())];
        let mut nginx = Launch::new("nginx", &log).arg("-p").arg(directory).arg("-c").arg(&file);
        for launch in [&mut wrap, &mut nginx] {
            // Nobody waits for them when this process is gone.
            launch.stop_signal = Signal::KILL;
        }
        let mut processes = [wrap.start().context("fcgiwrap")?, nginx.start().context("nginx")?];
        let begun = Instant::now();
        while !fcgi.exists() || std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            for process in &mut processes {
                ensure!(process.try_wait()?.is_none(), "nginx or fcgiwrap ended: {}", tail(&log));
            }
            ensure!(begun.elapsed() < Duration::from_secs(10), "nginx did not start: {}", tail(&log));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Self { _processes: processes, port })
    }
}

async fn git_http_backend() -> Result<PathBuf> {
    let output = Command::new("git").arg("--exec-path").output().await?;
    let path = Path::new(String::from_utf8(output.stdout)?.trim()).join("git-http-backend");
    ensure!(path.exists(), "{} is missing", path.display());
    Ok(path)
}
