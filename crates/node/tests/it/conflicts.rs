//! ConflictsService: conflicts are shown, and resolved as people say.

use sha1::{Digest as _, Sha1};
use tabularium_proto::gitaly::{
    ListConflictFilesRequest, Repository, ResolveConflictsRequest, ResolveConflictsRequestHeader,
    conflict_file::ConflictFilePayload, conflicts_service_client::ConflictsServiceClient,
    resolve_conflicts_request::ResolveConflictsRequestPayload as Payload,
};
use tonic::{Code, Status};

use crate::{
    harness::{Client, TestNode, git},
    operations::{assert_no_quarantine, hook, moment, user},
    seed::{self, all, fast_import, id, invalid, refusal},
};

fn conflicts(node: &TestNode) -> ConflictsServiceClient<Client> {
    ConflictsServiceClient::new(node.channel())
}

/// Two branches that have changed `file` in two places; `theirs` has removed `gone`, which `ours` has changed.
async fn sides(node: &TestNode) -> (Repository, String, String) {
    let repository = seed::repository(node, "a.git").await;
    let file =
        |path: &str, content: &str| format!("M 100644 inline {path}\ndata {}\n{content}\n", content.len());
    let who = "committer C <c@x> 1600000000 +0000\ndata 1\nc\n";
    let lines = |first: &str, last: &str| format!("{first}\n2\n3\n4\n5\n6\n7\n{last}\n");
    let stream = format!(
        "commit refs/heads/base\n{who}{}{}\ncommit refs/heads/ours\n{who}from refs/heads/base\n{}{}\ncommit refs/heads/theirs\n{who}from refs/heads/base\n{}\n",
        file("dir/file", &lines("1", "8")),
        file("gone", "g"),
        file("dir/file", &lines("one", "eight")),
        file("gone", "h"),
        file("dir/file", &lines("eins", "acht")),
    );
    fast_import(&node.path("a.git"), stream.as_bytes());
    (repository, id(node, "a.git", "ours"), id(node, "a.git", "theirs"))
}

/// Every file in conflict: its paths (ours, theirs, the ancestor's), its mode and its content.
type Listed = Vec<(String, String, String, i32, String)>;

async fn list(node: &TestNode, request: ListConflictFilesRequest) -> Result<Listed, Status> {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let mut listed = Listed::new();
    for file in
        all(conflicts(node).list_conflict_files(request).await).await?.into_iter().flat_map(|m| m.files)
    {
        match file.conflict_file_payload.unwrap() {
            ConflictFilePayload::Header(header) => listed.push((
                text(header.our_path),
                text(header.their_path),
                text(header.ancestor_path),
                header.our_mode,
                String::new(),
            )),
            ConflictFilePayload::Content(content) => listed.last_mut().unwrap().4.push_str(&text(content)),
        }
    }
    Ok(listed)
}

const MARKED: &str = "<<<<<<< dir/file\none\n=======\neins\n>>>>>>> dir/file\n2\n3\n4\n5\n6\n7\n<<<<<<< dir/file\neight\n=======\nacht\n>>>>>>> dir/file\n";

#[tokio::test]
async fn conflicts_are_listed() {
    let node = TestNode::start().await;
    let (repository, ours, theirs) = sides(&node).await;
    let whole = ListConflictFilesRequest {
        repository: Some(repository),
        our_commit_oid: ours.clone(),
        their_commit_oid: theirs.clone(),
        ..ListConflictFilesRequest::default()
    };
    let file = || "dir/file".to_owned();
    let expected = (file(), file(), file(), 0o100_644, MARKED.to_owned());
    assert_eq!(list(&node, whole.clone()).await.unwrap(), std::slice::from_ref(&expected));
    let headers = ListConflictFilesRequest { skip_content: true, ..whole.clone() };
    assert_eq!(list(&node, headers).await.unwrap()[0].4, "");
    let none = ListConflictFilesRequest { their_commit_oid: ours.clone(), ..whole.clone() };
    assert_eq!(list(&node, none).await.unwrap(), []);

    // One side has removed what the other has changed.
    let stream = "commit refs/heads/theirs\ncommitter C <c@x> 1600000000 +0000\ndata 1\nd\nfrom refs/heads/theirs^0\nD gone\n\n";
    fast_import(&node.path("a.git"), stream.as_bytes());
    let removed =
        ListConflictFilesRequest { their_commit_oid: id(&node, "a.git", "theirs"), ..whole.clone() };
    let refused = refusal(list(&node, removed.clone()).await);
    assert_eq!(refused, (Code::FailedPrecondition, "conflict side missing".into()));
    let allowed = ListConflictFilesRequest { allow_tree_conflicts: true, ..removed };
    let gone = ("gone".to_owned(), String::new(), "gone".to_owned(), 0o100_644, "h".to_owned());
    let marked = MARKED.to_owned();
    assert_eq!(list(&node, allowed).await.unwrap(), [(file(), file(), file(), 0o100_644, marked), gone]);

    let failed = |text: &str| (Code::FailedPrecondition, text.to_owned());
    for (change, expected) in [
        (
            ListConflictFilesRequest { our_commit_oid: "12".repeat(20), ..whole.clone() },
            failed("could not lookup 'our' OID: reference not found"),
        ),
        (
            ListConflictFilesRequest { their_commit_oid: "x y".into(), ..whole.clone() },
            failed("could not lookup 'their' OID: reference not found"),
        ),
        (
            ListConflictFilesRequest { our_commit_oid: String::new(), ..whole.clone() },
            invalid("empty OurCommitOid"),
        ),
        (
            ListConflictFilesRequest { their_commit_oid: String::new(), ..whole.clone() },
            invalid("empty TheirCommitOid"),
        ),
        (ListConflictFilesRequest { repository: None, ..whole.clone() }, invalid("repository not set")),
    ] {
        assert_eq!(refusal(list(&node, change).await), expected);
    }
    let unreadable = |branch: &str, byte: &str| {
        let who = "committer C <c@x> 1600000000 +0000\ndata 1\nc\nfrom refs/heads/base\n";
        format!("commit refs/heads/{branch}\n{who}M 100644 inline gone\ndata 3\n{byte}\n\n")
    };
    let stream = unreadable("one", "a~").into_bytes().into_iter().chain(unreadable("two", "b~").into_bytes());
    let stream: Vec<u8> = stream.map(|byte| if byte == b'~' { 0xff } else { byte }).collect();
    fast_import(&node.path("a.git"), &stream);
    let binary = ListConflictFilesRequest {
        our_commit_oid: id(&node, "a.git", "one"),
        their_commit_oid: id(&node, "a.git", "two"),
        ..whole
    };
    assert_eq!(refusal(list(&node, binary).await), failed("unsupported encoding"));
    assert_no_quarantine(&node).await;
}

async fn resolve(
    node: &TestNode,
    header: ResolveConflictsRequestHeader,
    json: &str,
) -> Result<String, Status> {
    let ask = |payload| ResolveConflictsRequest { resolve_conflicts_request_payload: Some(payload) };
    let mut requests = vec![ask(Payload::Header(header))];
    requests.extend(json.as_bytes().chunks(7).map(|piece| ask(Payload::FilesJson(piece.to_vec()))));
    let answer = conflicts(node).resolve_conflicts(tokio_stream::iter(requests)).await?;
    Ok(answer.into_inner().resolution_error)
}

fn section(theirs: usize, ours: usize) -> String {
    format!("{}_{theirs}_{ours}", hex::encode(Sha1::digest(b"dir/file")))
}

#[tokio::test]
async fn conflicts_are_resolved() {
    let node = TestNode::start().await;
    let (repository, ours, theirs) = sides(&node).await;
    let path = node.path("a.git");
    let whole = ResolveConflictsRequestHeader {
        repository: Some(repository.clone()),
        our_commit_oid: ours.clone(),
        target_repository: Some(repository.clone()),
        their_commit_oid: theirs.clone(),
        source_branch: b"ours".to_vec(),
        target_branch: b"theirs".to_vec(),
        commit_message: b"Resolved\n".to_vec(),
        user: Some(user()),
        timestamp: Some(moment()),
    };
    let choose = |first: &str, last: &str| {
        format!(
            r#"[{{"old_path":"dir/file","new_path":"dir/file","sections":{{"{}":"{first}","{}":"{last}"}}}}]"#,
            section(1, 1),
            section(8, 8)
        )
    };
    assert_eq!(resolve(&node, whole.clone(), &choose("head", "origin")).await.unwrap(), "");
    assert_eq!(git(&path, &["show", "ours:dir/file"]), "one\n2\n3\n4\n5\n6\n7\nacht");
    assert_eq!(git(&path, &["cat-file", "-s", "ours:dir/file"]), "21");
    assert_eq!(
        git(&path, &["log", "-1", "--format=%P|%an|%cn %ct|%B", "ours"]),
        format!("{ours} {theirs}|Jane Doe|Jane Doe 1690000000|Resolved")
    );
    git(&path, &["fsck", "--strict"]);
    let late = resolve(&node, whole.clone(), &choose("head", "head")).await;
    assert_eq!(refusal(late).0, Code::Internal, "the branch is elsewhere meanwhile");
    git(&path, &["update-ref", "refs/heads/ours", &ours]);

    // The whole file, as somebody has written it.
    let written = r#"[{"old_path":"dir/file","new_path":"dir/file","content":"mine"}]"#;
    assert_eq!(resolve(&node, whole.clone(), written).await.unwrap(), "");
    assert_eq!(git(&path, &["show", "ours:dir/file"]), "mine");
    git(&path, &["update-ref", "refs/heads/ours", &ours]);

    // What people are told, and nothing is changed.
    let unchanged = serde_json::to_string(&MARKED).unwrap();
    let unchanged = format!(r#"[{{"old_path":"dir/file","new_path":"dir/file","content":{unchanged}}}]"#);
    for (json, text) in [
        (unchanged, "Resolved content has no changes for file dir/file".to_owned()),
        (choose("head", "neither"), format!("Missing resolution for section ID: {}", section(8, 8))),
        ("[]".to_owned(), "Missing resolutions for the following files: dir/file".to_owned()),
    ] {
        assert_eq!(resolve(&node, whole.clone(), &json).await.unwrap(), text);
    }
    let internal = |text: &str| (Code::Internal, text.to_owned());
    let other = r#"[{"old_path":"README","sections":{}}]"#;
    let text = "NoMethodError: undefined method `resolve_lines' for nil:NilClass";
    assert_eq!(refusal(resolve(&node, whole.clone(), other).await), internal(text));
    let neither = r#"[{"old_path":"dir/file"}]"#;
    let text = "missing sections or content for a resolution";
    assert_eq!(refusal(resolve(&node, whole.clone(), neither).await), invalid(text));
    assert_eq!(refusal(resolve(&node, whole.clone(), "{").await).0, Code::Internal);
    hook(&node, "pre-receive", "echo no >&2; exit 1");
    let refused = resolve(&node, whole.clone(), &choose("head", "head")).await;
    assert_eq!(refusal(refused), internal("running pre-receive hooks: no\n"));
    let short = ResolveConflictsRequestHeader { our_commit_oid: "ours".into(), ..whole.clone() };
    let text = "Rugged::InvalidError: unable to parse OID - contains invalid characters";
    assert_eq!(refusal(resolve(&node, short, "[]").await), internal(text));
    let astray = ResolveConflictsRequestHeader { target_branch: b"none".to_vec(), ..whole.clone() };
    let text = "could not resolve target revision \"refs/heads/none\": reference not found";
    assert_eq!(refusal(resolve(&node, astray, "[]").await), internal(text));
    for (header, text) in [
        (
            ResolveConflictsRequestHeader { our_commit_oid: String::new(), ..whole.clone() },
            "empty OurCommitOid",
        ),
        (
            ResolveConflictsRequestHeader { target_repository: None, ..whole.clone() },
            "empty TargetRepository",
        ),
        (
            ResolveConflictsRequestHeader { their_commit_oid: String::new(), ..whole.clone() },
            "empty TheirCommitOid",
        ),
        (ResolveConflictsRequestHeader { source_branch: Vec::new(), ..whole.clone() }, "empty SourceBranch"),
        (ResolveConflictsRequestHeader { target_branch: Vec::new(), ..whole.clone() }, "empty TargetBranch"),
        (
            ResolveConflictsRequestHeader { commit_message: Vec::new(), ..whole.clone() },
            "empty CommitMessage",
        ),
        (ResolveConflictsRequestHeader { user: None, ..whole.clone() }, "empty User"),
    ] {
        assert_eq!(refusal(resolve(&node, header, "[]").await), invalid(text));
    }
    let nothing = ResolveConflictsRequest { resolve_conflicts_request_payload: None };
    let headless = conflicts(&node).resolve_conflicts(tokio_stream::iter([nothing])).await;
    assert_eq!(refusal(headless), invalid("empty ResolveConflictsRequestHeader"));
    assert_eq!(id(&node, "a.git", "ours"), ours);
    assert_no_quarantine(&node).await;
}
