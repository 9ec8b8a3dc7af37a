//! DiffService.

use tabularium_proto::gitaly::{
    ChangedPaths, CommitDeltaRequest, CommitDiffRequest, CommitDiffResponse, DiffStatsRequest,
    FindChangedPathsRequest, GetPatchIdRequest, RawDiffRequest, RawPatchRequest, Repository,
    changed_paths::Status as ChangeStatus,
    commit_diff_request::WhitespaceChanges,
    diff_service_client::DiffServiceClient,
    find_changed_paths_request::{
        DiffStatus, MergeCommitDiffMode, Request,
        request::{CommitRequest, TreeRequest, Type},
    },
};
use tonic::{Code, Status};

use crate::{
    harness::{Client, TestNode, git},
    seed::{self, all, id, invalid, refusal},
};

pub(crate) const INJECTED: &str = "--output=/tmp/injected";

pub(crate) fn diffs(node: &TestNode) -> DiffServiceClient<Client> {
    DiffServiceClient::new(node.channel())
}

pub(crate) fn injected(doing: &str) -> (Code, String) {
    let text = format!("{doing}positional arg \"{INJECTED}\" cannot start with dash '-': invalid argument");
    (Code::Internal, text)
}

/// A commit of these files on a branch, on top of what is there.
pub(crate) fn commit(branch: &str, message: &str, files: &[(&[u8], Option<&[u8]>)]) -> Vec<u8> {
    let who = "A U Thor <author@example.com> 1700000000 +0000";
    let mut stream =
        format!("commit refs/heads/{branch}\ncommitter {who}\ndata {}\n{message}\n", message.len())
            .into_bytes();
    for (path, content) in files {
        match content {
            None => stream.extend([b"D ", *path, b"\n"].concat()),
            Some(content) => {
                // What begins like a quoted path has to be one.
                let path =
                    if path.starts_with(b"\"") { [b"\"\\", *path, b"\""].concat() } else { path.to_vec() };
                let head = [b"M 100644 inline ", path.as_slice(), b"\n"].concat();
                stream
                    .extend([&head, format!("data {}\n", content.len()).as_bytes(), content, b"\n"].concat());
            }
        }
    }
    stream
}

/// `base` and `changed` differ in every way that files can: added, deleted, modified, renamed, of another type, binary,
/// with names that are no text.
pub(crate) async fn differing(node: &TestNode, path: &str) -> Repository {
    let repository = node.create(path).await;
    let long = b"one\ntwo\nthree\nfour\nfive\n";
    let mut stream = commit(
        "base",
        "base\n",
        &[
            (b"modified", Some(b"a\nb\nc\n")),
            (b"deleted", Some(b"gone\n")),
            (b"old name", Some(long)),
            (b"type", Some(b"target\n")),
            (b"binary", Some(b"\0\x01\x02")),
            (b"gr\xfc\xdfe", Some(b"hallo\n")),
            (b"space", Some(b"a b\n")),
        ],
    );
    stream.extend(b"reset refs/heads/changed\nfrom refs/heads/base\n\n");
    stream.extend(commit(
        "changed",
        "changed\n",
        &[
            (b"modified", Some(b"a\nB\nc\n")),
            (b"deleted", None),
            (b"old name", None),
            (b"\"new name", Some(long)),
            (b"added", Some(b"new\n")),
            (b"binary", Some(b"\0\x03")),
            (b"gr\xfc\xdfe", Some(b"Hallo\n")),
            (b"space", Some(b"a   b\n")),
        ],
    ));
    stream.extend(b"M 120000 inline type\ndata 6\ntarget\n");
    seed::fast_import(&node.path(path), &stream);
    repository
}

pub(crate) async fn diff(
    node: &TestNode,
    request: CommitDiffRequest,
) -> Result<Vec<CommitDiffResponse>, Status> {
    all(diffs(node).commit_diff(request).await).await
}

pub(crate) fn of(repository: &Repository) -> CommitDiffRequest {
    CommitDiffRequest {
        repository: Some(repository.clone()),
        left_commit_id: "base".into(),
        right_commit_id: "changed".into(),
        ..Default::default()
    }
}

fn paths(found: &[CommitDiffResponse]) -> Vec<(String, String)> {
    let text = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
    found.iter().map(|diff| (text(&diff.from_path), text(&diff.to_path))).collect()
}

#[tokio::test]
async fn every_kind_of_change_is_told_of() {
    let node = TestNode::start().await;
    let repository = differing(&node, "a.git").await;
    let found = diff(&node, of(&repository)).await.unwrap();
    let pair = |path: &str| (path.to_owned(), path.to_owned());
    assert_eq!(
        paths(&found),
        [
            ("old name".to_owned(), "\"new name".to_owned()),
            pair("added"),
            pair("binary"),
            pair("deleted"),
            pair("gr\u{fffd}\u{fffd}e"),
            pair("modified"),
            pair("space"),
            pair("type"),
            pair("type"),
        ]
    );
    assert!(found.iter().all(|diff| diff.end_of_patch && !diff.too_large && !diff.collapsed));
    let zero = "0".repeat(40);
    let [renamed, added, binary, deleted, odd, modified, _, ended, begun] = &found[..] else { panic!() };
    assert!(renamed.raw_patch_data.is_empty() && renamed.from_id == renamed.to_id);
    assert_eq!((added.from_id.as_str(), added.old_mode, added.new_mode), (zero.as_str(), 0, 0o100_644));
    assert_eq!(added.raw_patch_data, b"@@ -0,0 +1 @@\n+new\n");
    assert!(binary.binary);
    assert_eq!(binary.raw_patch_data, b"Binary files a/binary and b/binary differ\n");
    assert_eq!((deleted.to_id.as_str(), deleted.new_mode), (zero.as_str(), 0));
    assert_eq!(odd.to_path, b"gr\xfc\xdfe");
    assert_eq!(odd.raw_patch_data, b"@@ -1 +1 @@\n-hallo\n+Hallo\n");
    assert_eq!(modified.raw_patch_data, b"@@ -1,3 +1,3 @@\n a\n-b\n+B\n c\n");
    assert_eq!((modified.lines_added, modified.lines_removed), (1, 1));
    assert_eq!(modified.to_id, id(&node, "a.git", "changed:modified"));
    assert_eq!((ended.new_mode, ended.to_id.as_str()), (0, zero.as_str()));
    assert_eq!((begun.old_mode, begun.new_mode), (0, 0o120_000));
    assert_eq!(begun.raw_patch_data, b"@@ -0,0 +1 @@\n+target\n\\ No newline at end of file\n");

    let some =
        CommitDiffRequest { paths: vec![b"added".to_vec(), b"gr\xfc\xdfe".to_vec()], ..of(&repository) };
    assert_eq!(diff(&node, some).await.unwrap().len(), 2);
    let same = CommitDiffRequest { right_commit_id: "base".into(), ..of(&repository) };
    assert_eq!(diff(&node, same).await.unwrap(), []);
    let words = CommitDiffRequest { diff_mode: 1, paths: vec![b"modified".to_vec()], ..of(&repository) };
    assert_eq!(
        diff(&node, words).await.unwrap()[0].raw_patch_data,
        b"@@ -1,3 +1,3 @@\n a\n~\n-b\n+B\n~\n c\n~\n"
    );
    node.stop().await;
}

#[tokio::test]
async fn white_space_can_be_ignored_and_its_files_are_still_told_of() {
    let node = TestNode::start().await;
    let repository = differing(&node, "a.git").await;
    for changes in [WhitespaceChanges::Ignore, WhitespaceChanges::IgnoreAll] {
        let request = CommitDiffRequest { whitespace_changes: changes.into(), ..of(&repository) };
        let found = diff(&node, request).await.unwrap();
        assert_eq!(found.len(), 9);
        let space: Vec<_> = found.iter().filter(|diff| diff.to_path == b"space").collect();
        assert_eq!(space.len(), 1);
        assert!(space[0].raw_patch_data.is_empty() && space[0].end_of_patch);
    }
}

#[tokio::test]
async fn long_patches_come_in_pieces_and_limits_leave_them_out() {
    let node = TestNode::start().await;
    let repository = node.create("a.git").await;
    let content: Vec<u8> = (0..1000).flat_map(|number| format!("line {number}\n").into_bytes()).collect();
    let mut stream = commit("base", "base\n", &[(b"z", Some(b"z\n"))]);
    stream.extend(b"reset refs/heads/changed\nfrom refs/heads/base\n\n");
    let content = content.as_slice();
    stream.extend(commit(
        "changed",
        "changed\n",
        &[(b"a.txt", Some(content)), (b"b", Some(b"b\n")), (b"z", None)],
    ));
    seed::fast_import(&node.path("a.git"), &stream);

    let found = diff(&node, of(&repository)).await.unwrap();
    let (end, _) = found.iter().enumerate().find(|(_, piece)| piece.end_of_patch).unwrap();
    assert!(end > 0 && found[..end].iter().all(|piece| piece.raw_patch_data.len() == 5 * 1024));
    assert!(found[1..=end].iter().all(|piece| piece.to_path.is_empty() && piece.lines_added == 0));
    assert_eq!((found[0].to_path.as_slice(), found[0].lines_added), (&b"a.txt"[..], 1000));
    let patch: Vec<u8> = found[..=end].iter().flat_map(|piece| piece.raw_patch_data.clone()).collect();
    assert!(patch.starts_with(b"@@ -0,0 +1,1000 @@\n+line 0\n") && patch.ends_with(b"+line 999\n"));

    let limited = CommitDiffRequest {
        enforce_limits: true,
        max_files: 100,
        max_lines: 5000,
        max_bytes: 100_000,
        max_patch_bytes: 100,
        ..of(&repository)
    };
    let found = diff(&node, limited.clone()).await.unwrap();
    assert_eq!(found.iter().map(|diff| diff.too_large).collect::<Vec<_>>(), [true, false, false]);
    assert!(found[0].raw_patch_data.is_empty() && found[0].end_of_patch && found[0].lines_added == 1000);
    let more = [(".txt".to_owned(), 1_000_000)].into();
    let extension = CommitDiffRequest { max_patch_bytes_for_file_extension: more, ..limited.clone() };
    assert!(!diff(&node, extension).await.unwrap()[0].too_large);

    let files = CommitDiffRequest { max_files: 1, max_patch_bytes: 50_000, ..limited.clone() };
    let found = diff(&node, files.clone()).await.unwrap();
    let last = found.last().unwrap();
    assert!(last.overflow_marker && last.to_path.is_empty() && last.end_of_patch);
    assert_eq!(found.iter().filter(|piece| piece.end_of_patch).count(), 2);
    let every = CommitDiffRequest { collect_all_paths: true, ..files };
    let found = diff(&node, every).await.unwrap();
    assert_eq!(found.iter().filter(|piece| piece.overflow_marker).count(), 2);
    assert_eq!(found.last().unwrap().to_path, b"z");

    let collapsing = CommitDiffRequest {
        collapse_diffs: true,
        safe_max_files: 1,
        safe_max_lines: 500,
        safe_max_bytes: 100_000,
        ..of(&repository)
    };
    let found = diff(&node, collapsing).await.unwrap();
    assert_eq!(found.iter().map(|diff| diff.collapsed).collect::<Vec<_>>(), [true, true, true]);
}

#[tokio::test]
async fn differences_that_cannot_be_made() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let sides = |left: &str, right: &str| CommitDiffRequest {
        repository: Some(repository.clone()),
        left_commit_id: left.into(),
        right_commit_id: right.into(),
        ..Default::default()
    };
    let failed = (Code::FailedPrecondition, "eachDiff: exit status 128".to_owned());
    for (request, answer) in [
        (CommitDiffRequest::default(), invalid("repository not set")),
        (sides("", "main"), invalid("empty LeftCommitId")),
        (sides("main", ""), invalid("empty RightCommitId")),
        (sides("none", "main"), failed.clone()),
        (sides("main", &"12".repeat(20)), failed),
        (sides(INJECTED, "main"), injected("eachDiff: cmd: ")),
        (sides("main", INJECTED), injected("eachDiff: cmd: ")),
    ] {
        assert_eq!(refusal(diff(&node, request).await), answer);
    }
    let delta = async |left: &str, right: &str| {
        let (left_commit_id, right_commit_id) = (left.to_owned(), right.to_owned());
        let repository = Some(repository.clone());
        let request = CommitDeltaRequest { repository, left_commit_id, right_commit_id, paths: vec![] };
        all(diffs(&node).commit_delta(request).await).await
    };
    let stats = async |left: &str, right: &str| {
        let (left_commit_id, right_commit_id) = (left.to_owned(), right.to_owned());
        let request =
            DiffStatsRequest { repository: Some(repository.clone()), left_commit_id, right_commit_id };
        all(diffs(&node).diff_stats(request).await).await
    };
    let failed = (Code::FailedPrecondition, "exit status 128".to_owned());
    assert_eq!(refusal(delta("none", "main").await), failed);
    assert_eq!(refusal(stats("none", "main").await), failed);
    assert_eq!(refusal(delta("", "main").await), invalid("empty LeftCommitId"));
    assert_eq!(refusal(stats("main", "").await), invalid("empty RightCommitId"));
    assert_eq!(refusal(delta("main", INJECTED).await), injected("cmd: "));
    assert_eq!(refusal(stats(INJECTED, "main").await), injected("cmd: "));
    let raw = async |left: &str, right: &str| {
        let (left_commit_id, right_commit_id) = (left.to_owned(), right.to_owned());
        let request =
            RawDiffRequest { repository: Some(repository.clone()), left_commit_id, right_commit_id };
        all(diffs(&node).raw_diff(request).await).await
    };
    let patch = async |left: &str, right: &str| {
        let (left_commit_id, right_commit_id) = (left.to_owned(), right.to_owned());
        let request =
            RawPatchRequest { repository: Some(repository.clone()), left_commit_id, right_commit_id };
        all(diffs(&node).raw_patch(request).await).await
    };
    let failed = (Code::Internal, "cmd: exit status 128".to_owned());
    assert_eq!(refusal(raw("none", "main").await), failed);
    assert_eq!(refusal(patch("none", "main").await), failed);
    assert_eq!(refusal(raw("main", "").await), invalid("empty RightCommitId"));
    assert_eq!(refusal(patch("", "main").await), invalid("empty LeftCommitId"));
    assert_eq!(refusal(raw(INJECTED, "main").await), injected("cmd: "));
    let text =
        format!("cmd: positional arg \"{INJECTED}..main\" cannot start with dash '-': invalid argument");
    assert_eq!(refusal(patch(INJECTED, "main").await), (Code::Internal, text));
    assert!(!std::path::Path::new("/tmp/injected").exists());
}

#[tokio::test]
async fn deltas_and_stats_of_every_kind_of_change() {
    let node = TestNode::start().await;
    let repository = differing(&node, "a.git").await;
    let (left_commit_id, right_commit_id) = ("base".to_owned(), "changed".to_owned());
    let request = CommitDeltaRequest {
        repository: Some(repository.clone()),
        left_commit_id: left_commit_id.clone(),
        right_commit_id: right_commit_id.clone(),
        paths: Vec::new(),
    };
    let messages = all(diffs(&node).commit_delta(request).await).await.unwrap();
    let deltas: Vec<_> = messages.into_iter().flat_map(|message| message.deltas).collect();
    assert_eq!(deltas.len(), 9);
    assert_eq!(
        (deltas[0].from_path.as_slice(), deltas[0].to_path.as_slice()),
        (&b"old name"[..], &b"\"new name"[..])
    );
    assert_eq!(deltas[4].from_path, b"gr\xfc\xdfe");
    assert_eq!((deltas[7].new_mode, deltas[8].old_mode, deltas[8].new_mode), (0, 0, 0o120_000));
    let request = DiffStatsRequest { repository: Some(repository), left_commit_id, right_commit_id };
    let stats = all(diffs(&node).diff_stats(request).await).await.unwrap().remove(0).stats;
    let of = |path: &[u8]| stats.iter().find(|stat| stat.path == path).unwrap();
    assert_eq!((of(b"modified").additions, of(b"modified").deletions), (1, 1));
    assert_eq!((of(b"\"new name").old_path.as_slice(), of(b"\"new name").additions), (&b"old name"[..], 0));
    assert_eq!((of(b"binary").additions, of(b"binary").deletions), (0, 0));
    assert_eq!(of(b"gr\xfc\xdfe").additions, 1);
}

#[tokio::test]
async fn raw_patches_are_what_git_says_and_their_ids_tell_them_apart() {
    let node = TestNode::start().await;
    let repository = differing(&node, "a.git").await;
    let path = node.path("a.git");
    let (left_commit_id, right_commit_id) = ("base".to_owned(), "changed".to_owned());
    let request = RawDiffRequest {
        repository: Some(repository.clone()),
        left_commit_id: left_commit_id.clone(),
        right_commit_id: right_commit_id.clone(),
    };
    let data = |messages: Vec<Vec<u8>>| String::from_utf8(messages.concat()).unwrap();
    let messages = all(diffs(&node).raw_diff(request).await).await.unwrap();
    let raw = data(messages.into_iter().map(|message| message.data).collect());
    assert_eq!(raw.trim_end(), git(&path, &["diff", "--full-index", "base", "changed"]));
    let request = RawPatchRequest { repository: Some(repository.clone()), left_commit_id, right_commit_id };
    let messages = all(diffs(&node).raw_patch(request).await).await.unwrap();
    let patch = data(messages.into_iter().map(|message| message.data).collect());
    assert!(patch.starts_with("From ") && patch.contains("Subject: [PATCH] changed"));
    assert!(patch.trim_end().ends_with("-- \nGitLab"), "{patch}");

    let ask = async |old: &str, new: &str, context_free| {
        let request = GetPatchIdRequest {
            repository: Some(repository.clone()),
            old_revision: old.into(),
            new_revision: new.into(),
            context_free,
        };
        diffs(&node).get_patch_id(request).await.map(|answer| answer.into_inner().patch_id)
    };
    let patch_id = ask("base", "changed", false).await.unwrap();
    assert_eq!((patch_id.len(), &patch_id), (40, &ask("changed~", "changed", false).await.unwrap()));
    assert_ne!(patch_id, ask("base", "changed", true).await.unwrap());
    let single = ask("base:modified", "changed:modified", false).await.unwrap();
    assert_ne!(single, patch_id);
    let failed = (Code::FailedPrecondition, "no difference between old and new revision".to_owned());
    assert_eq!(refusal(ask("base", "base", false).await), failed);
    assert_eq!(refusal(ask("", "base", false).await), invalid("empty OldRevision"));
    assert_eq!(refusal(ask("base", "", false).await), invalid("empty NewRevision"));
    let failed = (Code::Internal, "waiting for git-diff: exit status 128".to_owned());
    assert_eq!(refusal(ask("none", "base", false).await), failed);
    assert_eq!(refusal(ask(INJECTED, "base", false).await), injected("spawning diff: "));
}

pub(crate) fn commit_request(commit: &str, parents: &[&str]) -> Request {
    let parent_commit_revisions = parents.iter().map(|&parent| parent.to_owned()).collect();
    let request = CommitRequest { commit_revision: commit.into(), parent_commit_revisions };
    Request { r#type: Some(Type::CommitRequest(request)) }
}

fn tree_request(left: &str, right: &str) -> Request {
    let request = TreeRequest { left_tree_revision: left.into(), right_tree_revision: right.into() };
    Request { r#type: Some(Type::TreeRequest(request)) }
}

pub(crate) async fn changed(
    node: &TestNode,
    request: FindChangedPathsRequest,
) -> Result<Vec<ChangedPaths>, Status> {
    let messages = all(diffs(node).find_changed_paths(request).await).await?;
    Ok(messages.into_iter().flat_map(|message| message.paths).collect())
}

#[tokio::test]
async fn changed_paths_of_commits_and_trees() {
    let node = TestNode::start().await;
    let repository = differing(&node, "a.git").await;
    let of = |requests: Vec<Request>| FindChangedPathsRequest {
        repository: Some(repository.clone()),
        requests,
        ..Default::default()
    };
    let found = changed(&node, of(vec![commit_request("changed", &[])])).await.unwrap();
    let status = |path: &[u8]| found.iter().find(|changed| changed.path == path).unwrap().status();
    assert_eq!(found.len(), 9);
    assert_eq!(status(b"old name"), ChangeStatus::Deleted);
    assert_eq!(status(b"\"new name"), ChangeStatus::Added);
    assert_eq!(status(b"type"), ChangeStatus::TypeChange);
    assert_eq!(status(b"gr\xfc\xdfe"), ChangeStatus::Modified);
    let commit = id(&node, "a.git", "changed");
    assert!(found.iter().all(|changed| changed.commit_id == commit && changed.old_path.is_empty()));
    let modified = found.iter().find(|changed| changed.path == b"modified").unwrap();
    assert_eq!(modified.new_blob_id, id(&node, "a.git", "changed:modified"));
    assert_eq!((modified.old_mode, modified.new_mode), (0o100_644, 0o100_644));

    let renames = FindChangedPathsRequest {
        find_renames: true,
        diff_filters: vec![DiffStatus::Renamed.into(), DiffStatus::Renamed.into()],
        ..of(vec![tree_request("base", "changed")])
    };
    let found = changed(&node, renames).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].status(), found[0].old_path.as_slice()), (ChangeStatus::Renamed, &b"old name"[..]));
    assert!(found[0].commit_id.is_empty());
    let older = FindChangedPathsRequest { commits: vec!["base".into()], ..of(Vec::new()) };
    assert_eq!(changed(&node, older).await.unwrap().len(), 7, "the first commit adds everything");
    assert_eq!(changed(&node, of(Vec::new())).await.unwrap(), []);
    let backwards = commit_request("base", &["changed"]);
    assert_eq!(changed(&node, of(vec![backwards])).await.unwrap().len(), 9);
}

#[tokio::test]
async fn changed_paths_of_merges() {
    let node = TestNode::start().await;
    let repository = node.create("a.git").await;
    let mut stream = commit("main", "base\n", &[(b"f", Some(b"1\n"))]);
    stream.extend(b"reset refs/heads/side\nfrom refs/heads/main\n\n");
    stream.extend(commit("main", "left\n", &[(b"f", Some(b"2\n")), (b"l", Some(b"l\n"))]));
    stream.extend(commit("side", "right\n", &[(b"f", Some(b"3\n"))]));
    let who = "A U Thor <author@example.com> 1700000000 +0000";
    stream.extend(
        format!(
            "commit refs/heads/main\ncommitter {who}\ndata 5\nmerge\nmerge refs/heads/side\n\
             M 100644 inline f\ndata 2\n4\n\n"
        )
        .into_bytes(),
    );
    seed::fast_import(&node.path("a.git"), &stream);
    let ask = async |mode: MergeCommitDiffMode| {
        let request = FindChangedPathsRequest {
            repository: Some(repository.clone()),
            requests: vec![commit_request("main", &[])],
            merge_commit_diff_mode: mode.into(),
            ..Default::default()
        };
        let found = changed(&node, request).await.unwrap();
        found.into_iter().map(|changed| String::from_utf8(changed.path).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(ask(MergeCommitDiffMode::IncludeMerges).await, ["f", "f", "l"]);
    assert_eq!(ask(MergeCommitDiffMode::AllParents).await, ["f", "f"], "one for each parent");
}

#[tokio::test]
async fn changed_paths_that_cannot_be_found() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let of = |requests: Vec<Request>| FindChangedPathsRequest {
        repository: Some(repository.clone()),
        requests,
        ..Default::default()
    };
    let missing = |doing: &str, revision: &str| {
        (Code::NotFound, format!("{doing}: revision can not be found: \"{revision}\""))
    };
    let both =
        FindChangedPathsRequest { commits: vec!["main".into()], ..of(vec![commit_request("main", &[])]) };
    let filter = FindChangedPathsRequest { diff_filters: vec![0], ..of(vec![commit_request("main", &[])]) };
    for (request, answer) in [
        (FindChangedPathsRequest::default(), invalid("repository not set")),
        (both, invalid("cannot specify both commits and requests")),
        (filter, invalid("invalid diff filter requested")),
        (of(vec![commit_request("", &[])]), invalid("resolving commit: revision cannot be empty")),
        (of(vec![commit_request("none", &[])]), missing("resolving commit", "none")),
        (of(vec![commit_request(INJECTED, &[])]), missing("resolving commit", INJECTED)),
        (of(vec![commit_request("main", &["none"])]), missing("resolving commit parent", "none")),
        (of(vec![tree_request("none", "main")]), missing("resolving left tree", "none")),
        (of(vec![tree_request("main", "main:README")]), missing("resolving right tree", "main:README")),
        (of(vec![Request { r#type: None }]), (Code::Internal, "unknown FindChangedPathsRequest type".into())),
    ] {
        assert_eq!(refusal(changed(&node, request).await), answer);
    }
}

#[tokio::test]
async fn longer_ids_are_as_good() {
    let node = TestNode::start().await;
    git(&node.root(), &["init", "-q", "--bare", "--object-format=sha256", "a.git"]);
    let mut stream = commit("base", "base\n", &[(b"f", Some(b"1\n"))]);
    stream.extend(commit("changed", "changed\n", &[(b"g", Some(b"2\n"))]));
    seed::fast_import(&node.path("a.git"), &stream);
    let repository = node.named("a.git");
    let found = diff(&node, of(&repository)).await.unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!(
        (found[0].to_id.as_str(), found[1].from_id.as_str()),
        ("0".repeat(64).as_str(), "0".repeat(64).as_str())
    );
    assert_eq!(found[1].raw_patch_data, b"@@ -0,0 +1 @@\n+2\n");
    let request = FindChangedPathsRequest {
        repository: Some(repository),
        requests: vec![commit_request("base", &[])],
        ..Default::default()
    };
    let found = changed(&node, request).await.unwrap();
    assert_eq!((found.len(), found[0].commit_id.len(), found[0].new_blob_id.len()), (1, 64, 64));
}
