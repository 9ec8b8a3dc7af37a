//! The binary: exit codes, announcement, memory.

use std::time::Duration;

use tabularium_common::announce::Announcement;
use tokio::{
    io::AsyncReadExt as _,
    process::{Child, Command},
};

use crate::{clients::noise, stage::Stage};

const BINARY: &str = env!("CARGO_BIN_EXE_tabularium-gateway");
/// What a transfer of any size may add to an idle gateway.
const GROWTH_KIB: u64 = 64 * 1024;

struct Process {
    child: Child,
    announcement: Announcement,
}

impl Process {
    /// A gateway of its own process, before the stage's stand-in.
    async fn start(stage: &Stage) -> Self {
        let (config, announce) = (stage.path("process.toml"), stage.path("process.json"));
        std::fs::write(&config, &stage.config).unwrap();
        let child = Command::new(BINARY)
            .args(["--config", config.to_str().unwrap(), "--announce", announce.to_str().unwrap()])
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let wait = async {
            loop {
                if let Some(announcement) = Announcement::read(&announce).unwrap() {
                    return announcement;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let announcement = tokio::time::timeout(Duration::from_secs(30), wait).await.unwrap();
        Self { child, announcement }
    }

    fn url(&self) -> String {
        format!("http://{}", self.announcement.http.as_ref().unwrap())
    }

    /// Largest resident size so far.
    fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.announcement.pid)).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Ends it as a supervisor would; its log.
    async fn stop(mut self) -> String {
        let pid = rustix::process::Pid::from_raw(self.announcement.pid.try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).await.unwrap();
        assert_eq!(self.child.wait().await.unwrap().code(), Some(0), "{log}");
        log
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_flat_under_large_pushes_and_clones() {
    const BYTES: usize = 192 << 20;
    let stage = Stage::new().await;
    stage.git(&["init", "-q", "seed"]).await;
    stage.git(&["-C", "seed", "config", "core.compression", "0"]).await;
    std::fs::write(stage.path("seed/noise"), noise(BYTES)).unwrap();
    stage.git(&["-C", "seed", "add", "."]).await;
    stage.git(&["-C", "seed", "commit", "-q", "-m", "large"]).await;
    stage.empty("g/p.git").await;

    let gateway = Process::start(&stage).await;
    let url = format!("{}/g/p.git", gateway.url());
    stage.git(&["ls-remote", &url]).await;
    let idle = gateway.peak_kib();
    stage.git(&["-C", "seed", "push", "-q", &url, "HEAD:main"]).await;
    let pushed = gateway.peak_kib();
    stage.git(&["clone", "-q", "--bare", &url, "clone"]).await;
    let cloned = gateway.peak_kib();
    assert_eq!(
        stage.git(&["-C", "clone", "rev-parse", "main"]).await,
        stage.git(&["-C", "seed", "rev-parse", "HEAD"]).await
    );
    assert!(cloned - idle < GROWTH_KIB, "idle {idle} KiB, pushed {pushed} KiB, cloned {cloned} KiB");

    let answer =
        stage.git_command(&["ls-remote", &format!("{}/none", gateway.url())]).output().await.unwrap();
    assert!(!answer.status.success());
    let log = gateway.stop().await;
    let line = log
        .lines()
        .find(|line| line.contains("path=/g/p.git/git-receive-pack") && !line.contains("bytes_in=4 "))
        .unwrap();
    for field in
        ["method=POST", "service=\"git-receive-pack\"", "status=200", "outcome=\"complete\"", "elapsed_ms="]
    {
        assert!(line.contains(field), "{field}: {line}");
    }
    let bytes_in: usize = line.split("bytes_in=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(bytes_in > BYTES, "{line}");
    assert!(
        log.lines().any(|line| line.contains("path=/none/info/refs") && line.contains("status=404")),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_configuration_ends_with_78_and_says_why() {
    let stage = Stage::new().await;
    let config = stage.path("bad.toml");
    for (text, parts) in [
        (stage.config.replace("routers", "router"), ["router", "expected"]),
        (format!("max_requests = 0\n{}", stage.config), ["`max_requests` is `0`", "1 to 1000000"]),
    ] {
        std::fs::write(&config, text).unwrap();
        let output =
            Command::new(BINARY).args(["--check-config", "--config"]).arg(&config).output().await.unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{error}");
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    // A secret that is not there is a fault of the configuration, checked or run.
    std::fs::write(&config, format!("access_token_file = \"/no/such/secret\"\n{}", stage.config)).unwrap();
    for arguments in [&["--check-config"][..], &[]] {
        let output =
            Command::new(BINARY).args(arguments).arg("--config").arg(&config).output().await.unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(78) && error.contains("/no/such/secret"), "{error}");
    }
    std::fs::write(&config, &stage.config).unwrap();
    let output =
        Command::new(BINARY).args(["--check-config", "--config"]).arg(&config).output().await.unwrap();
    assert_eq!(output.status.code(), Some(0));
    // The port is taken: a failure of the run, not of the configuration.
    let taken = stage.config.replacen("127.0.0.1:0", &stage.host, 1);
    std::fs::write(&config, taken).unwrap();
    let output = Command::new(BINARY).arg("--config").arg(&config).output().await.unwrap();
    assert_eq!(output.status.code(), Some(70));
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_was_served() {
    let stage = Stage::new().await;
    stage.seed("g/p.git", 1, 0).await;
    stage.git(&["clone", "-q", &format!("{}/g/p.git", stage.url), "clone"]).await;
    let admin = stage.gateway.as_ref().unwrap().admin;
    let mut stream = tokio::net::TcpStream::connect(admin).await.unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut stream, request).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let served = "tabularium_gateway_requests_total{service=\"git-upload-pack\",status=\"200\"} 3";
    for line in [served, "tabularium_gateway_requests_running 0", "tabularium_gateway_sent_bytes_total"] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}
