//! DiffService: pairs of blobs, and series of commits.

use tabularium_proto::gitaly::{
    ChangedPaths, DiffBlobsRequest, DiffBlobsResponse, FindChangedPathsRequest, RangeDiffRequest, RangePair,
    RawRangeDiffRequest, RevisionRange,
    changed_paths::Status as ChangeStatus,
    diff_blobs_request::{self, BlobPair},
    range_diff_request,
    range_diff_response::Comparator,
    raw_range_diff_request,
};
use tonic::{Code, Status};

use crate::{
    diffs::{INJECTED, changed, commit, commit_request, diff, differing, diffs, injected},
    harness::{TestNode, git},
    seed::{self, all, id, invalid, refusal},
};

async fn blobs(node: &TestNode, request: DiffBlobsRequest) -> Result<Vec<DiffBlobsResponse>, Status> {
    all(diffs(node).diff_blobs(request).await).await
}

fn pair(left: &str, right: &str) -> BlobPair {
    BlobPair { left_blob: left.into(), right_blob: right.into() }
}

#[tokio::test]
async fn blobs_are_compared_by_id_and_by_path() {
    let node = TestNode::start().await;
    let repository = differing(&node, "a.git").await;
    let of = |blob_pairs: Vec<BlobPair>| DiffBlobsRequest {
        repository: Some(repository.clone()),
        blob_pairs,
        ..Default::default()
    };
    let zero = "0".repeat(40);
    let (left, right) = (id(&node, "a.git", "base:modified"), id(&node, "a.git", "changed:modified"));
    let pairs = vec![
        pair(&left, &right),
        pair("base:modified", "changed:modified"),
        pair(&zero, &right),
        pair(&left, &zero),
    ];
    let found = blobs(&node, of(pairs)).await.unwrap();
    assert_eq!(found.len(), 4);
    assert_eq!((&found[0].left_blob_id, &found[0].right_blob_id), (&left, &right));
    assert_eq!(found[0].patch, b"@@ -1,3 +1,3 @@\n a\n-b\n+B\n c\n");
    assert_eq!((found[0].lines_added, found[0].lines_removed, found[0].patch_size), (1, 1, 28));
    assert_eq!(found[1].patch, found[0].patch);
    assert_eq!(found[2].left_blob_id, zero);
    assert_eq!(found[2].patch, b"@@ -0,0 +1,3 @@\n+a\n+B\n+c\n");
    assert_eq!((found[3].lines_removed, &found[3].right_blob_id), (3, &zero));
    assert!(found.iter().all(|diff| diff.status == 1));
    let small = DiffBlobsRequest { patch_bytes_limit: 10, ..of(vec![pair(&left, &right)]) };
    let found = blobs(&node, small).await.unwrap();
    assert!(found[0].over_patch_bytes_limit && found[0].patch.is_empty() && found[0].patch_size == 28);
    let binary = blobs(&node, of(vec![pair("base:binary", "changed:binary")])).await.unwrap();
    assert!(binary[0].binary);
    // A file without content that is added has no patch.
    let empty = git(&node.path("a.git"), &["hash-object", "-w", "--stdin"]);
    assert!(blobs(&node, of(vec![pair(&zero, &empty)])).await.unwrap()[0].patch.is_empty());

    let same = invalid("left and right blob revisions resolve to same OID");
    let missing = "12".repeat(20);
    for (pair, answer) in [
        (pair(&left, &left), same.clone()),
        (pair(&zero, &zero), same),
        (
            pair("base", &right),
            invalid(
                "getting left blob info: validating blob ID: invalid object ID: \"base\", expected length 40, got 4",
            ),
        ),
        (
            pair(&left, "-x:a"),
            invalid(
                "getting right blob info: validating path-scoped revision: revision can't start with '-'",
            ),
        ),
        (pair(&missing, &right), invalid("getting left blob info: getting revision info: object not found")),
        (pair("base:", &right), invalid("getting left blob info: revision is not blob")),
    ] {
        assert_eq!(refusal(blobs(&node, of(vec![pair])).await), answer);
    }
    assert_eq!(refusal(blobs(&node, of(vec![])).await), invalid("request contains no file pairs to diff"));
    let ignoring = diff_blobs_request::WhitespaceChanges::Ignore.into();
    let request = DiffBlobsRequest { whitespace_changes: ignoring, ..of(vec![pair(&left, &right)]) };
    let text = "whitespace changes cannot be ignored when blob pairs are provided";
    assert_eq!(refusal(blobs(&node, request).await), invalid(text));
    node.stop().await;
}

#[tokio::test]
async fn blobs_are_compared_by_what_was_found_of_their_paths() {
    let node = TestNode::start().await;
    let repository = differing(&node, "a.git").await;
    let request = FindChangedPathsRequest {
        repository: Some(repository.clone()),
        requests: vec![commit_request("changed", &[])],
        find_renames: true,
        ..Default::default()
    };
    let raw_info = changed(&node, request).await.unwrap();
    let of = |raw_info: Vec<ChangedPaths>| DiffBlobsRequest {
        repository: Some(repository.clone()),
        raw_info,
        ..Default::default()
    };
    let found = blobs(&node, of(raw_info.clone())).await.unwrap();
    assert_eq!(found.len(), raw_info.len() + 1, "a change of type is two differences");
    let wanted = diff(&node, crate::diffs::of(&repository)).await.unwrap();
    for (found, wanted) in found.iter().zip(&wanted) {
        assert_eq!((&found.left_blob_id, &found.right_blob_id), (&wanted.from_id, &wanted.to_id));
        assert_eq!((found.binary, found.lines_added), (wanted.binary, wanted.lines_added));
        if !found.binary {
            assert_eq!(found.patch, wanted.raw_patch_data);
        }
    }
    let ignoring = diff_blobs_request::WhitespaceChanges::IgnoreAll.into();
    let space: Vec<_> = raw_info.iter().filter(|changed| changed.path == b"space").cloned().collect();
    let request = DiffBlobsRequest { whitespace_changes: ignoring, ..of(space.clone()) };
    assert!(blobs(&node, request).await.unwrap()[0].patch.is_empty());
    let submodule = ChangedPaths {
        path: b"m".to_vec(),
        status: ChangeStatus::Added.into(),
        old_blob_id: "0".repeat(40),
        new_blob_id: "11".repeat(20),
        new_mode: 0o160_000,
        ..Default::default()
    };
    let found = blobs(&node, of(vec![submodule])).await.unwrap();
    let patch = format!("@@ -0,0 +1 @@\n+Subproject commit {}\n", "11".repeat(20));
    assert_eq!(found[0].patch, patch.as_bytes());

    let entry = |change: fn(&mut ChangedPaths)| {
        let mut entry = space[0].clone();
        change(&mut entry);
        of(vec![entry])
    };
    for (request, answer) in [
        (entry(|entry| entry.old_blob_id.clear()), invalid("raw info entry missing blob IDs")),
        (entry(|entry| entry.path.clear()), invalid("raw info entry missing path")),
        (
            entry(|entry| entry.set_status(ChangeStatus::Renamed)),
            invalid("rename/copy raw info entry missing old path"),
        ),
        (
            entry(|entry| entry.new_blob_id = "--output=x".into()),
            (Code::Internal, "waiting for git-diff-pairs: exit status 128".into()),
        ),
        (
            DiffBlobsRequest { blob_pairs: vec![pair("a", "b")], ..of(space.clone()) },
            invalid("blob pairs and raw info both used in request"),
        ),
    ] {
        assert_eq!(refusal(blobs(&node, request).await), answer);
    }
}

#[tokio::test]
async fn series_of_commits_are_compared() {
    let node = TestNode::start().await;
    let repository = node.create("a.git").await;
    let mut stream = commit("base", "base\n", &[(b"f", Some(b"1\n2\n3\n4\n5\n6\n7\n8\n"))]);
    for (branch, changed) in
        [("one", &b"1\n2\n3\nfour\n5\n6\n7\n8\n"[..]), ("two", b"1\n2\n3\nFOUR\n5\n6\n7\n8\n")]
    {
        stream.extend(format!("reset refs/heads/{branch}\nfrom refs/heads/base\n\n").bytes());
        stream.extend(commit(branch, "Change four\n", &[(b"f", Some(changed))]));
    }
    stream.extend(commit("two", "Add g\n", &[(b"g", Some(b"g\n"))]));
    seed::fast_import(&node.path("a.git"), &stream);
    let pair = |range1: &str, range2: &str| RangeDiffRequest {
        repository: Some(repository.clone()),
        range_spec: Some(range_diff_request::RangeSpec::RangePair(RangePair {
            range1: range1.into(),
            range2: range2.into(),
        })),
    };
    let ask = async |request: RangeDiffRequest| all(diffs(&node).range_diff(request).await).await;
    let found = ask(pair("base..one", "base..two")).await.unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!(
        (found[0].comparison(), found[0].commit_message_title.as_str()),
        (Comparator::NotEqual, "Change four")
    );
    assert_eq!(found[0].from_commit_id, id(&node, "a.git", "one"));
    assert!(found[0].patch_data.starts_with(b"@@ f") && found[0].end_of_patch, "{:?}", found[0]);
    assert_eq!(found[1].comparison(), Comparator::GreaterThan);
    assert!(found[1].from_commit_id.bytes().all(|byte| byte == b'-'));
    assert_eq!(found[1].to_commit_id, id(&node, "a.git", "two"));
    let range = RevisionRange { rev1: "one".into(), rev2: "one".into() };
    let spec = Some(range_diff_request::RangeSpec::RevisionRange(range.clone()));
    assert_eq!(ask(RangeDiffRequest { range_spec: spec, ..pair("", "") }).await.unwrap(), []);
    for (request, answer) in [
        (pair("", "x"), invalid("empty Range1")),
        (pair("x", ""), invalid("empty Range2")),
        (pair(INJECTED, "base..two"), injected("cmd: ")),
    ] {
        assert_eq!(refusal(ask(request).await), answer);
    }
    let failed = refusal(ask(pair("base..none", "base..two")).await);
    assert_eq!(failed.0, Code::FailedPrecondition);
    assert!(failed.1.starts_with("RangeDiff: exit status "), "{failed:?}");

    let raw = |range_spec| RawRangeDiffRequest { repository: Some(repository.clone()), range_spec };
    let ask = async |request: RawRangeDiffRequest| all(diffs(&node).raw_range_diff(request).await).await;
    let range = RevisionRange { rev1: "one".into(), rev2: "two".into() };
    let spec = raw_range_diff_request::RangeSpec::RevisionRange(range);
    let printed: Vec<u8> =
        ask(raw(Some(spec))).await.unwrap().into_iter().flat_map(|message| message.data).collect();
    let wanted = git(&node.path("a.git"), &["range-diff", "--abbrev=40", "one...two"]);
    assert_eq!(String::from_utf8(printed).unwrap().trim_end(), wanted);
    let half = RevisionRange { rev1: "one".into(), rev2: String::new() };
    let spec = raw_range_diff_request::RangeSpec::RevisionRange(half);
    assert_eq!(refusal(ask(raw(Some(spec))).await), invalid("empty Rev2"));
}
