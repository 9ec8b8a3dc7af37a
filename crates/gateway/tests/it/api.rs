use crate::stage::Stage;

const JSON: &str = "Content-Type: application/json\r\n";
const REPOSITORIES: &str = "/api/v1/repositories";

impl Stage {
    async fn create(&self, body: &str) -> crate::clients::Answer {
        self.http("POST", REPOSITORIES, JSON, body.as_bytes()).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_is_created_pushed_to_shown_and_removed() {
    let stage = Stage::new().await;
    std::fs::create_dir(stage.fake.path("g")).unwrap();
    let answer = stage.create(r#"{"path":"g/new","default_branch":"trunk","object_format":"sha256"}"#).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    let clone_url = format!("{}/g/new.git", stage.url);
    assert_eq!(answer.json(), serde_json::json!({"path": "g/new", "clone_url": clone_url}));
    assert!(answer.head.contains("location: /api/v1/repositories/g/new"));
    assert_eq!(stage.fake.last("CreateRepository")["default_branch"], "trunk");
    assert!(stage.fake.last("CreateRepository").contains_key("grpc-timeout"));

    stage.git(&["init", "-q", "--object-format=sha256", "-b", "trunk", "work"]).await;
    stage.git(&["-C", "work", "commit", "-q", "--allow-empty", "-m", "first"]).await;
    stage.git(&["-C", "work", "push", "-q", &clone_url, "trunk"]).await;
    assert_eq!(stage.create(r#"{"path":"g/new.git"}"#).await.status, 409);

    let shown = stage.http("GET", "/api/v1/repositories/g/new", "", b"").await;
    assert_eq!(shown.status, 200);
    let shown = shown.json();
    assert_eq!((shown["path"].as_str(), shown["generation"].as_i64()), (Some("g/new"), Some(3)));
    assert_eq!(shown["clone_url"], clone_url);
    assert_eq!(
        shown["replicas"][1],
        serde_json::json!({"storage": "node-2", "generation": 2, "up_to_date": false})
    );
    assert_eq!(shown["mirror"], serde_json::Value::Null);

    for name in ["a", "b"] {
        assert_eq!(stage.create(&format!(r#"{{"path":"g/{name}"}}"#)).await.status, 201);
    }
    let mut names = Vec::new();
    let mut token = String::new();
    loop {
        let target = format!("{REPOSITORIES}?page_size=2&page_token={token}");
        let page = stage.http("GET", &target, "", b"").await.json();
        let repositories = page["repositories"].as_array().unwrap().clone();
        assert!(repositories.len() <= 2);
        names.extend(repositories.iter().map(|shown| shown["path"].as_str().unwrap().to_owned()));
        match page["next_page_token"].as_str() {
            Some(next) => next.clone_into(&mut token),
            None => break,
        }
    }
    assert_eq!(names, ["g/a", "g/b", "g/new"]);

    assert_eq!(stage.http("DELETE", "/api/v1/repositories/g/new", "", b"").await.status, 204);
    let again = stage.http("DELETE", "/api/v1/repositories/g/new", "", b"").await;
    assert_eq!(again.json(), serde_json::json!({"error": "repository 'g/new' not found"}));
    assert_eq!(stage.http("GET", "/api/v1/repositories/g/new", "", b"").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_shows_its_home() {
    let stage = Stage::configured("external_url = \"https://git.example.com/\"").await;
    stage.empty("g/p.git").await;
    let home = ("berlin".to_owned(), "https://git.berlin.example/g/p.git".to_owned());
    stage.fake.mirrors.lock().unwrap().insert("g/p.git".to_owned(), home);
    let shown = stage.http("GET", "/api/v1/repositories/g/p", "", b"").await.json();
    assert_eq!(shown["clone_url"], "https://git.example.com/g/p.git");
    assert_eq!(shown["mirror"]["home_site"], "berlin");
    assert_eq!(shown["mirror"]["home_url"], "https://git.berlin.example/g/p.git");
    assert_eq!(shown["mirror"]["state"], "synced");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_told_what_is_allowed() {
    let stage = Stage::new().await;
    for (body, text) in [
        (r#"{"path":"../x"}"#, "starts with a letter"),
        (r#"{"path":"api/x"}"#, "not 'api'"),
        (r#"{"path":"a\u0000b"}"#, "ASCII letters"),
        (r#"{"path":""}"#, "one or more names"),
        (r#"{"path":"a","default_branch":"a b"}"#, "default_branch"),
        (r#"{"path":"a","object_format":"md5"}"#, "sha256"),
        (r#"{"path":"a","colour":"red"}"#, "colour"),
        ("{", "not what is expected"),
        ("", "not what is expected"),
    ] {
        let answer = stage.create(body).await;
        assert_eq!(answer.status, 400, "{body} {answer:?}");
        let error = answer.json()["error"].as_str().unwrap().to_owned();
        assert!(error.contains(text), "{body} {error}");
    }
    let answer = stage.http("POST", REPOSITORIES, "Content-Type: text/plain\r\n", b"{}").await;
    assert_eq!(answer.status, 415);
    let large = format!("{{\"path\":\"{}\"}}", "a".repeat(100_000));
    assert_eq!(stage.create(&large).await.status, 413);
    for target in ["?page_size=0", "?page_size=x", "?page_size=1001"] {
        let answer = stage.http("GET", &format!("{REPOSITORIES}{target}"), "", b"").await;
        assert!(answer.status == 400 && answer.text().contains("1 to 1000"), "{answer:?}");
    }
    let answer = stage.http("PUT", REPOSITORIES, "", b"").await;
    assert!(answer.status == 405 && answer.head.contains("allow: get, post"), "{answer:?}");
    assert_eq!(stage.fake.count("CreateRepository"), 0);
}
