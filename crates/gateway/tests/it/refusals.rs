use tonic::Status;

use crate::stage::Stage;

#[tokio::test(flavor = "multi_thread")]
async fn git_users_read_where_to_push_instead() {
    let stage = Stage::new().await;
    stage.seed("g/p.git", 1, 0).await;
    let home = ("berlin".to_owned(), "https://git.berlin.example/g/p.git".to_owned());
    stage.fake.mirrors.lock().unwrap().insert("g/p.git".to_owned(), home);
    let sentence = "repository is a mirror of berlin; push to https://git.berlin.example/g/p.git";
    let url = format!("{}/g/p.git", stage.url);
    let said = stage.try_git(&["-C", "seed", "push", &url, "HEAD:main"]).await;
    assert!(!said.ok && said.err.contains(&format!("remote: {sentence}")), "{}", said.err);
    stage.git(&["clone", "-q", &url, "read"]).await;

    let headers = "Content-Type: application/x-git-receive-pack-request\r\n";
    let answer = stage.http("POST", "/g/p.git/git-receive-pack", headers, b"0000").await;
    assert_eq!((answer.status, answer.text()), (403, format!("{sentence}\n")));
    assert!(answer.head.contains("content-type: text/plain"));
    assert_eq!(stage.fake.count("InfoRefsReceivePack") + stage.fake.count("PostReceivePack"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_coordinator_the_router_refuses_the_mirror() {
    let stage = Stage::new().await;
    stage.seed("g/p.git", 1, 0).await;
    let sentence = "repository is a mirror of berlin; push to https://git.berlin.example/g/p.git";
    let mut failures = std::collections::HashMap::new();
    failures.insert("GetRepository", Status::internal("no database"));
    failures.insert("PostReceivePack", Status::failed_precondition(format!("mutator call: {sentence}")));
    *stage.fake.failures.lock().unwrap() = failures;
    let headers = "Content-Type: application/x-git-receive-pack-request\r\n";
    let answer = stage.http("POST", "/g/p.git/git-receive-pack", headers, b"00000000").await;
    assert_eq!((answer.status, answer.text()), (403, format!("{sentence}\n")));
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_get_their_status_and_git_shows_the_text() {
    let stage = Stage::new().await;
    stage.seed("g/p.git", 1, 0).await;
    let url = format!("{}/g/p.git", stage.url);
    for (status, expected, text) in [
        (Status::permission_denied("not yours"), 403, "not yours"),
        (Status::unavailable("x"), 503, "the storage service is unavailable; try again"),
        (Status::resource_exhausted("maximum queue size reached"), 429, "maximum queue size reached"),
        (Status::internal("open /secret"), 500, "internal error (request "),
    ] {
        stage.fake.failures.lock().unwrap().insert("InfoRefsUploadPack", status);
        let answer = stage.http("GET", "/g/p/info/refs?service=git-upload-pack", "", b"").await;
        assert!(answer.status == expected && answer.text().contains(text), "{answer:?}");
        assert_eq!(answer.head.contains("retry-after: 1"), matches!(expected, 503 | 429), "{}", answer.head);
        let said = stage.try_git(&["ls-remote", &url]).await;
        assert!(!said.ok && said.err.contains(&format!("remote: {text}")), "{}", said.err);
        assert!(!said.err.contains("secret"));
    }
    stage.fake.failures.lock().unwrap().clear();
    let said = stage.try_git(&["clone", &format!("{}/no/such", stage.url), "x"]).await;
    assert!(said.err.contains("remote: repository 'no/such' not found"), "{}", said.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_token_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "s3cret\n").unwrap();
    let stage = Stage::configured(&format!("access_token_file = \"{}\"", file.display())).await;
    let tip = stage.seed("g/p.git", 1, 0).await;
    let url = |user: &str| format!("{}/g/p.git", stage.url).replace("http://", &format!("http://{user}@"));
    for target in ["/g/p/info/refs?service=git-upload-pack", "/api/v1/repositories", "/", "/../x"] {
        let answer = stage.http("GET", target, "Authorization: Bearer wrong\r\n", b"").await;
        assert_eq!(answer.status, 401, "{target}");
        assert!(answer.head.contains("www-authenticate: basic realm="), "{}", answer.head);
    }
    let said = stage.try_git(&["ls-remote", &url("alice:wrong")]).await;
    assert!(!said.ok && said.err.contains("Authentication failed"), "{}", said.err);
    assert!(stage.git(&["ls-remote", &url("alice:s3cret")]).await.contains(&tip));
    let bearer = "http.extraHeader=Authorization: Bearer s3cret";
    let plain = format!("{}/g/p.git", stage.url);
    assert!(stage.git(&["-c", bearer, "ls-remote", &plain]).await.contains(&tip));
    assert!(
        stage.fake.seen.lock().unwrap().calls.iter().all(|(_, said)| !format!("{said:?}").contains("s3cret"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_paths_services_and_types_are_refused() {
    let stage = Stage::new().await;
    stage.empty("g/p.git").await;
    let refs = "info/refs?service=git-upload-pack";
    for (method, target, expected, text) in [
        ("GET", format!("/../g/p.git/{refs}"), 400, "escapes"),
        ("GET", format!("/g/%2e%2e/%2E%2E/etc/{refs}"), 400, "escapes"),
        ("GET", format!("/g/p%00.git/{refs}"), 400, "control character"),
        ("GET", format!("/g/%ff.git/{refs}"), 400, "UTF-8"),
        ("GET", format!("/{}/{refs}", "x".repeat(5000)), 414, "longer than"),
        ("GET", "/g/p.git/info/refs".to_owned(), 403, "dumb"),
        ("GET", "/g/p.git/objects/info/packs".to_owned(), 403, "dumb"),
        ("GET", "/g/p.git/info/refs?service=git-upload-archive".to_owned(), 403, "git-upload-archive"),
        ("POST", format!("/g/p.git/{refs}"), 405, "GET"),
        ("GET", "/g/p.git/git-receive-pack".to_owned(), 405, "POST"),
        ("POST", "/g/p.git/git-receive-pack".to_owned(), 415, "application/x-git-receive-pack-request"),
        ("GET", "/".to_owned(), 404, "nothing"),
    ] {
        let answer = stage.http(method, &target, "", b"").await;
        assert_eq!(answer.status, expected, "{target} {answer:?}");
        assert!(answer.text().contains(text), "{target} {answer:?}");
    }
    let answer = stage.http("GET", &format!("/g/p.git/{refs}"), "Git-Protocol: $(id)\r\n", b"").await;
    assert_eq!(answer.status, 400);
    assert!(stage.fake.seen.lock().unwrap().calls.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_is_gone_is_passed_over() {
    // Bound and never listened on: connections are refused as long as it is kept.
    let gone = tokio::net::TcpSocket::new_v4().unwrap();
    gone.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let dead = gone.local_addr().unwrap();
    let stage = Stage::with("", |address| format!("routers = [\"tcp://{dead}\", \"{address}\"]")).await;
    let tip = stage.seed("g/p.git", 1, 3 << 20).await;
    // The first call of all goes to the one that is gone; its body must not be lost with it.
    let headers = "Content-Type: application/x-git-upload-pack-request\r\nGit-Protocol: version=2\r\n";
    let answer = stage.http("POST", "/g/p/git-upload-pack", headers, b"0014command=ls-refs\n0000").await;
    assert!(answer.status == 200 && answer.text().contains(&tip), "{answer:?}");
    let url = format!("{}/g/p.git", stage.url);
    for number in 0..3 {
        let target = format!("clone-{number}");
        stage.git(&["clone", "-q", &url, &target]).await;
        assert_eq!(stage.git(&["-C", &target, "rev-parse", "HEAD"]).await, tip);
        stage.git(&["-C", "seed", "commit", "-q", "--allow-empty", "-m", "x"]).await;
        let branch = format!("HEAD:refs/heads/b{number}");
        stage.git(&["-C", "seed", "-c", "http.postBuffer=1024", "push", "-q", &url, &branch]).await;
    }

    let alone = Stage::with("", |_| format!("routers = [\"tcp://{dead}\"]")).await;
    for (method, target) in
        [("GET", "/g/p/info/refs?service=git-upload-pack"), ("POST", "/g/p/git-upload-pack")]
    {
        let answer = alone.http(method, target, headers, b"").await;
        assert!(answer.status == 503 && answer.text().contains("unavailable"), "{answer:?}");
    }
    drop(gone);
}
