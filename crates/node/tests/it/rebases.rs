//! UserRebaseConfirmable, UserRebaseToRef, UserMergeToRef, UserFFBranch and UserSquash.

use tabularium_proto::gitaly::{
    Repository, User, UserFfBranchError, UserFfBranchRequest, UserMergeToRefRequest,
    UserRebaseConfirmableError, UserRebaseConfirmableRequest, UserRebaseToRefRequest, UserSquashError,
    UserSquashRequest, user_ff_branch_error as forwarded, user_rebase_confirmable_error as rebased,
    user_rebase_confirmable_request::{Header, UserRebaseConfirmableRequestPayload as Asked},
    user_rebase_confirmable_response::UserRebaseConfirmableResponsePayload as Answer,
    user_squash_error as squashed,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::{
    harness::{TestNode, git},
    operations::{assert_no_quarantine, hook, moment, operations, user},
    seed::{self, detail, fast_import, id, invalid, refusal},
};

/// `feature`, from the first commit: a commit that `main` has too, a merge, one with a long message, an empty one.
fn feature(node: &TestNode) -> String {
    let who = "committer C <c@x> 1600000000 +0000\n";
    let message = "m".repeat(20_000);
    let stream = format!(
        "commit refs/heads/feature\nmark :1\n{who}data 1\n1\nfrom refs/heads/side\nM 100644 inline README\ndata 11\nhello again\n\n\
         commit refs/heads/aside\nmark :2\n{who}data 1\n2\nfrom refs/heads/side\nM 100644 inline aside\ndata 1\na\n\n\
         commit refs/heads/feature\n{who}data 1\n3\nfrom :1\nmerge :2\nM 100644 inline aside\ndata 1\na\n\n\
         commit refs/heads/feature\nauthor F <f@x> 1500000000 -0330\n{who}data {}\n{message}\nM 100644 inline new\ndata 1\nn\n\n\
         commit refs/heads/feature\n{who}data 5\nempty\n\n",
        message.len()
    );
    fast_import(&node.path("a.git"), stream.as_bytes());
    id(node, "a.git", "feature")
}

fn conflicting(node: &TestNode) -> String {
    let stream = b"commit refs/heads/other\ncommitter C <c@x> 1600000000 +0000\ndata 1\no\nfrom refs/heads/side\nM 100644 inline README\ndata 1\no\n\n";
    fast_import(&node.path("a.git"), stream);
    id(node, "a.git", "other")
}

fn header(repository: &Repository, branch_sha: &str) -> Header {
    Header {
        repository: Some(repository.clone()),
        user: Some(user()),
        branch: b"feature".to_vec(),
        branch_sha: branch_sha.to_owned(),
        remote_repository: Some(repository.clone()),
        remote_branch: b"main".to_vec(),
        timestamp: Some(moment()),
        ..Header::default()
    }
}

/// Runs a rebase to its end; `apply` is the second message, if there is one.
async fn rebase(node: &TestNode, header: Header, apply: Option<bool>) -> Result<(String, bool), Status> {
    let ask =
        |payload| UserRebaseConfirmableRequest { user_rebase_confirmable_request_payload: Some(payload) };
    let (sender, receiver) = mpsc::channel(2);
    sender.send(ask(Asked::Header(header))).await.unwrap();
    let stream = ReceiverStream::new(receiver);
    let mut answers = operations(node).user_rebase_confirmable(stream).await?.into_inner();
    let first = answers.message().await?.unwrap().user_rebase_confirmable_response_payload;
    let Some(Answer::RebaseSha(sha)) = first else { panic!("{first:?}") };
    if let Some(apply) = apply {
        sender.send(ask(Asked::Apply(apply))).await.unwrap();
    }
    drop(sender);
    let second = answers.message().await?.and_then(|last| last.user_rebase_confirmable_response_payload);
    Ok((sha, second == Some(Answer::RebaseApplied(true))))
}

#[tokio::test]
async fn hooks_hear_the_options_of_a_rebase() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let old = feature(&node);
    let seen = node.path("a.git").join("seen");
    for name in ["pre-receive", "update", "post-receive"] {
        let script = format!(
            "echo \"$GIT_PUSH_OPTION_COUNT $GIT_PUSH_OPTION_0 $GIT_PUSH_OPTION_1.\" >> {}",
            seen.display()
        );
        hook(&node, name, &script);
    }
    let plain = header(&repository, &old);
    let with = Header { git_push_options: vec!["ci.skip".into(), "a=b".into()], ..plain.clone() };
    let (new, applied) = rebase(&node, with, Some(true)).await.unwrap();
    assert!(applied);
    assert_eq!(std::fs::read_to_string(&seen).unwrap(), "2 ci.skip a=b.\n  .\n2 ci.skip a=b.\n");
    std::fs::remove_file(&seen).unwrap();
    let again = Header { branch_sha: new, remote_branch: b"side".to_vec(), ..plain };
    rebase(&node, again, Some(true)).await.unwrap();
    assert_eq!(std::fs::read_to_string(&seen).unwrap(), "  .\n  .\n  .\n");
}

#[tokio::test]
async fn a_branch_is_rebased() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (path, main) = (node.path("a.git"), id(&node, "a.git", "main"));
    let old = feature(&node);
    let header = header(&repository, &old);
    let aborted = refusal(rebase(&node, header.clone(), Some(false)).await);
    assert_eq!(aborted, (Code::FailedPrecondition, "rebase aborted by client".into()));
    assert_eq!(refusal(rebase(&node, header.clone(), None).await).0, Code::Internal);
    assert_eq!(id(&node, "a.git", "feature"), old);

    let (new, applied) = rebase(&node, header.clone(), Some(true)).await.unwrap();
    assert!(applied);
    assert_eq!(id(&node, "a.git", "feature"), new);
    // What `main` has already is not there twice, the merge is left out, what was empty stays.
    let list = git(&path, &["log", "--date=raw", "--format=%an %ad|%cn %cd", &format!("{main}..{new}")]);
    let by_jane = "Jane Doe 1690000000 +0200";
    let lines = ["C 1600000000 +0000", "F 1500000000 -0330", "C 1600000000 +0000"];
    assert_eq!(list, lines.map(|author| format!("{author}|{by_jane}")).join("\n"));
    assert_eq!(git(&path, &["log", "-1", "--format=%B", "feature~1"]).len(), 20_000);
    assert_eq!(git(&path, &["diff", "--name-only", &main, "feature"]), "aside\nnew");
    git(&path, &["fsck", "--strict"]);

    // Nothing is to be done when one contains the other.
    let again = Header { branch_sha: new.clone(), ..header.clone() };
    assert_eq!(rebase(&node, again, Some(true)).await.unwrap(), (new.clone(), true));
    assert_no_quarantine(&node).await;

    let late = rebase(&node, header.clone(), Some(true)).await;
    assert_eq!(refusal(late).0, Code::Internal, "the branch is elsewhere meanwhile");
    hook(&node, "pre-receive", "echo no >&2; exit 1");
    let again = Header { branch_sha: new.clone(), remote_branch: b"side".to_vec(), ..header };
    let status = rebase(&node, again, Some(true)).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::PermissionDenied, "access check: \"running pre-receive hooks: no\\n\"")
    );
    let error = detail::<UserRebaseConfirmableError>(&status, "UserRebaseConfirmableError").error;
    let Some(rebased::Error::AccessCheck(error)) = error else { panic!("{error:?}") };
    assert_eq!(error.error_message, "no\n");
}

#[tokio::test]
async fn rebases_that_cannot_be() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (main, other) = (id(&node, "a.git", "main"), conflicting(&node));
    let whole = Header { branch: b"other".to_vec(), ..header(&repository, &other) };
    let status = rebase(&node, whole.clone(), Some(true)).await.unwrap_err();
    let text = format!("rebasing commits: rebase: commit {other:?}: there are conflicting files");
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text.as_str()));
    let error = detail::<UserRebaseConfirmableError>(&status, "UserRebaseConfirmableError").error;
    let Some(rebased::Error::RebaseConflict(error)) = error else { panic!("{error:?}") };
    assert_eq!(error.conflicting_files, [b"README".to_vec()]);
    assert_eq!(error.conflicting_commit_ids, [main, other.clone()]);
    let short = Header { branch_sha: "12".into(), ..whole.clone() };
    assert_eq!(refusal(rebase(&node, short, None).await).0, Code::NotFound);
    for (header, text) in [
        (Header { user: None, ..whole.clone() }, "empty User"),
        (Header { branch: Vec::new(), ..whole.clone() }, "empty Branch"),
        (Header { branch_sha: String::new(), ..whole.clone() }, "empty BranchSha"),
        (Header { remote_repository: None, ..whole.clone() }, "empty RemoteRepository"),
        (Header { remote_branch: Vec::new(), ..whole.clone() }, "empty RemoteBranch"),
        (Header { remote_branch: b"a b".to_vec(), ..whole.clone() }, "invalid branch name"),
        (
            Header { remote_branch: b"none".to_vec(), ..whole.clone() },
            "resolve start ref: reference not found",
        ),
        (
            Header { branch_sha: "12".repeat(20), ..whole.clone() },
            "rebasing commits: resolving branch commit: reference not found",
        ),
    ] {
        assert_eq!(refusal(rebase(&node, header, None).await), invalid(text));
    }
    let request =
        UserRebaseConfirmableRequest { user_rebase_confirmable_request_payload: Some(Asked::Apply(true)) };
    let headless = operations(&node).user_rebase_confirmable(tokio_stream::iter([request])).await;
    assert_eq!(refusal(headless), invalid("empty UserRebaseConfirmableRequest.Header"));
    assert_eq!(id(&node, "a.git", "other"), other);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn a_result_is_put_under_a_reference_of_its_own() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let (main, source, other) = (id(&node, "a.git", "main"), feature(&node), conflicting(&node));
    hook(&node, "pre-receive", "exit 1");
    let merging = UserMergeToRefRequest {
        repository: Some(repository.clone()),
        user: Some(user()),
        source_sha: source.clone(),
        target_ref: b"refs/merge-requests/1/merge".to_vec(),
        message: b"Merge".to_vec(),
        first_parent_ref: b"refs/heads/main".to_vec(),
        timestamp: Some(moment()),
        ..UserMergeToRefRequest::default()
    };
    let merge = async |request: UserMergeToRefRequest| {
        operations(&node).user_merge_to_ref(request).await.map(|response| response.into_inner().commit_id)
    };
    let new = merge(merging.clone()).await.unwrap();
    assert_eq!(id(&node, "a.git", "refs/merge-requests/1/merge"), new);
    assert_eq!(git(&path, &["log", "-1", "--format=%P", &new]), format!("{main} {source}"));
    // The old field, on top of what is there.
    let old_field = UserMergeToRefRequest {
        first_parent_ref: Vec::new(),
        branch: b"side".to_vec(),
        expected_old_oid: new.clone(),
        ..merging.clone()
    };
    let newer = merge(old_field.clone()).await.unwrap();
    assert_eq!(id(&node, "a.git", "refs/merge-requests/1/merge"), newer);
    let race = "Could not update refs/merge-requests/1/merge. Please refresh and try again";
    let failed = |text: &str| (Code::FailedPrecondition, text.to_owned());
    assert_eq!(refusal(merge(old_field).await), failed(race));
    let new_only = UserMergeToRefRequest { expected_old_oid: "0".repeat(40), ..merging.clone() };
    assert_eq!(refusal(merge(new_only).await), failed(race));
    let conflict = UserMergeToRefRequest { source_sha: other.clone(), ..merging.clone() };
    let text = format!(
        "Failed to create merge commit for source_sha {other} and target_sha {main} at refs/merge-requests/1/merge"
    );
    assert_eq!(refusal(merge(conflict).await), failed(&text));
    git(&path, &["symbolic-ref", "refs/merge-requests/2/merge", "refs/heads/main"]);
    let symbolic =
        UserMergeToRefRequest { target_ref: b"refs/merge-requests/2/merge".to_vec(), ..merging.clone() };
    let text = "target reference is symbolic: \"refs/merge-requests/2/merge\"";
    assert_eq!(refusal(merge(symbolic).await), failed(text));
    git(&path, &["update-ref", "refs/merge-requests/1/head", &main]);
    for (change, text) in [
        (
            UserMergeToRefRequest { target_ref: b"refs/merge-requests/1".to_vec(), ..merging.clone() },
            "target reference is ambiguous: reference is ambiguous",
        ),
        (
            UserMergeToRefRequest { target_ref: b"refs/heads/x".to_vec(), ..merging.clone() },
            "invalid target ref",
        ),
        (UserMergeToRefRequest { target_ref: Vec::new(), ..merging.clone() }, "empty target ref"),
        (UserMergeToRefRequest { source_sha: "none".into(), ..merging.clone() }, "Invalid merge source"),
        (UserMergeToRefRequest { source_sha: String::new(), ..merging.clone() }, "empty source SHA"),
        (UserMergeToRefRequest { user: None, ..merging.clone() }, "empty user"),
        (
            UserMergeToRefRequest { first_parent_ref: Vec::new(), ..merging.clone() },
            "empty first parent ref and branch name",
        ),
    ] {
        assert_eq!(refusal(merge(change).await), invalid(text));
    }

    let rebasing = UserRebaseToRefRequest {
        repository: Some(repository.clone()),
        user: Some(user()),
        source_sha: source,
        target_ref: b"refs/merge-requests/3/rebase".to_vec(),
        first_parent_ref: b"refs/heads/main".to_vec(),
        timestamp: Some(moment()),
        ..UserRebaseToRefRequest::default()
    };
    let rebase = async |request: UserRebaseToRefRequest| {
        operations(&node).user_rebase_to_ref(request).await.map(|response| response.into_inner().commit_id)
    };
    let new = rebase(rebasing.clone()).await.unwrap();
    assert_eq!(id(&node, "a.git", "refs/merge-requests/3/rebase"), new);
    assert_eq!(id(&node, "a.git", &format!("{new}~3")), main);
    let conflict = UserRebaseToRefRequest { source_sha: other.clone(), ..rebasing.clone() };
    let text = format!(
        "failed to rebase {other} on {main} while preparing refs/merge-requests/3/rebase due to conflict"
    );
    assert_eq!(refusal(rebase(conflict).await), failed(&text));
    let race = UserRebaseToRefRequest { expected_old_oid: main.clone(), ..rebasing.clone() };
    let text = "could not update refs/merge-requests/3/rebase. Please refresh and try again";
    assert_eq!(refusal(rebase(race).await), failed(text));
    for (change, text) in [
        (UserRebaseToRefRequest { first_parent_ref: Vec::new(), ..rebasing.clone() }, "empty FirstParentRef"),
        (UserRebaseToRefRequest { user: None, ..rebasing.clone() }, "empty User"),
        (UserRebaseToRefRequest { source_sha: String::new(), ..rebasing.clone() }, "empty SourceSha"),
        (UserRebaseToRefRequest { source_sha: "none".into(), ..rebasing.clone() }, "invalid SourceSha"),
        (
            UserRebaseToRefRequest { first_parent_ref: b"x".to_vec(), ..rebasing.clone() },
            "invalid FirstParentRef",
        ),
        (UserRebaseToRefRequest { target_ref: Vec::new(), ..rebasing.clone() }, "empty TargetRef"),
        (UserRebaseToRefRequest { target_ref: b"HEAD".to_vec(), ..rebasing.clone() }, "invalid TargetRef"),
    ] {
        assert_eq!(refusal(rebase(change).await), invalid(text));
    }
    git(&path, &["fsck", "--strict"]);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn a_branch_is_moved_forward() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let [first, second, third] = ["main~2", "main~1", "main"].map(|name| id(&node, "a.git", name));
    let whole = UserFfBranchRequest {
        repository: Some(repository.clone()),
        user: Some(user()),
        commit_id: second.clone(),
        branch: b"side".to_vec(),
        expected_old_oid: String::new(),
    };
    let forward = async |request: UserFfBranchRequest| {
        operations(&node)
            .user_ff_branch(request)
            .await
            .map(|response| response.into_inner().branch_update.unwrap().commit_id)
    };
    assert_eq!(forward(whole.clone()).await.unwrap(), second);
    assert_eq!(id(&node, "a.git", "side"), second);
    let backward = UserFfBranchRequest { commit_id: first.clone(), ..whole.clone() };
    assert_eq!(refusal(forward(backward).await), (Code::FailedPrecondition, "not fast forward".into()));
    let further = UserFfBranchRequest { commit_id: third.clone(), ..whole.clone() };
    let race = UserFfBranchRequest { expected_old_oid: first, ..further.clone() };
    let status = forward(race).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let error = detail::<UserFfBranchError>(&status, "UserFFBranchError").error;
    assert!(matches!(error, Some(forwarded::Error::ReferenceUpdate(_))), "{error:?}");
    hook(&node, "pre-receive", "echo no >&2; exit 1");
    let status = forward(further).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, "no\n"));
    let error = detail::<UserFfBranchError>(&status, "UserFFBranchError").error;
    assert!(matches!(error, Some(forwarded::Error::CustomHook(_))), "{error:?}");
    for (change, text) in [
        (UserFfBranchRequest { branch: Vec::new(), ..whole.clone() }, "empty branch name"),
        (UserFfBranchRequest { user: None, ..whole.clone() }, "empty user"),
        (UserFfBranchRequest { commit_id: String::new(), ..whole.clone() }, "empty commit id"),
        (UserFfBranchRequest { branch: b"none".to_vec(), ..whole.clone() }, "reference not found"),
        (
            UserFfBranchRequest { commit_id: "main".into(), ..whole.clone() },
            "cannot parse commit ID: invalid object ID: \"main\", expected length 40, got 4",
        ),
    ] {
        assert_eq!(refusal(forward(change).await), invalid(text));
    }
    let absent = UserFfBranchRequest { commit_id: "12".repeat(20), ..whole.clone() };
    assert_eq!(refusal(forward(absent).await).0, Code::Internal);
    assert_eq!(id(&node, "a.git", "side"), second);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn commits_are_squashed() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let (main, end, other) = (id(&node, "a.git", "main"), feature(&node), conflicting(&node));
    let author = User { name: b"Au".to_vec(), email: b"au@x".to_vec(), ..User::default() };
    let whole = UserSquashRequest {
        repository: Some(repository.clone()),
        user: Some(user()),
        start_sha: main.clone(),
        end_sha: end.clone(),
        author: Some(author.clone()),
        commit_message: b"All of it".to_vec(),
        timestamp: Some(moment()),
        ..UserSquashRequest::default()
    };
    let squash = async |request: UserSquashRequest| {
        operations(&node).user_squash(request).await.map(|response| response.into_inner().squash_sha)
    };
    let before = git(&path, &["for-each-ref"]);
    let new = squash(whole.clone()).await.unwrap();
    assert_eq!(
        git(&path, &["log", "-1", "--date=raw", "--format=%P|%an %ad|%cn %cd|%B", &new]),
        format!("{main}|Au 1690000000 +0000|Jane Doe 1690000000 +0200|All of it")
    );
    assert_eq!(git(&path, &["diff", "--name-only", &main, &new]), "aside\nnew");
    assert_eq!(git(&path, &["for-each-ref"]), before, "no reference moves");

    let conflict = UserSquashRequest { end_sha: other.clone(), ..whole.clone() };
    let status = squash(conflict).await.unwrap_err();
    let text = "squashing commits: merge: there are conflicting files";
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text));
    let error = detail::<UserSquashError>(&status, "UserSquashError").error;
    let Some(squashed::Error::RebaseConflict(error)) = error else { panic!("{error:?}") };
    assert_eq!(error.conflicting_commit_ids, [main, other]);
    for (change, which) in [
        (UserSquashRequest { start_sha: "none".into(), ..whole.clone() }, "start"),
        (UserSquashRequest { end_sha: "none".into(), ..whole.clone() }, "end"),
    ] {
        let status = squash(change).await.unwrap_err();
        let text = format!("resolving {which} revision: reference not found");
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, text.as_str()));
        let error = detail::<UserSquashError>(&status, "UserSquashError").error;
        let Some(squashed::Error::ResolveRevision(error)) = error else { panic!("{error:?}") };
        assert_eq!(error.revision, b"none");
    }
    let nameless = |user: &User| Some(User { name: Vec::new(), ..user.clone() });
    let homeless = |user: &User| Some(User { email: Vec::new(), ..user.clone() });
    for (change, text) in [
        (UserSquashRequest { user: None, ..whole.clone() }, "empty User"),
        (UserSquashRequest { user: nameless(&user()), ..whole.clone() }, "empty user name"),
        (UserSquashRequest { user: homeless(&user()), ..whole.clone() }, "empty user email"),
        (UserSquashRequest { start_sha: String::new(), ..whole.clone() }, "empty StartSha"),
        (UserSquashRequest { end_sha: String::new(), ..whole.clone() }, "empty EndSha"),
        (UserSquashRequest { commit_message: Vec::new(), ..whole.clone() }, "empty CommitMessage"),
        (UserSquashRequest { author: None, ..whole.clone() }, "empty Author"),
        (UserSquashRequest { author: nameless(&author), ..whole.clone() }, "empty author name"),
        (UserSquashRequest { author: homeless(&author), ..whole.clone() }, "empty author email"),
    ] {
        assert_eq!(refusal(squash(change).await), invalid(text));
    }
    assert_no_quarantine(&node).await;
}
