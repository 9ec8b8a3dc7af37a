//! Pushes: GitLab is asked before they can be seen, and told of them afterwards.

use std::{
    fs,
    path::Path,
    process::Output,
    sync::{Arc, OnceLock},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha2::Sha256;
use tabularium_proto::gitaly::{
    CheckObjectsExistRequest, FindCommitRequest, Repository, commit_service_client::CommitServiceClient,
};
use tempfile::TempDir;

use super::{Call, Gitlab, Reply, SECRET, config};
use crate::{
    bridge,
    harness::{Client, TestNode, eventually, git, git_command},
    operations::hook,
    seed::all,
    transport::{leftovers, work_tree},
    voting::router::Router,
};

async fn push(url: &str, work: &Path, arguments: &[&str]) -> Output {
    let mut command = git_command(work);
    command.args(["push", url]).args(arguments);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn references(node: &TestNode) -> String {
    git(&node.path("a.git"), &["for-each-ref", "--format=%(refname)"])
}

/// A node that asks this GitLab, and where to push to its empty `a.git`.
async fn asking(gitlab: &Gitlab) -> (TestNode, String, TempDir) {
    asking_at(&gitlab.serve().await).await
}

async fn asking_at(url: &str) -> (TestNode, String, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let mut gitlab = config(url, directory.path());
    gitlab.http_settings.read_timeout = 2;
    let node = TestNode::start_with(move |config| config.gitlab = Some(gitlab)).await;
    node.create("a.git").await;
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    (node, url, directory)
}

/// The repository as GitLab asks for it while it is asked itself: with what it was told of the objects.
fn quarantined(node: Repository, call: &Call) -> Repository {
    let env: Value = serde_json::from_str(call.body["env"].as_str().unwrap()).unwrap();
    let alternates = env["GIT_ALTERNATE_OBJECT_DIRECTORIES_RELATIVE"].as_array().unwrap();
    Repository {
        git_object_directory: env["GIT_OBJECT_DIRECTORY_RELATIVE"].as_str().unwrap().to_owned(),
        git_alternate_object_directories: alternates
            .iter()
            .map(|directory| directory.as_str().unwrap().to_owned())
            .collect(),
        ..node
    }
}

async fn sees(client: Client, repository: Repository, id: &str) -> bool {
    let request = FindCommitRequest {
        repository: Some(repository),
        revision: id.as_bytes().to_vec(),
        ..FindCommitRequest::default()
    };
    let found = CommitServiceClient::new(client).find_commit(request).await.unwrap();
    found.into_inner().commit.is_some()
}

/// A GitLab that reads from the node before it allows anything, and what it has seen.
fn reading() -> (Gitlab, Arc<OnceLock<(Client, Repository)>>) {
    let node: Arc<OnceLock<(Client, Repository)>> = Arc::default();
    let reader = Arc::clone(&node);
    let gitlab = Gitlab::thinking(move |call| {
        let reader = Arc::clone(&reader);
        Box::pin(async move {
            if call.endpoint() != "allowed" {
                return None;
            }
            let (client, repository) = reader.get().unwrap().clone();
            let changes = call.body["changes"].as_str().unwrap();
            let new = changes.split(' ').nth(1).unwrap();
            let with = sees(client.clone(), quarantined(repository.clone(), &call), new).await;
            let without = sees(client, repository, new).await;
            let allowed = with && !without;
            Some(Reply::json(200, &json!({"status": allowed, "message": format!("{with} {without}")})))
        })
    });
    (gitlab, node)
}

#[tokio::test(flavor = "multi_thread")]
async fn gitlab_sees_a_push_before_it_allows_it() {
    let (gitlab, reader) = reading();
    let (node, url, _directory) = asking(&gitlab).await;
    assert!(reader.set((node.channel(), node.named("a.git"))).is_ok());
    let work = work_tree(1000);
    let pushed = push(&url, work.path(), &["main"]).await;
    assert!(pushed.status.success(), "{}", words(&pushed));
    let id = git(work.path(), &["rev-parse", "main"]);
    assert_eq!(git(&node.path("a.git"), &["rev-parse", "main"]), id);

    let changes = format!("{} {id} refs/heads/main\n", "0".repeat(40));
    let calls = gitlab.calls();
    assert_eq!(gitlab.endpoints(), ["allowed", "pre_receive", "post_receive"]);
    let allowed = &calls[0].body;
    let expected = json!({
        "action": "git-receive-pack",
        "gl_repository": "project-1",
        "project": node.path("a.git").to_str().unwrap(),
        "changes": changes,
        "protocol": "http",
        "relative_path": "a.git",
        "env": allowed["env"],
        "user_id": "1",
    });
    assert_eq!(*allowed, expected);
    assert_eq!(calls[1].body, json!({"gl_repository": "project-1"}));
    let told = json!({
        "gl_repository": "project-1",
        "identifier": "user-1",
        "changes": changes,
        "push_options": null,
    });
    assert_eq!(calls[2].body, told);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_signed_and_say_who_calls() {
    let gitlab = Gitlab::agreeing();
    let directory = tempfile::tempdir().unwrap();
    let mut to_gitlab = config(&gitlab.serve().await, directory.path());
    to_gitlab.http_settings.user = "someone".to_owned();
    to_gitlab.http_settings.password = "some:pass".to_owned().into();
    let node = TestNode::start_with(move |config| config.gitlab = Some(to_gitlab)).await;
    node.create("a.git").await;
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    let pushed = push(&url, work_tree(1000).path(), &["-o", "ci.skip", "-o", "a=b", "main"]).await;
    assert!(pushed.status.success(), "{}", words(&pushed));
    let calls = gitlab.calls();
    assert_eq!(calls.len(), 3);
    for call in &calls {
        assert!(call.path.starts_with("/api/v4/internal/"), "{}", call.path);
        assert_eq!(call.header("content-type"), "application/json");
        assert_eq!(call.header("connection"), "close");
        assert!(call.header("user-agent").starts_with("gitaly/"), "{}", call.header("user-agent"));
        assert_eq!(call.header("authorization"), "Basic c29tZW9uZTpzb21lOnBhc3M=");
        let (signed, signature) = call.header("gitlab-shell-api-request").rsplit_once('.').unwrap();
        let mut mac = Hmac::<Sha256>::new_from_slice(SECRET.trim().as_bytes()).unwrap();
        mac.update(signed.as_bytes());
        mac.verify_slice(&URL_SAFE_NO_PAD.decode(signature).unwrap()).unwrap();
        let claims = signed.split_once('.').unwrap().1;
        let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
        assert_eq!(claims["iss"], "gitlab-shell");
        assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 60);
    }
    for number in [0, 2] {
        assert_eq!(calls[number].body["push_options"], json!(["ci.skip", "a=b"]));
    }
    eventually("GitLab was asked who it is", async || gitlab.checks() == 1).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_no_clear_yes_is_a_no() {
    let json = |status, body: Value| Reply::json(status, &body);
    let text = |status, body: &str| Reply { status, content_type: "text/html", body: body.to_owned() };
    let work = work_tree(1000);
    for (reply, said) in [
        (json(401, json!({"status": false, "message": "You are not allowed"})), "You are not allowed"),
        (json(200, json!({"status": false, "message": "read-only"})), "read-only"),
        (json(300, json!({"status": false, "message": "elsewhere"})), "elsewhere"),
        (json(404, json!({"message": "no such project"})), "no such project"),
        (text(500, "<html>"), "Internal API error (500)"),
        (
            text(200, "{\"status\":true}"),
            "/allowed endpoint respond with unsupported content type: text/html",
        ),
        (json(302, json!({"status": true})), "gitlab api is not accessible: 302"),
        (json(200, json!("yes")), "decoding response from /allowed endpoint: "),
        (json(200, json!({})), ""),
    ] {
        let gitlab = Gitlab::answering("allowed", reply.clone());
        let (node, url, _directory) = asking(&gitlab).await;
        let pushed = push(&url, work.path(), &["main"]).await;
        let said = format!("remote: GitLab: {said}");
        assert!(!pushed.status.success() && words(&pushed).contains(said.trim_end()), "{}", words(&pushed));
        assert!(words(&pushed).contains("pre-receive hook declined"), "{}", words(&pushed));
        assert_eq!(
            (references(&node).as_str(), gitlab.endpoints().as_slice()),
            ("", &["allowed".to_owned()][..])
        );
        eventually("nothing is left", async || leftovers(&node.path("a.git")).is_empty()).await;
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gitlab_that_is_not_there_allows_nothing() {
    let silent = Gitlab::thinking(|call| {
        Box::pin(
            async move { if call.endpoint() == "allowed" { std::future::pending().await } else { None } },
        )
    });
    let silent = silent.serve().await;
    for url in [silent.as_str(), "http+unix://%2Fnowhere%2Fat.socket"] {
        let (node, url, _directory) = asking_at(url).await;
        let pushed = push(&url, work_tree(1000).path(), &["main"]).await;
        assert!(!pushed.status.success());
        assert!(words(&pushed).contains("remote: GitLab: Internal API unreachable"), "{}", words(&pushed));
        assert_eq!(references(&node), "");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_pushes_to_what_must_be_known() {
    let gitlab = Gitlab::agreeing();
    let (node, _, _directory) = asking(&gitlab).await;
    let work = work_tree(1000);
    for (gl_repository, said) in [("", "repository not set"), ("project-1", "")] {
        let url = bridge::serve_as(&node, "user-1", gl_repository).await;
        let pushed = push(&format!("{url}/a.git"), work.path(), &["main"]).await;
        assert_eq!(pushed.status.success(), said.is_empty(), "{}", words(&pushed));
        assert!(words(&pushed).contains(said), "{}", words(&pushed));
    }
    let url = bridge::serve_as(&node, "nobody", "project-1").await;
    let pushed = push(&format!("{url}/a.git"), work.path(), &["main:other"]).await;
    let said = "remote: GitLab: setting gl_id: gl_id='nobody' is invalid";
    assert!(!pushed.status.success() && words(&pushed).contains(said), "{}", words(&pushed));
    assert_eq!(references(&node), "refs/heads/main");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn custom_hooks_run_between_the_questions() {
    let gitlab = Gitlab::answering("pre_receive", Reply::json(200, &json!({})));
    let (node, url, _directory) = asking(&gitlab).await;
    hook(&node, "pre-receive", "echo from a custom hook");
    let work = work_tree(1000);
    let pushed = push(&url, work.path(), &["main"]).await;
    assert!(
        !pushed.status.success() && words(&pushed).contains("remote: from a custom hook"),
        "{}",
        words(&pushed)
    );
    assert_eq!(gitlab.endpoints(), ["allowed", "pre_receive"]);

    hook(&node, "pre-receive", "echo no; exit 1");
    let pushed = push(&url, work.path(), &["main"]).await;
    assert!(!pushed.status.success() && words(&pushed).contains("remote: no"), "{}", words(&pushed));
    assert_eq!(gitlab.endpoints()[2..], ["allowed"], "it is not announced");
    assert_eq!(references(&node), "");

    let failing = Gitlab::answering("pre_receive", Reply::json(500, &json!({"message": "Redis is down"})));
    let (node, url, _directory) = asking(&failing).await;
    let pushed = push(&url, work.path(), &["main"]).await;
    let said =
        "remote: calling pre_receive endpoint: http post to gitlab api /pre_receive endpoint: Redis is down";
    assert!(!pushed.status.success() && words(&pushed).contains(said), "{}", words(&pushed));
    assert_eq!(references(&node), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_gitlab_says_afterwards_reaches_the_user() {
    let messages = json!([
        {"type": "basic", "message": "To create a merge request for main, visit:\n  http://gitlab/new"},
        {"type": "alert", "message": "The system goes down at noon."},
    ]);
    let body = json!({"reference_counter_decreased": true, "messages": messages});
    let gitlab = Gitlab::answering("post_receive", Reply::json(200, &body));
    let (node, url, _directory) = asking(&gitlab).await;
    hook(&node, "post-receive", "echo and a hook");
    let pushed = push(&url, work_tree(1000).path(), &["main"]).await;
    assert!(pushed.status.success());
    let said = words(&pushed);
    let lines: Vec<&str> =
        said.lines().filter_map(|line| line.strip_prefix("remote:")).map(str::trim_end).collect();
    let rule = format!(" {}", "=".repeat(72));
    let expected = [
        "",
        " To create a merge request for main, visit:",
        "   http://gitlab/new",
        "",
        "",
        &rule,
        "",
        &format!(" {}The system goes down at noon.", " ".repeat(21)),
        "",
        &rule,
        "",
        " and a hook",
    ];
    assert_eq!(lines, expected, "{said}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_been_pushed_stays_whatever_gitlab_says() {
    let counted =
        json!({"reference_counter_decreased": false, "messages": [{"type": "poem", "message": "x"}]});
    for (reply, said) in [
        (
            Reply::json(503, &json!({"message": "later"})),
            "remote: GitLab: http post to gitlab api /post_receive endpoint: later",
        ),
        (Reply::json(200, &counted), "remote: error writing messages to stream: invalid message type: poem"),
    ] {
        let gitlab = Gitlab::answering("post_receive", reply);
        let (node, url, _directory) = asking(&gitlab).await;
        hook(&node, "post-receive", "echo unheard");
        let pushed = push(&url, work_tree(1000).path(), &["main"]).await;
        assert!(pushed.status.success() && words(&pushed).contains(said), "{}", words(&pushed));
        assert!(!words(&pushed).contains("unheard"), "{}", words(&pushed));
        assert_eq!(references(&node), "refs/heads/main");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_primary_alone_asks() {
    let work = work_tree(1000);
    for (primary, arguments, asked) in [
        (true, &["main"][..], 3),
        (false, &["main"][..], 0),
        // Not followed: the secondary runs the push like the primary.
        (false, &["main:a", "main:b"][..], 0),
    ] {
        let gitlab = Gitlab::agreeing();
        let (node, _, _directory) = asking(&gitlab).await;
        let router = Router::agreeing();
        let url = bridge::serve_from(router.client(&node, primary), &node.storage, None).await;
        let pushed = push(&format!("{url}/a.git"), work.path(), arguments).await;
        assert!(pushed.status.success(), "{}", words(&pushed));
        assert_eq!(gitlab.calls().len(), asked, "{arguments:?}");
        assert!(router.phases(&node).starts_with("SS"), "{}", router.phases(&node));
        node.stop().await;
    }
    let gitlab = Gitlab::answering("allowed", Reply::json(401, &json!({"message": "no"})));
    let (node, _, _directory) = asking(&gitlab).await;
    let router = Router::agreeing();
    let url = bridge::serve_from(router.client(&node, true), &node.storage, None).await;
    let pushed = push(&format!("{url}/a.git"), work.path(), &["main"]).await;
    assert!(!pushed.status.success() && words(&pushed).contains("remote: GitLab: no"), "{}", words(&pushed));
    assert_eq!((router.stops(), references(&node).as_str()), (1, ""));
    assert!(!router.phases(&node).contains('S'), "nobody waits any more");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pushes_that_wait_for_gitlab_leave_room_for_what_gitlab_reads() {
    let (gitlab, reader) = reading();
    let directory = tempfile::tempdir().unwrap();
    let to_gitlab = config(&gitlab.serve().await, directory.path());
    let node = TestNode::start_with(move |config| {
        config.gitlab = Some(to_gitlab);
        config.max_git_processes = 2;
    })
    .await;
    node.create("a.git").await;
    assert!(reader.set((node.channel(), node.named("a.git"))).is_ok());
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    let pushes = (0..3).map(|number| {
        let url = url.clone();
        async move {
            let work = work_tree(1000);
            fs::write(work.path().join("own"), number.to_string()).unwrap();
            git(work.path(), &["add", "own"]);
            git(work.path(), &["commit", "--quiet", "-m", "own"]);
            push(&url, work.path(), &[&format!("main:refs/heads/{number}")]).await
        }
    });
    for pushed in futures::future::join_all(pushes).await {
        assert!(pushed.status.success(), "{}", words(&pushed));
    }
    assert_eq!(references(&node).lines().count(), 3);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_reads_what_another_repository_keeps() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    node.create_with_commits("b.git").await;
    for directory in ["../b.git/objects", "/etc", "..", "refs", "objects/../../b.git/objects"] {
        let request = CheckObjectsExistRequest {
            repository: Some(Repository { git_object_directory: directory.to_owned(), ..repository.clone() }),
            revisions: vec![b"HEAD".to_vec()],
        };
        let mut client = CommitServiceClient::new(node.channel());
        let asked = all(client.check_objects_exist(futures::stream::iter([request])).await).await;
        assert_eq!(asked.unwrap_err().code(), tonic::Code::InvalidArgument, "{directory}");
    }
    node.stop().await;
}
