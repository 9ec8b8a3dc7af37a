//! Changes that users make through a web interface: GitLab is asked about them too.

use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use tabularium_proto::gitaly::{
    AccessCheckError, Repository, UserCommitFilesAction, UserCommitFilesActionHeader, UserCommitFilesError,
    UserCommitFilesRequest, UserCommitFilesRequestHeader, UserCreateBranchRequest, UserCreateTagError,
    UserCreateTagRequest, UserDeleteBranchError, UserDeleteBranchRequest, UserDeleteTagRequest,
    UserMergeBranchError, UserMergeBranchRequest, UserUpdateBranchRequest,
    user_commit_files_action::UserCommitFilesActionPayload, user_commit_files_error,
    user_commit_files_request::UserCommitFilesRequestPayload, user_create_tag_error,
    user_delete_branch_error, user_merge_branch_error,
};
use tonic::{Code, Status};

use super::{Gitlab, Reply, config};
use crate::{
    harness::{TestNode, git},
    operations::{assert_no_quarantine, hook, moment, operations, user},
    seed::{self, all, detail, id},
};

async fn asking(gitlab: &Gitlab) -> (TestNode, Repository, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let to_gitlab = config(&gitlab.serve().await, directory.path());
    let node = TestNode::start_with(move |config| config.gitlab = Some(to_gitlab)).await;
    let repository = seed::repository(&node, "a.git").await;
    let repository = Repository { gl_repository: "project-7".into(), ..repository };
    (node, repository, directory)
}

fn create_branch(repository: &Repository) -> UserCreateBranchRequest {
    UserCreateBranchRequest {
        repository: Some(repository.clone()),
        branch_name: b"new".to_vec(),
        user: Some(user()),
        start_point: b"main".to_vec(),
    }
}

fn create_tag(repository: &Repository) -> UserCreateTagRequest {
    UserCreateTagRequest {
        repository: Some(repository.clone()),
        tag_name: b"v9".to_vec(),
        user: Some(user()),
        target_revision: b"main".to_vec(),
        message: b"nine".to_vec(),
        timestamp: Some(moment()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gitlab_sees_what_a_user_makes_before_it_allows_it() {
    let path: Arc<OnceLock<std::path::PathBuf>> = Arc::default();
    let looking = Arc::clone(&path);
    let gitlab = Gitlab::deciding(move |call| {
        if call.endpoint() != "allowed" {
            return None;
        }
        let env: Value = serde_json::from_str(call.body["env"].as_str().unwrap()).unwrap();
        let directory = env["GIT_OBJECT_DIRECTORY_RELATIVE"].as_str().unwrap();
        assert!(directory.starts_with("../+gitaly/tmp/quarantine-"), "{directory}");
        assert_eq!(env["GIT_ALTERNATE_OBJECT_DIRECTORIES_RELATIVE"], json!(["objects"]));
        // The tag is there and nowhere else.
        let repository = looking.get().unwrap();
        let tag = call.body["changes"].as_str().unwrap().split(' ').nth(1).unwrap().to_owned();
        let object = format!("{}/{}", &tag[..2], &tag[2..]);
        let allowed = repository.join(directory).join(&object).exists()
            && !repository.join("objects").join(object).exists();
        Some(Reply::json(200, &json!({"status": allowed, "message": "it is not there"})))
    });
    let (node, repository, _directory) = asking(&gitlab).await;
    path.set(node.path("a.git")).unwrap();
    operations(&node).user_create_tag(create_tag(&repository)).await.unwrap();
    let calls = gitlab.calls();
    assert_eq!(gitlab.endpoints(), ["allowed", "pre_receive", "post_receive"]);
    let changes = format!("{} {} refs/tags/v9\n", "0".repeat(40), id(&node, "a.git", "v9"));
    for (key, value) in [
        ("protocol", "web"),
        ("gl_repository", "project-7"),
        ("user_id", "1"),
        ("relative_path", "a.git"),
        ("changes", changes.as_str()),
    ] {
        assert_eq!(calls[0].body[key], value, "{key}");
    }
    let told = json!({
        "gl_repository": "project-7", "identifier": "user-1", "changes": changes, "push_options": null,
    });
    assert_eq!(calls[2].body, told);
    node.stop().await;
}

fn is_denied(error: &AccessCheckError, changes: &str) {
    assert_eq!((error.error_message.as_str(), error.protocol.as_str()), ("not you", "web"));
    assert_eq!(error.user_id, "user-1");
    let told = String::from_utf8_lossy(&error.changes);
    assert!(told.ends_with(&format!(" {changes}\n")), "{told}");
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>) -> Status {
    answer.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_has_the_form_that_gitlab_expects() {
    let gitlab = Gitlab::answering("allowed", Reply::json(401, &json!({"message": "not you"})));
    let (node, repository, _directory) = asking(&gitlab).await;
    let before = git(&node.path("a.git"), &["for-each-ref"]);
    let mut client = operations(&node);
    let is = |status: &Status, code: Code, text: &str| {
        assert_eq!((status.code(), status.message()), (code, text));
    };
    let running = "running pre-receive hooks: GitLab: not you";

    let status = refused(client.user_create_branch(create_branch(&repository)).await);
    is(&status, Code::Internal, running);

    let update = UserUpdateBranchRequest {
        repository: Some(repository.clone()),
        branch_name: b"main".to_vec(),
        user: Some(user()),
        newrev: id(&node, "a.git", "v1").into(),
        oldrev: id(&node, "a.git", "main").into(),
    };
    let status = refused(client.user_update_branch(update).await);
    is(&status, Code::FailedPrecondition, "Could not update main. Please refresh and try again.");

    let delete = UserDeleteBranchRequest {
        repository: Some(repository.clone()),
        branch_name: b"side".to_vec(),
        user: Some(user()),
        expected_old_oid: String::new(),
    };
    let status = refused(client.user_delete_branch(delete).await);
    is(&status, Code::PermissionDenied, &format!("deletion denied by access checks: {running}"));
    let error = detail::<UserDeleteBranchError>(&status, "UserDeleteBranchError").error;
    let Some(user_delete_branch_error::Error::AccessCheck(error)) = error else { panic!("{error:?}") };
    is_denied(&error, "refs/heads/side");

    let status = refused(client.user_create_tag(create_tag(&repository)).await);
    is(&status, Code::PermissionDenied, &format!("reference update denied by access checks: {running}"));
    let error = detail::<UserCreateTagError>(&status, "UserCreateTagError").error;
    let Some(user_create_tag_error::Error::AccessCheck(error)) = error else { panic!("{error:?}") };
    is_denied(&error, "refs/tags/v9");

    let delete = UserDeleteTagRequest {
        repository: Some(repository.clone()),
        tag_name: b"v1".to_vec(),
        user: Some(user()),
        expected_old_oid: String::new(),
    };
    is(&refused(client.user_delete_tag(delete).await), Code::Internal, running);

    let header = UserCommitFilesRequestHeader {
        repository: Some(repository.clone()),
        user: Some(user()),
        branch_name: b"main".to_vec(),
        commit_message: b"more".to_vec(),
        timestamp: Some(moment()),
        ..Default::default()
    };
    let action = UserCommitFilesActionHeader { file_path: b"more".to_vec(), ..Default::default() };
    let action = UserCommitFilesAction {
        user_commit_files_action_payload: Some(UserCommitFilesActionPayload::Header(action)),
    };
    let payloads =
        [UserCommitFilesRequestPayload::Header(header), UserCommitFilesRequestPayload::Action(action)];
    let requests =
        payloads.map(|payload| UserCommitFilesRequest { user_commit_files_request_payload: Some(payload) });
    let status = refused(client.user_commit_files(futures::stream::iter(requests)).await);
    is(&status, Code::PermissionDenied, &format!("denied by access checks: {running}"));
    let error = detail::<UserCommitFilesError>(&status, "UserCommitFilesError").error;
    let Some(user_commit_files_error::Error::AccessCheck(error)) = error else { panic!("{error:?}") };
    is_denied(&error, "refs/heads/main");

    let first = UserMergeBranchRequest {
        repository: Some(repository.clone()),
        user: Some(user()),
        commit_id: id(&node, "a.git", "side"),
        branch: b"main".to_vec(),
        message: b"merge".to_vec(),
        timestamp: Some(moment()),
        ..Default::default()
    };
    let second = UserMergeBranchRequest { apply: true, ..Default::default() };
    let status = refused(all(client.user_merge_branch(futures::stream::iter([first, second])).await).await);
    is(&status, Code::PermissionDenied, "GitLab: not you");
    let error = detail::<UserMergeBranchError>(&status, "UserMergeBranchError").error;
    let Some(user_merge_branch_error::Error::AccessCheck(error)) = error else { panic!("{error:?}") };
    is_denied(&error, "refs/heads/main");

    assert_eq!(git(&node.path("a.git"), &["for-each-ref"]), before);
    assert_eq!(gitlab.endpoints(), vec!["allowed"; 7]);
    assert_no_quarantine(&node).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_denial_is_a_failure() {
    let gitlab = Gitlab::answering("pre_receive", Reply::json(500, &json!({"message": "Redis is down"})));
    let (node, repository, _directory) = asking(&gitlab).await;
    let status = refused(operations(&node).user_create_branch(create_branch(&repository)).await);
    let text = "running pre-receive hooks: calling pre_receive endpoint: http post to gitlab api /pre_receive endpoint: Redis is down";
    assert_eq!((status.code(), status.message()), (Code::Internal, text));
    let unnamed = Repository { gl_repository: String::new(), ..repository };
    let status = refused(operations(&node).user_create_branch(create_branch(&unnamed)).await);
    let text = "running pre-receive hooks: repository not set";
    assert_eq!((status.code(), status.message()), (Code::Internal, text));
    assert_eq!(gitlab.endpoints(), ["allowed", "pre_receive"]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_too_often_may_ask_later() {
    let gitlab = Gitlab::answering("allowed", Reply::json(429, &json!({"message": "Retry later"})));
    let (node, repository, _directory) = asking(&gitlab).await;
    let text = "running pre-receive hooks: GitLab: rate limited";
    let created = operations(&node).user_create_branch(create_branch(&repository)).await;
    let deleted = operations(&node)
        .user_delete_branch(UserDeleteBranchRequest {
            repository: Some(repository.clone()),
            branch_name: b"side".to_vec(),
            user: Some(user()),
            ..UserDeleteBranchRequest::default()
        })
        .await;
    for status in [refused(created), refused(deleted)] {
        assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, text));
    }
    assert_eq!(
        git(&node.path("a.git"), &["for-each-ref", "--format=%(refname)", "refs/heads"]),
        "refs/heads/main\nrefs/heads/side"
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_been_made_stays_whatever_gitlab_says() {
    let gitlab = Gitlab::answering("post_receive", Reply::json(500, &json!({"message": "later"})));
    let (node, repository, _directory) = asking(&gitlab).await;
    let order = node.path("a.git").join("order");
    hook(&node, "pre-receive", &format!("echo before >> {}", order.display()));
    hook(&node, "post-receive", &format!("echo after >> {}", order.display()));
    operations(&node).user_create_branch(create_branch(&repository)).await.unwrap();
    assert_eq!(id(&node, "a.git", "new"), id(&node, "a.git", "main"));
    assert_eq!(gitlab.endpoints(), ["allowed", "pre_receive", "post_receive"]);
    assert_eq!(std::fs::read_to_string(order).unwrap(), "before\n", "hooks come after GitLab");
    node.stop().await;
}
