use tonic::Status;

use crate::stage::{Stage, list_references};

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_complete_in_every_protocol_version() {
    let stage = Stage::new().await;
    let tip = stage.seed("g/p.git", 3, 300_000).await;
    for version in ["0", "1", "2"] {
        for url in [format!("{}/g/p.git", stage.url), format!("{}/g/p", stage.url)] {
            let target = format!("clone-{version}-{}", url.len());
            let option = format!("protocol.version={version}");
            stage.git(&["-c", &option, "clone", "-q", &url, &target]).await;
            assert_eq!(stage.git(&["-C", &target, "rev-parse", "HEAD"]).await, tip);
            stage.git(&["-C", &target, "fsck", "--strict"]).await;
        }
        let expected = if version == "0" { String::new() } else { format!("version={version}") };
        let said = stage.fake.last("UploadPack");
        assert_eq!(
            (said["git_protocol"].as_str(), said["relative_path"].as_str()),
            (expected.as_str(), "g/p.git")
        );
        assert_eq!(said["x-gitlab-client-name"], "tabularium-gateway");
        assert!(!said.contains_key("grpc-timeout"), "a long clone has no deadline");
    }
    stage.until("no git is left", |seen| seen.running == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shallow_and_partial_clones_and_later_fetches() {
    let stage = Stage::new().await;
    stage.seed("g/p.git", 5, 0).await;
    let url = format!("{}/g/p.git", stage.url);
    for version in ["0", "2"] {
        let option = format!("protocol.version={version}");
        let shallow = format!("shallow-{version}");
        stage.git(&["-c", &option, "clone", "-q", "--depth", "1", &url, &shallow]).await;
        assert_eq!(stage.git(&["-C", &shallow, "rev-list", "--count", "HEAD"]).await, "1");
        stage.git(&["-C", &shallow, "-c", &option, "fetch", "-q", "--deepen", "2"]).await;
        assert_eq!(stage.git(&["-C", &shallow, "rev-list", "--count", "HEAD"]).await, "3");
        stage.git(&["-C", &shallow, "-c", &option, "fetch", "-q", "--unshallow"]).await;
        assert_eq!(stage.git(&["-C", &shallow, "rev-list", "--count", "HEAD"]).await, "5");

        let partial = format!("partial-{version}");
        stage
            .git(&["-c", &option, "clone", "-q", "--filter=blob:none", "--no-checkout", &url, &partial])
            .await;
        let missing = stage.git(&["-C", &partial, "rev-list", "--objects", "--missing=print", "--all"]).await;
        assert!(missing.lines().filter(|line| line.starts_with('?')).count() == 5, "{missing}");
        assert_eq!(stage.git(&["-C", &partial, "-c", &option, "show", "HEAD:file"]).await, "4");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ls_remote_and_fetch_with_compressed_negotiation() {
    let stage = Stage::new().await;
    let tip = stage.seed("g/p.git", 2, 0).await;
    let url = format!("{}/g/p.git", stage.url);
    assert!(stage.git(&["ls-remote", &url]).await.contains(&tip));
    stage.git(&["clone", "-q", &url, "work"]).await;
    let bare = stage.fake.path("g/p.git");
    for version in ["0", "2"] {
        // Many wants make a request large enough for git to compress it.
        for number in 0..30 {
            stage.git(&["-C", "seed", "commit", "-q", "--allow-empty", "-m", &format!("new {number}")]).await;
            stage.git(&["-C", "seed", "branch", &format!("v{version}-{number}")]).await;
        }
        stage.git(&["-C", "seed", "push", "-q", "--all", bare.to_str().unwrap()]).await;
        let option = format!("protocol.version={version}");
        let mut fetch = stage.git_command(&["-C", "work", "-c", &option, "fetch", "-q", "origin"]);
        let output = fetch.env("GIT_CURL_VERBOSE", "1").output().await.unwrap();
        let trace = String::from_utf8_lossy(&output.stderr).to_lowercase();
        assert!(output.status.success() && trace.contains("content-encoding: gzip"), "{trace}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_mid_pack_stops_git() {
    Stage::new().await.left_mid_pack().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_after_the_first_byte_breaks_the_connection() {
    let stage = Stage::configured("hold_answers = \"0s\"").await;
    stage.seed("g/p.git", 1, 2 * 1024 * 1024).await;
    stage.fake.failures.lock().unwrap().insert("UploadPack:mid", Status::unavailable("node died"));
    let url = format!("{}/g/p.git", stage.url);
    // A v2 clone begins with ls-refs, whose answer breaks off as well.
    for version in ["0", "2"] {
        let option = format!("protocol.version={version}");
        let said = stage.try_git(&["-c", &option, "clone", "-q", &url, "broken"]).await;
        assert!(!said.ok, "{}", said.err);
    }
    let answer = stage.bytes(list_references("g/p.git").as_bytes()).await;
    assert!(!answer.ends_with(b"0\r\n\r\n"), "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_before_the_first_byte_is_told_in_gits_own_protocol() {
    let stage = Stage::new().await;
    stage.seed("g/p.git", 1, 0).await;
    stage
        .fake
        .failures
        .lock()
        .unwrap()
        .insert("UploadPack", Status::failed_precondition("repository not valid"));
    let said = stage.try_git(&["clone", "-q", &format!("{}/g/p.git", stage.url), "x"]).await;
    assert!(!said.ok && said.err.contains("remote error: repository not valid"), "{}", said.err);

    stage.fake.failures.lock().unwrap().clear();
    let headers = "Content-Type: application/x-git-upload-pack-request\r\n";
    let answer = stage.http("POST", "/g/p.git/git-upload-pack", headers, b"this is not a pkt-line").await;
    assert_eq!(answer.status, 200);
    assert!(answer.text().contains("ERR internal error (request "), "{}", answer.text());
    stage.until("no git is left", |seen| seen.running == 0).await;
}
