//! Upkeep beside everything else that goes on in a repository.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    sync::atomic::{AtomicBool, Ordering},
};

use tabularium_proto::gitaly::{
    OptimizeRepositoryRequest, User, UserCommitFilesAction, UserCommitFilesActionHeader,
    UserCommitFilesRequest, UserCommitFilesRequestHeader, operation_service_client::OperationServiceClient,
    optimize_repository_request::Strategy,
    user_commit_files_action::UserCommitFilesActionPayload as ActionPayload,
    user_commit_files_request::UserCommitFilesRequestPayload as Payload,
};

use crate::harness::{TestNode, git_async};

/// Rounds of upkeep.
const ROUNDS: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn upkeep_loses_nothing_that_is_written_meanwhile_and_runs_no_hooks() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let path = node.path("a.git");
    fs::create_dir(path.join("hooks")).unwrap();
    for name in ["pre-auto-gc", "reference-transaction", "post-rewrite", "pre-receive", "update"] {
        let file = path.join("hooks").join(name);
        fs::write(&file, "#!/bin/sh\ntouch \"$GIT_DIR/hook-ran\"\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let commit = async |number: usize| {
        let header = UserCommitFilesRequestHeader {
            repository: Some(repository.clone()),
            user: Some(User { name: "Jane".into(), email: "j@example.com".into(), ..Default::default() }),
            branch_name: format!("branch-{}", number % 7).into(),
            start_branch_name: b"main".to_vec(),
            commit_message: format!("number {number}").into(),
            force: true,
            ..Default::default()
        };
        let request = |payload| UserCommitFilesRequest { user_commit_files_request_payload: Some(payload) };
        let action = |payload| {
            request(Payload::Action(UserCommitFilesAction {
                user_commit_files_action_payload: Some(payload),
            }))
        };
        let file = UserCommitFilesActionHeader { file_path: b"d/file".to_vec(), ..Default::default() };
        let messages = [
            request(Payload::Header(header)),
            action(ActionPayload::Header(file)),
            action(ActionPayload::Content(format!("content {number}").into())),
        ];
        let call =
            OperationServiceClient::new(node.channel()).user_commit_files(tokio_stream::iter(messages)).await;
        call.unwrap().into_inner().branch_update.unwrap().commit_id
    };
    let done = AtomicBool::new(false);
    let write = async {
        let mut made = Vec::new();
        while !done.load(Ordering::Relaxed) || made.len() < ROUNDS {
            made.push(commit(made.len()).await);
        }
        made
    };
    let keep_up = async {
        for _ in 0..ROUNDS {
            let request = OptimizeRepositoryRequest {
                repository: Some(repository.clone()),
                strategy: Strategy::Eager.into(),
            };
            node.repositories().optimize_repository(request).await.unwrap();
        }
        done.store(true, Ordering::Relaxed);
    };
    let (made, ()) = tokio::join!(write, keep_up);
    // Also those that no branch points to any more.
    for id in &made {
        git_async(&path, &["rev-list", "--objects", "--quiet", id]).await;
    }
    git_async(&path, &["fsck", "--full", "--strict"]).await;
    assert!(!path.join("hook-ran").exists());
    node.stop().await;
}
