//! UserCherryPick and UserRevert: one commit's change, made or unmade on top of a branch.

use std::fs;

use tabularium_proto::gitaly::{
    GitCommit, Repository, UserCherryPickError, UserCherryPickRequest, UserRevertError, UserRevertRequest,
    user_cherry_pick_error as picked, user_revert_error as reverted,
};
use tonic::{Code, Status};

use crate::{
    harness::{TestNode, git, with_servers},
    operations::{assert_no_quarantine, hook, moment, operations, user},
    seed::{self, detail, fast_import, id, invalid, refusal},
};

/// What is picked or reverted, where.
#[derive(Clone, Default)]
struct Ask {
    commit: String,
    branch: &'static str,
    start: &'static str,
    expected: String,
    dry_run: bool,
}

fn ask(commit: &str, branch: &'static str) -> Ask {
    Ask { commit: commit.to_owned(), branch, ..Ask::default() }
}

fn pick_request(repository: &Repository, ask: &Ask) -> UserCherryPickRequest {
    UserCherryPickRequest {
        repository: Some(repository.clone()),
        user: Some(user()),
        commit: Some(GitCommit { id: ask.commit.clone(), ..GitCommit::default() }),
        branch_name: ask.branch.into(),
        message: b"Picked\n".to_vec(),
        start_branch_name: ask.start.into(),
        dry_run: ask.dry_run,
        timestamp: Some(moment()),
        expected_old_oid: ask.expected.clone(),
        ..UserCherryPickRequest::default()
    }
}

fn revert_request(repository: &Repository, ask: &Ask) -> UserRevertRequest {
    UserRevertRequest {
        repository: Some(repository.clone()),
        user: Some(user()),
        commit: Some(GitCommit { id: ask.commit.clone(), ..GitCommit::default() }),
        branch_name: ask.branch.into(),
        message: b"Reverted\n".to_vec(),
        start_branch_name: ask.start.into(),
        dry_run: ask.dry_run,
        timestamp: Some(moment()),
        expected_old_oid: ask.expected.clone(),
        ..UserRevertRequest::default()
    }
}

/// The new commit, and whether the branch and the repository came into being with it.
type Picked = Result<(String, bool, bool), Status>;

async fn pick(node: &TestNode, request: UserCherryPickRequest) -> Picked {
    let update = operations(node).user_cherry_pick(request).await?.into_inner().branch_update.unwrap();
    Ok((update.commit_id, update.branch_created, update.repo_created))
}

async fn revert(node: &TestNode, request: UserRevertRequest) -> Picked {
    let update = operations(node).user_revert(request).await?.into_inner().branch_update.unwrap();
    Ok((update.commit_id, update.branch_created, update.repo_created))
}

/// On top of the first commit: one commit that adds `new`, and one that changes `README`.
fn feature(node: &TestNode) -> (String, String) {
    let stream = b"commit refs/heads/feature\nauthor F <f@x> 1600000000 -0330\ncommitter C <c@x> 1600000001 +0000\ndata 1\nf\nfrom refs/heads/side\nM 100644 inline new\ndata 1\nn\n\ncommit refs/heads/feature\ncommitter C <c@x> 1600000002 +0000\ndata 1\ng\nM 100644 inline README\ndata 5\nother\n\n";
    fast_import(&node.path("a.git"), stream);
    (id(node, "a.git", "feature~1"), id(node, "a.git", "feature"))
}

const WHO: &str = "--format=%P|%an %ae %ad|%cn %ce %cd|%B";

#[tokio::test]
async fn a_commit_is_picked() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (path, main) = (node.path("a.git"), id(&node, "a.git", "main"));
    let (adds, changes) = feature(&node);
    let request = |ask: &Ask| pick_request(&repository, ask);

    let (new, branch_created, repo_created) = pick(&node, request(&ask(&adds, "main"))).await.unwrap();
    assert_eq!((new.as_str(), branch_created, repo_created), (&*id(&node, "a.git", "main"), false, false));
    assert_eq!(
        git(&path, &["log", "-1", "--date=raw", WHO, "main"]),
        format!("{main}|F f@x 1600000000 -0330|Jane Doe jane@example.com 1690000000 +0200|Picked")
    );
    assert_eq!(git(&path, &["diff", "--name-only", &main, "main"]), "new");

    // Somewhere else, and by somebody else.
    let elsewhere = Ask { start: "side", ..ask(&changes, "picked") };
    let named = UserCherryPickRequest {
        commit_author_name: b" N ".to_vec(),
        commit_author_email: b"n@x".to_vec(),
        ..request(&elsewhere)
    };
    let (new, branch_created, _) = pick(&node, named).await.unwrap();
    assert_eq!((new.as_str(), branch_created), (&*id(&node, "a.git", "picked"), true));
    assert!(git(&path, &["log", "-1", "--date=raw", WHO, "picked"]).contains("|N n@x 1690000000 +0200|"));
    assert_eq!(git(&path, &["show", "picked:README"]), "other");
    git(&path, &["fsck", "--strict"]);

    // A trial moves nothing, and comes to the same refusals.
    let before = id(&node, "a.git", "side");
    let trial = Ask { dry_run: true, ..ask(&changes, "side") };
    assert_eq!(pick(&node, request(&trial)).await.unwrap().0, before);
    assert_eq!(id(&node, "a.git", "side"), before);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn commits_that_cannot_be_picked() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (main, side) = (id(&node, "a.git", "main"), id(&node, "a.git", "side"));
    let (adds, changes) = feature(&node);
    let request = |ask: &Ask| pick_request(&repository, ask);
    let failure = async |ask: &Ask, text: &str| {
        let status = pick(&node, request(ask)).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text));
        detail::<UserCherryPickError>(&status, "UserCherryPickError").error.unwrap()
    };

    let error = failure(&ask(&changes, "main"), "cherry pick: merge: there are conflicting files").await;
    let picked::Error::CherryPickConflict(error) = error else { panic!("{error:?}") };
    assert_eq!(error.conflicting_files, [b"README".to_vec()]);
    let text = "cherry-pick: could not apply because the result was empty";
    let error = failure(&ask(&id(&node, "a.git", "main~1"), "main"), text).await;
    assert!(matches!(error, picked::Error::ChangesAlreadyApplied(_)), "{error:?}");
    let diverged = Ask { start: "side", ..ask(&adds, "main") };
    let error = failure(&diverged, "cherry-pick: branch diverged").await;
    let picked::Error::TargetBranchDiverged(error) = error else { panic!("{error:?}") };
    assert_eq!(error.parent_revision, main.as_bytes());
    hook(&node, "pre-receive", "echo no >&2; exit 1");
    let error = failure(&ask(&adds, "main"), "access check failed").await;
    let picked::Error::AccessCheck(error) = error else { panic!("{error:?}") };
    assert_eq!(error.error_message, "no");
    fs::remove_dir_all(node.path("a.git").join("custom_hooks")).unwrap();

    let absent = "12".repeat(20);
    let text = format!("cherry-pick: commit lookup: commit not found: {absent:?}");
    assert_eq!(refusal(pick(&node, request(&ask(&absent, "main"))).await), (Code::NotFound, text));
    let nowhere = Ask { start: "none", ..ask(&adds, "main") };
    let text = "resolve start ref: reference not found";
    assert_eq!(refusal(pick(&node, request(&nowhere)).await), invalid(text));
    // The first commit has nothing before it.
    assert_eq!(refusal(pick(&node, request(&ask(&side, "main"))).await).0, Code::Internal);
    let moved = Ask { expected: side.clone(), ..ask(&adds, "main") };
    assert_eq!(refusal(pick(&node, request(&moved)).await).0, Code::Internal);
    let bad = Ask { expected: "xyz".into(), ..ask(&adds, "main") };
    assert!(refusal(pick(&node, request(&bad)).await).1.starts_with("invalid expected old object ID"));
    let whole = request(&ask(&adds, "main"));
    for (request, text) in [
        (UserCherryPickRequest { user: None, ..whole.clone() }, "empty User"),
        (UserCherryPickRequest { commit: None, ..whole.clone() }, "empty Commit"),
        (UserCherryPickRequest { branch_name: Vec::new(), ..whole.clone() }, "empty BranchName"),
        (UserCherryPickRequest { message: Vec::new(), ..whole.clone() }, "empty Message"),
        (UserCherryPickRequest { repository: None, ..whole.clone() }, "repository not set"),
    ] {
        assert_eq!(refusal(pick(&node, request).await), invalid(text));
    }
    assert_eq!(id(&node, "a.git", "main"), main);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn a_commit_of_another_repository_is_brought() {
    let node = TestNode::start().await;
    let fork = seed::repository(&node, "a.git").await;
    let (adds, _) = feature(&node);
    let target = node.create("b.git").await;
    let first = id(&node, "a.git", "side");
    let source = node.path("a.git");
    git(&node.path("b.git"), &["fetch", "-q", source.to_str().unwrap(), "side:refs/heads/other"]);
    let request = UserCherryPickRequest {
        start_repository: Some(fork.clone()),
        ..pick_request(&target, &Ask { start: "main", ..ask(&adds, "new") })
    };
    // Only what the commit is made on is brought.
    assert_eq!(refusal(pick(&node, request.clone()).await).0, Code::Internal, "no way to the other storage");
    let absent = operations(&node).user_cherry_pick(with_servers(request.clone(), &[&node])).await;
    assert_eq!(refusal(absent).0, Code::NotFound);
    git(&node.path("b.git"), &["fetch", "-q", source.to_str().unwrap(), "feature:refs/keep-around/feature"]);
    let answer = operations(&node).user_cherry_pick(with_servers(request, &[&node])).await.unwrap();
    let update = answer.into_inner().branch_update.unwrap();
    assert!(update.branch_created && !update.repo_created);
    assert_eq!(id(&node, "b.git", "refs/heads/new^"), id(&node, "a.git", "main"));
    assert_eq!(id(&node, "b.git", "refs/heads/new~3"), first);
    git(&node.path("b.git"), &["fsck", "--strict"]);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn a_commit_is_reverted() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (path, main) = (node.path("a.git"), id(&node, "a.git", "main"));
    let [first, second, third] = ["main~2", "main~1", "main"].map(|name| id(&node, "a.git", name));
    let request = |ask: &Ask| revert_request(&repository, ask);
    let (new, ..) = revert(&node, request(&ask(&second, "main"))).await.unwrap();
    assert_eq!(new, id(&node, "a.git", "main"));
    let who = "Jane Doe jane@example.com 1690000000 +0200";
    assert_eq!(git(&path, &["log", "-1", "--date=raw", WHO, "main"]), format!("{main}|{who}|{who}|Reverted"));
    assert_eq!(git(&path, &["show", "main:README"]), "hello");
    // The first commit of all: nothing is left of it.
    let (_, created, _) =
        revert(&node, request(&Ask { start: "side", ..ask(&first, "empty") })).await.unwrap();
    assert!(created);
    assert_eq!(git(&path, &["ls-tree", "empty"]), "");
    git(&path, &["fsck", "--strict"]);

    let failure = async |ask: &Ask, code: Code, text: &str| {
        let status = revert(&node, request(ask)).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, text));
        detail::<UserRevertError>(&status, "UserRevertError").error.unwrap()
    };
    let failed = Code::FailedPrecondition;
    // Reverting what has been changed since is a conflict, reverting what is gone already is empty.
    git(&path, &["update-ref", "refs/heads/main", &third]);
    let error = failure(&ask(&first, "main"), failed, "revert: there are conflicting files").await;
    let reverted::Error::MergeConflict(error) = error else { panic!("{error:?}") };
    assert_eq!(error.conflicting_files, [b"README".to_vec()]);
    let text = "revert: could not apply because the result was empty";
    let gone = Ask { start: "side", ..ask(&third, "side") };
    let error = failure(&gone, failed, text).await;
    assert!(matches!(error, reverted::Error::ChangesAlreadyApplied(_)), "{error:?}");
    let diverged = Ask { start: "side", ..ask(&first, "main") };
    let error = failure(&diverged, failed, "revert: branch diverged").await;
    assert!(matches!(error, reverted::Error::NotAncestor(_)), "{error:?}");
    hook(&node, "update", "exit 1");
    let error = failure(&ask(&third, "main"), Code::PermissionDenied, "revert: custom hook error").await;
    assert!(matches!(error, reverted::Error::CustomHook(_)), "{error:?}");

    let absent = ask(&"12".repeat(20), "main");
    let expected = (Code::NotFound, "revert commit lookup: commit not found".to_owned());
    assert_eq!(refusal(revert(&node, request(&absent)).await), expected);
    let nameless = UserRevertRequest { user: None, ..request(&ask(&second, "main")) };
    assert_eq!(refusal(revert(&node, nameless).await), invalid("empty User"));
    assert_eq!(id(&node, "a.git", "main"), third);
    assert_no_quarantine(&node).await;
}
