//! Repositories come into being and go, and refusals are Gitaly's word for word.

use tabularium_proto::gitaly::{
    CreateRepositoryRequest, ObjectFormat, ObjectFormatRequest, RemoveRepositoryRequest, Repository,
    RepositoryExistsRequest, RepositorySizeRequest, WriteRefRequest,
};
use tonic::Code;

use crate::harness::{TestNode, eventually, git};

fn refusal<T: std::fmt::Debug>(result: Result<T, tonic::Status>) -> (Code, String) {
    let status = result.unwrap_err();
    (status.code(), status.message().to_owned())
}

fn create(repository: Option<Repository>) -> CreateRepositoryRequest {
    CreateRepositoryRequest { repository, ..CreateRepositoryRequest::default() }
}

async fn exists(node: &TestNode, path: &str) -> bool {
    let request = RepositoryExistsRequest { repository: Some(node.named(path)) };
    node.repositories().repository_exists(request).await.unwrap().into_inner().exists
}

#[tokio::test]
async fn a_repository_is_created_once_and_removed_once() {
    let node = TestNode::start().await;
    let mut client = node.repositories();
    assert!(!exists(&node, "a/b.git").await);
    let repository = node.create("a/b.git").await;
    assert!(exists(&node, "a/b.git").await);
    assert_eq!(git(&node.path("a/b.git"), &["symbolic-ref", "HEAD"]), "refs/heads/main");
    assert!(!node.path("a/b.git/hooks").exists(), "no templates");

    let again = client.create_repository(create(Some(repository.clone()))).await;
    let expected = "creating repository: repository exists already";
    assert_eq!(refusal(again), (Code::AlreadyExists, expected.to_owned()));
    let nested = client.create_repository(create(Some(node.named("a/b.git/refs/c.git")))).await;
    assert_eq!(refusal(nested).0, Code::FailedPrecondition);

    let lock = node.path("a/b.git.lock");
    std::fs::write(&lock, "somebody else").unwrap();
    let remove = RemoveRepositoryRequest { repository: Some(repository) };
    let locked = client.remove_repository(remove.clone()).await;
    assert_eq!(refusal(locked), (Code::FailedPrecondition, "repository is already locked".to_owned()));
    // An earlier process of this node held this one.
    std::fs::write(&lock, "3f2504e0-4f89-41d3-9a0c-0305e82c3301").unwrap();
    client.remove_repository(remove.clone()).await.unwrap();
    assert!(!lock.exists() && !exists(&node, "a/b.git").await);
    let again = client.remove_repository(remove).await;
    assert_eq!(refusal(again), (Code::NotFound, "repository does not exist".to_owned()));

    let temporary = node.path("+gitaly/tmp");
    eventually("temporary files are gone", async || std::fs::read_dir(&temporary).unwrap().next().is_none())
        .await;
    node.stop().await;
}

#[tokio::test]
async fn formats_and_branches_are_the_callers_choice() {
    let node = TestNode::start().await;
    let mut client = node.repositories();
    let repository = node.named("sha256.git");
    let request = CreateRepositoryRequest {
        repository: Some(repository.clone()),
        default_branch: b"trunk".to_vec(),
        object_format: ObjectFormat::Sha256.into(),
    };
    client.create_repository(request.clone()).await.unwrap();
    assert_eq!(git(&node.path("sha256.git"), &["symbolic-ref", "HEAD"]), "refs/heads/trunk");
    let format = client.object_format(ObjectFormatRequest { repository: Some(repository) }).await.unwrap();
    assert_eq!(format.into_inner().format(), ObjectFormat::Sha256);

    let unknown = CreateRepositoryRequest {
        object_format: 7,
        repository: Some(node.named("x.git")),
        ..request.clone()
    };
    let expected = (Code::InvalidArgument, "unknown object format: \"7\"".to_owned());
    assert_eq!(refusal(client.create_repository(unknown).await), expected);
    for branch in ["-x", "a..b", "a b", "a.lock"] {
        let repository = Some(node.named("x.git"));
        let request =
            CreateRepositoryRequest { default_branch: branch.into(), repository, ..Default::default() };
        assert_eq!(refusal(client.create_repository(request).await).0, Code::InvalidArgument, "{branch}");
    }
    assert!(!exists(&node, "x.git").await);
}

#[tokio::test]
async fn what_is_no_repository_is_refused_as_gitaly_does() {
    let node = TestNode::start().await;
    let mut client = node.repositories();
    std::fs::create_dir_all(node.path("half.git/objects")).unwrap();
    std::os::unix::fs::symlink("/", node.path("out")).unwrap();
    let invalid = Code::InvalidArgument;
    for (storage, path, code, text) in [
        ("", "", invalid, "repository not set"),
        ("default", "", invalid, "repository path not set"),
        ("", "a.git", invalid, "storage name not set"),
        ("elsewhere", "a.git", invalid, "storage name not found"),
        ("default", "../a.git", invalid, "relative path escapes root directory"),
        ("default", "a/../../../etc", invalid, "relative path escapes root directory"),
        ("default", "/etc", invalid, "relative path escapes root directory"),
        ("default", "out/tmp", invalid, "relative path escapes root directory"),
        ("default", "+gitaly/tmp", invalid, "relative path escapes root directory"),
        ("default", "none.git", Code::NotFound, "repository not found"),
        ("default", "half.git", Code::FailedPrecondition, "repository not valid: \"refs\" does not exist"),
    ] {
        let repository = Some(Repository {
            storage_name: storage.into(),
            relative_path: path.into(),
            ..Default::default()
        });
        let size = client.repository_size(RepositorySizeRequest { repository: repository.clone() }).await;
        assert_eq!(refusal(size), (code, text.to_owned()), "{storage} {path}");
        if code == invalid {
            let created = client.create_repository(create(repository.clone())).await;
            assert_eq!(refusal(created), (code, text.to_owned()), "{storage} {path}");
            let removed = client.remove_repository(RemoveRepositoryRequest { repository }).await;
            assert_eq!(refusal(removed), (code, text.to_owned()), "{storage} {path}");
        }
    }
    let unset = client.repository_size(RepositorySizeRequest { repository: None }).await;
    assert_eq!(refusal(unset), (invalid, "repository not set".to_owned()));
}

#[tokio::test]
async fn refs_are_written_conditionally() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let path = node.path("a.git");
    let write = |name: &str, revision: &str, old: &str| WriteRefRequest {
        repository: Some(repository.clone()),
        r#ref: name.into(),
        revision: revision.into(),
        old_revision: old.into(),
    };
    let mut client = node.repositories();
    let zeros = "0".repeat(40);
    client.write_ref(write("HEAD", "refs/heads/unborn", "")).await.unwrap();
    assert_eq!(git(&path, &["symbolic-ref", "HEAD"]), "refs/heads/unborn");
    client.write_ref(write("refs/heads/new", "main~1", &zeros)).await.unwrap();
    let side = git(&path, &["rev-parse", "refs/heads/side"]);
    assert_eq!(git(&path, &["rev-parse", "refs/heads/new"]), side);
    let exists = client.write_ref(write("refs/heads/new", "main", &zeros)).await;
    assert_eq!(refusal(exists).0, Code::FailedPrecondition);
    let moved = client.write_ref(write("refs/heads/new", "main", "main")).await;
    assert_eq!(refusal(moved).0, Code::FailedPrecondition);
    client.write_ref(write("refs/heads/new", "main", &side)).await.unwrap();
    std::fs::write(path.join("refs/heads/new.lock"), "").unwrap();
    let locked = client.write_ref(write("refs/heads/new", "side", "")).await;
    assert_eq!(refusal(locked), (Code::Aborted, "reference is locked already".to_owned()));
    std::fs::remove_file(path.join("refs/heads/new.lock")).unwrap();
    client.write_ref(write("refs/heads/new", &zeros, "")).await.unwrap();
    assert!(!path.join("refs/heads/new").exists());

    let invalid = Code::InvalidArgument;
    for (name, revision, code, text) in [
        ("heads/x", "main", invalid, "ref has to be a full reference"),
        ("refs/heads/x", "", invalid, "invalid revision: empty revision"),
        ("refs/heads/x", "-m", invalid, "invalid revision: revision can't start with '-'"),
        ("refs/heads/x", "a b", invalid, "invalid revision: revision can't contain whitespace"),
        ("refs/heads/x", "main:file", invalid, "invalid revision: revision can't contain ':'"),
        ("refs/heads/x", "nowhere", Code::NotFound, "resolving new revision: reference not found"),
    ] {
        let result = client.write_ref(write(name, revision, "")).await;
        assert_eq!(refusal(result), (code, text.to_owned()), "{name} {revision}");
    }
}
