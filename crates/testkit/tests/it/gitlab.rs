//! GitLab behind a whole cluster: the primary asks it, and it looks at what is pushed through the router before it answers.

use std::sync::{Arc, Mutex, OnceLock};

use serde_json::{Value, json};
use tabularium_proto::gitaly::{
    FindCommitRequest, ListCommitsRequest, Repository, commit_service_client::CommitServiceClient,
};
use tabularium_testkit::{
    cluster::{Signed, TestCluster, VIRTUAL_STORAGE, local_cluster::HOME},
    git::GitClient,
    wait::wait_until,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
};

use crate::support::{FOLLOW, home_only, request, router, start};

const PATH: &str = "a/b.git";
/// Has git say that user 7 pushes, with any password: GitLab knows users by their numbers.
const USER: &str = "http.extraHeader=Authorization: Basic Nzp4";

/// What GitLab was asked, and what it saw.
#[derive(Default)]
struct Seen {
    router: OnceLock<Signed>,
    calls: Mutex<Vec<(String, Value)>>,
    /// Commits that are new, by the router's word.
    new_commits: Mutex<Vec<String>>,
}

/// The repository as GitLab's clients name it, with what `/allowed` said of new objects.
fn quarantined(env: &str) -> Repository {
    let env: Value = serde_json::from_str(env).unwrap();
    let alternates = env["GIT_ALTERNATE_OBJECT_DIRECTORIES_RELATIVE"].as_array().unwrap();
    Repository {
        storage_name: VIRTUAL_STORAGE.into(),
        relative_path: PATH.into(),
        git_object_directory: env["GIT_OBJECT_DIRECTORY_RELATIVE"].as_str().unwrap().into(),
        git_alternate_object_directories: alternates
            .iter()
            .map(|directory| directory.as_str().unwrap().to_owned())
            .collect(),
        ..Repository::default()
    }
}

/// As Rails asks while it is asked.
fn of_the_primary<T>(message: T) -> tonic::Request<T> {
    let mut request = request(message, "allowed");
    let policy = "gitaly-route-repository-accessor-policy";
    request.metadata_mut().insert(policy, "primary-only".parse().unwrap());
    request
}

/// Everything that the push brings is there for GitLab and for nobody else.
async fn look(seen: &Seen, body: &Value) -> Result<(), String> {
    let new = body["changes"].as_str().unwrap().split(' ').nth(1).unwrap().to_owned();
    let repository = quarantined(body["env"].as_str().unwrap());
    let mut commits = CommitServiceClient::new(seen.router.get().unwrap().clone());
    let plain = Repository {
        git_object_directory: String::new(),
        git_alternate_object_directories: Vec::new(),
        ..repository.clone()
    };
    for (repository, there) in [(repository.clone(), true), (plain, false)] {
        let find = FindCommitRequest {
            repository: Some(repository),
            revision: new.clone().into_bytes(),
            ..FindCommitRequest::default()
        };
        let found = commits.find_commit(of_the_primary(find)).await.map_err(|status| status.to_string())?;
        if found.into_inner().commit.is_some() != there {
            return Err(format!("{new} is there: {}", !there));
        }
    }
    let list = ListCommitsRequest {
        repository: Some(repository),
        revisions: vec![new, "--not".to_owned(), "--all".to_owned()],
        ..ListCommitsRequest::default()
    };
    let listed = commits.list_commits(of_the_primary(list)).await.map_err(|status| status.to_string())?;
    let mut listed = listed.into_inner();
    while let Some(message) = listed.message().await.map_err(|status| status.to_string())? {
        let ids = message.commits.into_iter().map(|commit| commit.id);
        seen.new_commits.lock().unwrap().extend(ids);
    }
    Ok(())
}

async fn answer(seen: &Seen, stream: TcpStream) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
        head += &line;
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let body: Value = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    seen.calls.lock().unwrap().push((path.clone(), body.clone()));
    let answer = match path.rsplit('/').next().unwrap_or_default() {
        "allowed" => {
            let refused = body["changes"].as_str().unwrap().contains("refs/heads/refused");
            let looked = if refused { Err("not there".to_owned()) } else { look(seen, &body).await };
            json!({"status": looked.is_ok(), "message": looked.err().unwrap_or_default()})
        }
        "pre_receive" => json!({"reference_counter_increased": true}),
        "post_receive" => {
            let message = json!({"type": "basic", "message": "Thank you"});
            json!({"reference_counter_decreased": true, "messages": [message]})
        }
        _ => json!({"api_version": "v4", "redis": true}),
    };
    let answer = answer.to_string();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close";
    let text = format!("{head}\r\nContent-Length: {}\r\n\r\n{answer}", answer.len());
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

/// Serves until the test ends; the URL.
async fn serve(seen: Arc<Seen>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    #[allow(clippy::disallowed_methods, reason = "ends with the test's runtime")]
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move { answer(&seen, stream).await.unwrap() });
        }
    });
    format!("http://{address}")
}

fn asked(seen: &Seen) -> Vec<String> {
    let calls = seen.calls.lock().unwrap();
    let ends = calls.iter().map(|(path, _)| path.rsplit('/').next().unwrap().to_owned());
    ends.filter(|end| end != "check").collect()
}

async fn level(test: &TestCluster, what: &str) {
    wait_until(what, FOLLOW, || test.equal_checksums(PATH, 3)).await;
}

#[tokio::test]
async fn gitlab_decides_about_what_it_has_seen_through_the_router() {
    let seen = Arc::new(Seen::default());
    let url = serve(Arc::clone(&seen)).await;
    let directory = tempfile::tempdir().unwrap();
    let secret_file = directory.path().join("secret");
    std::fs::write(&secret_file, "shared").unwrap();
    let tables = format!("[gitlab]\nurl = \"{url}\"\nsecret_file = \"{}\"\n", secret_file.display());
    let (test, _logs) = start(|options| {
        home_only(options);
        options.node_tables = tables.parse().unwrap();
    })
    .await;
    assert!(seen.router.set(router(&test, 0)).is_ok());
    test.create(PATH).await;
    let git = GitClient::new();
    git.work_tree("source", 2).await;
    let url = test.url(HOME, 0, PATH);

    let (pushed, said) = git.try_run("source", &["-c", USER, "push", &url, "main"]).await;
    assert!(pushed && said.contains("remote: Thank you"), "{said}");
    assert_eq!(asked(&seen), ["allowed", "pre_receive", "post_receive"], "the primary alone asks");
    assert_eq!(seen.new_commits.lock().unwrap().len(), 2, "both commits are new");
    let allowed =
        seen.calls.lock().unwrap().iter().find(|(path, _)| path.ends_with("/allowed")).unwrap().1.clone();
    assert_eq!((&allowed["user_id"], &allowed["protocol"]), (&json!("7"), &json!("http")));
    level(&test, "all replicas have the push").await;

    let before = test.equal_checksums(PATH, 3).await.unwrap();
    let (pushed, said) = git.try_run("source", &["-c", USER, "push", &url, "main:refused"]).await;
    assert!(!pushed && said.contains("remote: GitLab: not there"), "{said}");
    assert_eq!(asked(&seen)[3..], ["allowed"]);
    assert_eq!(test.equal_checksums(PATH, 3).await.unwrap(), before, "no replica moved anything");
    test.stop().await.unwrap();
}
