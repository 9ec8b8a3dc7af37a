//! RefService: which references lead where, and what stands in tags.

use tabularium_proto::gitaly::{
    FindAllBranchesRequest, FindAllRemoteBranchesRequest, FindRefsByOidRequest, GetTagMessagesRequest,
    GetTagSignaturesRequest, ListBranchNamesContainingCommitRequest, ListTagNamesContainingCommitRequest,
    Repository, ref_service_client::RefServiceClient,
};
use tonic::{Code, Status};

use crate::{
    harness::{Client, TestNode, commit, git},
    seed::{self, all, id, invalid, refusal},
};

fn refs(node: &TestNode) -> RefServiceClient<Client> {
    RefServiceClient::new(node.channel())
}

fn texts(names: Vec<Vec<u8>>) -> Vec<String> {
    names.into_iter().map(|name| String::from_utf8_lossy(&name).into_owned()).collect()
}

#[tokio::test]
async fn branches_that_are_merged_and_those_of_remotes() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let empty = node.create("empty.git").await;
    let path = node.path("a.git");
    let ahead = commit(&path, Some("main"), "ahead");
    git(&path, &["update-ref", "refs/heads/ahead", &ahead]);
    for name in ["refs/remotes/origin/x", "refs/remotes/origin/y", "refs/remotes/other/x"] {
        git(&path, &["update-ref", name, "side"]);
    }
    let request = |repository: &Repository, merged_only, branches: &[&str]| FindAllBranchesRequest {
        repository: Some(repository.clone()),
        merged_only,
        merged_branches: branches.iter().map(|branch| branch.as_bytes().to_vec()).collect(),
    };
    let list = async |request: FindAllBranchesRequest| {
        let messages = all(refs(&node).find_all_branches(request).await).await?;
        let branches = messages.into_iter().flat_map(|message| message.branches);
        Ok::<_, Status>(texts(branches.map(|branch| branch.name).collect()))
    };
    let remote = ["refs/remotes/origin/x", "refs/remotes/origin/y", "refs/remotes/other/x"];
    let local = ["refs/heads/ahead", "refs/heads/main", "refs/heads/side"];
    assert_eq!(
        list(request(&repository, false, &["refs/heads/side"])).await.unwrap(),
        [&local[..], &remote].concat()
    );
    assert_eq!(list(request(&repository, true, &[])).await.unwrap(), [&local[1..], &remote].concat());
    let some = ["refs/heads/ahead", "refs/heads/side"];
    assert_eq!(list(request(&repository, true, &some)).await.unwrap(), ["refs/heads/side"]);
    assert_eq!(list(request(&empty, false, &[])).await.unwrap(), Vec::<String>::new());
    let (code, text) = refusal(list(request(&empty, true, &[])).await);
    assert_eq!(code, Code::Internal);
    assert!(text.starts_with("finding refs: listing failed with exit code "), "{text}");
    let text = "finding refs: spawning for-each-ref: positional arg \"--format=x\" cannot start with dash '-': invalid argument";
    assert_eq!(
        refusal(list(request(&repository, true, &["--format=x"])).await),
        (Code::Internal, text.to_owned())
    );

    let remotes = async |remote_name: &str| {
        let request = FindAllRemoteBranchesRequest {
            repository: Some(repository.clone()),
            remote_name: remote_name.into(),
        };
        let messages = all(refs(&node).find_all_remote_branches(request).await).await?;
        Ok::<_, Status>(messages.into_iter().flat_map(|message| message.branches).collect::<Vec<_>>())
    };
    let found = remotes("origin").await.unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].name, remote[0].as_bytes());
    assert_eq!(found[0].target_commit.as_ref().unwrap().subject, b"first");
    assert_eq!(remotes("none").await.unwrap(), []);
    assert_eq!(refusal(remotes("").await), invalid("empty RemoteName"));
}

#[tokio::test]
async fn references_that_lead_to_an_object() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let first = id(&node, "a.git", "side");
    let base = FindRefsByOidRequest {
        repository: Some(repository.clone()),
        oid: first.clone(),
        ..Default::default()
    };
    let find = async |request: FindRefsByOidRequest| {
        refs(&node).find_refs_by_oid(request).await.map(|answer| answer.into_inner().refs)
    };
    assert_eq!(find(base.clone()).await.unwrap(), ["refs/heads/side", "refs/tags/v1"]);
    let short = FindRefsByOidRequest { oid: first[..10].to_owned(), limit: 1, ..base.clone() };
    assert_eq!(find(short).await.unwrap(), ["refs/heads/side"]);
    let sorted = FindRefsByOidRequest { sort_field: "-refname".into(), ..base.clone() };
    assert_eq!(find(sorted).await.unwrap(), ["refs/tags/v1", "refs/heads/side"]);
    let tags = FindRefsByOidRequest { ref_patterns: vec!["refs/tags/".into()], ..base.clone() };
    assert_eq!(find(tags).await.unwrap(), ["refs/tags/v1"]);
    let second = FindRefsByOidRequest { oid: id(&node, "a.git", "v2^{}"), ..base.clone() };
    assert_eq!(find(second).await.unwrap(), ["refs/tags/v2"], "through the tag");
    assert_eq!(
        refusal(find(FindRefsByOidRequest { oid: String::new(), ..base.clone() }).await),
        invalid("empty Oid")
    );
    let text = "for-each-ref pipeline command: exit status 129";
    assert_eq!(
        refusal(find(FindRefsByOidRequest { oid: "none".into(), ..base.clone() }).await),
        invalid(text)
    );
    let missing = FindRefsByOidRequest { oid: "12".repeat(20), ..base.clone() };
    assert_eq!(find(missing).await.unwrap(), Vec::<String>::new());
    let dash = FindRefsByOidRequest { ref_patterns: vec!["--all".into()], ..base };
    let text = "positional arg \"--all\" cannot start with dash '-': invalid argument";
    assert_eq!(refusal(find(dash).await), (Code::Internal, text.to_owned()));
}

#[tokio::test]
async fn names_of_what_contains_a_commit() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let branches = async |commit_id: &str, limit| {
        let request = ListBranchNamesContainingCommitRequest {
            repository: Some(repository.clone()),
            commit_id: commit_id.into(),
            limit,
        };
        let messages = all(refs(&node).list_branch_names_containing_commit(request).await).await?;
        Ok::<_, Status>(texts(messages.into_iter().flat_map(|message| message.branch_names).collect()))
    };
    let tags = async |commit_id: &str, limit| {
        let request = ListTagNamesContainingCommitRequest {
            repository: Some(repository.clone()),
            commit_id: commit_id.into(),
            limit,
        };
        let messages = all(refs(&node).list_tag_names_containing_commit(request).await).await?;
        Ok::<_, Status>(texts(messages.into_iter().flat_map(|message| message.tag_names).collect()))
    };
    let (first, third) = (id(&node, "a.git", "side"), id(&node, "a.git", "main"));
    assert_eq!(branches(&first, 0).await.unwrap(), ["main", "side"]);
    assert_eq!(branches(&first, 1).await.unwrap(), ["main"]);
    assert_eq!(branches(&third, 0).await.unwrap(), ["main"]);
    assert_eq!(tags(&first, 0).await.unwrap(), ["v1", "v2"]);
    assert_eq!(tags(&third, 0).await.unwrap(), Vec::<String>::new());
    let text = "invalid object ID: \"main\", expected length 40, got 4";
    assert_eq!(refusal(branches("main", 0).await), invalid(text));
    assert_eq!(refusal(tags("main", 0).await), invalid(text));
    let failed = (Code::Internal, "exit status 129".to_owned());
    assert_eq!(refusal(branches(&"12".repeat(20), 0).await), failed);
    assert_eq!(refusal(tags(&"12".repeat(20), 0).await), failed);
}

#[tokio::test]
async fn what_stands_in_tags() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let commit = id(&node, "a.git", "side");
    let signature = "-----BEGIN PGP SIGNATURE-----\n\nabc\n-----END PGP SIGNATURE-----";
    let head = format!("object {commit}\ntype commit\ntag v3\ntagger A <a@x> 1 +0000\n\n");
    std::fs::write(path.join("raw"), format!("{head}Gr\u{fc}\u{df}e\n{signature}\n")).unwrap();
    let signed = git(&path, &["hash-object", "-t", "tag", "-w", "raw"]);
    std::fs::remove_file(path.join("raw")).unwrap();
    git(&path, &["update-ref", "refs/tags/v3", &signed]);
    let v2 = id(&node, "a.git", "v2");

    let messages = async |ids: &[&str]| {
        let tag_ids = ids.iter().map(|&id| id.to_owned()).collect();
        let request = GetTagMessagesRequest { repository: Some(repository.clone()), tag_ids };
        all(refs(&node).get_tag_messages(request).await).await
    };
    let found = messages(&[&v2, &signed]).await.unwrap();
    assert_eq!((found[0].tag_id.as_str(), found[0].message.len()), (v2.as_str(), 0));
    assert_eq!(found[1].message, b"Release two\n");
    assert!(found[1].tag_id.is_empty() && found[2].tag_id == signed);
    assert!(found[3].message.ends_with(b"-----END PGP SIGNATURE-----\n"));
    let failed = |text: &str| (Code::Internal, text.to_owned());
    assert_eq!(refusal(messages(&[&commit]).await), failed("getting tag: expected tag, got commit"));
    assert_eq!(refusal(messages(&["none"]).await), failed("getting tag: object not found"));

    let signatures = async |revisions: &[&str]| {
        let tag_revisions = revisions.iter().map(|&revision| revision.to_owned()).collect();
        let request = GetTagSignaturesRequest { repository: Some(repository.clone()), tag_revisions };
        let messages = all(refs(&node).get_tag_signatures(request).await).await?;
        Ok::<_, Status>(messages.into_iter().flat_map(|message| message.signatures).collect::<Vec<_>>())
    };
    let found = signatures(&["v3"]).await.unwrap();
    assert_eq!((found.len(), found[0].tag_id.as_str()), (1, signed.as_str()));
    assert_eq!(found[0].signature, signature.as_bytes());
    assert_eq!(found[0].content, format!("{head}Gr\u{fc}\u{df}e\n").as_bytes());
    let found = signatures(&["--tags"]).await.unwrap();
    assert_eq!(found.len(), 2);
    assert!(found.iter().find(|found| found.tag_id == v2).unwrap().signature.is_empty());
    assert_eq!(signatures(&["main"]).await.unwrap(), []);
    assert_eq!(refusal(signatures(&[]).await), invalid("missing revisions"));
    let text = "invalid revision: revision can't start with '-'";
    assert_eq!(refusal(signatures(&["--output=x"]).await), invalid(text));
    let (code, text) = refusal(signatures(&["none"]).await);
    assert_eq!(code, Code::Internal);
    assert!(text.starts_with("cat-file iterator stop: rev-list pipeline command: exit status 128"), "{text}");
}
