//! The program: its arguments, its exit codes, and how it stops.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tabularium_common::announce::Announcement;

use crate::harness::eventually;

const PROGRAM: &str = env!("CARGO_BIN_EXE_tabularium-node");

fn config(directory: &Path, storage: &Path) -> std::path::PathBuf {
    let path = directory.join("node.toml");
    let text = format!(
        "listen = \"unix:{}\"\nadmin_listen = \"127.0.0.1:0\"\n[[storage]]\nname = \"a\"\npath = \"{}\"\n",
        directory.join("node.sock").display(),
        storage.display()
    );
    fs::write(&path, text).unwrap();
    path
}

fn wait(mut child: Child) -> Option<i32> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(began.elapsed() < Duration::from_secs(20), "the program does not end");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[tokio::test]
async fn it_announces_serves_and_stops_when_told_to() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path(), directory.path());
    let announce = directory.path().join("announce.json");
    let start = || {
        let mut command = Command::new(PROGRAM);
        command.arg("--config").arg(&config).arg("--announce").arg(&announce);
        command.stderr(Stdio::null()).spawn().unwrap()
    };
    let child = start();
    eventually("announced", async || Announcement::read(&announce).unwrap().is_some()).await;
    let announced = Announcement::read(&announce).unwrap().unwrap();
    assert_eq!(announced.pid, child.id());
    assert!(announced.grpc.unwrap().starts_with("unix:"));
    let admin = announced.admin.unwrap();
    eventually("ready", async || {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(&admin).await.unwrap();
        stream.write_all(b"GET /ready HTTP/1.0\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text.starts_with("HTTP/1.0 200")
    })
    .await;
    let second = start();
    assert_eq!(wait(second), Some(70), "the storage is taken");
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), Signal::TERM).unwrap();
    assert_eq!(wait(child), Some(0));
}

#[test]
fn a_bad_configuration_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("not-mounted");
    let path = config(directory.path(), &missing);
    let output = Command::new(PROGRAM).arg("--check-config").arg("--config").arg(&path).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("storage.path of a") && stderr.contains("not-mounted"), "{stderr}");
    let good = config(directory.path(), directory.path());
    let output = Command::new(PROGRAM).arg("--check-config").arg("--config").arg(good).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let output = Command::new(PROGRAM).arg("fetch-proxy").output().unwrap();
    assert_eq!(output.status.code(), Some(128));
}
