//! Copies between nodes, and fetches from remotes outside.

use std::fs;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tabularium_proto::{
    gitaly::{
        CreateForkRequest, FetchRemoteRequest, FindRemoteRepositoryRequest, FindRemoteRootRefRequest, Remote,
        ReplicateRepositoryRequest, Repository, remote_service_client::RemoteServiceClient,
    },
    node::{FenceCopiesRequest, replica_service_client::ReplicaServiceClient},
};
use tonic::{Code, Status};

use crate::{
    bridge,
    harness::{PATIENCE, TestNode, commit, git, with_servers},
};

pub(crate) async fn replicate(from: &TestNode, to: &TestNode, path: &str) -> Result<(), Status> {
    let message = ReplicateRepositoryRequest {
        repository: Some(to.named(path)),
        source: Some(from.named(path)),
        ..ReplicateRepositoryRequest::default()
    };
    to.repositories().replicate_repository(with_servers(message, &[from])).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_what_its_source_is() {
    let (source, target) = (TestNode::start_named("one").await, TestNode::start_named("two").await);
    let original = source.create_with_commits("a/b.git").await;
    let (path, copied) = (source.path("a/b.git"), target.path("a/b.git"));
    git(&path, &["update-ref", "refs/keep-around/1", "refs/heads/side"]);
    git(&path, &["symbolic-ref", "HEAD", "refs/heads/side"]);
    git(&path, &["config", "gitlab.fullpath", "a/b"]);
    git(&path, &["config", "core.sshCommand", "false"]);
    fs::create_dir_all(path.join("custom_hooks/pre-receive.d")).unwrap();
    fs::write(path.join("custom_hooks/pre-receive.d/check"), "#!/bin/sh\n").unwrap();

    let same = async |when: &str| {
        replicate(&source, &target, "a/b.git").await.unwrap();
        let sums = (source.checksum(&original).await, target.checksum(&target.named("a/b.git")).await);
        assert_eq!(sums.0, sums.1, "{when}");
        assert_eq!(git(&path, &["show-ref"]), git(&copied, &["show-ref"]), "{when}");
        assert!(!copied.join("FETCH_HEAD").exists());
    };
    same("created").await;
    assert_eq!(git(&copied, &["symbolic-ref", "HEAD"]), "refs/heads/side");
    assert_eq!(git(&copied, &["config", "gitlab.fullpath"]), "a/b");
    assert!(!fs::read_to_string(copied.join("config")).unwrap().contains("false"), "programs are not copied");
    assert!(copied.join("custom_hooks/pre-receive.d/check").exists());

    let third = commit(&path, None, "unrelated");
    git(&path, &["update-ref", "refs/heads/main", &third]);
    git(&path, &["update-ref", "-d", "refs/tags/v1"]);
    git(&path, &["symbolic-ref", "HEAD", "refs/heads/main"]);
    fs::remove_dir_all(path.join("custom_hooks")).unwrap();
    same("forced, pruned, head moved").await;
    assert_eq!(git(&copied, &["symbolic-ref", "HEAD"]), "refs/heads/main");
    assert!(!copied.join("custom_hooks").exists());

    git(&path, &["update-ref", "-d", "refs/heads/side"]);
    git(&path, &["update-ref", "refs/heads/side/way", &third]);
    same("a branch became a directory").await;
    same("nothing to do").await;

    fs::remove_dir_all(copied.join("refs")).unwrap();
    same("the replica was broken").await;
    git(&copied, &["fsck"]);
    source.stop().await;
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_repository_can_be_replicated() {
    let (source, target) = (TestNode::start_named("one").await, TestNode::start_named("two").await);
    source.create("a.git").await;
    replicate(&source, &target, "a.git").await.unwrap();
    assert_eq!(target.checksum(&target.named("a.git")).await, "0".repeat(40));
}

#[tokio::test(flavor = "multi_thread")]
async fn replication_refuses_what_gitaly_refuses() {
    let (source, target) = (TestNode::start_named("one").await, TestNode::start_named("two").await);
    let absent = replicate(&source, &target, "none.git").await.unwrap_err();
    assert_eq!((absent.code(), absent.message()), (Code::NotFound, "invalid source repository"));
    assert!(!target.path("none.git").exists());

    let request = |source: Option<Repository>| ReplicateRepositoryRequest {
        repository: Some(target.named("a.git")),
        source,
        ..ReplicateRepositoryRequest::default()
    };
    let mut client = target.repositories();
    let unset = client.replicate_repository(request(None)).await.unwrap_err();
    let expected = (Code::InvalidArgument, "source repository cannot be empty");
    assert_eq!((unset.code(), unset.message()), expected);
    let own = client.replicate_repository(request(Some(target.named("b.git")))).await.unwrap_err();
    let expected = (Code::InvalidArgument, "repository and source have the same storage");
    assert_eq!((own.code(), own.message()), expected);
    let nowhere = client.replicate_repository(request(Some(source.named("b.git")))).await.unwrap_err();
    assert_eq!((nowhere.code(), nowhere.message()), (Code::Internal, "empty metadata"));
    source.create_with_commits("a.git").await;
    source.stop().await;
    let dead = TestNode::start_named("one").await;
    let message = with_servers(request(Some(dead.named("a.git"))), &[&dead]);
    dead.stop().await;
    assert_eq!(client.replicate_repository(message).await.unwrap_err().code(), Code::Unavailable);
    assert!(!target.path("a.git").exists() && !target.path("a.git.lock").exists());
}

async fn replicate_as(attempt: i64, from: &TestNode, to: &TestNode, path: &str) -> Result<(), Status> {
    let message = ReplicateRepositoryRequest {
        repository: Some(to.named(path)),
        source: Some(from.named(path)),
        ..ReplicateRepositoryRequest::default()
    };
    let mut request = with_servers(message, &[from]);
    request.metadata_mut().insert("tabularium-copy-attempt", attempt.to_string().parse().unwrap());
    to.repositories().replicate_repository(request).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_comes_late_or_twice_undoes_nothing() {
    let (source, target) = (TestNode::start_named("one").await, TestNode::start_named("two").await);
    source.create_with_commits("a.git").await;
    let (path, copied) = (source.path("a.git"), target.path("a.git"));
    replicate_as(20, &source, &target, "a.git").await.unwrap();
    let written = commit(&copied, None, "written since");
    git(&copied, &["update-ref", "refs/heads/main", &written]);
    for late in [19, 20] {
        let refused = replicate_as(late, &source, &target, "a.git").await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert_eq!(refused.message(), format!("copy attempt {late} is overtaken by attempt 20"));
    }
    assert_eq!(git(&copied, &["rev-parse", "refs/heads/main"]), written);
    git(&copied, &["fsck"]);
    replicate_as(21, &source, &target, "a.git").await.unwrap();
    assert_eq!(git(&path, &["show-ref"]), git(&copied, &["show-ref"]));
    let odd = replicate_as(-3, &source, &target, "a.git").await.unwrap_err();
    assert_eq!(odd.code(), Code::InvalidArgument);
}

/// A listener that takes connections and says nothing.
async fn silent() -> (tokio::net::TcpListener, String) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    (listener, address)
}

/// A copy onto `to` whose source never answers, with number 5.
fn hanging(from: &TestNode, to: &TestNode, source: &str) -> tonic::Request<ReplicateRepositoryRequest> {
    let message = ReplicateRepositoryRequest {
        repository: Some(to.named("a.git")),
        source: Some(from.named("a.git")),
        ..ReplicateRepositoryRequest::default()
    };
    let servers = STANDARD.encode(format!(r#"{{"one":{{"address":"{source}","token":""}}}}"#));
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("gitaly-servers", servers.parse().unwrap());
    request.metadata_mut().insert("tabularium-copy-attempt", "5".parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_copy_cuts_off_the_one_that_hangs() {
    let (source, target) = (TestNode::start_named("one").await, TestNode::start_named("two").await);
    source.create_with_commits("a.git").await;
    let (_silent, address) = silent().await;
    let mut client = target.repositories();
    let hanging = client.replicate_repository(hanging(&source, &target, &address));
    let later = async {
        // Until the one that hangs has arrived, a later one finds nothing to cut off and is simply done.
        for attempt in 6.. {
            replicate_as(attempt, &source, &target, "a.git").await.unwrap();
        }
    };
    let refused = tokio::select! {
        refused = hanging => refused.unwrap_err(),
        () = later => unreachable!("goes on for ever"),
        () = tokio::time::sleep(PATIENCE) => panic!("the copy hangs"),
    };
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().starts_with("copy attempt 5 is overtaken by"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_are_cut_off_and_refused_when_the_replica_is_fenced() {
    let (source, target) = (TestNode::start_named("one").await, TestNode::start_named("two").await);
    source.create_with_commits("a.git").await;
    replicate_as(1, &source, &target, "a.git").await.unwrap();
    let fence = async |attempt: i64| {
        let request = FenceCopiesRequest { repository: Some(target.named("a.git")), copy_attempt: attempt };
        ReplicaServiceClient::new(target.channel()).fence_copies(request).await
    };
    let (silent, address) = silent().await;
    let mut client = target.repositories();
    let hanging = client.replicate_repository(hanging(&source, &target, &address));
    let fencing = async {
        // It asks its source, so it has arrived.
        let _asking = silent.accept().await.unwrap();
        fence(7).await.unwrap();
    };
    let (refused, ()) =
        tokio::time::timeout(PATIENCE, async { tokio::join!(hanging, fencing) }).await.unwrap();
    assert!(refused.unwrap_err().message().starts_with("copy attempt 5 is overtaken by"));

    let written = commit(&target.path("a.git"), None, "written since");
    git(&target.path("a.git"), &["update-ref", "refs/heads/main", &written]);
    for late in [5, 6, 7] {
        let refused = replicate_as(late, &source, &target, "a.git").await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    }
    assert_eq!(git(&target.path("a.git"), &["rev-parse", "refs/heads/main"]), written);
    for low in [6, 7] {
        assert_eq!(fence(low).await.unwrap_err().code(), Code::Aborted);
    }
    assert_eq!(fence(0).await.unwrap_err().code(), Code::InvalidArgument);
    replicate_as(8, &source, &target, "a.git").await.unwrap();
    assert_ne!(git(&target.path("a.git"), &["rev-parse", "refs/heads/main"]), written);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_has_branches_and_tags_only() {
    let (source, target) = (TestNode::start_named("one").await, TestNode::start_named("two").await);
    let original = source.create_with_commits("a.git").await;
    git(&source.path("a.git"), &["update-ref", "refs/keep-around/1", "refs/heads/side"]);
    let fork = |path: &str, revision: &str| CreateForkRequest {
        repository: Some(target.named(path)),
        source_repository: Some(original.clone()),
        revision: revision.into(),
    };
    let mut client = target.repositories();
    client.create_fork(with_servers(fork("all.git", ""), &[&source])).await.unwrap();
    let refs = git(&target.path("all.git"), &["for-each-ref", "--format=%(refname)"]);
    assert_eq!(refs, "refs/heads/main\nrefs/heads/side\nrefs/tags/v1");
    client.create_fork(with_servers(fork("one.git", "refs/heads/side"), &[&source])).await.unwrap();
    assert_eq!(git(&target.path("one.git"), &["for-each-ref", "--format=%(refname)"]), "refs/heads/side");
    assert_eq!(git(&target.path("one.git"), &["symbolic-ref", "HEAD"]), "refs/heads/side");
    let tag =
        client.create_fork(with_servers(fork("tag.git", "refs/tags/v1"), &[&source])).await.unwrap_err();
    assert_eq!(
        (tag.code(), tag.message()),
        (Code::InvalidArgument, "creating fork: reference is not a branch")
    );
    let none = client.create_fork(with_servers(fork("none.git", "refs/heads/none"), &[&source])).await;
    assert_eq!(none.unwrap_err().code(), Code::Internal);
    assert!(!target.path("none.git").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_follows_its_remote() {
    let (home, mirror) = (TestNode::start_named("home").await, TestNode::start_named("mirror").await);
    home.create_with_commits("a.git").await;
    let (path, copy) = (home.path("a.git"), mirror.path("a.git"));
    mirror.create("a.git").await;
    let url = format!("{}/a.git", bridge::serve(&home, Some("Bearer geo")).await);
    let request = |authorization: &str| FetchRemoteRequest {
        repository: Some(mirror.named("a.git")),
        force: true,
        check_tags_changed: true,
        timeout: 60,
        remote_params: Some(Remote {
            url: url.clone(),
            http_authorization_header: authorization.to_owned(),
            mirror_refmaps: vec!["all_refs".into()],
            ..Remote::default()
        }),
        ..FetchRemoteRequest::default()
    };
    let mut client = mirror.repositories();
    let refused = client.fetch_remote(request("Bearer wrong")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Internal);
    assert!(
        refused.message().starts_with("fetch remote: ") && !refused.message().contains("wrong"),
        "{refused}"
    );
    let fetched = client.fetch_remote(request("Bearer geo")).await.unwrap().into_inner();
    assert!(fetched.tags_changed && fetched.repo_changed);
    assert_eq!(git(&path, &["show-ref"]), git(&copy, &["show-ref"]));
    let again = client.fetch_remote(request("Bearer geo")).await.unwrap().into_inner();
    assert!(!again.tags_changed && !again.repo_changed);
    let third = commit(&path, None, "unrelated");
    git(&path, &["update-ref", "refs/heads/main", &third]);
    git(&path, &["update-ref", "-d", "refs/heads/side"]);
    git(&path, &["update-ref", "refs/heads/side/way", &third]);
    let moved = client.fetch_remote(request("Bearer geo")).await.unwrap().into_inner();
    assert!(!moved.tags_changed && moved.repo_changed);
    assert_eq!(git(&path, &["show-ref"]), git(&copy, &["show-ref"]));

    let mut remotes = RemoteServiceClient::new(mirror.channel());
    git(&path, &["update-ref", "refs/heads/trunk", &third]);
    git(&path, &["symbolic-ref", "HEAD", "refs/heads/trunk"]);
    let root = |url: &str| FindRemoteRootRefRequest {
        repository: Some(mirror.named("a.git")),
        remote_url: url.to_owned(),
        http_authorization_header: "Bearer geo".into(),
        ..FindRemoteRootRefRequest::default()
    };
    let found = remotes.find_remote_root_ref(root(&url)).await.unwrap().into_inner();
    assert_eq!(found.r#ref, "trunk");
    let missing = remotes.find_remote_root_ref(root(&url.replace("a.git", "none.git"))).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    let exists = FindRemoteRepositoryRequest { remote: url.clone(), storage_name: mirror.storage.clone() };
    let unauthorised = remotes.find_remote_repository(exists).await.unwrap().into_inner();
    assert!(!unauthorised.exists);
}

#[tokio::test]
async fn remotes_on_this_machine_are_refused() {
    let node = TestNode::start().await;
    node.create("a.git").await;
    let mut client = node.repositories();
    let root = node.root();
    for url in [
        format!("file://{}/a.git", root.display()),
        format!("{}/a.git", root.display()),
        "ext::sh -c id".into(),
    ] {
        let request = FetchRemoteRequest {
            repository: Some(node.named("a.git")),
            remote_params: Some(Remote { url: url.clone(), ..Remote::default() }),
            ..FetchRemoteRequest::default()
        };
        assert_eq!(client.fetch_remote(request).await.unwrap_err().code(), Code::InvalidArgument, "{url}");
    }
    let request = |remote_params| FetchRemoteRequest {
        repository: Some(node.named("a.git")),
        remote_params,
        ..FetchRemoteRequest::default()
    };
    let missing = client.fetch_remote(request(None)).await.unwrap_err();
    assert_eq!((missing.code(), missing.message()), (Code::InvalidArgument, "missing remote params"));
    let blank = client
        .fetch_remote(request(Some(Remote { url: " ".into(), ..Remote::default() })))
        .await
        .unwrap_err();
    assert_eq!((blank.code(), blank.message()), (Code::InvalidArgument, "blank or empty remote URL"));
}
