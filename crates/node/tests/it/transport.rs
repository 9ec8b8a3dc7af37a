//! Real git clients push to the node and clone from it; broken ones leave nothing behind.

use std::{fs, path::Path, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use sha1::{Digest as _, Sha1};
use tabularium_proto::{
    gitaly::{
        FsckRequest, InfoRefsRequest, OptimizeRepositoryRequest, PostReceivePackRequest,
        optimize_repository_request::Strategy, smart_http_service_client::SmartHttpServiceClient,
    },
    node::{UploadPackRequest, upload_pack_service_client::UploadPackServiceClient},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::{
    bridge,
    harness::{TestNode, eventually, git, git_async, git_command},
};

/// A work tree with one commit that holds a file of `size` bytes which do not compress.
pub(crate) fn work_tree(size: usize) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    git(directory.path(), &["init", "--quiet", "--initial-branch=main", "."]);
    let mut content = Vec::with_capacity(size);
    let mut block = Sha1::digest(b"seed");
    while content.len() < size {
        content.extend_from_slice(&block);
        block = Sha1::digest(block);
    }
    fs::write(directory.path().join("file"), content).unwrap();
    git(directory.path(), &["add", "file"]);
    git(directory.path(), &["commit", "--quiet", "-m", "first"]);
    directory
}

/// The checksum as the wire reference describes it, from what git on the disk says.
fn expected_checksum(repository: &Path) -> String {
    let mut sum = [0_u8; 20];
    for line in git(repository, &["show-ref", "--head"]).lines() {
        for (sum, byte) in sum.iter_mut().zip(Sha1::digest(line)) {
            *sum ^= byte;
        }
    }
    let first = sum.iter().position(|byte| *byte != 0).unwrap();
    hex::encode(&sum[first..])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_is_cloned() {
    let node = TestNode::start().await;
    let repository = node.create("a.git").await;
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    let work = work_tree(3_000_000);
    git(work.path(), &["tag", "v1"]);
    git_async(work.path(), &["push", "--quiet", &url, "main", "v1"]).await;
    assert_eq!(node.checksum(&repository).await, expected_checksum(&node.path("a.git")));

    for version in ["0", "2"] {
        let clone = tempfile::tempdir().unwrap();
        let protocol = format!("protocol.version={version}");
        git_async(clone.path(), &["-c", &protocol, "clone", "--quiet", &url, "copy"]).await;
        let copied = fs::read(clone.path().join("copy/file")).unwrap();
        assert!(copied == fs::read(work.path().join("file")).unwrap(), "version {version}");
        let shallow = ["-c", &protocol, "clone", "--quiet", "--depth=1", &url, "shallow"];
        git_async(clone.path(), &shallow).await;
        assert!(clone.path().join("shallow/.git/shallow").exists());
    }

    let fsck = FsckRequest { repository: Some(repository.clone()), ..Default::default() };
    let fsck = node.repositories().fsck(fsck).await.unwrap().into_inner();
    assert_eq!(String::from_utf8_lossy(&fsck.error), "");
    let optimise =
        OptimizeRepositoryRequest { repository: Some(repository.clone()), strategy: Strategy::Eager.into() };
    node.repositories().optimize_repository(optimise).await.unwrap();
    let packs = fs::read_dir(node.path("a.git/objects/pack")).unwrap().flatten();
    assert_eq!(packs.filter(|entry| entry.path().extension().is_some_and(|e| e == "pack")).count(), 1);
    assert!(node.path("a.git/packed-refs").exists());
    assert_eq!(node.checksum(&repository).await, expected_checksum(&node.path("a.git")));

    git_async(work.path(), &["push", "--quiet", &url, ":refs/tags/v1"]).await;
    assert_eq!(git(&node.path("a.git"), &["tag"]), "");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_git_rejects_is_told_in_the_data() {
    let node = TestNode::start().await;
    node.create("a.git").await;
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    let work = work_tree(1000);
    let directory = work.path().to_owned();
    let pushed = tokio::task::spawn_blocking(move || {
        git_command(&directory).args(["push", &url, "main:refs/keep-around/1"]).output().unwrap()
    });
    let output = pushed.await.unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("deny updating a hidden ref"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn custom_hooks_decide_about_pushes() {
    use std::os::unix::fs::PermissionsExt as _;
    let node = TestNode::start().await;
    node.create("a.git").await;
    let path = node.path("a.git");
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    let work = work_tree(1000);
    fs::create_dir_all(path.join("custom_hooks/pre-receive.d")).unwrap();
    let hook = |name: &str, script: &str| {
        let file = path.join("custom_hooks").join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    };
    hook("pre-receive", "cat > seen-first; echo $GL_ID > seen-id");
    hook("pre-receive.d/10-check", "grep -v refs/heads/bad || { echo never bad >&2; exit 3; }");
    hook("update", "echo $1 >> seen-update");
    hook("post-receive", "cat > seen-last");
    fs::write(path.join("custom_hooks/pre-receive.d/20-off"), "#!/bin/sh\nexit 1\n").unwrap();
    let push = async |branch: &str| {
        let (directory, url, refspec) = (work.path().to_owned(), url.clone(), format!("main:{branch}"));
        let run = move || git_command(&directory).args(["push", &url, &refspec]).output().unwrap();
        let output = tokio::task::spawn_blocking(run).await.unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (accepted, stderr) = push("refs/heads/good").await;
    assert!(accepted, "{stderr}");
    assert_eq!(fs::read_to_string(path.join("seen-id")).unwrap(), "user-1\n");
    assert_eq!(fs::read_to_string(path.join("seen-update")).unwrap(), "refs/heads/good\n");
    let (first, last) =
        (fs::read_to_string(path.join("seen-first")), fs::read_to_string(path.join("seen-last")));
    assert_eq!(first.unwrap(), last.unwrap());
    let (accepted, stderr) = push("refs/heads/bad").await;
    assert!(!accepted && stderr.contains("never bad") && stderr.contains("hook declined"), "{stderr}");
    assert_eq!(git(&path, &["for-each-ref", "--format=%(refname)"]), "refs/heads/good");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_cuts_off_what_does_not_end() {
    let node = TestNode::start_draining("default", 1).await;
    node.create("a.git").await;
    let path = node.path("a.git");
    let (_sender, _stream) = begin_push(&node, "a.git").await;
    let late = node.stop_keeping_files().await;
    assert!(late.result.is_err(), "the push was running");
    eventually("git is gone", async || processes(&path).is_empty()).await;
}

#[tokio::test]
async fn an_advertisement_starts_with_its_service() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    git(&node.path("a.git"), &["update-ref", "refs/keep-around/1", "refs/heads/main"]);
    let mut client = SmartHttpServiceClient::new(node.channel());
    let mut collect = async |options: Vec<String>, protocol: &str| {
        let request = InfoRefsRequest {
            repository: Some(repository.clone()),
            git_config_options: options,
            git_protocol: protocol.to_owned(),
        };
        let mut stream = client.info_refs_upload_pack(request).await?.into_inner();
        let mut collected = Vec::new();
        while let Some(message) = stream.message().await? {
            collected.extend_from_slice(&message.data);
        }
        Ok::<_, tonic::Status>(String::from_utf8_lossy(&collected).into_owned())
    };
    let plain = collect(vec![], "").await.unwrap();
    assert!(plain.starts_with("001e# service=git-upload-pack\n0000"), "{plain}");
    assert!(plain.contains("refs/heads/main") && !plain.contains("keep-around"), "{plain}");
    let all = collect(vec!["transfer.hideRefs=!refs".to_owned()], "").await.unwrap();
    assert!(all.contains("refs/keep-around/1"), "{all}");
    let newest = collect(vec![], "version=2").await.unwrap();
    assert!(newest.starts_with("001e# service=git-upload-pack\n0000000eversion 2\n"), "{newest}");
    let hook = collect(vec!["uploadpack.packObjectsHook=/bin/false".to_owned()], "").await.unwrap_err();
    assert_eq!(hook.code(), Code::InvalidArgument);
}

fn first(node: &TestNode, path: &str) -> PostReceivePackRequest {
    PostReceivePackRequest {
        repository: Some(node.named(path)),
        gl_id: "user-1".into(),
        ..PostReceivePackRequest::default()
    }
}

async fn receive(node: &TestNode, requests: Vec<PostReceivePackRequest>) -> Result<Vec<u8>, tonic::Status> {
    let mut client = SmartHttpServiceClient::new(node.channel());
    let mut stream = client.post_receive_pack(tokio_stream::iter(requests)).await?.into_inner();
    let mut collected = Vec::new();
    while let Some(message) = stream.message().await? {
        collected.extend_from_slice(&message.data);
    }
    Ok(collected)
}

#[tokio::test]
async fn malformed_pushes_are_refused() {
    let node = TestNode::start().await;
    node.create("a.git").await;
    let good = first(&node, "a.git");
    let data = |data: &'static [u8]| PostReceivePackRequest { data: data.into(), ..Default::default() };
    let nobody = PostReceivePackRequest { gl_id: String::new(), ..good.clone() };
    let eager = PostReceivePackRequest { data: "x".into(), ..good.clone() };
    for (requests, code, text) in [
        (vec![nobody], Code::InvalidArgument, "empty GlId"),
        (vec![eager], Code::InvalidArgument, "non-empty Data"),
        (vec![first(&node, "none.git")], Code::NotFound, "repository not found"),
        (
            vec![good.clone(), data(b"GET / HTTP/1.1\r\n")],
            Code::FailedPrecondition,
            "waiting for receive-pack: exit status 128",
        ),
        (
            vec![good.clone(), data(b"ffff")],
            Code::FailedPrecondition,
            "waiting for receive-pack: exit status 128",
        ),
        (
            vec![good.clone(), data(b"0003")],
            Code::FailedPrecondition,
            "waiting for receive-pack: exit status 128",
        ),
    ] {
        let status = receive(&node, requests).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, text));
    }
    let zeros = "0".repeat(40);
    let bad = format!("{zeros} {} refs/heads/../x\0 report-status\n", "1".repeat(40));
    let line = format!("{:04x}{bad}0000", bad.len() + 4);
    let message = PostReceivePackRequest { data: line.into(), ..Default::default() };
    // Without a pack git ends early; whatever it says, nothing is created.
    let _ = receive(&node, vec![good, message]).await;
    assert_eq!(git(&node.path("a.git"), &["for-each-ref"]), "");

    let garbage = UploadPackRequest {
        repository: Some(node.named("a.git")),
        stateless_rpc: true,
        data: Bytes::from_static(b"zzzz"),
        ..UploadPackRequest::default()
    };
    let mut client = UploadPackServiceClient::new(node.channel());
    let mut stream = client.upload_pack(tokio_stream::iter([garbage])).await.unwrap().into_inner();
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("garbage was taken"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().starts_with("running upload-pack: exit status 128"), "{status}");
}

/// Ids of processes whose command line names `path`.
pub(crate) fn processes(path: &Path) -> Vec<u32> {
    let needle = path.to_str().unwrap().as_bytes().to_vec();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|id| {
            let command = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            command.windows(needle.len()).any(|window| window == needle)
        })
        .collect()
}

pub(crate) fn leftovers(repository: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![repository.to_owned()];
    while let Some(directory) = directories.pop() {
        // What is being removed meanwhile is not left.
        let Ok(entries) = fs::read_dir(&directory) else {
            assert!(!directory.exists(), "{}", directory.display());
            continue;
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.path().extension().is_some_and(|extension| extension == "lock")
                || name.starts_with("tmp_")
                || name.starts_with("incoming-")
            {
                found.push(name);
            } else if entry.path().is_dir() {
                directories.push(entry.path());
            }
        }
    }
    found
}

/// A push of one new branch whose pack is the beginning of a real one.
async fn begin_push(
    node: &TestNode,
    path: &str,
) -> (
    tokio::sync::mpsc::Sender<PostReceivePackRequest>,
    tonic::Streaming<tabularium_proto::gitaly::PostReceivePackResponse>,
) {
    let work = work_tree(2_000_000);
    let id = git(work.path(), &["rev-parse", "HEAD"]);
    let mut command = git_command(work.path());
    let packed = command
        .args(["-c", "pack.threads=1", "pack-objects", "--all", "--revs", "--stdout", "--quiet"])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert!(packed.stdout.len() > 1_000_000);
    let update = format!("{} {id} refs/heads/main\0 report-status side-band-64k\n", "0".repeat(40));
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    sender.send(first(node, path)).await.unwrap();
    let line = format!("{:04x}{update}0000", update.len() + 4);
    let mut client = SmartHttpServiceClient::new(node.channel());
    let send = async {
        let message = |data: Bytes| PostReceivePackRequest { data, ..Default::default() };
        sender.send(message(line.into())).await.unwrap();
        let half = Bytes::copy_from_slice(&packed.stdout[..packed.stdout.len() / 2]);
        for piece in half.chunks(100_000) {
            sender.send(message(Bytes::copy_from_slice(piece))).await.unwrap();
        }
    };
    let (stream, ()) = tokio::join!(client.post_receive_pack(ReceiverStream::new(receiver)), send);
    (sender, stream.unwrap().into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_leaves_nothing_behind() {
    let node = TestNode::start().await;
    node.create("a.git").await;
    let path = node.path("a.git");
    let (sender, stream) = begin_push(&node, "a.git").await;
    eventually("git unpacks into its quarantine", async || !leftovers(&path).is_empty()).await;
    let running = processes(&path);
    assert!(!running.is_empty());

    drop(stream);
    drop(sender);
    eventually("git is gone, reaped too", async || {
        processes(&path).is_empty() && running.iter().all(|id| !Path::new(&format!("/proc/{id}")).exists())
    })
    .await;
    eventually("nothing is left", async || leftovers(&path).is_empty()).await;
    eventually("every process was reaped", async || {
        node.metric("tabularium_node_git_processes_running").await == 0
    })
    .await;
    assert_eq!(git(&path, &["for-each-ref"]), "");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_that_hang_up_free_their_slots() {
    let node = TestNode::start().await;
    node.create("a.git").await;
    for _ in 0..3 {
        let mut pushes = Vec::new();
        for _ in 0..8 {
            pushes.push(begin_push(&node, "a.git").await);
        }
        drop(pushes);
    }
    let path = node.path("a.git");
    eventually("all are gone", async || {
        processes(&path).is_empty() && node.metric("tabularium_node_git_processes_running").await == 0
    })
    .await;
    eventually("nothing is left", async || leftovers(&path).is_empty()).await;
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    let work = work_tree(1000);
    git_async(work.path(), &["push", "--quiet", &url, "main"]).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_may_start_with_the_advertisement() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    sender.send(UploadPackRequest { repository: Some(repository), ..Default::default() }).await.unwrap();
    let mut client = UploadPackServiceClient::new(node.channel());
    let mut stream = client.upload_pack(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    let message =
        tokio::time::timeout(Duration::from_secs(10), stream.next()).await.unwrap().unwrap().unwrap();
    let text = format!("{message:?}");
    assert!(text.contains("refs/heads/main") || text.contains("HEAD"), "{text}");
    sender.send(UploadPackRequest { data: "0000".into(), ..Default::default() }).await.unwrap();
    drop(sender);
    while let Some(message) = stream.next().await {
        message.unwrap();
    }
}
