//! Fetches whose bytes go beside the call.

use tonic::Status;

use crate::stage::{Stage, fetch_everything, list_references};

const BESIDE: &str = "PostUploadPackWithSidechannel";

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_takes_a_sidechannel_where_there_is_one() {
    let stage = Stage::multiplexed().await;
    let tip = stage.seed("g/p.git", 3, 3_000_000).await;
    let url = format!("{}/g/p.git", stage.url);
    for version in ["0", "1", "2"] {
        let (target, option) = (format!("clone-{version}"), format!("protocol.version={version}"));
        stage.git(&["-c", &option, "clone", "-q", &url, &target]).await;
        assert_eq!(stage.git(&["-C", &target, "rev-parse", "HEAD"]).await, tip);
        stage.git(&["-C", &target, "fsck", "--strict"]).await;
        let shallow = format!("shallow-{version}");
        stage.git(&["-c", &option, "clone", "-q", "--depth", "1", &url, &shallow]).await;
        assert_eq!(stage.git(&["-C", &shallow, "rev-list", "--count", "HEAD"]).await, "1");
        let expected = if version == "0" { String::new() } else { format!("version={version}") };
        let said = stage.fake.last(BESIDE);
        assert_eq!((&said["git_protocol"], said["relative_path"].as_str()), (&expected, "g/p.git"));
        assert_eq!(said["x-gitlab-client-name"], "tabularium-gateway");
        assert!(!said.contains_key("grpc-timeout"), "a long clone has no deadline");
    }
    let asking = "http.extraHeader=X-Tabularium-At-Least-Generation: 39";
    stage.git(&["-c", asking, "clone", "-q", &url, "asking"]).await;
    assert_eq!(stage.fake.last(BESIDE)["tabularium-at-least-generation"], "39");

    // A router says first how new the repository is; one that does not know how says nothing of it.
    let request = fetch_everything("g/p.git", &tip);
    let told = |answer: &str| answer.contains("x-tabularium-generation: 41\r\n");
    assert!(told(&stage.raw(request.as_bytes()).await.head));
    let silent = Status::unimplemented("an older router");
    stage.fake.failures.lock().unwrap().insert("PostUploadPackWithSidechannel:silent", silent);
    assert!(!told(&stage.raw(request.as_bytes()).await.head));
    stage.git(&["clone", "-q", &url, "from-an-older-one"]).await;
    assert_eq!(stage.git(&["-C", "from-an-older-one", "rev-parse", "HEAD"]).await, tip);
    assert_eq!(stage.fake.count("UploadPack"), 0);
    stage.until("no git is left", |seen| seen.running == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_mid_pack_stops_git() {
    Stage::multiplexed().await.left_mid_pack().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_told_as_they_are_without_one() {
    let stage = Stage::multiplexed_with("hold_answers = \"0s\"").await;
    stage.seed("g/p.git", 1, 2 * 1024 * 1024).await;
    let fail = |name: &'static str, status: Status| {
        let mut failures = stage.fake.failures.lock().unwrap();
        failures.clear();
        failures.insert(name, status);
    };
    let url = format!("{}/g/p.git", stage.url);
    fail(BESIDE, Status::failed_precondition("repository not valid"));
    let said = stage.try_git(&["clone", "-q", &url, "refused"]).await;
    assert!(!said.ok && said.err.contains("remote error: repository not valid"), "{}", said.err);

    fail("PostUploadPackWithSidechannel:mid", Status::unavailable("node died"));
    let answer = stage.bytes(list_references("g/p.git").as_bytes()).await;
    assert!(!answer.ends_with(b"0\r\n\r\n"), "{}", String::from_utf8_lossy(&answer));
    stage.until("no git is left", |seen| seen.running == 0).await;
    assert_eq!(stage.fake.count("UploadPack"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_has_none_is_asked_in_messages_and_not_asked_again() {
    let stage = Stage::multiplexed().await;
    let tip = stage.seed("g/p.git", 2, 0).await;
    stage.fake.failures.lock().unwrap().insert(BESIDE, Status::unimplemented("unknown method"));
    let url = format!("{}/g/p.git", stage.url);
    for target in ["one", "two"] {
        stage.git(&["clone", "-q", &url, target]).await;
        assert_eq!(stage.git(&["-C", target, "rev-parse", "HEAD"]).await, tip);
    }
    assert_eq!(stage.fake.count(BESIDE), 1);
    assert!(stage.fake.count("UploadPack") >= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_knows_no_such_connections_is_asked_in_messages() {
    let stage = Stage::new().await;
    let tip = stage.seed("g/p.git", 2, 0).await;
    stage.git(&["clone", "-q", &format!("{}/g/p.git", stage.url), "clone"]).await;
    assert_eq!(stage.git(&["-C", "clone", "rev-parse", "HEAD"]).await, tip);
    assert_eq!((stage.fake.count(BESIDE), stage.fake.count("UploadPack") > 0), (0, true));
}
