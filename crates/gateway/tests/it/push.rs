use tokio::io::AsyncWriteExt as _;

use crate::{clients::noise, stage::Stage};

#[tokio::test(flavor = "multi_thread")]
async fn pushes_small_large_and_chunked_arrive() {
    let stage = Stage::new().await;
    stage.seed("g/p.git", 1, 0).await;
    let url = format!("{}/g/p.git", stage.url);
    for (number, (bytes, buffer)) in
        [(10, "1m"), (40_000, "1024"), (3 << 20, "1m"), (3 << 20, "64m")].into_iter().enumerate()
    {
        std::fs::write(stage.path("seed/pushed"), noise(bytes + number)).unwrap();
        stage.git(&["-C", "seed", "add", "."]).await;
        stage.git(&["-C", "seed", "commit", "-q", "-m", "push"]).await;
        let option = format!("http.postBuffer={buffer}");
        // Unasked, git sends no credential: Basic alice:x by hand.
        let user = "http.extraHeader=Authorization: Basic YWxpY2U6eA==";
        stage.git(&["-C", "seed", "-c", &option, "-c", user, "push", "-q", &url, "HEAD:main"]).await;
        let bare = stage.fake.path("g/p.git");
        assert_eq!(
            stage.git(&["-C", bare.to_str().unwrap(), "rev-parse", "main"]).await,
            stage.git(&["-C", "seed", "rev-parse", "HEAD"]).await
        );
    }
    // Git's probes before chunked pushes reach no node.
    assert_eq!(stage.fake.count("PostReceivePack"), 4);
    let said = stage.fake.last("PostReceivePack");
    assert_eq!(said["gl_id"], "user-alice");
    assert_eq!(said["gl_username"], "alice");
    assert_eq!(said["gl_repository"], "project-g/p");
    stage.until("no git is left", |seen| seen.running == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn options_atomic_pushes_and_rejections() {
    let stage = Stage::new().await;
    stage.seed("g/p.git", 2, 0).await;
    let bare = stage.fake.path("g/p.git");
    let hook = bare.join("hooks/pre-receive");
    std::fs::write(&hook, "#!/bin/sh\necho \"options $GIT_PUSH_OPTION_COUNT $GIT_PUSH_OPTION_0\"\n").unwrap();
    std::fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let url = format!("{}/g/p.git", stage.url);
    let said = stage.try_git(&["-C", "seed", "push", "-o", "ci.skip", &url, "HEAD:refs/heads/a"]).await;
    assert!(said.ok && said.err.contains("remote: options 1 ci.skip"), "{}", said.err);

    // `a` may move on, `main` may not go back: together neither does.
    stage.git(&["-C", "seed", "commit", "-q", "--allow-empty", "-m", "on"]).await;
    for version in ["0", "2"] {
        let option = format!("protocol.version={version}");
        let said = stage
            .try_git(&["-C", "seed", "-c", &option, "push", "--atomic", &url, "HEAD:a", "HEAD~2:main"])
            .await;
        assert!(!said.ok && said.err.contains("atomic push failed"), "{}", said.err);
    }
    std::fs::write(&hook, "#!/bin/sh\necho not today >&2\nexit 1\n").unwrap();
    let said = stage.try_git(&["-C", "seed", "push", &url, "HEAD:a"]).await;
    assert!(!said.ok && said.err.contains("remote: not today"), "{}", said.err);
    assert!(said.err.contains("pre-receive hook declined"), "{}", said.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn gits_probe_is_answered_without_bothering_a_node() {
    let stage = Stage::new().await;
    stage.empty("g/p.git").await;
    for service in ["git-upload-pack", "git-receive-pack"] {
        let headers = format!("Content-Type: application/x-{service}-request\r\n");
        let answer = stage.http("POST", &format!("/g/p.git/{service}"), &headers, b"0000").await;
        assert_eq!((answer.status, answer.body.len()), (200, 0));
        assert!(answer.head.contains(&format!("content-type: application/x-{service}-result")));
    }
    assert_eq!(stage.fake.count("PostReceivePack") + stage.fake.count("UploadPack"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_breaks_off_changes_nothing_and_stops_git() {
    let stage = Stage::new().await;
    let tip = stage.seed("g/p.git", 1, 0).await;
    let head = "POST /g/p.git/git-receive-pack HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\
                Content-Type: application/x-git-receive-pack-request\r\n\r\n";
    // The whole command that deletes a branch, but not the flush packet after it.
    let line = format!("{tip} {} refs/heads/main\0 report-status delete-refs", "0".repeat(40));
    let packet = format!("{:04x}{line}", line.len() + 4);
    let mut stream = tokio::net::TcpStream::connect(&stage.host).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(format!("{:x}\r\n{packet}\r\n", packet.len()).as_bytes()).await.unwrap();
    stage.until("the push began", |seen| seen.running == 1).await;
    drop(stream);
    stage.until("the push was cancelled", |seen| seen.running == 0 && seen.abandoned == 1).await;
    let bare = stage.fake.path("g/p.git");
    assert_eq!(stage.git(&["-C", bare.to_str().unwrap(), "rev-parse", "main"]).await, tip);
}

#[tokio::test(flavor = "multi_thread")]
async fn expect_100_continue_is_obeyed() {
    use tokio::io::AsyncReadExt as _;
    let stage = Stage::new().await;
    stage.empty("g/p.git").await;
    let head = "POST /g/p.git/git-receive-pack HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\
                Expect: 100-continue\r\nContent-Type: application/x-git-receive-pack-request\r\n\r\n";
    let mut stream = tokio::net::TcpStream::connect(&stage.host).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut interim = [0; 25];
    stream.read_exact(&mut interim).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"0000").await.unwrap();
    let mut status = [0; 15];
    stream.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200 OK");
}
