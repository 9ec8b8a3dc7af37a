//! What the tables leave to git: a repository of longer ids is pushed to, cloned from, and copied to another node.

use tabularium_proto::gitaly::{CreateRepositoryRequest, ObjectFormat, ObjectFormatRequest};

use crate::{
    bridge,
    copies::replicate,
    harness::{TestNode, commit, git, git_async},
};

#[tokio::test(flavor = "multi_thread")]
async fn longer_ids_are_pushed_cloned_and_copied() {
    let (node, other) = (TestNode::start_named("one").await, TestNode::start_named("two").await);
    let repository = Some(node.named("a.git"));
    let request = CreateRepositoryRequest {
        repository: repository.clone(),
        object_format: ObjectFormat::Sha256.into(),
        ..CreateRepositoryRequest::default()
    };
    node.repositories().create_repository(request).await.unwrap();
    let url = format!("{}/a.git", bridge::serve(&node, None).await);

    let work = tempfile::tempdir().unwrap();
    git(work.path(), &["init", "--quiet", "--object-format=sha256", "--initial-branch=main", "."]);
    let first = commit(work.path(), None, "first");
    let second = commit(work.path(), Some(&first), "second");
    assert_eq!(second.len(), 64);
    git(work.path(), &["update-ref", "refs/heads/main", &first]);
    git_async(work.path(), &["push", "--quiet", &url, "main"]).await;
    // The second push negotiates.
    git(work.path(), &["update-ref", "refs/heads/main", &second]);
    git_async(work.path(), &["push", "--quiet", &url, "main"]).await;
    assert_eq!(git(&node.path("a.git"), &["rev-parse", "refs/heads/main"]), second);
    for version in ["0", "2"] {
        let clone = tempfile::tempdir().unwrap();
        let protocol = format!("protocol.version={version}");
        git_async(clone.path(), &["-c", &protocol, "clone", "--quiet", "--bare", &url, "."]).await;
        assert_eq!(git(clone.path(), &["rev-parse", "refs/heads/main"]), second);
    }

    replicate(&node, &other, "a.git").await.unwrap();
    assert_eq!(git(&other.path("a.git"), &["rev-parse", "refs/heads/main"]), second);
    git(&other.path("a.git"), &["fsck", "--strict"]);
    let request = ObjectFormatRequest { repository: Some(other.named("a.git")) };
    let format = other.repositories().object_format(request).await.unwrap().into_inner().format();
    assert_eq!(format, ObjectFormat::Sha256);
    assert_eq!(node.checksum(&node.named("a.git")).await, other.checksum(&other.named("a.git")).await);
    // The copy follows.
    let third = commit(work.path(), Some(&second), "third");
    git(work.path(), &["update-ref", "refs/heads/main", &third]);
    git_async(work.path(), &["push", "--quiet", &url, "main"]).await;
    replicate(&node, &other, "a.git").await.unwrap();
    assert_eq!(git(&other.path("a.git"), &["rev-parse", "refs/heads/main"]), third);
    node.stop().await;
    other.stop().await;
}
