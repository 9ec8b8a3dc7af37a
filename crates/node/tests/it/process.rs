//! The program: its arguments, its exit codes, and how it stops.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tabularium_common::{
    announce::Announcement,
    grpc::{self, Address},
};
use tabularium_proto::gitaly::{
    CreateRepositoryRequest, Repository, repository_service_client::RepositoryServiceClient,
};
use tonic::service::interceptor::InterceptedService;

use crate::{
    bridge,
    harness::{Caller, eventually, git, git_async},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_tabularium-node");

/// An empty storage in the directory.
fn storage(directory: &Path) -> std::path::PathBuf {
    let storage = directory.join("storage");
    fs::create_dir_all(&storage).unwrap();
    storage
}

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
    let config = config(directory.path(), &storage(directory.path()));
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

/// The most memory the process has used, in MiB.
fn peak_memory(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

/// A file that does not compress.
fn write_noise(path: &Path, mebibytes: usize) {
    let mut file = std::io::BufWriter::new(fs::File::create(path).unwrap());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..mebibytes * 1024 * 1024 / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes()).unwrap();
    }
    file.flush().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_push_and_clone_do_not_grow_the_node() {
    const BOUND_MIB: u64 = 64;
    let mebibytes = std::env::var("TEST_PUSH_MIB").map_or(160, |text| text.parse().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path(), &storage(directory.path()));
    let announce = directory.path().join("announce.json");
    let mut command = Command::new(PROGRAM);
    command.arg("--config").arg(&config).arg("--announce").arg(&announce).stderr(Stdio::null());
    let child = command.spawn().unwrap();
    eventually("announced", async || Announcement::read(&announce).unwrap().is_some()).await;
    let address: Address = Announcement::read(&announce).unwrap().unwrap().grpc.unwrap().parse().unwrap();
    let client = InterceptedService::new(grpc::channel(&address), Caller::nobody());
    let repository =
        Repository { storage_name: "a".into(), relative_path: "a.git".into(), ..Repository::default() };
    let create = CreateRepositoryRequest { repository: Some(repository), ..Default::default() };
    RepositoryServiceClient::new(client.clone()).create_repository(create).await.unwrap();
    let url = format!("{}/a.git", bridge::serve_from(client, "a", None).await);

    let work = directory.path().join("work");
    fs::create_dir(&work).unwrap();
    git(&work, &["init", "--quiet", "-b", "main", "."]);
    write_noise(&work.join("noise"), mebibytes);
    for setting in [["core.compression", "0"], ["core.bigFileThreshold", "1m"]] {
        git(&work, &["config", setting[0], setting[1]]);
    }
    git_async(&work, &["add", "noise"]).await;
    git_async(&work, &["commit", "--quiet", "-m", "noise"]).await;
    git_async(&work, &["push", "--quiet", &url, "main"]).await;
    let pushed = peak_memory(child.id());
    assert!(pushed < BOUND_MIB, "{pushed} MiB after the push");
    git_async(directory.path(), &["clone", "--quiet", "--bare", &url, "copy"]).await;
    let cloned = peak_memory(child.id());
    assert!(cloned < BOUND_MIB, "{cloned} MiB after the clone");
    println!("pushed and cloned {mebibytes} MiB: peak {pushed} MiB, then {cloned} MiB");
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
    let good = config(directory.path(), &storage(directory.path()));
    let output = Command::new(PROGRAM).arg("--check-config").arg("--config").arg(good).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let output = Command::new(PROGRAM).arg("fetch-proxy").output().unwrap();
    assert_eq!(output.status.code(), Some(128));
}

/// Git keeps its side open until it has heard from us: whoever waits for both waits for ever.
#[tokio::test]
async fn a_fetch_whose_source_is_gone_ends_although_git_still_listens() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", gone.local_addr().unwrap());
    drop(gone);
    let mut proxy = tokio::process::Command::new(PROGRAM)
        .args(["fetch-proxy", "gitaly", "git-upload-pack '/internal.git'"])
        .env("TABULARIUM_FETCH_ADDRESS", address)
        .env("TABULARIUM_FETCH_REPOSITORY", "")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let git = proxy.stdin.take().unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), proxy.wait_with_output());
    let output = ended.await.expect("the end of the proxy").unwrap();
    assert_eq!(output.status.code(), Some(128));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.starts_with("fetch-proxy: "), "{said}");
    drop(git);
}
