//! RewriteHistory casts the votes that Gitaly's nodes cast, in their order, so that both can keep a repository together.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use sha1::{Digest as _, Sha1};
use tabularium_proto::gitaly::{
    Repository, RewriteHistoryRequest, cleanup_service_client::CleanupServiceClient,
    vote_transaction_request::Phase,
};
use tonic::{Code, Status};

use super::router::{Answer, Router};
use crate::{
    harness::{Client, TestNode, commit, git},
    seed::{self, id, refusal},
};

async fn rewrite(client: Client, repository: &Repository, redaction: &str) -> Result<(), Status> {
    let request = RewriteHistoryRequest {
        repository: Some(repository.clone()),
        redactions: vec![redaction.into()],
        ..Default::default()
    };
    CleanupServiceClient::new(client).rewrite_history(tokio_stream::once(request)).await.map(drop)
}

/// A vote on these lines, as git tells its hooks of them.
fn on(lines: &str) -> Vec<u8> {
    Sha1::digest(lines).to_vec()
}

/// What git tells its hooks of a fetch like the node's: the order, and what is said of `HEAD` and of tags, is git's.
fn told(repository: &Path, from: &Path) -> String {
    let hooks = tempfile::tempdir().unwrap();
    let (hook, updates) = (hooks.path().join("reference-transaction"), hooks.path().join("updates"));
    fs::write(&hook, format!("#!/bin/sh\n[ $1 != prepared ] || cat > '{}'\n", updates.display())).unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    let setting = format!("core.hooksPath={}", hooks.path().display());
    let options = ["--prune", "--no-tags", "--force", "--atomic", "--no-show-forced-updates", "--quiet"];
    let fetch =
        [&["-c", &setting, "fetch"], &options[..], &[from.to_str().unwrap(), "+refs/*:refs/*"]].concat();
    git(repository, &fetch);
    // The last one: packed references make git speak of those that go twice.
    fs::read_to_string(updates).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_votes_are_on_head_and_then_on_all_references() {
    let node = TestNode::start_named("one").await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    git(&path, &["update-ref", "refs/tags/blob", &id(&node, "a.git", "main:README")]);
    git(&path, &["update-ref", "refs/tags/same", &commit(&path, None, "same")]);
    git(&path, &["pack-refs", "--all"]);
    let main = id(&node, "a.git", "main");
    let copy = tempfile::tempdir().unwrap();
    git(copy.path(), &["clone", "--quiet", "--mirror", path.to_str().unwrap(), "."]);

    let router = Router::agreeing();
    rewrite(router.client(&node, true), &repository, "hello").await.unwrap();
    let zero = "0".repeat(40);
    let head = on(&format!("{zero} ref:refs/heads/main HEAD\n"));
    let lines = told(copy.path(), &path);
    let moved = format!("{main} {} refs/heads/main\n", id(&node, "a.git", "main"));
    let gone = format!("{zero} {zero} refs/tags/blob\n");
    assert!(lines.contains(&moved) && lines.contains(&gone) && !lines.contains("refs/tags/same"), "{lines}");
    let all = on(&lines);
    let expected = [
        (Phase::PreparedPhase, head.clone()),
        (Phase::CommittedPhase, head.clone()),
        (Phase::PreparedPhase, all.clone()),
        (Phase::CommittedPhase, all),
    ];
    let votes = router.votes(&node).into_iter().map(|vote| (vote.phase, vote.ballot));
    assert_eq!(votes.collect::<Vec<_>>(), expected);

    // Where nothing is to be changed, the write is recorded all the same.
    let router = Router::agreeing();
    rewrite(router.client(&node, true), &repository, "nowhere").await.unwrap();
    assert_eq!(router.phases(&node), "PC");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_came_out_differently_elsewhere_is_not_taken() {
    let node = TestNode::start_named("one").await;
    let repository = seed::repository(&node, "a.git").await;
    let before = git(&node.path("a.git"), &["show-ref", "--head"]);
    let head = on(&format!("{} ref:refs/heads/main HEAD\n", "0".repeat(40)));
    let router =
        Router::deciding(move |vote| if vote.ballot == head { Answer::Commit } else { Answer::Abort });
    let refused = refusal(rewrite(router.client(&node, false), &repository, "hello").await);
    assert_eq!(refused, (Code::Aborted, "transaction was aborted".to_owned()));
    assert_eq!(router.phases(&node), "PCP");
    assert_eq!(git(&node.path("a.git"), &["show-ref", "--head"]), before);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_cannot_rewrite_does_not_vote() {
    let node = TestNode::start_named("one").await;
    let empty = node.create("empty.git").await;
    let router = Router::agreeing();
    let refused = refusal(rewrite(router.client(&node, true), &empty, "hello").await);
    let text = "calculate initial checksum: git-show-ref failed with exit code 1";
    assert_eq!(refused, (Code::Internal, text.to_owned()));
    assert_eq!(router.phases(&node), "");
    node.stop().await;
}
