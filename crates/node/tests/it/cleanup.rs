//! ApplyBfgObjectMapStream, and what is said of references' format and of bundles.

use tabularium_proto::gitaly::{
    ApplyBfgObjectMapStreamRequest, GenerateBundleUriRequest, MigrateReferenceBackendRequest, ObjectType,
    Repository, cleanup_service_client::CleanupServiceClient,
    migrate_reference_backend_request::ReferenceBackend,
};
use tonic::{Code, Status};

use crate::{
    harness::{TestNode, git},
    seed::{self, all, id, invalid, refusal},
};

/// What became of which object: its type, its old id and its new one.
type Told = (ObjectType, String, String);

/// Sends the map in pieces of a few bytes.
async fn apply(node: &TestNode, repository: Option<Repository>, map: &str) -> Result<Vec<Told>, Status> {
    let mut repository = repository;
    let mut pieces: Vec<&[u8]> = map.as_bytes().chunks(7).collect();
    if pieces.is_empty() {
        pieces.push(b"");
    }
    let requests: Vec<_> = pieces
        .into_iter()
        .map(|piece| ApplyBfgObjectMapStreamRequest {
            repository: repository.take(),
            object_map: piece.to_vec(),
        })
        .collect();
    let mut client = CleanupServiceClient::new(node.channel());
    let answers = client.apply_bfg_object_map_stream(tokio_stream::iter(requests)).await;
    let entries = all(answers).await?.into_iter().flat_map(|answer| answer.entries);
    Ok(entries.map(|entry| (entry.r#type(), entry.old_oid, entry.new_oid)).collect())
}

#[tokio::test]
async fn internal_references_to_what_was_replaced_go() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let (first, second, third) =
        (id(&node, "a.git", "v1"), id(&node, "a.git", "main~1"), id(&node, "a.git", "main"));
    let (blob, tree) = (id(&node, "a.git", "main:README"), id(&node, "a.git", "main^{tree}"));
    for (name, target) in [
        ("refs/keep-around/1", &first),
        ("refs/merge-requests/1/head", &second),
        ("refs/environments/third", &third),
        ("refs/tmp/kept", &third),
        ("refs/notes/first", &first),
    ] {
        git(&path, &["update-ref", name, target]);
    }
    let none = "7".repeat(40);
    // The first commit is also the parent of what a merge request points to.
    let map = format!(
        "old                                      new\n{first} {second}\r\n{third} {third}\n{none} {blob}\n{blob} {tree}\n{tree} {none}"
    );
    let told = apply(&node, Some(repository.clone()), &map).await.unwrap();
    let expected = [
        (ObjectType::Commit, first.clone(), second.clone()),
        (ObjectType::Blob, none.clone(), blob.clone()),
        (ObjectType::Tree, blob, tree.clone()),
        (ObjectType::Unknown, tree, none),
    ];
    assert_eq!(told, expected);
    let left = git(&path, &["for-each-ref", "--format=%(refname)"]);
    let left: Vec<&str> = left.lines().collect();
    assert_eq!(
        left,
        [
            "refs/environments/third",
            "refs/heads/main",
            "refs/heads/side",
            "refs/notes/first",
            "refs/tags/v1",
            "refs/tags/v2",
            "refs/tmp/kept",
        ]
    );
    assert_eq!(apply(&node, Some(repository), "").await.unwrap(), []);
}

#[tokio::test]
async fn a_bad_map_removes_nothing() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let (first, second) = (id(&node, "a.git", "v1"), id(&node, "a.git", "main~1"));
    git(&path, &["update-ref", "refs/keep-around/1", &first]);
    let before = git(&path, &["for-each-ref"]);
    for (line, problem) in [
        ("x".to_owned(), "object map invalid at line 1"),
        (format!("abc {second}"), "invalid old object ID at line 1"),
        (format!("{first} abc"), "invalid new object ID at line 1"),
        ("y".repeat(10_000), "object map invalid at line 1"),
    ] {
        let map = format!("{first} {second}\n{line}");
        assert_eq!(refusal(apply(&node, Some(repository.clone()), &map).await), invalid(problem));
        assert_eq!(git(&path, &["for-each-ref"]), before);
    }
    assert_eq!(refusal(apply(&node, None, "").await), invalid("repository not set"));
    let absent = apply(&node, Some(node.named("absent.git")), "").await;
    assert_eq!(refusal(absent), (Code::NotFound, "repository not found".to_owned()));
}

#[tokio::test]
async fn references_stay_in_files() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let migrate = async |repository: Option<Repository>, target: ReferenceBackend| {
        let request = MigrateReferenceBackendRequest { repository, target_reference_backend: target as i32 };
        node.repositories().migrate_reference_backend(request).await.map(tonic::Response::into_inner)
    };
    let here = || Some(repository.clone());
    assert!(migrate(here(), ReferenceBackend::Files).await.unwrap().time.is_some());
    let refused = refusal(migrate(here(), ReferenceBackend::Reftable).await);
    let text = "migration failed: this node keeps references in files";
    assert_eq!(refused, (Code::FailedPrecondition, text.to_owned()));
    let unsaid = migrate(here(), ReferenceBackend::Unspecified).await;
    assert_eq!(refusal(unsaid), invalid("target reference backend not set"));
    assert_eq!(refusal(migrate(None, ReferenceBackend::Files).await), invalid("repository not set"));
    assert!(
        node.path("a.git").join("refs/heads/main").is_file() && !node.path("a.git").join("reftable").exists()
    );
}

#[tokio::test]
async fn there_is_no_place_for_bundles() {
    let node = TestNode::start().await;
    let request = GenerateBundleUriRequest { repository: Some(node.named("a.git")) };
    let refused = refusal(node.repositories().generate_bundle_uri(request).await);
    assert_eq!(refused, (Code::FailedPrecondition, "no bundle-generation manager available".to_owned()));
}
