//! UserCommitFiles: files changed through a web interface.

use tabularium_proto::gitaly::{
    IndexError, Repository, UserCommitFilesAction, UserCommitFilesActionHeader, UserCommitFilesError,
    UserCommitFilesRequest, UserCommitFilesRequestHeader, UserCommitFilesResponse, index_error::ErrorType,
    user_commit_files_action::UserCommitFilesActionPayload as ActionPayload,
    user_commit_files_action_header::ActionType, user_commit_files_error,
    user_commit_files_request::UserCommitFilesRequestPayload as Payload,
};
use tonic::{Code, Status};

use crate::{
    harness::{TestNode, git},
    operations::{assert_no_quarantine, hook, moment, operations, user},
    seed::{self, detail, id, invalid, refusal},
};

type Header = UserCommitFilesRequestHeader;

fn commit_header(repository: &Repository, branch: &str) -> Header {
    Header {
        repository: Some(repository.clone()),
        user: Some(user()),
        branch_name: branch.into(),
        commit_message: b"Change files".to_vec(),
        timestamp: Some(moment()),
        ..Header::default()
    }
}

fn action(kind: ActionType, path: &str) -> UserCommitFilesActionHeader {
    UserCommitFilesActionHeader {
        action: kind as i32,
        file_path: path.into(),
        ..UserCommitFilesActionHeader::default()
    }
}

type Change<'a> = (UserCommitFilesActionHeader, &'a [&'a [u8]]);

async fn commit_files(
    node: &TestNode,
    header: Header,
    changes: &[Change<'_>],
) -> Result<UserCommitFilesResponse, Status> {
    let request = |payload| UserCommitFilesRequest { user_commit_files_request_payload: Some(payload) };
    let of_action = |payload| {
        request(Payload::Action(UserCommitFilesAction { user_commit_files_action_payload: Some(payload) }))
    };
    let mut messages = vec![request(Payload::Header(header))];
    for (header, content) in changes {
        messages.push(of_action(ActionPayload::Header(header.clone())));
        messages.extend(content.iter().map(|piece| of_action(ActionPayload::Content(piece.to_vec()))));
    }
    operations(node).user_commit_files(tokio_stream::iter(messages)).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn every_action_in_one_commit() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let before = id(&node, "a.git", "main");
    let big: Vec<Vec<u8>> = (0..40_u8).map(|number| vec![number; 100_000]).collect();
    let big: Vec<&[u8]> = big.iter().map(Vec::as_slice).collect();
    let base64 = |mut header: UserCommitFilesActionHeader| {
        header.base64_content = true;
        header
    };
    let moved = |from: &str, to: &str, infer_content| UserCommitFilesActionHeader {
        previous_path: from.into(),
        infer_content,
        ..action(ActionType::Move, to)
    };
    let mode = |path: &str, execute_filemode| UserCommitFilesActionHeader {
        execute_filemode,
        ..action(ActionType::Chmod, path)
    };
    let response = commit_files(
        &node,
        commit_header(&repository, "main"),
        &[
            (
                UserCommitFilesActionHeader {
                    execute_filemode: true,
                    ..action(ActionType::Create, "x/y/new.sh")
                },
                &[b"new"],
            ),
            (action(ActionType::Create, "large"), &big),
            (base64(action(ActionType::Create, "/coded")), &[b"aGVsb", b"G8gd29ybGQ="]),
            (action(ActionType::CreateDir, "dir"), &[]),
            (action(ActionType::Update, "run.sh"), &[b"up", b"dated"]),
            (moved("README", "docs/README", true), &[]),
            (moved("a/b/c/deep.txt", "shallow.txt", false), &[b"other"]),
            (action(ActionType::Delete, "big.bin"), &[]),
            (mode("docs/README", true), &[]),
            (action(ActionType::Create, "empty"), &[]),
        ],
    )
    .await
    .unwrap();
    let update = response.branch_update.unwrap();
    assert_eq!((update.repo_created, update.branch_created), (false, false));
    assert_eq!(id(&node, "a.git", "main"), update.commit_id);
    assert_eq!(id(&node, "a.git", "main^"), before);
    let listing = git(&path, &["ls-tree", "-r", "--format=%(objectmode) %(path)", "main"]);
    assert_eq!(
        listing.lines().collect::<Vec<_>>(),
        [
            "100644 coded",
            "100644 dir/.gitkeep",
            "100755 docs/README",
            "100644 empty",
            "100644 large",
            "160000 module",
            "100755 run.sh",
            "100644 shallow.txt",
            "100755 x/y/new.sh",
        ]
    );
    for (file, content) in [
        ("coded", "hello world"),
        ("run.sh", "updated"),
        ("docs/README", "hello again"),
        ("shallow.txt", "other"),
        ("empty", ""),
    ] {
        assert_eq!(git(&path, &["cat-file", "blob", &format!("main:{file}")]), content, "{file}");
    }
    assert_eq!(git(&path, &["cat-file", "-s", "main:large"]), "4000000");
    assert_eq!(
        git(&path, &["log", "-1", "--format=%an|%ae|%ad|%cn|%cd|%B", "--date=raw", "main"]),
        "Jane Doe|jane@example.com|1690000000 +0200|Jane Doe|1690000000 +0200|Change files"
    );
    git(&path, &["fsck", "--strict"]);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn the_first_commit_of_a_repository_and_branches_off_others() {
    let node = TestNode::start().await;
    let empty = node.create("empty.git").await;
    let header = Header {
        commit_author_name: b"Author".to_vec(),
        commit_author_email: b"author@x".to_vec(),
        start_repository: Some(Repository {
            relative_path: "as/seen/elsewhere.git".into(),
            gl_repository: "project-1".into(),
            ..empty.clone()
        }),
        repository: Some(Repository { gl_repository: "project-1".into(), ..empty.clone() }),
        ..commit_header(&empty, "main")
    };
    let response = commit_files(&node, header, &[(action(ActionType::Create, "f"), &[b"1"])]).await.unwrap();
    let update = response.branch_update.unwrap();
    assert!(update.repo_created && update.branch_created);
    assert_eq!(
        git(&node.path("empty.git"), &["log", "--format=%an %ae %cn", "main"]),
        "Author author@x Jane Doe"
    );

    let repository = seed::repository(&node, "a.git").await;
    let (first, third) = (id(&node, "a.git", "v1"), id(&node, "a.git", "main"));
    let create: &[Change] = &[(action(ActionType::Create, "f"), &[b"1"])];
    let with = |branch: &str, change: &dyn Fn(&mut Header)| {
        let mut header = commit_header(&repository, branch);
        change(&mut header);
        header
    };
    let off = with("off", &|header| header.start_branch_name = b"side".to_vec());
    let update = commit_files(&node, off, create).await.unwrap().branch_update.unwrap();
    assert!(!update.repo_created && update.branch_created);
    assert_eq!(id(&node, "a.git", "off^"), first);
    let by_id = with("by-id", &|header| header.start_sha.clone_from(&third));
    commit_files(&node, by_id, create).await.unwrap();
    assert_eq!(id(&node, "a.git", "by-id^"), third);

    // On another commit than the branch is at: only with force.
    let other = with("off", &|header| header.start_sha.clone_from(&third));
    let lost = (
        Code::FailedPrecondition,
        "Could not update refs/heads/off. Please refresh and try again.".to_owned(),
    );
    assert_eq!(refusal(commit_files(&node, other.clone(), create).await), lost);
    let expected = Header { expected_old_oid: first.clone(), force: true, ..other.clone() };
    assert_eq!(refusal(commit_files(&node, expected, create).await), lost);
    commit_files(&node, Header { force: true, ..other }, create).await.unwrap();
    assert_eq!(id(&node, "a.git", "off^"), third);

    let unborn = with("orphan", &|_| ());
    let update = commit_files(&node, unborn, create).await.unwrap().branch_update.unwrap();
    assert!(update.branch_created);
    assert_eq!(git(&node.path("a.git"), &["log", "--format=%P", "orphan"]), "");
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn actions_that_do_not_fit_change_nothing() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let before = id(&node, "a.git", "main");
    let fail = async |header: UserCommitFilesActionHeader| {
        let status =
            commit_files(&node, commit_header(&repository, "main"), &[(header, &[b"x"])]).await.unwrap_err();
        let error = detail::<UserCommitFilesError>(&status, "UserCommitFilesError").error;
        let Some(user_commit_files_error::Error::IndexUpdate(IndexError { path, error_type })) = error else {
            panic!("{error:?}")
        };
        let kind = ErrorType::try_from(error_type).unwrap();
        (status.code(), status.message().to_owned(), String::from_utf8(path).unwrap(), kind)
    };
    let move_from = |from: &str, to: &str| UserCommitFilesActionHeader {
        previous_path: from.into(),
        ..action(ActionType::Move, to)
    };
    for (header, code, text, path, kind) in [
        (
            action(ActionType::Create, "README"),
            Code::AlreadyExists,
            "A file with this name already exists",
            "README",
            ErrorType::FileExists,
        ),
        (
            action(ActionType::Create, "README/x"),
            Code::AlreadyExists,
            "A file with this name already exists",
            "README/x",
            ErrorType::FileExists,
        ),
        (
            action(ActionType::CreateDir, "a/b"),
            Code::AlreadyExists,
            "A directory with this name already exists",
            "a/b",
            ErrorType::DirectoryExists,
        ),
        (
            action(ActionType::CreateDir, "README"),
            Code::AlreadyExists,
            "A file with this name already exists",
            "README",
            ErrorType::FileExists,
        ),
        (
            action(ActionType::Update, "none"),
            Code::NotFound,
            "A file with this name doesn't exist",
            "none",
            ErrorType::FileNotFound,
        ),
        (
            action(ActionType::Delete, "a/none"),
            Code::NotFound,
            "A file with this name doesn't exist",
            "a/none",
            ErrorType::FileNotFound,
        ),
        (
            action(ActionType::Chmod, "a"),
            Code::NotFound,
            "A file with this name doesn't exist",
            "a",
            ErrorType::FileNotFound,
        ),
        (
            move_from("none", "x"),
            Code::NotFound,
            "A file with this name doesn't exist",
            "none",
            ErrorType::FileNotFound,
        ),
        (
            move_from("README", "run.sh"),
            Code::AlreadyExists,
            "A file with this name already exists",
            "run.sh",
            ErrorType::FileExists,
        ),
        (
            move_from("../x", "y"),
            Code::InvalidArgument,
            "Path cannot include directory traversal",
            "../x",
            ErrorType::DirectoryTraversal,
        ),
        (
            action(ActionType::Create, "../x"),
            Code::InvalidArgument,
            "Path cannot include directory traversal",
            "../x",
            ErrorType::DirectoryTraversal,
        ),
        (
            action(ActionType::Create, ""),
            Code::InvalidArgument,
            "You must provide a file path",
            "",
            ErrorType::EmptyPath,
        ),
        (
            action(ActionType::Create, "a//b"),
            Code::InvalidArgument,
            "invalid path: \"a//b\"",
            "a//b",
            ErrorType::InvalidPath,
        ),
        (
            action(ActionType::Create, ".git/config"),
            Code::InvalidArgument,
            "invalid path: \".git/config\"",
            ".git/config",
            ErrorType::InvalidPath,
        ),
    ] {
        assert_eq!(fail(header).await, (code, text.to_owned(), path.to_owned(), kind));
    }
    assert_eq!(id(&node, "a.git", "main"), before);
    assert_no_quarantine(&node).await;
}

#[tokio::test]
async fn commits_that_lack_something_or_are_refused() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let before = id(&node, "a.git", "main");
    let create: &[Change] = &[(action(ActionType::Create, "f"), &[b"1"])];
    let fail = async |change: &dyn Fn(&mut Header)| {
        let mut header = commit_header(&repository, "main");
        change(&mut header);
        refusal(commit_files(&node, header, create).await)
    };
    assert_eq!(fail(&|header| header.user = None).await, invalid("empty User"));
    assert_eq!(fail(&|header| header.branch_name.clear()).await, invalid("empty BranchName"));
    assert_eq!(fail(&|header| header.commit_message.clear()).await, invalid("empty CommitMessage"));
    assert_eq!(fail(&|header| header.repository = None).await, invalid("repository not set"));
    assert_eq!(fail(&|header| header.start_sha = "main".into()).await.0, Code::InvalidArgument);
    let (code, text) = fail(&|header| header.start_sha = "12".repeat(20)).await;
    assert!(code == Code::InvalidArgument && text.starts_with("cannot resolve parent commit: "), "{text}");
    let (code, text) = fail(&|header| header.start_branch_name = b"none".to_vec()).await;
    assert!(code == Code::InvalidArgument && text.starts_with("cannot resolve parent commit: "), "{text}");
    let nameless =
        invalid("commit: failed to parse signature - Signature cannot have an empty name or email");
    assert_eq!(fail(&|header| header.user.as_mut().unwrap().name = b" ".to_vec()).await, nameless);
    assert_eq!(fail(&|header| header.user.as_mut().unwrap().name = b"<>".to_vec()).await, nameless);
    let elsewhere = Repository { relative_path: "b.git".into(), ..repository.clone() };
    assert_eq!(
        fail(&|header| header.start_repository = Some(elsewhere.clone())).await,
        (Code::Internal, "empty metadata".into())
    );

    let empty = operations(&node)
        .user_commit_files(tokio_stream::iter(vec![UserCommitFilesRequest::default()]))
        .await;
    assert_eq!(refusal(empty), invalid("empty UserCommitFilesRequestHeader"));
    let unknown = UserCommitFilesActionHeader { action: 77, ..action(ActionType::Create, "f") };
    let status = refusal(commit_files(&node, commit_header(&repository, "main"), &[(unknown, &[])]).await);
    assert_eq!(status.0, Code::InvalidArgument);
    let coded = UserCommitFilesActionHeader { base64_content: true, ..action(ActionType::Create, "f") };
    let status = refusal(commit_files(&node, commit_header(&repository, "main"), &[(coded, &[b"*"])]).await);
    assert_eq!(status, invalid("illegal base64 data"));

    hook(&node, "pre-receive", "read old new ref; git cat-file -p $new:f >&2; exit 1");
    let status = commit_files(&node, commit_header(&repository, "main"), create).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, "denied by custom hooks"));
    let error = detail::<UserCommitFilesError>(&status, "UserCommitFilesError").error;
    let Some(user_commit_files_error::Error::CustomHook(error)) = error else { panic!("{error:?}") };
    assert_eq!(error.stderr, b"1", "the hook read the new object");
    assert_eq!(id(&node, "a.git", "main"), before);
    assert_no_quarantine(&node).await;
    git(&node.path("a.git"), &["fsck", "--strict", "--no-dangling"]);
}
