//! CommitService.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tabularium_proto::gitaly::{
    CheckObjectsExistRequest, CommitIsAncestorRequest, CountCommitsRequest, FindCommitRequest,
    GetTreeEntriesError, GetTreeEntriesRequest, GetTreeEntriesResponse, ListCommitsByOidRequest,
    ListCommitsRequest, ListFilesRequest, PaginationParameter, TreeEntryRequest, TreeEntryResponse,
    commit_service_client::CommitServiceClient, get_tree_entries_error, tree_entry::EntryType,
    tree_entry_response::ObjectType,
};
use tonic::{Code, Status};

use crate::{
    harness::{Client, TestNode, git},
    seed::{self, BIG, all, detail, id, invalid, refusal},
};

fn commits(node: &TestNode) -> CommitServiceClient<Client> {
    CommitServiceClient::new(node.channel())
}

#[tokio::test]
async fn a_commit_is_found_by_any_name() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let find = async |revision: &str, trailers| {
        let request = FindCommitRequest {
            repository: Some(repository.clone()),
            revision: revision.as_bytes().to_vec(),
            trailers,
        };
        commits(&node).find_commit(request).await.map(|response| response.into_inner().commit)
    };
    let first = find("side", true).await.unwrap().unwrap();
    assert_eq!(first.id, id(&node, "a.git", "v1"));
    assert_eq!(first.tree_id, id(&node, "a.git", "v1^{tree}"));
    assert_eq!((first.subject.as_slice(), first.parent_ids.len()), (&b"first"[..], 0));
    assert!(first.body.starts_with(b"first\n\nbody\n"));
    assert_eq!(usize::try_from(first.body_size).unwrap(), first.body.len());
    assert_eq!(first.author.unwrap().timezone, b"+0100");
    let trailers: Vec<_> =
        first.trailers.iter().map(|trailer| (&trailer.key[..], &trailer.value[..])).collect();
    assert_eq!(trailers, [(&b"Reviewed-by"[..], &b"R <r@x>"[..]), (b"Fixes", b"7")]);
    let second = find("v2", false).await.unwrap().unwrap();
    assert_eq!(second.parent_ids, [first.id]);
    assert!(second.trailers.is_empty());
    assert_eq!(find("main~1", false).await.unwrap().unwrap(), second);
    for absent in ["none", "main~100", "main^{blob}", &"12".repeat(20)] {
        assert_eq!(find(absent, true).await.unwrap(), None, "{absent}");
    }
    assert_eq!(refusal(find("", false).await), invalid("empty revision"));
    assert_eq!(refusal(find("--all", false).await), invalid("revision can't start with '-'"));
    assert_eq!(refusal(find("a b", false).await), invalid("revision can't contain whitespace"));
}

#[tokio::test]
async fn history_is_listed_limited_and_paged() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let base = ListCommitsRequest { repository: Some(repository.clone()), ..Default::default() };
    let subjects = async |request: ListCommitsRequest| {
        let messages = all(commits(&node).list_commits(request).await).await?;
        let found = messages.into_iter().flat_map(|message| message.commits);
        Ok::<Vec<String>, Status>(found.map(|commit| String::from_utf8(commit.subject).unwrap()).collect())
    };
    let of = |revisions: &[&str]| ListCommitsRequest {
        revisions: revisions.iter().map(|&revision| revision.to_owned()).collect(),
        ..base.clone()
    };
    assert_eq!(subjects(of(&["main"])).await.unwrap(), ["third", "second", "first"]);
    assert_eq!(subjects(of(&["main", "^side"])).await.unwrap(), ["third", "second"]);
    assert_eq!(subjects(of(&["side..v2"])).await.unwrap(), ["second"]);
    assert_eq!(subjects(of(&["--branches", "--not", "--tags=v2*"])).await.unwrap(), ["third"]);
    assert_eq!(subjects(of(&["--not", "--all"])).await.unwrap(), Vec::<String>::new());
    let reverse = ListCommitsRequest { reverse: true, ..of(&["--all"]) };
    assert_eq!(subjects(reverse).await.unwrap(), ["first", "second", "third"]);
    let single = ListCommitsRequest { disable_walk: true, ..of(&["main"]) };
    assert_eq!(subjects(single).await.unwrap(), ["third"]);
    let pattern = ListCommitsRequest {
        commit_message_patterns: vec![b"^SEC".to_vec()],
        ignore_case: true,
        ..of(&["main"])
    };
    assert_eq!(subjects(pattern).await.unwrap(), ["second"]);
    let path = ListCommitsRequest { paths: vec![b"README".to_vec()], skip: 1, ..of(&["main"]) };
    assert_eq!(subjects(path).await.unwrap(), ["first"]);
    let before = ListCommitsRequest {
        before: Some(prost_types::Timestamp { seconds: 1_600_000_000, nanos: 0 }),
        ..of(&["main"])
    };
    assert_eq!(subjects(before).await.unwrap(), Vec::<String>::new());

    let third = id(&node, "a.git", "main");
    let page = |page_token: &str, limit| ListCommitsRequest {
        pagination_params: Some(PaginationParameter { page_token: page_token.into(), limit }),
        ..of(&["main"])
    };
    let messages = all(commits(&node).list_commits(page(&third, 1)).await).await.unwrap();
    assert_eq!(messages[0].commits[0].subject, b"second");
    assert_eq!(messages[0].pagination_cursor.as_ref().unwrap().next_cursor, messages[0].commits[0].id);
    assert_eq!(subjects(page("", 0)).await.unwrap().len(), 3, "no limit");
    assert_eq!(refusal(subjects(page("none", 1)).await), invalid("could not find page token"));
    assert_eq!(refusal(subjects(of(&[])).await), invalid("missing revisions"));
    assert_eq!(
        refusal(subjects(of(&["--output=x"])).await),
        invalid("invalid revision: revision can't start with '-'")
    );
    assert_eq!(refusal(subjects(of(&["none"])).await).0, Code::Internal);
}

#[tokio::test]
async fn commits_by_id_and_objects_that_exist() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (third, first) = (id(&node, "a.git", "main"), id(&node, "a.git", "side"));
    let request = ListCommitsByOidRequest {
        repository: Some(repository.clone()),
        oid: vec![third.clone(), "12".repeat(20), first.clone()],
    };
    let found = all(commits(&node).list_commits_by_oid(request).await).await.unwrap().remove(0).commits;
    assert_eq!(found.iter().map(|commit| &commit.id).collect::<Vec<_>>(), [&third, &first]);

    let ask = async |messages: Vec<Vec<&str>>| {
        let messages: Vec<CheckObjectsExistRequest> = messages
            .into_iter()
            .enumerate()
            .map(|(number, revisions)| CheckObjectsExistRequest {
                repository: (number == 0).then(|| repository.clone()),
                revisions: revisions.into_iter().map(|revision| revision.as_bytes().to_vec()).collect(),
            })
            .collect();
        let answers = all(commits(&node).check_objects_exist(tokio_stream::iter(messages)).await).await?;
        let answers = answers.into_iter().flat_map(|answer| answer.revisions);
        Ok::<Vec<bool>, Status>(answers.map(|answer| answer.exists).collect())
    };
    let exist = ask(vec![
        vec!["main", "none", "main:README", "main:./README"],
        vec![],
        vec![&first, "main:a\nb", "main"],
    ])
    .await
    .unwrap();
    assert_eq!(exist, [true, false, true, false, true, false, true]);
    assert_eq!(
        refusal(ask(vec![vec!["-x"]]).await),
        invalid("invalid revision: revision can't start with '-'")
    );
}

#[tokio::test]
async fn counting_and_ancestry() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let base = CountCommitsRequest { repository: Some(repository.clone()), ..Default::default() };
    let count =
        async |request| commits(&node).count_commits(request).await.map(|found| found.into_inner().count);
    let of = |revision: &str| CountCommitsRequest { revision: revision.as_bytes().to_vec(), ..base.clone() };
    assert_eq!(count(of("main")).await.unwrap(), 3);
    assert_eq!(count(of("side..main")).await.unwrap(), 2);
    assert_eq!(count(of("none")).await.unwrap(), 0);
    assert_eq!(count(CountCommitsRequest { max_count: 2, ..of("main") }).await.unwrap(), 2);
    assert_eq!(count(CountCommitsRequest { path: b"README".to_vec(), ..of("main") }).await.unwrap(), 2);
    assert_eq!(count(CountCommitsRequest { all: true, ..base.clone() }).await.unwrap(), 3);
    assert_eq!(refusal(count(base.clone()).await), invalid("empty Revision and false All"));
    assert_eq!(refusal(count(of("-x")).await), invalid("revision can't start with '-'"));

    let ancestor = async |ancestor: &str, child: &str| {
        let request = CommitIsAncestorRequest {
            repository: Some(repository.clone()),
            ancestor_id: ancestor.into(),
            child_id: child.into(),
        };
        commits(&node).commit_is_ancestor(request).await.map(|found| found.into_inner().value)
    };
    assert!(ancestor("side", "main").await.unwrap());
    assert!(!ancestor("main", "side").await.unwrap());
    assert!(!ancestor("none", "main").await.unwrap());
    assert_eq!(refusal(ancestor("", "main").await), invalid("empty ancestor sha"));
    assert_eq!(refusal(ancestor("main", "").await), invalid("empty child sha"));
}

#[tokio::test]
async fn an_entry_comes_with_its_content_in_chunks() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let base = TreeEntryRequest {
        repository: Some(repository),
        revision: b"main".to_vec(),
        ..TreeEntryRequest::default()
    };
    let ask = async |path: &str, limit, max_size| {
        let request = TreeEntryRequest { path: path.as_bytes().to_vec(), limit, max_size, ..base.clone() };
        all(commits(&node).tree_entry(request).await).await
    };
    let big: Vec<TreeEntryResponse> = ask("big.bin", 0, 0).await.unwrap();
    assert_eq!(big[0].oid, id(&node, "a.git", "main:big.bin"));
    assert_eq!((big[0].r#type(), big[0].mode, big[0].size), (ObjectType::Blob, 0o100_644, 300 * 1024));
    assert!(big.len() > 2 && big[1..].iter().all(|message| message.oid.is_empty() && message.size == 0));
    assert!(big.iter().all(|message| message.data.len() <= 128 * 1024));
    assert_eq!(big.iter().flat_map(|message| message.data.clone()).collect::<Vec<u8>>(), BIG);
    let limited = ask("big.bin", 130 * 1024, 0).await.unwrap();
    assert_eq!(limited.iter().map(|message| message.data.len()).sum::<usize>(), 130 * 1024);
    let tree = ask("a/b/", 0, 0).await.unwrap();
    assert_eq!((tree[0].r#type(), tree[0].oid.clone()), (ObjectType::Tree, id(&node, "a.git", "main:a/b")));
    assert!(tree.len() == 1 && tree[0].data.is_empty());
    let module = ask("module", 0, 0).await.unwrap();
    assert_eq!((module[0].r#type(), module[0].oid.as_str()), (ObjectType::Commit, &*"11".repeat(20)));
    assert_eq!(ask("a/b/c/deep.txt", 0, 4).await.unwrap()[0].data, b"deep");
    assert_eq!(
        refusal(ask("README", 0, 5).await),
        (Code::FailedPrecondition, "object size (11) is bigger than the maximum allowed size (5)".into())
    );
    for absent in ["none", "README/x", "../README", "a/none", "a\nb"] {
        assert_eq!(
            refusal(ask(absent, 0, 0).await),
            (Code::NotFound, "tree entry not found".into()),
            "{absent:?}"
        );
    }
    assert_eq!(refusal(ask("", 0, 0).await), invalid("empty Path"));
    assert_eq!(refusal(ask("README", -1, 0).await), invalid("negative Limit"));
    assert_eq!(refusal(ask("README", 0, -1).await), invalid("negative MaxSize"));
}

#[tokio::test]
async fn directories_are_listed_flat_deep_sorted_and_paged() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let base = GetTreeEntriesRequest {
        repository: Some(repository),
        revision: b"main".to_vec(),
        path: b".".to_vec(),
        ..GetTreeEntriesRequest::default()
    };
    let ask = async |request: GetTreeEntriesRequest| -> Result<Vec<GetTreeEntriesResponse>, Status> {
        all(commits(&node).get_tree_entries(request).await).await
    };
    let paths = |messages: &[GetTreeEntriesResponse]| -> Vec<String> {
        let entries = messages.iter().flat_map(|message| &message.entries);
        entries.map(|entry| String::from_utf8(entry.path.clone()).unwrap()).collect()
    };
    let root = ask(base.clone()).await.unwrap();
    assert_eq!(paths(&root), ["README", "a", "big.bin", "module", "run.sh"]);
    let entries = &root[0].entries;
    assert_eq!(entries[1].flat_path, b"a/b/c");
    assert_eq!(entries[0].flat_path, b"README");
    assert_eq!(entries[1].r#type(), EntryType::Tree);
    assert_eq!(entries[3].r#type(), EntryType::Commit);
    assert_eq!((entries[4].r#type(), entries[4].mode), (EntryType::Blob, 0o100_755));
    assert_eq!(entries[0].commit_oid, "main");
    let sorted = ask(GetTreeEntriesRequest { sort: 1, skip_flat_paths: true, ..base.clone() }).await.unwrap();
    assert_eq!(paths(&sorted), ["a", "README", "big.bin", "run.sh", "module"]);
    assert!(sorted[0].entries[0].flat_path.is_empty());
    let deep = GetTreeEntriesRequest { recursive: true, path: b"a".to_vec(), ..base.clone() };
    assert_eq!(paths(&ask(deep.clone()).await.unwrap()), ["a/b", "a/b/c", "a/b/c/deep.txt"]);

    let mut token = String::new();
    let mut seen = Vec::new();
    loop {
        let page = GetTreeEntriesRequest {
            sort: 1,
            pagination_params: Some(PaginationParameter { page_token: token, limit: 2 }),
            ..base.clone()
        };
        let messages = ask(page).await.unwrap();
        seen.extend(paths(&messages));
        token = messages[0].pagination_cursor.as_ref().unwrap().next_cursor.clone();
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, ["a", "README", "big.bin", "run.sh", "module"]);
    let by_id = GetTreeEntriesRequest {
        pagination_params: Some(PaginationParameter {
            page_token: id(&node, "a.git", "main:big.bin"),
            limit: 9,
        }),
        ..base.clone()
    };
    assert_eq!(paths(&ask(by_id).await.unwrap()), ["module", "run.sh"]);
    let lost = GetTreeEntriesRequest {
        pagination_params: Some(PaginationParameter {
            page_token: STANDARD.encode(r#"{"file_name":"none"}"#),
            limit: 9,
        }),
        ..base.clone()
    };
    assert_eq!(refusal(ask(lost).await), (Code::Internal, "could not find starting OID: none".into()));

    let fail = async |request| {
        let status = ask(request).await.unwrap_err();
        let error = detail::<GetTreeEntriesError>(&status, "GetTreeEntriesError").error.unwrap();
        (status.code(), status.message().to_owned(), error)
    };
    let (code, text, error) = fail(GetTreeEntriesRequest { path: vec![], ..base.clone() }).await;
    assert_eq!((code, text.as_str()), (Code::InvalidArgument, "empty path"));
    assert!(matches!(error, get_tree_entries_error::Error::Path(_)));
    for (request, expected, text) in [
        (
            GetTreeEntriesRequest { path: b"none".to_vec(), ..base.clone() },
            Code::InvalidArgument,
            "invalid revision or path",
        ),
        (
            GetTreeEntriesRequest { path: b"none".to_vec(), ..deep },
            Code::NotFound,
            "invalid revision or path",
        ),
        (
            GetTreeEntriesRequest { revision: b"none".to_vec(), ..base.clone() },
            Code::InvalidArgument,
            "invalid revision or path",
        ),
        (
            GetTreeEntriesRequest { path: b"README".to_vec(), ..base.clone() },
            Code::InvalidArgument,
            "path not treeish",
        ),
    ] {
        let (code, message, error) = fail(request).await;
        assert_eq!((code, message.as_str()), (expected, text));
        assert!(matches!(error, get_tree_entries_error::Error::ResolveTree(_)));
    }
}

#[tokio::test]
async fn files_are_listed() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let ask = async |revision: &str| {
        let request =
            ListFilesRequest { repository: Some(repository.clone()), revision: revision.as_bytes().to_vec() };
        let messages = all(commits(&node).list_files(request).await).await?;
        let paths = messages.into_iter().flat_map(|message| message.paths);
        Ok::<Vec<String>, Status>(paths.map(|path| String::from_utf8(path).unwrap()).collect())
    };
    assert_eq!(ask("").await.unwrap(), ["README", "a/b/c/deep.txt", "big.bin", "run.sh"]);
    assert_eq!(ask("v1").await.unwrap(), ["README", "a/b/c/deep.txt", "run.sh"]);
    assert_eq!(ask("none").await.unwrap(), Vec::<String>::new());
    for name in ["heads/main", "heads/side", "tags/v1", "tags/v2"] {
        git(&node.path("a.git"), &["update-ref", "-d", &format!("refs/{name}")]);
    }
    assert_eq!(
        refusal(ask("").await),
        (Code::FailedPrecondition, "repository does not have a default branch".into())
    );
}
