//! RefService.

use std::fs;

use tabularium_proto::gitaly::{
    DeleteRefsError, DeleteRefsRequest, FindAllBranchesRequest, FindAllTagsRequest, FindBranchRequest,
    FindDefaultBranchNameRequest, FindLocalBranchesRequest, FindTagError, FindTagRequest, ListRefsRequest,
    PaginationParameter, RefExistsRequest, Repository, SignatureType, UpdateReferencesError,
    UpdateReferencesRequest, UpdateReferencesResponse, delete_refs_error, find_all_tags_request,
    find_tag_error, list_refs_request, ref_service_client::RefServiceClient, update_references_error,
    update_references_request::Update,
};
use tonic::{Code, Status};

use crate::{
    harness::{Client, TestNode, git},
    seed::{self, all, detail, id, invalid, refusal},
};

fn refs(node: &TestNode) -> RefServiceClient<Client> {
    RefServiceClient::new(node.channel())
}

async fn list(node: &TestNode, request: ListRefsRequest) -> Result<Vec<String>, Status> {
    let messages = all(refs(node).list_refs(request).await).await?;
    for message in &messages {
        assert!(message.references.len() <= 20);
    }
    let references = messages.into_iter().flat_map(|message| message.references);
    Ok(references
        .map(|reference| {
            format!(
                "{} {} {}",
                String::from_utf8(reference.name).unwrap(),
                reference.target,
                reference.peeled_target
            )
        })
        .collect())
}

#[tokio::test]
async fn references_are_listed_sorted_peeled_and_paged() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (main, v1, v2) = (id(&node, "a.git", "main"), id(&node, "a.git", "v1"), id(&node, "a.git", "v2"));
    let second = id(&node, "a.git", "v2^{commit}");
    let request = ListRefsRequest {
        repository: Some(repository.clone()),
        patterns: vec![b"refs/".to_vec()],
        head: true,
        peel_tags: true,
        ..ListRefsRequest::default()
    };
    assert_eq!(
        list(&node, request.clone()).await.unwrap(),
        [
            format!("HEAD {main} "),
            format!("refs/heads/main {main} "),
            format!("refs/heads/side {v1} "),
            format!("refs/tags/v1 {v1} "),
            format!("refs/tags/v2 {v2} {second}"),
        ]
    );
    let descending = ListRefsRequest {
        patterns: vec![b"refs/heads/".to_vec()],
        head: false,
        sort_by: Some(list_refs_request::SortBy { key: 0, direction: 1 }),
        ..request.clone()
    };
    assert_eq!(
        list(&node, descending).await.unwrap(),
        [format!("refs/heads/side {v1} "), format!("refs/heads/main {main} ")]
    );
    let pointing =
        ListRefsRequest { pointing_at_oids: vec![v1.clone().into_bytes()], head: false, ..request.clone() };
    assert_eq!(list(&node, pointing).await.unwrap().len(), 2);
    let none = ListRefsRequest { patterns: vec![b"refs/none/".to_vec()], ..request.clone() };
    assert_eq!(list(&node, none).await.unwrap(), Vec::<String>::new());

    // Page by page, the cursor of each leading to the next.
    let mut token = String::new();
    let mut seen = Vec::new();
    loop {
        let page = ListRefsRequest {
            head: false,
            pagination_params: Some(PaginationParameter { page_token: token, limit: 3 }),
            ..request.clone()
        };
        let messages = all(refs(&node).list_refs(page).await).await.unwrap();
        let last = messages.last().unwrap();
        seen.extend(last.references.iter().map(|reference| reference.name.clone()));
        match &last.pagination_cursor {
            Some(cursor) => token = cursor.next_cursor.clone(),
            None => break,
        }
    }
    assert_eq!(seen.len(), 4);

    let empty = ListRefsRequest { patterns: vec![], ..request.clone() };
    assert_eq!(refusal(list(&node, empty).await), invalid("patterns must have at least one entry"));
    let absent = ListRefsRequest { repository: Some(node.named("none.git")), ..request };
    assert_eq!(refusal(list(&node, absent).await), (Code::NotFound, "repository not found".into()));
}

#[tokio::test]
async fn long_listings_come_in_messages_of_twenty() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let main = id(&node, "a.git", "main");
    let resets = (0..55).map(|number| format!("reset refs/heads/b{number:02}\nfrom {main}\n\n"));
    seed::fast_import(&node.path("a.git"), resets.collect::<Vec<_>>().concat().as_bytes());

    let request = FindLocalBranchesRequest { repository: Some(repository.clone()), ..Default::default() };
    let messages = all(refs(&node).find_local_branches(request.clone()).await).await.unwrap();
    let sizes: Vec<usize> = messages.iter().map(|message| message.local_branches.len()).collect();
    assert_eq!(sizes, [20, 20, 17]);
    let first = &messages[0].local_branches[0];
    assert_eq!(first.name, b"refs/heads/b00");
    assert_eq!(first.target_commit.as_ref().unwrap().id, main);
    assert_eq!(first.target_commit.as_ref().unwrap().subject, b"third");

    let paged = |page_token: &str, limit| FindLocalBranchesRequest {
        pagination_params: Some(PaginationParameter { page_token: page_token.into(), limit }),
        ..request.clone()
    };
    let page = all(refs(&node).find_local_branches(paged("refs/heads/b53", 2)).await).await.unwrap();
    let names: Vec<&[u8]> = page[0].local_branches.iter().map(|branch| branch.name.as_slice()).collect();
    assert_eq!(names, [&b"refs/heads/b54"[..], b"refs/heads/main"]);
    assert!(all(refs(&node).find_local_branches(paged("", 0)).await).await.unwrap().is_empty());
    let rest = all(refs(&node).find_local_branches(paged("refs/heads/main", -1)).await).await.unwrap();
    assert_eq!(rest[0].local_branches.len(), 1);
    let lost = all(refs(&node).find_local_branches(paged("refs/heads/none", 5)).await).await;
    assert_eq!(refusal(lost), invalid("could not find page token"));

    let request = FindAllBranchesRequest { repository: Some(repository), ..Default::default() };
    let messages = all(refs(&node).find_all_branches(request).await).await.unwrap();
    assert_eq!(messages.iter().map(|message| message.branches.len()).sum::<usize>(), 57);
}

#[tokio::test]
async fn the_default_branch_is_found_even_if_head_lies() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let ask = async |head_only| {
        let request = FindDefaultBranchNameRequest { repository: Some(repository.clone()), head_only };
        String::from_utf8(refs(&node).find_default_branch_name(request).await.unwrap().into_inner().name)
            .unwrap()
    };
    assert_eq!(ask(false).await, "refs/heads/main");
    git(&path, &["symbolic-ref", "HEAD", "refs/heads/gone"]);
    assert_eq!(ask(false).await, "refs/heads/main");
    assert_eq!(ask(true).await, "refs/heads/gone");
    git(&path, &["update-ref", "refs/heads/master", "side"]);
    git(&path, &["update-ref", "-d", "refs/heads/main"]);
    assert_eq!(ask(false).await, "refs/heads/master");
    git(&path, &["update-ref", "-d", "refs/heads/master"]);
    assert_eq!(ask(false).await, "refs/heads/side");
    git(&path, &["update-ref", "-d", "refs/heads/side"]);
    assert_eq!(ask(false).await, "");
}

#[tokio::test]
async fn branches_and_references_are_found_by_their_exact_name() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let find = async |name: &str| {
        let request =
            FindBranchRequest { repository: Some(repository.clone()), name: name.as_bytes().to_vec() };
        refs(&node).find_branch(request).await.map(|response| response.into_inner().branch)
    };
    let branch = find("side").await.unwrap().unwrap();
    assert_eq!(branch.name, b"side");
    assert_eq!(branch.target_commit.unwrap().subject, b"first");
    assert_eq!(find("v1").await.unwrap(), None, "a tag is no branch");
    assert_eq!(find("sid*").await.unwrap(), None);
    assert_eq!(refusal(find("").await), invalid("Branch name cannot be empty"));

    let exists = async |name: &str| {
        let request =
            RefExistsRequest { repository: Some(repository.clone()), r#ref: name.as_bytes().to_vec() };
        refs(&node).ref_exists(request).await.map(|response| response.into_inner().value)
    };
    assert!(exists("refs/heads/main").await.unwrap());
    assert!(exists("refs/tags/v2").await.unwrap());
    for absent in ["refs/heads", "refs/heads/mai", "refs/heads/*", "refs/heads/none"] {
        assert!(!exists(absent).await.unwrap(), "{absent}");
    }
    assert_eq!(refusal(exists("heads/main").await), invalid("invalid refname"));
}

#[tokio::test]
async fn tags_of_every_kind() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let blob = id(&node, "a.git", "main:README");
    let v2 = id(&node, "a.git", "v2");
    git(&path, &["tag", "blob", &blob]);
    git(&path, &["tag", "-a", "-m", "a tag of a tag", "nested", &v2]);
    let signed = format!(
        "object {}\ntype commit\ntag signed\ntagger T <t@x> 7 +0100\n\nMine\n-----BEGIN PGP SIGNATURE-----\n\nx\n-----END PGP SIGNATURE-----\n",
        id(&node, "a.git", "main")
    );
    fs::write(path.join("signed"), signed).unwrap();
    let signed = git(&path, &["hash-object", "-t", "tag", "-w", "signed"]);
    git(&path, &["update-ref", "refs/tags/signed", &signed]);

    let request = FindAllTagsRequest { repository: Some(repository.clone()), ..Default::default() };
    let tags = all(refs(&node).find_all_tags(request.clone()).await).await.unwrap().remove(0).tags;
    let names: Vec<&str> = tags.iter().map(|tag| std::str::from_utf8(&tag.name).unwrap()).collect();
    assert_eq!(names, ["blob", "nested", "signed", "v1", "v2"]);
    let [of_blob, nested, signed_tag, light, annotated] = tags.as_slice() else { panic!("{tags:?}") };
    assert_eq!((of_blob.id.as_str(), &of_blob.target_commit), (blob.as_str(), &None));
    assert_eq!(nested.target_commit.as_ref().unwrap().subject, b"second");
    assert_eq!(nested.message, b"a tag of a tag");
    assert_eq!(signed_tag.signature_type(), SignatureType::Pgp);
    assert_eq!(light.id, light.target_commit.as_ref().unwrap().id);
    assert!(light.message.is_empty() && light.tagger.is_none());
    assert_eq!((annotated.id.as_str(), annotated.message.as_slice()), (v2.as_str(), &b"Release two"[..]));
    assert_eq!(annotated.message_size, 11);
    assert_eq!(annotated.tagger.as_ref().unwrap().timezone, b"+0100");

    let paged = FindAllTagsRequest {
        sort_by: Some(find_all_tags_request::SortBy { key: 2, direction: 1 }),
        pagination_params: Some(PaginationParameter { page_token: "refs/tags/v2".into(), limit: 1 }),
        ..request.clone()
    };
    let page = all(refs(&node).find_all_tags(paged).await).await.unwrap();
    assert_eq!(page[0].tags[0].name, b"v1");
    let lost = FindAllTagsRequest {
        pagination_params: Some(PaginationParameter { page_token: "refs/tags/none".into(), limit: 1 }),
        ..request
    };
    assert_eq!(
        refusal(all(refs(&node).find_all_tags(lost).await).await),
        invalid("could not find page token")
    );

    let find = async |name: &str| {
        let request =
            FindTagRequest { repository: Some(repository.clone()), tag_name: name.as_bytes().to_vec() };
        refs(&node).find_tag(request).await.map(|response| response.into_inner().tag.unwrap())
    };
    assert_eq!(&find("v2").await.unwrap(), annotated);
    assert_eq!(refusal(find("").await), invalid("tag name is empty"));
    let missing = find("main").await.unwrap_err();
    assert_eq!((missing.code(), missing.message()), (Code::NotFound, "tag does not exist"));
    let Some(find_tag_error::Error::TagNotFound(error)) =
        detail::<FindTagError>(&missing, "FindTagError").error
    else {
        panic!("no detail")
    };
    assert_eq!(error.reference_name, b"refs/tags/main");
}

fn names(node: &TestNode) -> Vec<String> {
    git(&node.path("a.git"), &["for-each-ref", "--format=%(refname)"]).lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn references_are_deleted_by_name_or_all_but() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let delete = async |refs_to_go: &[&str], except: &[&str]| {
        let bytes = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
        let request = DeleteRefsRequest {
            repository: Some(repository.clone()),
            refs: bytes(refs_to_go),
            except_with_prefix: bytes(except),
        };
        refs(&node).delete_refs(request).await.map(|response| response.into_inner().git_error)
    };
    assert_eq!(refusal(delete(&[], &[]).await), invalid("empty ExceptWithPrefix and Refs"));
    assert_eq!(
        refusal(delete(&["refs/x"], &["refs/"]).await),
        invalid("ExceptWithPrefix and Refs are mutually exclusive")
    );
    assert_eq!(refusal(delete(&[""], &[]).await), invalid("empty ref"));
    assert_eq!(refusal(delete(&[], &[""]).await), invalid("empty prefix for exclusion"));
    let status = delete(&["refs/heads/side", "HEAD", "refs/heads/a b"], &[]).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "invalid references"));
    let error = detail::<DeleteRefsError>(&status, "DeleteRefsError").error;
    let Some(delete_refs_error::Error::InvalidFormat(error)) = error else { panic!("{error:?}") };
    assert_eq!(error.refs, [b"HEAD".to_vec(), b"refs/heads/a b".to_vec()]);

    let lock = node.path("a.git").join("refs/heads/side.lock");
    fs::create_dir_all(lock.parent().unwrap()).unwrap();
    fs::write(&lock, "").unwrap();
    let status = delete(&["refs/heads/side", "refs/tags/v1"], &[]).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Aborted, "cannot lock references"));
    let error = detail::<DeleteRefsError>(&status, "DeleteRefsError").error;
    let Some(delete_refs_error::Error::ReferencesLocked(error)) = error else { panic!("{error:?}") };
    assert_eq!(error.refs, [b"refs/heads/side".to_vec()]);
    assert_eq!(names(&node).len(), 4, "all or nothing");
    fs::remove_file(&lock).unwrap();

    assert_eq!(delete(&["refs/heads/side", "refs/heads/none", "refs/heads/side"], &[]).await.unwrap(), "");
    assert_eq!(names(&node), ["refs/heads/main", "refs/tags/v1", "refs/tags/v2"]);
    git(&node.path("a.git"), &["pack-refs", "--all"]);
    assert_eq!(delete(&[], &["refs/heads/", "refs/keep/"]).await.unwrap(), "");
    assert_eq!(names(&node), ["refs/heads/main"]);
}

async fn update(
    node: &TestNode,
    repository: &Repository,
    messages: Vec<Vec<(&str, &str, &str)>>,
) -> Result<UpdateReferencesResponse, Status> {
    let messages: Vec<UpdateReferencesRequest> = messages
        .into_iter()
        .enumerate()
        .map(|(number, updates)| UpdateReferencesRequest {
            repository: (number == 0).then(|| repository.clone()),
            updates: updates
                .into_iter()
                .map(|(reference, old, new)| Update {
                    reference: reference.into(),
                    old_object_id: old.into(),
                    new_object_id: new.into(),
                })
                .collect(),
        })
        .collect();
    refs(node).update_references(tokio_stream::iter(messages)).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn references_move_together_or_not_at_all() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let (main, v1) = (id(&node, "a.git", "main"), id(&node, "a.git", "v1"));
    let zero = "0".repeat(40);
    update(
        &node,
        &repository,
        vec![
            vec![("refs/heads/new", &zero, &main), ("refs/heads/side", &v1, &zero)],
            vec![("refs/tags/v1", "", &main)],
        ],
    )
    .await
    .unwrap();
    assert_eq!(names(&node), ["refs/heads/main", "refs/heads/new", "refs/tags/v1", "refs/tags/v2"]);
    assert_eq!(id(&node, "a.git", "refs/tags/v1"), main);

    let before = names(&node);
    let fail = async |updates| {
        let status = update(&node, &repository, updates).await.unwrap_err();
        let text = format!("{:?}", status.code());
        let error = if status.details().is_empty() {
            None
        } else {
            detail::<UpdateReferencesError>(&status, "UpdateReferencesError").error
        };
        (text, error)
    };
    let (code, error) = fail(vec![vec![("refs/heads/x", "", &main), ("refs/heads/main", &v1, &main)]]).await;
    let Some(update_references_error::Error::ReferenceStateMismatch(error)) = error else {
        panic!("{error:?}")
    };
    assert_eq!((code.as_str(), error.reference_name.as_slice()), ("Aborted", &b"refs/heads/main"[..]));
    assert_eq!(error.expected_object_id, v1.as_bytes());
    assert_eq!(error.actual_object_id, main.as_bytes());
    // It exists, or it does not, against expectation.
    for (update, actual) in
        [(("refs/heads/main", zero.as_str(), v1.as_str()), &main), (("refs/heads/none", &v1, &main), &zero)]
    {
        let (code, error) = fail(vec![vec![update]]).await;
        let Some(update_references_error::Error::ReferenceStateMismatch(error)) = error else {
            panic!("{error:?}")
        };
        assert_eq!((code.as_str(), error.actual_object_id.as_slice()), ("Aborted", actual.as_bytes()));
    }
    let lock = node.path("a.git").join("refs/heads/main.lock");
    fs::write(&lock, "").unwrap();
    let (code, error) = fail(vec![vec![("refs/heads/x", "", &main), ("refs/heads/main", "", &v1)]]).await;
    fs::remove_file(lock).unwrap();
    let Some(update_references_error::Error::ReferencesLocked(error)) = error else { panic!("{error:?}") };
    assert_eq!((code.as_str(), error.refs), ("Aborted", vec![b"refs/heads/main".to_vec()]));

    let (code, error) = fail(vec![vec![("refs/heads/a..b", "", &main)]]).await;
    let Some(update_references_error::Error::InvalidFormat(error)) = error else { panic!("{error:?}") };
    assert_eq!((code.as_str(), error.refs), ("InvalidArgument", vec![b"refs/heads/a..b".to_vec()]));
    let nowhere = "12".repeat(20);
    assert_eq!(fail(vec![vec![("refs/heads/x", "", &nowhere)]]).await, ("NotFound".into(), None));
    assert_eq!(fail(vec![vec![("refs/heads/x", "", "main")]]).await, ("InvalidArgument".into(), None));
    assert_eq!(names(&node), before);

    assert_eq!(refusal(update(&node, &repository, vec![vec![]]).await), invalid("no updates specified"));
    let twice = UpdateReferencesRequest {
        repository: Some(repository.clone()),
        updates: vec![Update {
            reference: b"refs/heads/x".to_vec(),
            old_object_id: vec![],
            new_object_id: main.clone().into(),
        }],
    };
    let stream = tokio_stream::iter(vec![twice.clone(), twice]);
    assert_eq!(
        refusal(refs(&node).update_references(stream).await),
        invalid("repository set in subsequent request")
    );
    assert_eq!(names(&node), before);
    // Nothing of all this left a lock behind.
    update(&node, &repository, vec![vec![("refs/heads/main", &main, &v1)]]).await.unwrap();
}
