//! CommitService: what `git log` finds, and what stands in commits.

use tabularium_proto::gitaly::{
    CommitStatsRequest, CommitsByMessageRequest, CountDivergingCommitsRequest,
    FilterShasWithSignaturesRequest, FindAllCommitsRequest, FindCommitsError, FindCommitsRequest,
    GetCommitMessagesRequest, GetCommitSignaturesRequest, GetTreeEntriesRequest, GitCommit, GlobalOptions,
    LastCommitForPathRequest, ListAllCommitsRequest, ListCommitsByRefNameRequest,
    ListLastCommitsForTreeRequest, PaginationParameter, RawBlameError, RawBlameRequest, Repository,
    commit_service_client::CommitServiceClient, get_tree_entries_request::SortBy, raw_blame_error::Error,
};
use tonic::{Code, Status};

use crate::{
    harness::{Client, TestNode, git},
    seed::{self, all, detail, id, invalid, refusal},
};

const DASH: &str = "revision can't start with '-'";

fn commits(node: &TestNode) -> CommitServiceClient<Client> {
    CommitServiceClient::new(node.channel())
}

fn subjects(found: &[GitCommit]) -> Vec<&str> {
    found.iter().map(|commit| std::str::from_utf8(&commit.subject).unwrap()).collect()
}

async fn find(node: &TestNode, request: FindCommitsRequest) -> Result<Vec<GitCommit>, Status> {
    let messages = all(commits(node).find_commits(request).await).await?;
    Ok(messages.into_iter().flat_map(|message| message.commits).collect())
}

fn asked(repository: &Repository, revision: &str) -> FindCommitsRequest {
    FindCommitsRequest {
        repository: Some(repository.clone()),
        revision: revision.into(),
        limit: 100,
        ..Default::default()
    }
}

#[tokio::test]
async fn commits_are_found_by_what_they_are_and_change() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let all = ["third", "second", "first"];
    let base = asked(&repository, "main");
    let with = |change: fn(&mut FindCommitsRequest)| {
        let mut request = base.clone();
        change(&mut request);
        request
    };
    let seconds = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    let second = seconds(1_700_000_002);
    for (request, wanted) in [
        (base.clone(), &all[..]),
        (asked(&repository, ""), &all[..]),
        (asked(&repository, "side"), &all[2..]),
        (asked(&repository, "side..main"), &all[..2]),
        (with(|request| request.limit = 0), &[]),
        (with(|request| request.limit = -1), &all[..]),
        (with(|request| (request.limit, request.offset) = (1, 1)), &all[1..2]),
        (with(|request| request.offset = 7), &[]),
        (with(|request| request.paths = vec![b"README".to_vec()]), &all[1..]),
        (with(|request| (request.follow, request.paths) = (true, vec![b"README".to_vec()])), &all[1..]),
        (
            with(|request| {
                (request.follow, request.offset, request.limit) = (true, 1, 1);
                request.paths = vec![b"README".to_vec()];
            }),
            &all[2..],
        ),
        (FindCommitsRequest { before: second, ..base.clone() }, &all[1..]),
        (FindCommitsRequest { after: second, ..base.clone() }, &all[..2]),
        (with(|request| request.author = b"Nobody".to_vec()), &[]),
        (with(|request| request.author = b"A U".to_vec()), &all[..]),
        (with(|request| request.message_regex = "^SEC".into()), &all[1..2]),
        (
            with(|request| (request.first_parent, request.skip_merges, request.order) = (true, true, 1)),
            &all[..],
        ),
    ] {
        assert_eq!(subjects(&find(&node, request.clone()).await.unwrap()), wanted, "{request:?}");
    }
    let every = FindCommitsRequest { all: true, ..asked(&repository, "") };
    assert_eq!(subjects(&find(&node, every).await.unwrap()), ["first", "second", "third"]);
    let glob = with(|request| request.paths = vec![b"READ*".to_vec()]);
    assert_eq!(find(&node, glob.clone()).await.unwrap().len(), 2);
    let literal =
        FindCommitsRequest { global_options: Some(GlobalOptions { literal_pathspecs: true }), ..glob };
    assert_eq!(find(&node, literal).await.unwrap(), []);
}

#[tokio::test]
async fn commits_are_told_of_with_trailers_references_and_statistics() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let request = FindCommitsRequest {
        trailers: true,
        include_shortstat: true,
        include_referenced_by: vec![b"refs/heads/".to_vec(), b"refs/tags/".to_vec()],
        ..asked(&repository, "main")
    };
    let found = find(&node, request).await.unwrap();
    let stats: Vec<_> = found.iter().map(|commit| commit.short_stats.unwrap()).collect();
    assert_eq!((stats[1].changed_files, stats[1].additions, stats[1].deletions), (1, 1, 1));
    assert_eq!((stats[2].changed_files, stats[2].additions, stats[2].deletions), (3, 3, 0));
    let references = |commit: &GitCommit| -> Vec<String> {
        commit.referenced_by.iter().map(|name| String::from_utf8(name.clone()).unwrap()).collect()
    };
    assert!(references(&found[0]).contains(&"refs/heads/main".to_owned()));
    assert_eq!(references(&found[1]), ["refs/tags/v2"]);
    let mut first = references(&found[2]);
    first.sort();
    assert_eq!(first, ["refs/heads/side", "refs/tags/v1"]);
    assert_eq!(found[2].trailers.len(), 2);
    assert_eq!(
        (found[2].trailers[1].key.as_slice(), found[2].trailers[1].value.as_slice()),
        (&b"Fixes"[..], &b"7"[..])
    );
    assert!(found[1].trailers.is_empty());
    let plain = find(&node, asked(&repository, "main")).await.unwrap();
    assert!(plain.iter().all(|commit| commit.short_stats.is_none() && commit.referenced_by.is_empty()));
}

#[tokio::test]
async fn commits_that_cannot_be_found() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let empty = node.create("empty.git").await;
    let missing = "12".repeat(20);
    for request in [
        asked(&repository, "none"),
        asked(&repository, &missing),
        asked(&repository, &format!("{missing}..main")),
        asked(&empty, ""),
        asked(&empty, "main"),
    ] {
        let status = find(&node, request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::NotFound, "commits not found"));
        assert_eq!(detail::<FindCommitsError>(&status, "FindCommitsError"), FindCommitsError::default());
    }
    let every = FindCommitsRequest { all: true, ..asked(&empty, "") };
    assert_eq!(find(&node, every).await.unwrap(), []);
    let two = FindCommitsRequest {
        follow: true,
        paths: vec![b"README".to_vec(), b"a".to_vec()],
        ..asked(&repository, "main")
    };
    assert_eq!(refusal(find(&node, two).await), (Code::Internal, "listing commits failed".to_owned()));
    let path = FindCommitsRequest { paths: vec![Vec::new()], ..asked(&repository, "main") };
    assert_eq!(refusal(find(&node, path).await), invalid("path is empty string"));
    assert_eq!(refusal(find(&node, asked(&repository, "--output=/tmp/x")).await), invalid(DASH));
    assert_eq!(refusal(find(&node, FindCommitsRequest::default()).await), invalid("repository not set"));
    assert_eq!(
        refusal(find(&node, asked(&node.named("none.git"), "main")).await),
        (Code::NotFound, "repository not found".to_owned())
    );
}

#[tokio::test]
async fn the_last_commit_of_a_path() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let last = async |revision: &str, path: &str| {
        let request = LastCommitForPathRequest {
            repository: Some(repository.clone()),
            revision: revision.into(),
            path: path.into(),
            ..Default::default()
        };
        let answer = commits(&node).last_commit_for_path(request).await?;
        let subject = answer.into_inner().commit.map(|commit| String::from_utf8(commit.subject).unwrap());
        Ok::<_, Status>(subject)
    };
    for (revision, path, wanted) in [
        ("main", "README", Some("second")),
        ("main", "", Some("third")),
        ("main", "/", Some("third")),
        ("main", "a/b", Some("first")),
        ("side", "README", Some("first")),
        ("main", "a/../README", Some("second")),
        ("main", "none", None),
        ("none", "README", None),
    ] {
        assert_eq!(last(revision, path).await.unwrap().as_deref(), wanted, "{revision} {path}");
    }
    assert_eq!(refusal(last("main", "/README").await), invalid("path is an absolute path"));
    assert_eq!(refusal(last("main", "../README").await), invalid("path escapes repository"));
    assert_eq!(refusal(last("", "README").await), invalid("empty revision"));
    assert_eq!(refusal(last("-n1", "README").await), invalid(DASH));
    let glob = LastCommitForPathRequest {
        repository: Some(repository.clone()),
        revision: b"main".to_vec(),
        path: b"READ*".to_vec(),
        ..Default::default()
    };
    assert!(commits(&node).last_commit_for_path(glob.clone()).await.unwrap().into_inner().commit.is_some());
    let literal = LastCommitForPathRequest { literal_pathspec: true, ..glob };
    assert!(commits(&node).last_commit_for_path(literal).await.unwrap().into_inner().commit.is_none());
}

#[tokio::test]
async fn the_last_commits_of_a_directory() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let stream = b"commit refs/heads/odd\ncommitter A <a@x> 1 +0000\ndata 3\nodd\nfrom refs/heads/main\n\
                   M 100644 inline [R]EADME\ndata 1\nx\nM 100644 inline gr\xfcn\ndata 1\nx\n\n";
    seed::fast_import(&node.path("a.git"), stream);
    let request = |revision: &str, path: &str, offset, limit| ListLastCommitsForTreeRequest {
        repository: Some(repository.clone()),
        revision: revision.into(),
        path: path.into(),
        offset,
        limit,
        ..Default::default()
    };
    let list = async |request: ListLastCommitsForTreeRequest| {
        let messages = all(commits(&node).list_last_commits_for_tree(request).await).await?;
        let found = messages.into_iter().flat_map(|message| message.commits);
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok::<_, Status>(
            found
                .map(|entry| (text(entry.path_bytes), text(entry.commit.unwrap().subject)))
                .collect::<Vec<_>>(),
        )
    };
    let pairs = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        pairs.iter().map(|&(path, subject)| (path.to_owned(), subject.to_owned())).collect()
    };
    let root = [
        ("a", "first"),
        ("README", "second"),
        ("big.bin", "third"),
        ("run.sh", "first"),
        ("module", "third"),
    ];
    assert_eq!(list(request("main", "", 0, 25)).await.unwrap(), pairs(&root));
    assert_eq!(list(request("main", "/", 1, 2)).await.unwrap(), pairs(&root[1..3]));
    assert_eq!(list(request("main", "a/", 0, 25)).await.unwrap(), pairs(&[("a/b", "first")]));
    let odd = list(request("odd", "", 0, 25)).await.unwrap();
    assert!(odd.contains(&("[R]EADME".to_owned(), "odd".to_owned())), "{odd:?}");
    assert!(odd.contains(&("gr\u{fffd}n".to_owned(), "odd".to_owned())), "{odd:?}");
    for nothing in [request("main", "none/", 0, 25), request("main", "", 5, 25), request("main", "", 0, 0)] {
        assert_eq!(list(nothing).await.unwrap(), []);
    }
    let failed = (Code::Internal, "exit status 128".to_owned());
    assert_eq!(refusal(list(request("none", "", 0, 25)).await), failed);
    assert_eq!(refusal(list(request("main", "", -1, 25)).await), invalid("offset negative"));
    assert_eq!(refusal(list(request("main", "", 0, -1)).await), invalid("limit negative"));
    assert_eq!(refusal(list(request("", "", 0, 25)).await), invalid("empty revision"));
    assert_eq!(refusal(list(request("--all", "", 0, 25)).await), invalid(DASH));
}

#[tokio::test]
async fn commits_are_counted_on_both_sides_and_what_they_change() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    git(
        &node.path("a.git"),
        &["update-ref", "refs/heads/other", &crate::harness::commit(&node.path("a.git"), Some("side"), "x")],
    );
    let count = async |from: &str, to: &str, max_count| {
        let request = CountDivergingCommitsRequest {
            repository: Some(repository.clone()),
            from: from.into(),
            to: to.into(),
            max_count,
        };
        let answer = commits(&node).count_diverging_commits(request).await?.into_inner();
        Ok::<_, Status>((answer.left_count, answer.right_count))
    };
    assert_eq!(count("main", "other", 0).await.unwrap(), (2, 1));
    assert_eq!(count("main", "main", 0).await.unwrap(), (0, 0));
    let (left, right) = count("main", "other", 1).await.unwrap();
    assert_eq!(left + right, 1);
    let failed = (Code::Internal, "gi rev-list error: exit status 128".to_owned());
    assert_eq!(refusal(count("none", "main", 0).await), failed);
    assert_eq!(refusal(count("", "main", 0).await), invalid("from and to are both required"));
    assert_eq!(refusal(count("main", "", 0).await), invalid("from and to are both required"));
    let text = "git rev-list cmd: validating positional argument: revision can't start with '-'";
    assert_eq!(refusal(count("--all", "main", 0).await), invalid(text));

    let stats = async |revision: &str| {
        let request = CommitStatsRequest { repository: Some(repository.clone()), revision: revision.into() };
        let answer = commits(&node).commit_stats(request).await?.into_inner();
        Ok::<_, Status>((answer.oid, answer.additions, answer.deletions, answer.files))
    };
    assert_eq!(stats("v2").await.unwrap(), (id(&node, "a.git", "main~"), 1, 1, 1));
    assert_eq!(stats("side").await.unwrap(), (id(&node, "a.git", "side"), 3, 0, 3), "the first commit");
    assert_eq!(refusal(stats("none").await), (Code::Internal, "object not found".to_owned()));
    assert_eq!(refusal(stats("").await), invalid("empty revision"));
    assert_eq!(refusal(stats("--all").await), invalid(DASH));
}

#[tokio::test]
async fn all_commits_and_those_with_a_word_in_their_messages() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let empty = node.create("empty.git").await;
    let every = |repository: &Repository, revision: &str| FindAllCommitsRequest {
        repository: Some(repository.clone()),
        revision: revision.into(),
        ..Default::default()
    };
    let list = async |request: FindAllCommitsRequest| {
        let messages = all(commits(&node).find_all_commits(request).await).await?;
        Ok::<Vec<GitCommit>, Status>(messages.into_iter().flat_map(|message| message.commits).collect())
    };
    assert_eq!(subjects(&list(every(&repository, "")).await.unwrap()), ["third", "second", "first"]);
    assert_eq!(subjects(&list(every(&repository, "v2")).await.unwrap()), ["second", "first"]);
    let part = FindAllCommitsRequest { max_count: 1, skip: 1, order: 1, ..every(&repository, "main") };
    assert_eq!(subjects(&list(part).await.unwrap()), ["second"]);
    assert_eq!(list(every(&repository, "none")).await.unwrap(), []);
    assert_eq!(list(every(&empty, "")).await.unwrap(), []);
    assert_eq!(refusal(list(every(&repository, "--all")).await), invalid(DASH));

    let by_message = |repository: &Repository, query: &str| CommitsByMessageRequest {
        repository: Some(repository.clone()),
        query: query.into(),
        ..Default::default()
    };
    let search = async |request: CommitsByMessageRequest| {
        let messages = all(commits(&node).commits_by_message(request).await).await?;
        Ok::<Vec<GitCommit>, Status>(messages.into_iter().flat_map(|message| message.commits).collect())
    };
    assert_eq!(subjects(&search(by_message(&repository, "IR")).await.unwrap()), ["third", "first"]);
    let part = CommitsByMessageRequest { offset: 1, limit: 1, ..by_message(&repository, "ir") };
    assert_eq!(subjects(&search(part).await.unwrap()), ["first"]);
    let path = CommitsByMessageRequest { path: b"run.sh".to_vec(), ..by_message(&repository, "ir") };
    assert_eq!(subjects(&search(path).await.unwrap()), ["first"]);
    let none = CommitsByMessageRequest { revision: b"none".to_vec(), ..by_message(&repository, "ir") };
    assert_eq!(search(none).await.unwrap(), []);
    assert_eq!(search(by_message(&empty, "ir")).await.unwrap(), []);
    assert_eq!(refusal(search(by_message(&repository, "")).await), invalid("empty Query"));
    let dash = CommitsByMessageRequest { revision: b"--all".to_vec(), ..by_message(&repository, "x") };
    assert_eq!(refusal(search(dash).await), invalid(DASH));
}

#[tokio::test]
async fn commits_that_nothing_leads_to_and_those_of_references() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let lost = crate::harness::commit(&node.path("a.git"), None, "lost");
    let list = async |page: Option<PaginationParameter>| {
        let request = ListAllCommitsRequest { repository: Some(repository.clone()), pagination_params: page };
        let messages = all(commits(&node).list_all_commits(request).await).await.unwrap();
        messages.into_iter().flat_map(|message| message.commits).collect::<Vec<GitCommit>>()
    };
    let every = list(None).await;
    assert_eq!(every.len(), 4);
    assert!(every.iter().any(|commit| commit.id == lost));
    let page =
        |page_token: &str, limit| Some(PaginationParameter { page_token: page_token.to_owned(), limit });
    assert_eq!(list(page("", 2)).await, every[..2]);
    assert_eq!(list(page(&every[1].id, 0)).await, every[2..]);
    assert_eq!(list(page("none", 0)).await, []);

    let names = ["refs/heads/side", "none", "refs/tags/v2", "-x", ""];
    let request = ListCommitsByRefNameRequest {
        repository: Some(repository.clone()),
        ref_names: names.iter().map(|name| name.as_bytes().to_vec()).collect(),
    };
    let found =
        all(commits(&node).list_commits_by_ref_name(request).await).await.unwrap().remove(0).commit_refs;
    let found: Vec<_> = found
        .into_iter()
        .map(|found| (String::from_utf8(found.ref_name).unwrap(), found.commit.unwrap().subject))
        .collect();
    assert_eq!(
        found,
        [("refs/heads/side".to_owned(), b"first".to_vec()), ("refs/tags/v2".to_owned(), b"second".to_vec())]
    );
}

/// A commit with a signature, which nobody could check, and a long message that is no text.
fn signed(node: &TestNode, path: &str) -> (String, Vec<u8>) {
    let tree = id(node, path, "side^{tree}");
    let mut raw = format!(
        "tree {tree}\nauthor A <a@x> 5 +0000\ncommitter C <c@x> 6 +0000\ngpgsig -----BEGIN PGP SIGNATURE-----\n \n \
         abc\n -----END PGP SIGNATURE-----\n\n"
    )
    .into_bytes();
    let message = [b"Gr\xfc\xdfe\n\n".as_slice(), &vec![b'x'; 200_000], b"\n"].concat();
    raw.extend(&message);
    let file = node.path(path).join("raw");
    std::fs::write(&file, raw).unwrap();
    let id = git(&node.path(path), &["hash-object", "-t", "commit", "-w", "raw"]);
    std::fs::remove_file(file).unwrap();
    (id, message)
}

#[tokio::test]
async fn messages_and_signatures_are_handed_out_whole() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (signed, message) = signed(&node, "a.git");
    let (first, missing) = (id(&node, "a.git", "side"), "12".repeat(20));
    let messages = async |ids: &[&str]| {
        let commit_ids = ids.iter().map(|&id| id.to_owned()).collect();
        let request = GetCommitMessagesRequest { repository: Some(repository.clone()), commit_ids };
        all(commits(&node).get_commit_messages(request).await).await
    };
    let found = messages(&[&signed, &first]).await.unwrap();
    assert_eq!((found[0].commit_id.as_str(), found[0].message.len()), (signed.as_str(), 0));
    assert_eq!((found[1].commit_id.as_str(), found[1].message.len()), ("", 128 * 1024));
    assert_eq!([found[1].message.clone(), found[2].message.clone()].concat(), message);
    assert_eq!(found[3].commit_id, first);
    assert!(found[4].message.starts_with(b"first\n\nbody\n"));
    let text = "failed to get commit message: object not found";
    assert_eq!(refusal(messages(&[&missing]).await), (Code::Internal, text.to_owned()));
    assert_eq!(messages(&[]).await.unwrap(), []);

    let signatures = async |ids: &[&str]| {
        let commit_ids = ids.iter().map(|&id| id.to_owned()).collect();
        let request = GetCommitSignaturesRequest { repository: Some(repository.clone()), commit_ids };
        all(commits(&node).get_commit_signatures(request).await).await
    };
    let found = signatures(&[&first, &missing, &signed]).await.unwrap();
    assert_eq!(found[0].commit_id, signed);
    assert_eq!(found[0].signature, b"-----BEGIN PGP SIGNATURE-----\n\nabc\n-----END PGP SIGNATURE-----");
    assert_eq!((found[0].signer, found[0].committer.as_ref().unwrap().name.as_slice()), (1, &b"C"[..]));
    let text: Vec<u8> = found[1..].iter().flat_map(|message| message.signed_text.clone()).collect();
    assert!(
        text.starts_with(b"tree ") && text.ends_with(&message) && !text.windows(6).any(|at| at == b"gpgsig")
    );
    assert_eq!(refusal(signatures(&[]).await), invalid("empty CommitIds"));
    let text = "invalid object ID: \"main\", expected length 40, got 4";
    assert_eq!(refusal(signatures(&["main"]).await), invalid(text));
    let odd = format!("{}X", &first[1..]);
    let text = format!("invalid object ID: \"{odd}\", invalid character 'X'");
    assert_eq!(refusal(signatures(&[&odd]).await), invalid(&text));

    let request = |repository: Option<Repository>, shas: &[&str]| FilterShasWithSignaturesRequest {
        repository,
        shas: shas.iter().map(|sha| sha.as_bytes().to_vec()).collect(),
    };
    let requests = vec![
        request(Some(repository.clone()), &[&first, &signed, "none", &signed[..12]]),
        request(None, &[&first]),
    ];
    let found =
        all(commits(&node).filter_shas_with_signatures(tokio_stream::iter(requests)).await).await.unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].shas, [signed.as_bytes(), &signed.as_bytes()[..12]]);
    assert!(found[1].shas.is_empty());
    let nobody = tokio_stream::iter(vec![request(None, &[])]);
    let refused = all(commits(&node).filter_shas_with_signatures(nobody).await).await;
    assert_eq!(refusal(refused), invalid("repository not set"));
}

#[tokio::test]
async fn lines_are_blamed_on_commits() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let request = |revision: &str, path: &str, range: &str| RawBlameRequest {
        repository: Some(repository.clone()),
        revision: revision.into(),
        path: path.into(),
        range: range.into(),
        ..Default::default()
    };
    let blame = async |request: RawBlameRequest| {
        let messages = all(commits(&node).raw_blame(request).await).await?;
        let data: Vec<u8> = messages.into_iter().flat_map(|message| message.data).collect();
        Ok::<String, Status>(String::from_utf8(data).unwrap())
    };
    let wanted = git(&path, &["blame", "-p", "main", "--", "README"]);
    assert_eq!(blame(request("main", "README", "")).await.unwrap().trim_end(), wanted);
    assert_eq!(blame(request("main", "README", "1,1")).await.unwrap().trim_end(), wanted);

    // The second commit is looked through.
    let list = path.join("list");
    std::fs::write(&list, id(&node, "a.git", "main~") + "\n").unwrap();
    let ignored = git(&path, &["hash-object", "-w", "list"]);
    std::fs::write(&list, "nonsense\n").unwrap();
    let nonsense = git(&path, &["hash-object", "-w", "list"]);
    std::fs::remove_file(list).unwrap();
    let ignoring =
        |blob: &str| RawBlameRequest { ignore_revisions_blob: blob.into(), ..request("main", "README", "") };
    assert!(blame(ignoring(&ignored)).await.unwrap().starts_with(&id(&node, "a.git", "side")));

    let missing = blame(request("main", "none", "")).await.unwrap_err();
    assert_eq!((missing.code(), missing.message()), (Code::NotFound, "path not found in revision"));
    let error = detail::<RawBlameError>(&missing, "RawBlameError").error;
    assert!(matches!(error, Some(Error::PathNotFound(error)) if error.path == b"none"));
    let range = blame(request("main", "README", "5,6")).await.unwrap_err();
    assert_eq!(
        (range.code(), range.message()),
        (Code::InvalidArgument, "range is outside of the file length")
    );
    let error = detail::<RawBlameError>(&range, "RawBlameError").error;
    assert!(matches!(error, Some(Error::OutOfRange(error)) if error.actual_lines == 1));
    let unresolved = blame(ignoring("main:none")).await.unwrap_err();
    assert_eq!(
        (unresolved.code(), unresolved.message()),
        (Code::NotFound, "cannot resolve ignore-revs blob")
    );
    let error = detail::<RawBlameError>(&unresolved, "RawBlameError").error;
    assert!(
        matches!(error, Some(Error::ResolveIgnoreRevs(error)) if error.ignore_revisions_blob == b"main:none")
    );
    assert_eq!(refusal(blame(ignoring("main")).await), invalid("ignore revision is not a blob"));
    let odd = blame(ignoring(&nonsense)).await.unwrap_err();
    assert_eq!((odd.code(), odd.message()), (Code::NotFound, "invalid object name"));
    let failed = (Code::Internal, "blaming file: exit status 128".to_owned());
    assert_eq!(refusal(blame(request("none", "README", "")).await), failed);
    for (refused, text) in [
        (request("", "README", ""), "empty revision"),
        (request("--output=x", "README", ""), DASH),
        (request("main", "", ""), "empty Path"),
        (request("main", "../x", ""), "path escapes repository root"),
        (request("main", "/x", ""), "path escapes repository root"),
        (request("main", "README", "1,2 --output=x"), "invalid Range"),
    ] {
        assert_eq!(refusal(blame(refused).await), invalid(text));
    }
    assert!(std::fs::read_dir(node.path("+gitaly/tmp")).unwrap().count() <= 5);
    node.stop().await;
}

#[tokio::test]
async fn entries_in_the_order_of_file_systems_and_pages_that_stay_in_their_tree() {
    let node = TestNode::start().await;
    let repository = node.create("a.git").await;
    let stream =
        b"commit refs/heads/main\ncommitter A <a@x> 1 +0000\ndata 1\nm\nM 100644 inline a/x\ndata 1\nx\n\
                   M 100644 inline a.b\ndata 1\nx\nM 100644 inline b\ndata 1\nx\n\n";
    seed::fast_import(&node.path("a.git"), stream);
    let request = |sort: SortBy, token: &str, limit| GetTreeEntriesRequest {
        repository: Some(repository.clone()),
        revision: b"main".to_vec(),
        path: b".".to_vec(),
        sort: sort.into(),
        pagination_params: Some(PaginationParameter { page_token: token.to_owned(), limit }),
        ..Default::default()
    };
    let list = async |request: GetTreeEntriesRequest| {
        let mut messages = all(commits(&node).get_tree_entries(request).await).await.unwrap();
        let first = messages.remove(0);
        let paths =
            first.entries.into_iter().map(|entry| String::from_utf8(entry.path).unwrap()).collect::<Vec<_>>();
        (paths, first.pagination_cursor.unwrap().next_cursor)
    };
    assert_eq!(list(request(SortBy::Default, "", -1)).await.0, ["a.b", "a", "b"]);
    assert_eq!(list(request(SortBy::Filesystem, "", -1)).await.0, ["a", "a.b", "b"]);
    let (page, token) = list(request(SortBy::Filesystem, "", 1)).await;
    assert_eq!(page, ["a"]);
    // The branch moves on; the pages do not.
    let stream =
        b"commit refs/heads/main\ncommitter A <a@x> 2 +0000\ndata 1\nm\nfrom refs/heads/main^0\nD a.b\n\n";
    seed::fast_import(&node.path("a.git"), stream);
    let (page, token) = list(request(SortBy::Filesystem, &token, 1)).await;
    assert_eq!(page, ["a.b"]);
    let (page, token) = list(request(SortBy::Filesystem, &token, 1)).await;
    assert_eq!((page, token.as_str()), (vec!["b".to_owned()], ""));
    assert_eq!(list(request(SortBy::Filesystem, "", -1)).await.0, ["a", "b"]);
}

#[tokio::test]
async fn longer_ids_are_as_good() {
    let node = TestNode::start().await;
    let path = node.path("sha256.git");
    git(&node.root(), &["init", "-q", "--bare", "--object-format=sha256", "sha256.git"]);
    let stream =
        b"commit refs/heads/main\ncommitter A <a@x> 1 +0000\ndata 1\nm\nM 100644 inline f\ndata 1\nx\n\n";
    seed::fast_import(&path, stream);
    let repository = node.named("sha256.git");
    let request = CommitStatsRequest { repository: Some(repository.clone()), revision: b"main".to_vec() };
    let stats = commits(&node).commit_stats(request).await.unwrap().into_inner();
    assert_eq!((stats.oid.len(), stats.additions, stats.files), (64, 1, 1));
    let found =
        find(&node, FindCommitsRequest { include_shortstat: true, ..asked(&repository, "") }).await.unwrap();
    assert_eq!((found[0].id.len(), found[0].short_stats.unwrap().additions), (64, 1));
}
