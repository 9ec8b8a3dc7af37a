//! OperationService: what users change through a web interface.

use std::{fs, os::unix::fs::PermissionsExt as _};

use tabularium_proto::gitaly::{
    Repository, User, UserCreateBranchError, UserCreateBranchRequest, UserCreateTagError,
    UserCreateTagRequest, UserDeleteBranchError, UserDeleteBranchRequest, UserDeleteTagRequest,
    UserMergeBranchError, UserMergeBranchRequest, UserUpdateBranchRequest, custom_hook_error::HookType,
    operation_service_client::OperationServiceClient, user_create_branch_error, user_create_tag_error,
    user_delete_branch_error, user_merge_branch_error,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::{
    harness::{Client, TestNode, eventually, git},
    seed::{self, detail, id, invalid, refusal},
};

pub(crate) fn operations(node: &TestNode) -> OperationServiceClient<Client> {
    OperationServiceClient::new(node.channel())
}

pub(crate) fn user() -> User {
    User {
        gl_id: "user-1".into(),
        name: "Jane Doe".into(),
        email: "jane@example.com".into(),
        gl_username: "jane".into(),
        timezone: "Europe/Berlin".into(),
    }
}

/// A moment in summer.
pub(crate) fn moment() -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: 1_690_000_000, nanos: 0 }
}

/// Installs a custom hook.
pub(crate) fn hook(node: &TestNode, path: &str, script: &str) {
    let file = node.path("a.git").join("custom_hooks").join(path);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
}

/// No quarantine is left behind, whatever happened.
pub(crate) async fn assert_no_quarantine(node: &TestNode) {
    let temporary = node.root().join("+gitaly/tmp");
    eventually("no quarantine is left", async || {
        let mut entries = fs::read_dir(&temporary).unwrap().flatten();
        !entries.any(|entry| entry.file_name().to_string_lossy().starts_with("quarantine-"))
    })
    .await;
}

fn read(node: &TestNode, revision: &str) -> Option<String> {
    let path = node.path("a.git");
    let output =
        crate::harness::git_command(&path).args(["rev-parse", "-q", "--verify", revision]).output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

#[tokio::test]
async fn a_branch_is_created_moved_and_deleted() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (first, third) = (id(&node, "a.git", "v1"), id(&node, "a.git", "main"));
    let create = async |branch: &str, start: &str| {
        let request = UserCreateBranchRequest {
            repository: Some(repository.clone()),
            branch_name: branch.into(),
            user: Some(user()),
            start_point: start.into(),
        };
        operations(&node)
            .user_create_branch(request)
            .await
            .map(|response| response.into_inner().branch.unwrap())
    };
    let branch = create("new/one", "v1").await.unwrap();
    assert_eq!((branch.name, branch.target_commit.unwrap().id), (b"new/one".to_vec(), first.clone()));
    assert_eq!(read(&node, "refs/heads/new/one"), Some(first.clone()));
    let failed = |text: &str| (Code::FailedPrecondition, text.to_owned());
    assert_eq!(refusal(create("x", "none").await), failed("revspec 'none' not found"));
    assert_eq!(refusal(create("x", "main:README").await), failed("revspec 'main:README' not found"));
    for taken in ["new/one", "new", "new/one/more", "bad..name"] {
        assert_eq!(
            refusal(create(taken, "main").await),
            failed(&format!("Could not update refs/heads/{taken}. Please refresh and try again."))
        );
    }
    assert_eq!(refusal(create("", "main").await), invalid("empty branch name"));
    assert_eq!(refusal(create("x", "").await), invalid("empty start point"));
    let nobody = UserCreateBranchRequest {
        repository: Some(repository.clone()),
        branch_name: b"x".to_vec(),
        start_point: b"main".to_vec(),
        user: None,
    };
    assert_eq!(refusal(operations(&node).user_create_branch(nobody).await), invalid("empty user"));

    let move_to = async |old: &str, new: &str| {
        let request = UserUpdateBranchRequest {
            repository: Some(repository.clone()),
            branch_name: b"new/one".to_vec(),
            user: Some(user()),
            newrev: new.into(),
            oldrev: old.into(),
        };
        operations(&node)
            .user_update_branch(request)
            .await
            .map(|response| response.into_inner().pre_receive_error)
    };
    assert_eq!(
        refusal(move_to(&third, &first).await),
        failed("Could not update new/one. Please refresh and try again.")
    );
    assert_eq!(move_to(&first, &third).await.unwrap(), "");
    assert_eq!(read(&node, "refs/heads/new/one"), Some(third.clone()));
    assert_eq!(refusal(move_to("main", &third).await).0, Code::Internal);
    assert_eq!(refusal(move_to("", &third).await), invalid("empty oldrev"));

    let delete = async |branch: &str, expected: &str| {
        let request = UserDeleteBranchRequest {
            repository: Some(repository.clone()),
            branch_name: branch.into(),
            user: Some(user()),
            expected_old_oid: expected.into(),
        };
        operations(&node).user_delete_branch(request).await
    };
    assert_eq!(refusal(delete("none", "").await), failed("branch not found: \"none\""));
    let status = delete("new/one", &first).await.unwrap_err();
    let text = "reference update failed: Could not update refs/heads/new/one. Please refresh and try again.";
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text));
    let error = detail::<UserDeleteBranchError>(&status, "UserDeleteBranchError").error;
    let Some(user_delete_branch_error::Error::ReferenceUpdate(error)) = error else { panic!("{error:?}") };
    assert_eq!((error.reference_name.as_slice(), error.old_oid), (&b"refs/heads/new/one"[..], first.clone()));
    assert_eq!(error.new_oid, "0".repeat(40));
    assert!(refusal(delete("new/one", "xyz").await).1.starts_with("invalid expected old object ID"));
    assert!(
        refusal(delete("new/one", &"12".repeat(20)).await)
            .1
            .starts_with("cannot resolve expected old object ID")
    );
    delete("new/one", &third).await.unwrap();
    assert_eq!(read(&node, "refs/heads/new/one"), None);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn hooks_see_the_change_and_may_refuse_it() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let repository = Repository { gl_repository: "project-7".into(), ..repository };
    let third = id(&node, "a.git", "main");
    let seen = node.path("a.git").join("seen");
    let log = format!(
        "cat >> {0}; echo \"$@|$GL_ID|$GL_USERNAME|$GL_REPOSITORY|$GL_PROTOCOL\" >> {0}",
        seen.display()
    );
    for name in ["pre-receive.d/1", "update", "post-receive"] {
        hook(&node, name, &log);
    }
    let create = async |branch: &str| {
        let request = UserCreateBranchRequest {
            repository: Some(repository.clone()),
            branch_name: branch.into(),
            user: Some(user()),
            start_point: b"main".to_vec(),
        };
        operations(&node).user_create_branch(request).await
    };
    create("x").await.unwrap();
    let zero = "0".repeat(40);
    let who = "|user-1|jane|project-7|web";
    let line = format!("{zero} {third} refs/heads/x\n{who}\n");
    assert_eq!(fs::read_to_string(&seen).unwrap(), format!("{line}refs/heads/x {zero} {third}{who}\n{line}"));

    // A failing post-receive hook changes nothing: the branch is there.
    hook(&node, "post-receive", "exit 1");
    create("y").await.unwrap();
    assert!(read(&node, "refs/heads/y").is_some());

    hook(&node, "update", "echo out; echo 'not here' >&2; exit 3");
    let status = create("z").await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::PermissionDenied, "creation denied by custom hooks")
    );
    let error = detail::<UserCreateBranchError>(&status, "UserCreateBranchError").error;
    let Some(user_create_branch_error::Error::CustomHook(error)) = error else { panic!("{error:?}") };
    assert_eq!(
        (error.hook_type(), error.stdout.as_slice(), error.stderr.as_slice()),
        (HookType::Update, &b"out\n"[..], &b"not here\n"[..])
    );
    assert_eq!(read(&node, "refs/heads/z"), None);

    hook(&node, "pre-receive", "echo only out; exit 1");
    let delete = UserDeleteBranchRequest {
        repository: Some(repository.clone()),
        branch_name: b"x".to_vec(),
        user: Some(user()),
        expected_old_oid: String::new(),
    };
    let status = operations(&node).user_delete_branch(delete).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::PermissionDenied, "deletion denied by custom hooks: running pre-receive hooks: only out\n")
    );
    let error = detail::<UserDeleteBranchError>(&status, "UserDeleteBranchError").error;
    let Some(user_delete_branch_error::Error::CustomHook(error)) = error else { panic!("{error:?}") };
    assert_eq!(error.hook_type(), HookType::Prereceive);
    let update = UserUpdateBranchRequest {
        repository: Some(repository.clone()),
        branch_name: b"x".to_vec(),
        user: Some(user()),
        newrev: id(&node, "a.git", "v1").into(),
        oldrev: third.clone().into(),
    };
    let answer = operations(&node).user_update_branch(update).await.unwrap().into_inner();
    assert_eq!(answer.pre_receive_error, "only out\n");
    let tag = UserDeleteTagRequest {
        repository: Some(repository.clone()),
        tag_name: b"v1".to_vec(),
        user: Some(user()),
        expected_old_oid: String::new(),
    };
    let answer = operations(&node).user_delete_tag(tag).await.unwrap().into_inner();
    assert_eq!(answer.pre_receive_error, "only out\n");
    assert_eq!(read(&node, "refs/heads/x"), Some(third));
    assert!(read(&node, "refs/tags/v1").is_some());
}

#[tokio::test]
async fn tags_are_created_and_deleted() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let create = async |name: &str, target: &str, message: &str| {
        let request = UserCreateTagRequest {
            repository: Some(repository.clone()),
            tag_name: name.into(),
            user: Some(user()),
            target_revision: target.into(),
            message: message.into(),
            timestamp: Some(moment()),
        };
        operations(&node).user_create_tag(request).await.map(|response| response.into_inner().tag.unwrap())
    };
    let light = create("light", "main", " \n").await.unwrap();
    assert_eq!((light.name.as_slice(), light.id), (&b"light"[..], id(&node, "a.git", "main")));
    assert_eq!(light.target_commit.unwrap().subject, b"third");
    let of_tag = create("of-tag", "v2", "").await.unwrap();
    assert_eq!(of_tag.id, id(&node, "a.git", "v2^{commit}"));
    let annotated = create("annotated", "v2", "Hear, hear\n").await.unwrap();
    assert_eq!((annotated.message.as_slice(), annotated.message_size), (&b"Hear, hear"[..], 10));
    assert_eq!(annotated.target_commit.unwrap().subject, b"second");
    assert_eq!(
        git(&path, &["cat-file", "-p", "annotated"]),
        format!(
            "object {}\ntype tag\ntag annotated\ntagger Jane Doe <jane@example.com> 1690000000 +0200\n\nHear, hear",
            id(&node, "a.git", "v2")
        )
    );
    let blob = create("blob", "main:README", "").await.unwrap();
    assert_eq!(blob.target_commit, None);

    let status = create("v1", "main", "again").await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::AlreadyExists, "tag reference exists already"));
    let error = detail::<UserCreateTagError>(&status, "UserCreateTagError").error;
    let Some(user_create_tag_error::Error::ReferenceExists(error)) = error else { panic!("{error:?}") };
    assert_eq!(
        (error.reference_name.as_slice(), error.oid),
        (&b"refs/tags/v1"[..], id(&node, "a.git", "v1"))
    );
    let failed = |text: &str| (Code::FailedPrecondition, text.to_owned());
    assert_eq!(refusal(create("x", "none", "m").await), failed("revspec 'none' not found"));
    assert_eq!(refusal(create("", "main", "m").await), invalid("empty tag name"));
    assert_eq!(
        refusal(create("a b", "main", "m").await),
        invalid("invalid tag name: revision can't contain whitespace")
    );
    assert_eq!(refusal(create("x", "", "m").await), invalid("empty target revision"));
    assert_eq!(refusal(create("x", "main", "m\0").await), invalid("tag message contains NUL byte"));
    let status = create("light/under", "main", "").await.unwrap_err();
    let error = detail::<UserCreateTagError>(&status, "UserCreateTagError").error;
    assert!(matches!(error, Some(user_create_tag_error::Error::ReferenceUpdate(_))), "{error:?}");
    assert_eq!(status.code(), Code::FailedPrecondition);
    hook(&node, "pre-receive", "git cat-file -t $(cut -d' ' -f2) >&2; exit 1");
    let status = create("refused", "main", "only the hook saw me").await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::PermissionDenied, "reference update denied by custom hooks")
    );
    let error = detail::<UserCreateTagError>(&status, "UserCreateTagError").error;
    let Some(user_create_tag_error::Error::CustomHook(error)) = error else { panic!("{error:?}") };
    assert_eq!(error.stderr, b"tag\n", "the hook saw the new object");
    assert_eq!(read(&node, "refs/tags/refused"), None);
    assert_no_quarantine(&node).await;
    fs::remove_dir_all(path.join("custom_hooks")).unwrap();

    let delete = async |name: &str, expected: &str| {
        let request = UserDeleteTagRequest {
            repository: Some(repository.clone()),
            tag_name: name.into(),
            user: Some(user()),
            expected_old_oid: expected.into(),
        };
        operations(&node).user_delete_tag(request).await
    };
    assert_eq!(refusal(delete("none", "").await), failed("tag not found: none"));
    assert_eq!(
        refusal(delete("light", &id(&node, "a.git", "v1")).await),
        failed("Could not update refs/tags/light. Please refresh and try again.")
    );
    delete("light", "").await.unwrap();
    assert_eq!(read(&node, "refs/tags/light"), None);
}

/// Runs a merge to its end; `apply` is the second message, if there is one.
async fn merge(
    node: &TestNode,
    request: UserMergeBranchRequest,
    apply: Option<bool>,
) -> Result<(String, Option<String>), Status> {
    let (sender, receiver) = mpsc::channel(2);
    sender.send(request).await.unwrap();
    let mut answers = operations(node).user_merge_branch(ReceiverStream::new(receiver)).await?.into_inner();
    let first = answers.message().await?.unwrap();
    assert!(first.branch_update.is_none());
    if let Some(apply) = apply {
        sender.send(UserMergeBranchRequest { apply, ..Default::default() }).await.unwrap();
    }
    drop(sender);
    let second = answers.message().await?;
    Ok((first.commit_id, second.map(|second| second.branch_update.unwrap().commit_id)))
}

/// `feature` from the first commit, changing `path` to `content`.
fn feature(node: &TestNode, path: &str, content: &str) -> String {
    let message = "feature";
    let stream = format!(
        "commit refs/heads/feature\ncommitter F <f@x> 1700000000 +0000\ndata {}\n{message}\nfrom refs/heads/side\nM 100644 inline {path}\ndata {}\n{content}\n",
        message.len(),
        content.len()
    );
    seed::fast_import(&node.path("a.git"), stream.as_bytes());
    id(node, "a.git", "feature")
}

fn merge_request(repository: &Repository, theirs: &str) -> UserMergeBranchRequest {
    UserMergeBranchRequest {
        repository: Some(repository.clone()),
        user: Some(user()),
        commit_id: theirs.to_owned(),
        branch: b"main".to_vec(),
        message: b"Merge it".to_vec(),
        timestamp: Some(moment()),
        ..UserMergeBranchRequest::default()
    }
}

#[tokio::test]
async fn a_merge_is_shown_and_then_applied() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let theirs = feature(&node, "new file", "n");
    let ours = id(&node, "a.git", "main");
    let request = merge_request(&repository, &theirs);

    let aborted = refusal(merge(&node, request.clone(), Some(false)).await);
    assert_eq!(aborted, (Code::FailedPrecondition, "merge aborted by client".into()));
    assert_eq!(refusal(merge(&node, request.clone(), None).await).0, Code::Internal);
    assert_eq!(id(&node, "a.git", "main"), ours);
    assert_no_quarantine(&node).await;

    hook(&node, "update", "exit 1");
    let status = merge(&node, request.clone(), Some(true)).await.unwrap_err();
    let program = path.join("custom_hooks/update");
    let text =
        format!("executing custom hooks: error executing {:?}: exit status 1", program.display().to_string());
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, text.as_str()));
    let error = detail::<UserMergeBranchError>(&status, "UserMergeBranchError").error;
    assert!(matches!(error, Some(user_merge_branch_error::Error::CustomHook(_))), "{error:?}");
    fs::remove_dir_all(path.join("custom_hooks")).unwrap();

    let (shown, applied) = merge(&node, request.clone(), Some(true)).await.unwrap();
    assert_eq!(Some(&shown), applied.as_ref());
    assert_eq!(id(&node, "a.git", "main"), shown);
    assert_eq!(id(&node, "a.git", "main^1"), ours);
    assert_eq!(id(&node, "a.git", "main^2"), theirs);
    assert_eq!(git(&path, &["show", "main:new file"]), "n");
    assert_eq!(
        git(&path, &["log", "-1", "--format=%an %ae %ad %cd %B", "--date=raw", "main"]),
        "Jane Doe jane@example.com 1690000000 +0200 1690000000 +0200 Merge it"
    );
    git(&path, &["fsck", "--strict"]);

    // Squashed, the second parent is left out.
    git(&path, &["update-ref", "refs/heads/main", &ours]);
    let squash = UserMergeBranchRequest { squash: true, ..request.clone() };
    merge(&node, squash, Some(true)).await.unwrap();
    assert_eq!(git(&path, &["log", "-1", "--format=%P", "main"]), ours);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn merges_that_cannot_be() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let theirs = feature(&node, "README", "otherwise");
    let ours = id(&node, "a.git", "main");
    let request = merge_request(&repository, &theirs);
    let status = merge(&node, request.clone(), Some(true)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().starts_with("merging commits: "), "{status:?}");
    let error = detail::<UserMergeBranchError>(&status, "UserMergeBranchError").error;
    let Some(user_merge_branch_error::Error::MergeConflict(error)) = error else { panic!("{error:?}") };
    assert_eq!(error.conflicting_files, [b"README".to_vec()]);
    assert_eq!(error.conflicting_commit_ids, [ours.clone(), theirs.clone()]);

    let with = |change: fn(&mut UserMergeBranchRequest)| {
        let mut request = request.clone();
        change(&mut request);
        request
    };
    let absent = with(|request| request.branch = b"none".to_vec());
    assert_eq!(
        refusal(merge(&node, absent, Some(true)).await),
        (Code::NotFound, "reference not found".into())
    );
    for (request, text) in [
        (with(|request| request.user = None), "empty user"),
        (with(|request| request.user.as_mut().unwrap().name.clear()), "empty user name"),
        (with(|request| request.user.as_mut().unwrap().email.clear()), "empty user email"),
        (with(|request| request.branch.clear()), "empty branch name"),
        (with(|request| request.commit_id.clear()), "empty commit ID"),
        (with(|request| request.message.clear()), "empty message"),
    ] {
        assert_eq!(refusal(merge(&node, request, Some(true)).await), invalid(text));
    }
    let mars = with(|request| request.user.as_mut().unwrap().timezone = "Mars/Olympus".into());
    assert_eq!(refusal(merge(&node, mars, Some(true)).await), invalid("unknown time zone Mars/Olympus"));
    let nothing = with(|request| request.commit_id = "12".repeat(20));
    assert_eq!(refusal(merge(&node, nothing, Some(true)).await).0, Code::Internal);

    // Somebody moves the branch while the merge is being shown.
    let theirs = feature(&node, "fine", "f");
    let request = merge_request(&repository, &theirs);
    let (sender, receiver) = mpsc::channel(2);
    sender.send(request).await.unwrap();
    let mut answers =
        operations(&node).user_merge_branch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    let shown = answers.message().await.unwrap().unwrap().commit_id;
    git(&node.path("a.git"), &["update-ref", "refs/heads/main", "side"]);
    sender.send(UserMergeBranchRequest { apply: true, ..Default::default() }).await.unwrap();
    let status = answers.message().await.unwrap_err();
    let text = "Could not update refs/heads/main. Please refresh and try again.";
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text));
    let error = detail::<UserMergeBranchError>(&status, "UserMergeBranchError").error;
    let Some(user_merge_branch_error::Error::ReferenceUpdate(error)) = error else { panic!("{error:?}") };
    assert_eq!((error.old_oid, error.new_oid), (ours, shown));
    assert_no_quarantine(&node).await;
}
