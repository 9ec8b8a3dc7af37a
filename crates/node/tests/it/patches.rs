//! UserApplyPatch and UserUpdateSubmodule.

use std::path::Path;

use tabularium_proto::gitaly::{
    OperationBranchUpdate, Repository, UserApplyPatchError, UserApplyPatchRequest, UserUpdateSubmoduleError,
    UserUpdateSubmoduleRequest,
    path_error::ErrorType,
    user_apply_patch_error as refused,
    user_apply_patch_request::{Header, UserApplyPatchRequestPayload as Payload},
    user_update_submodule_error as misplaced,
};
use tonic::{Code, Status};

use crate::{
    harness::{TestNode, git, git_command},
    operations::{assert_no_quarantine, hook, moment, operations, user},
    seed::{self, detail, fast_import, id, invalid, refusal},
};

fn header(repository: &Repository, branch: &str) -> Header {
    Header {
        repository: Some(repository.clone()),
        user: Some(user()),
        target_branch: branch.into(),
        timestamp: Some(moment()),
        ..Header::default()
    }
}

async fn apply(node: &TestNode, header: Header, patches: &str) -> Result<OperationBranchUpdate, Status> {
    let ask = |payload| UserApplyPatchRequest { user_apply_patch_request_payload: Some(payload) };
    let mut requests = vec![ask(Payload::Header(header))];
    requests.extend(patches.as_bytes().chunks(100).map(|piece| ask(Payload::Patches(piece.to_vec()))));
    let answer = operations(node).user_apply_patch(tokio_stream::iter(requests)).await?;
    Ok(answer.into_inner().branch_update.unwrap())
}

/// On top of `main`: `lined` adds a file of twenty lines. From there, `feature` has two commits, and `changed` one that changes
/// a line beside the one that `feature` changes. Answers the commits of `feature` as mails.
fn mails(path: &Path) -> [String; 2] {
    let who = "author M\u{fc}ller <m@x> 1600000000 -0330\ncommitter C <c@x> 1600000000 +0000\n";
    let lines = |changed: &[usize]| {
        let line = |number| {
            if changed.contains(&number) { format!("new {number}\n") } else { format!("{number}\n") }
        };
        let text: String = (1..=20).map(line).collect();
        format!("M 100644 inline lines\ndata {}\n{text}\n", text.len())
    };
    let message = "[tag] Subject\n\nBody \n\n\nmore\n";
    let stream = format!(
        "commit refs/heads/lined\n{who}data 1\nl\nfrom refs/heads/main\n{}\
         commit refs/heads/changed\n{who}data 1\nc\nfrom refs/heads/lined\n{}\
         commit refs/heads/feature\n{who}data {}\n{message}from refs/heads/lined\nR a/b/c/deep.txt moved.txt\n{}\
         commit refs/heads/feature\n{who}data 6\nSecond\nM 100644 inline new\ndata 1\nn\n\n",
        lines(&[]),
        lines(&[8]),
        message.len(),
        lines(&[10]),
    );
    fast_import(path, stream.as_bytes());
    let mail = |range: &str| git(path, &["format-patch", "--stdout", range]) + "\n";
    [mail("lined..feature"), mail("feature~1..feature")]
}

/// What `git am` makes of it.
fn reference(node: &TestNode, branch: &str, mails: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = node.path("a.git");
    git(directory.path(), &["clone", "--quiet", "--no-local", "-b", branch, path.to_str().unwrap(), "."]);
    let file = directory.path().join(".git/mails");
    std::fs::write(&file, mails).unwrap();
    let status = git_command(directory.path())
        .args(["am", "--quiet", "--3way", file.to_str().unwrap()])
        .env("GIT_COMMITTER_NAME", "Jane Doe")
        .env("GIT_COMMITTER_EMAIL", "jane@example.com")
        .env("GIT_COMMITTER_DATE", "1690000000 +0200")
        .status();
    assert!(status.unwrap().success());
    git(directory.path(), &["rev-parse", "HEAD"])
}

#[tokio::test]
async fn patches_become_the_commits_that_git_makes_of_them() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let [mails, last] = mails(&path);
    // Where they fit, and where one of them has to be merged.
    for branch in ["lined", "changed"] {
        let expected = reference(&node, branch, &mails);
        let update = apply(&node, header(&repository, branch), &mails).await.unwrap();
        assert_eq!(update.commit_id, expected, "{branch}");
        assert!(!update.branch_created && !update.repo_created);
        assert_eq!(id(&node, "a.git", branch), expected);
    }
    assert!(git(&path, &["show", "changed:lines"]).contains("new 8\n9\nnew 10\n"));
    git(&path, &["fsck", "--strict"]);
    // What is there already is left out.
    let before = id(&node, "a.git", "changed");
    let again = apply(&node, header(&repository, "changed"), &last).await.unwrap();
    assert_eq!(again.commit_id, before);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn patches_begin_a_branch() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (path, main) = (node.path("a.git"), id(&node, "a.git", "main"));
    let [_, mails] = mails(&path);
    let update = apply(&node, header(&repository, "new"), &mails).await.unwrap();
    assert!(update.branch_created);
    assert_eq!(id(&node, "a.git", "refs/heads/new"), update.commit_id);
    assert_eq!(id(&node, "a.git", "refs/heads/new^"), main);
    // A mail without a date is of the request's time.
    let dateless: String = mails
        .lines()
        .filter(|line| !line.starts_with("Date: "))
        .fold(String::new(), |text, line| text + line + "\n");
    apply(&node, header(&repository, "dateless"), &dateless).await.unwrap();
    let date = git(&path, &["log", "-1", "--date=raw", "--format=%ad", "dateless"]);
    assert_eq!(date, "1690000000 +0200");
}

#[tokio::test]
async fn patches_that_do_not_apply() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let [mails, _] = mails(&path);
    let whole = header(&repository, "lined");
    let lined = id(&node, "a.git", "lined");
    // It changes what is not there.
    let status = apply(&node, header(&repository, "side"), &mails).await.unwrap_err();
    let text = "Patch failed at 0001 Subject\n";
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text));
    assert_eq!(refusal(apply(&node, whole.clone(), "no mail\n").await).0, Code::Internal);
    hook(&node, "pre-receive", "echo no >&2; exit 1");
    let status = apply(&node, whole.clone(), &mails).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, "denied by custom hooks"));
    let error = detail::<UserApplyPatchError>(&status, "UserApplyPatchError").error;
    assert!(matches!(error, Some(refused::Error::CustomHook(_))), "{error:?}");
    std::fs::remove_dir_all(path.join("custom_hooks")).unwrap();
    let race = Header { expected_old_oid: id(&node, "a.git", "side"), ..whole.clone() };
    assert_eq!(refusal(apply(&node, race, &mails).await).0, Code::Internal);
    for (change, text) in [
        (Header { user: None, ..whole.clone() }, "missing User"),
        (Header { target_branch: Vec::new(), ..whole.clone() }, "missing Branch"),
    ] {
        assert_eq!(refusal(apply(&node, change, &mails).await), invalid(text));
    }
    let headless = UserApplyPatchRequest {
        user_apply_patch_request_payload: Some(Payload::Patches(mails.clone().into_bytes())),
    };
    let headless = operations(&node).user_apply_patch(tokio_stream::iter([headless])).await;
    assert_eq!(refusal(headless), invalid("empty UserApplyPatch_Header"));
    let empty = node.create("b.git").await;
    let nothing = refusal(apply(&node, header(&empty, "main"), "").await);
    assert_eq!(nothing, (Code::Internal, "no default branch".into()));
    assert_eq!(id(&node, "a.git", "lined"), lined);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn a_submodule_is_set() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (path, main) = (node.path("a.git"), id(&node, "a.git", "main"));
    let whole = UserUpdateSubmoduleRequest {
        repository: Some(repository.clone()),
        user: Some(user()),
        commit_sha: "22".repeat(20),
        branch: b"main".to_vec(),
        submodule: b"module".to_vec(),
        commit_message: b"Newer\n".to_vec(),
        timestamp: Some(moment()),
        ..UserUpdateSubmoduleRequest::default()
    };
    let set = async |request: UserUpdateSubmoduleRequest| {
        operations(&node)
            .user_update_submodule(request)
            .await
            .map(|response| response.into_inner().branch_update.unwrap().commit_id)
    };
    let new = set(whole.clone()).await.unwrap();
    assert_eq!(id(&node, "a.git", "main"), new);
    assert_eq!(
        git(&path, &["log", "-1", "--format=%P|%an|%cn %ct|%B", "main"]),
        format!("{main}|Jane Doe|Jane Doe 1690000000|Newer")
    );
    let changed = git(&path, &["diff", "--raw", "--no-abbrev", &main, "main"]);
    assert_eq!(changed, format!(":160000 160000 {} {} M\tmodule", "11".repeat(20), "22".repeat(20)));

    let refusal_of = async |request, code: Code, text: &str| {
        let status = set(request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, text));
        detail::<UserUpdateSubmoduleError>(&status, "UserUpdateSubmoduleError").error.unwrap()
    };
    let invalid_code = Code::InvalidArgument;
    let text = format!("The submodule module is already at {}", "22".repeat(20));
    let error = refusal_of(whole.clone(), invalid_code, &text).await;
    let misplaced::Error::PathError(error) = error else { panic!("{error:?}") };
    assert_eq!(error.error_type(), ErrorType::PathExists);
    for nowhere in ["none", "README", "a/b", "../x"] {
        let request = UserUpdateSubmoduleRequest { submodule: nowhere.into(), ..whole.clone() };
        let error = refusal_of(request, invalid_code, "Invalid submodule path").await;
        let misplaced::Error::PathError(error) = error else { panic!("{error:?}") };
        assert_eq!((error.error_type(), error.path), (ErrorType::InvalidPath, nowhere.as_bytes().to_vec()));
    }
    let other = UserUpdateSubmoduleRequest { commit_sha: "33".repeat(20), ..whole.clone() };
    let race = UserUpdateSubmoduleRequest { expected_old_oid: main.clone(), ..other.clone() };
    let text = "reference update: Could not update refs/heads/main. Please refresh and try again.";
    let error = refusal_of(race, Code::FailedPrecondition, text).await;
    assert!(matches!(error, misplaced::Error::ReferenceUpdate(_)), "{error:?}");
    hook(&node, "update", "echo no >&2; exit 1");
    let error = refusal_of(other.clone(), Code::PermissionDenied, "no\n").await;
    assert!(matches!(error, misplaced::Error::CustomHook(_)), "{error:?}");
    for (change, text) in [
        (UserUpdateSubmoduleRequest { user: None, ..other.clone() }, "empty User"),
        (UserUpdateSubmoduleRequest { commit_sha: String::new(), ..other.clone() }, "empty CommitSha"),
        (UserUpdateSubmoduleRequest { commit_sha: "33".into(), ..other.clone() }, "invalid CommitSha"),
        (UserUpdateSubmoduleRequest { branch: Vec::new(), ..other.clone() }, "empty Branch"),
        (UserUpdateSubmoduleRequest { submodule: Vec::new(), ..other.clone() }, "empty Submodule"),
        (UserUpdateSubmoduleRequest { commit_message: Vec::new(), ..other.clone() }, "empty CommitMessage"),
        (UserUpdateSubmoduleRequest { branch: b"none".to_vec(), ..other.clone() }, "Cannot find branch"),
    ] {
        assert_eq!(refusal(set(change).await), invalid(text));
    }
    let empty = node.create("b.git").await;
    let nothing = UserUpdateSubmoduleRequest { repository: Some(empty), ..other };
    assert_eq!(refusal(set(nothing).await), (Code::FailedPrecondition, "Repository is empty".into()));
    assert_eq!(id(&node, "a.git", "main"), new);
    assert_no_quarantine(&node).await;
}
