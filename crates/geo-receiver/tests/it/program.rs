//! The program itself: its arguments, its exit codes, its signals.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use tabularium_common::announce::Announcement;
use tabularium_testkit::nats::Nats;

use crate::support::{get, until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_tabularium-geo-receiver");

fn config(directory: &Path, nats: &str, extra: &str) -> std::path::PathBuf {
    std::fs::write(directory.join("token"), "hunter2").unwrap();
    let path = directory.join("config.toml");
    let text = format!(
        "listen = '127.0.0.1:0'\nadmin_listen = '127.0.0.1:0'\nnats_url = '{nats}'\n{extra}\
         [[home_site]]\nname = 'rome'\nhook_token_file = '{}'\n",
        directory.join("token").display()
    );
    std::fs::write(&path, text).unwrap();
    path
}

fn run(config: &Path, arguments: &[&str]) -> Output {
    Command::new(PROGRAM).arg("--config").arg(config).args(arguments).output().unwrap()
}

#[test]
fn a_bad_configuration_is_named_and_ends_with_78() {
    let directory = tempfile::tempdir().unwrap();
    let bad = config(directory.path(), "nats://127.0.0.1:1", "drain_second = 1\n");
    let output = run(&bad, &[]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("drain_second") && text.contains("expected"), "{text}");
    assert_eq!(run(&directory.path().join("absent.toml"), &[]).status.code(), Some(78));
}

#[test]
fn a_configuration_can_be_checked_alone() {
    let directory = tempfile::tempdir().unwrap();
    let good = config(directory.path(), "nats://127.0.0.1:1", "");
    assert_eq!(run(&good, &["--check-config"]).status.code(), Some(0));
    std::fs::write(directory.path().join("token"), "\n").unwrap();
    let output = run(&good, &["--check-config"]);
    assert_eq!(output.status.code(), Some(78), "an empty secret is no secret");
}

#[test]
fn a_port_that_is_taken_is_named_once() {
    let directory = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let path = config(directory.path(), "nats://127.0.0.1:1", "");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("127.0.0.1:0", &address, 1)).unwrap();
    let output = run(&path, &[]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(70), "{text}");
    assert!(text.contains(&format!("cannot listen on {address}")), "{text}");
    assert_eq!(text.matches("in use").count(), 1, "{text}");
}

#[tokio::test]
async fn it_says_where_it_listens_and_ends_in_order_when_told_to() {
    let nats = Nats::start().await;
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path(), nats.url(), "");
    let announce = directory.path().join("announce.json");
    let mut child = Command::new(PROGRAM)
        .arg("--config")
        .arg(&config)
        .arg("--announce")
        .arg(&announce)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("it announces itself", || async { Announcement::read(&announce).unwrap().is_some() }).await;
    let announcement = Announcement::read(&announce).unwrap().unwrap();
    assert_eq!(announcement.pid, child.id());
    let ready = format!("http://{}/ready", announcement.admin.unwrap());
    until("it is ready", || async { get(&ready).await.status == 200 }).await;
    let told = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(told.success());
    let status = tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
}
