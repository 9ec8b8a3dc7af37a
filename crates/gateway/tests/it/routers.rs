//! Routers that die, fall silent, or say that they have not begun.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tabularium_common::{
    grpc::{Address, NOT_BEGUN},
    lifecycle::Tasks,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tonic::Status;

use crate::stage::Stage;

const LS_REFS: &[u8] = b"0014command=ls-refs\n0000";

/// A way to a router on which a client can die.
struct Way {
    listener: TcpListener,
    address: String,
    deaths: Arc<AtomicUsize>,
    tasks: Tasks,
}

impl Way {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("tcp://{}", listener.local_addr().unwrap());
        Self { listener, address, deaths: Arc::default(), tasks: Tasks::new() }
    }

    /// Connections to `router` break as soon as a client has said `word`; what it said with it does not arrive.
    fn until(self, router: &Address, word: &'static str) -> (Arc<AtomicUsize>, Tasks) {
        let Self { listener, deaths, tasks, .. } = self;
        let (router, owner, seen) = (router.clone(), tasks.clone(), Arc::clone(&deaths));
        tasks.spawn("way", async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let mut server = router.connect().await.unwrap();
                let deaths = Arc::clone(&seen);
                owner.spawn("way", async move {
                    let (mut from_server, mut to_server) = tokio::io::split(&mut server);
                    let (mut from_client, mut to_client) = client.split();
                    let there = async {
                        let mut heard = Vec::new();
                        let mut passed = 0;
                        while from_client.read_buf(&mut heard).await.is_ok_and(|length| length > 0) {
                            if String::from_utf8_lossy(&heard).contains(word) {
                                deaths.fetch_add(1, Ordering::Relaxed);
                                return;
                            }
                            to_server.write_all(&heard[passed..]).await.unwrap();
                            passed = heard.len();
                        }
                    };
                    tokio::select! {
                        () = there => {}
                        _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
                    }
                });
            }
        });
        (deaths, tasks)
    }
}

/// A gateway before two ways to the same router, of which the first one breaks at `word`; how often it broke.
async fn stage(word: &'static str) -> (Stage, Arc<AtomicUsize>, Tasks) {
    let way = Way::new().await;
    let first = way.address.clone();
    let (router, given) = std::sync::mpsc::channel();
    let stage = Stage::with("", |address| {
        router.send(address.clone()).unwrap();
        format!("routers = [\"{first}\", \"{address}\"]")
    })
    .await;
    let (deaths, tasks) = way.until(&given.recv().unwrap(), word);
    (stage, deaths, tasks)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_dies_under_an_advertisement_is_passed_over() {
    for service in ["git-upload-pack", "git-receive-pack"] {
        let (stage, deaths, _tasks) = stage("g/p.git").await;
        stage.seed("g/p.git", 1, 0).await;
        let answer = stage.http("GET", &format!("/g/p.git/info/refs?service={service}"), "", b"").await;
        assert_eq!((answer.status, deaths.load(Ordering::Relaxed)), (200, 1), "{service}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_dies_under_a_fetch_is_passed_over_with_the_body_that_it_had_read() {
    let (stage, deaths, _tasks) = stage("ls-refs").await;
    let tip = stage.seed("g/p.git", 1, 0).await;
    let headers = "Content-Type: application/x-git-upload-pack-request\r\nGit-Protocol: version=2\r\n";
    let answer = stage.http("POST", "/g/p.git/git-upload-pack", headers, LS_REFS).await;
    assert_eq!((answer.status, deaths.load(Ordering::Relaxed)), (200, 1));
    assert!(String::from_utf8_lossy(&answer.body).contains(&tip));
    assert_eq!(stage.fake.seen.lock().unwrap().inputs, ["end"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_answer_that_breaks_off_is_asked_of_another_router() {
    let twice = |address: &Address| format!("routers = [\"{address}\", \"{address}\"]");
    let stage = Stage::with("hold_answers = \"10s\"", twice).await;
    let tip = stage.seed("g/p.git", 1, 0).await;
    stage.fake.failures.lock().unwrap().insert("UploadPack:mid:once", Status::unavailable("node died"));
    let headers = "Content-Type: application/x-git-upload-pack-request\r\nGit-Protocol: version=2\r\n";
    let answer = stage.http("POST", "/g/p.git/git-upload-pack", headers, LS_REFS).await;
    assert_eq!((answer.status, stage.fake.count("UploadPack")), (200, 2));
    assert!(String::from_utf8_lossy(&answer.body).contains(&tip));
    assert_eq!(answer.text().matches("refs/heads/main").count(), 1, "{answer:?}");
}

/// A push that deletes a branch, which needs no pack.
fn deletion(tip: &str) -> Vec<u8> {
    let line = format!("{tip} {} refs/heads/main\0 report-status delete-refs", "0".repeat(40));
    format!("{:04x}{line}0000", line.len() + 4).into_bytes()
}

const PUSH: &str = "Content-Type: application/x-git-receive-pack-request\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_push_whose_router_died_is_not_made_twice() {
    let (stage, deaths, _tasks) = stage("refs/heads/main").await;
    let tip = stage.seed("g/p.git", 1, 0).await;
    let answer = stage.http("POST", "/g/p.git/git-receive-pack", PUSH, &deletion(&tip)).await;
    assert_eq!((answer.status, deaths.load(Ordering::Relaxed)), (503, 1), "{answer:?}");
    assert!(answer.head.contains("retry-after: 1"), "{}", answer.head);
    assert!(answer.text().contains("broke in the midst of the push, which may have been made"), "{answer:?}");
    assert!(!stage.fake.seen.lock().unwrap().inputs.contains(&"end".to_owned()));
    let bare = stage.fake.path("g/p.git");
    assert_eq!(stage.git(&["-C", bare.to_str().unwrap(), "rev-parse", "main"]).await, tip);
}

#[tokio::test(flavor = "multi_thread")]
async fn git_says_that_the_service_is_unavailable_when_a_router_died_under_its_push() {
    let (stage, deaths, _tasks) = stage("refs/heads/topic").await;
    stage.seed("g/p.git", 1, 0).await;
    let url = format!("{}/g/p.git", stage.url);
    // Routers take turns: this one and the push itself are for the first, the advertisement between them for the second.
    stage.http("GET", "/g/p.git/info/refs?service=git-upload-pack", "", b"").await;
    let said = stage.try_git(&["-C", "seed", "push", &url, "HEAD:refs/heads/topic"]).await;
    assert_eq!(deaths.load(Ordering::Relaxed), 1);
    assert!(!said.ok && said.err.contains("HTTP 503"), "{}", said.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_a_router_has_not_begun_goes_to_another_one() {
    let stage = Stage::with("", |address| format!("routers = [\"{address}\", \"{address}\"]")).await;
    let tip = stage.seed("g/p.git", 1, 0).await;
    for (has_begun, status, calls) in [(true, 503, 1), (false, 200, 3)] {
        let mut refusal = Status::unavailable("not now");
        if !has_begun {
            refusal.metadata_mut().insert(NOT_BEGUN, "1".parse().unwrap());
        }
        stage.fake.failures.lock().unwrap().insert("PostReceivePack:once", refusal);
        let answer = stage.http("POST", "/g/p.git/git-receive-pack", PUSH, &deletion(&tip)).await;
        assert_eq!((answer.status, stage.fake.count("PostReceivePack")), (status, calls));
    }
    stage.until("the push was read to its end", |seen| seen.inputs == ["end"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_says_nothing_is_given_up_and_then_left_alone() {
    // The kernel accepts, and nobody ever reads.
    let way = Way::new().await;
    let stage = Stage::with("", |address| format!("routers = [\"{}\", \"{address}\"]", way.address)).await;
    stage.seed("g/p.git", 1, 0).await;
    for patience in [10, 2, 2, 2] {
        let begun = Instant::now();
        let answer = stage.http("GET", "/g/p.git/info/refs?service=git-upload-pack", "", b"").await;
        assert_eq!(answer.status, 200);
        assert!(begun.elapsed() < Duration::from_secs(patience), "{:?}", begun.elapsed());
    }
}
