//! What a replica holds, told when no reference moves.

use std::{fs, time::Duration};

use tabularium_proto::{
    gitaly::{Repository, WriteRefRequest, vote_transaction_request::Phase},
    node::{QuiesceRequest, QuiesceResponse, replica_service_client::ReplicaServiceClient},
};
use tonic::{Code, Status};

use super::router::{Answer, Router};
use crate::harness::{TestNode, eventually, git};

async fn quiesce(
    node: &TestNode,
    repository: &Repository,
    patience: Duration,
) -> Result<QuiesceResponse, Status> {
    let patience_milliseconds = u32::try_from(patience.as_millis()).unwrap();
    let request = QuiesceRequest { repository: Some(repository.clone()), patience_milliseconds };
    ReplicaServiceClient::new(node.channel()).quiesce(request).await.map(tonic::Response::into_inner)
}

async fn digest(node: &TestNode, repository: &Repository) -> Vec<u8> {
    let held = quiesce(node, repository, Duration::from_secs(10)).await.unwrap();
    assert!(held.exists);
    held.digest.to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_replicas_have_equal_digests_and_others_do_not() {
    let (one, other) = (TestNode::start_named("one").await, TestNode::start_named("other").await);
    let repositories = (one.create_with_commits("a.git").await, other.create_with_commits("a.git").await);
    let compare = async || (digest(&one, &repositories.0).await, digest(&other, &repositories.1).await);
    let (first, second) = compare().await;
    assert_eq!(first, second);
    let (path, copy) = (one.path("a.git"), other.path("a.git"));
    git(&path, &["pack-refs", "--all"]);
    git(&path, &["repack", "-adq"]);
    git(&path, &["config", "core.sshCommand", "false"]);
    assert_eq!(digest(&one, &repositories.0).await, first, "packing and what is the disk's own do not count");

    let mut seen = vec![first];
    let mut same_change = async |what: &str, change: &dyn Fn(&std::path::Path)| {
        change(&path);
        let (changed, unchanged) = compare().await;
        assert!(changed != unchanged && !seen.contains(&changed), "{what}");
        seen.push(changed.clone());
        change(&copy);
        assert_eq!(digest(&other, &repositories.1).await, changed, "{what}");
    };
    same_change("a reference", &|path| drop(git(path, &["update-ref", "refs/x/y", "refs/heads/main"]))).await;
    same_change("HEAD", &|path| drop(git(path, &["symbolic-ref", "HEAD", "refs/heads/side"]))).await;
    same_change("a setting", &|path| drop(git(path, &["config", "gitlab.fullpath", "a/b"]))).await;
    same_change("a hook", &|path| {
        fs::create_dir(path.join("custom_hooks")).unwrap();
        fs::write(path.join("custom_hooks/update"), "x").unwrap();
    })
    .await;
    let absent = quiesce(&one, &one.named("none.git"), Duration::from_secs(1)).await.unwrap();
    assert!(!absent.exists && absent.digest.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_was_begun_is_waited_for() {
    let router = Router::deciding(|vote| match vote.phase {
        Phase::PreparedPhase => Answer::Silence,
        _ => Answer::Commit,
    });
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let before = digest(&node, &repository).await;
    let mut client = tabularium_proto::gitaly::repository_service_client::RepositoryServiceClient::new(
        router.client(&node, true),
    );
    let request = WriteRefRequest {
        repository: Some(repository.clone()),
        r#ref: b"refs/heads/new".to_vec(),
        revision: b"main".to_vec(),
        ..Default::default()
    };
    let settling = async {
        eventually("a vote is pending", async || !router.votes(&node).is_empty()).await;
        let impatient = quiesce(&node, &repository, Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(impatient.code(), Code::DeadlineExceeded);
        let patient = digest(&node, &repository);
        let dying = async {
            tokio::task::yield_now().await;
            router.die().await;
        };
        tokio::join!(patient, dying).0
    };
    let (written, after) = tokio::join!(client.write_ref(request), settling);
    assert!(written.is_err());
    assert_eq!(after, before, "the router is lost, and with it the word to go ahead");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_begins_when_no_change_can_come_after_it() {
    let router = Router::deciding(|vote| match vote.phase {
        Phase::PreparedPhase => Answer::Silence,
        _ => Answer::Commit,
    });
    let (source, target) = (TestNode::start_named("one").await, TestNode::start_named("two").await);
    source.create_with_commits("a.git").await;
    crate::copies::replicate(&source, &target, "a.git").await.unwrap();
    let mut client = tabularium_proto::gitaly::repository_service_client::RepositoryServiceClient::new(
        router.client(&target, true),
    );
    let request = WriteRefRequest {
        repository: Some(target.named("a.git")),
        r#ref: b"refs/heads/new".to_vec(),
        revision: b"main".to_vec(),
        ..Default::default()
    };
    let settling = async {
        eventually("a vote is pending", async || !router.votes(&target).is_empty()).await;
        let mut copying = Box::pin(crate::copies::replicate(&source, &target, "a.git"));
        let early = tokio::time::timeout(Duration::from_millis(300), &mut copying).await;
        assert!(early.is_err(), "the copy waits for what the router may still say");
        router.die().await;
        copying.await.unwrap();
    };
    let (written, ()) = tokio::join!(client.write_ref(request), settling);
    assert!(written.is_err());
}
