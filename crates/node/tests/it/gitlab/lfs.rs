//! Archives with files that GitLab keeps.

use std::{collections::BTreeMap, fs, io::Read as _};

use tabularium_proto::gitaly::{GetArchiveRequest, Repository, get_archive_request::Format};

use super::{Gitlab, Reply, config};
use crate::{
    harness::{TestNode, git},
    seed::all,
};

fn pointer(digit: &str, size: usize) -> String {
    let id = digit.repeat(64);
    format!("version https://git-lfs.github.com/spec/v1\noid sha256:{id}\nsize {size}\n")
}

/// A repository with files that are kept elsewhere, and others.
async fn repository(node: &TestNode) -> Repository {
    let repository = node.create("a.git").await;
    let work = tempfile::tempdir().unwrap();
    git(work.path(), &["init", "--quiet", "--initial-branch=main"]);
    for (name, content) in [
        (".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n".to_owned()),
        ("kept.bin", pointer("a", 300_000)),
        ("gone.bin", pointer("b", 3)),
        ("cut.bin", pointer("c", 3)),
        ("plain.bin", "no pointer\n".repeat(20_000)),
        ("other.txt", pointer("a", 300_000)),
    ] {
        fs::write(work.path().join(name), content).unwrap();
    }
    git(work.path(), &["-c", "filter.lfs.required=false", "add", "--all"]);
    git(work.path(), &["commit", "--quiet", "--message=files"]);
    let path = node.path("a.git");
    git(work.path(), &["push", "--quiet", path.to_str().unwrap(), "main"]);
    Repository { gl_repository: "project-7".into(), ..repository }
}

async fn archive(
    node: &TestNode,
    repository: &Repository,
    include_lfs_blobs: bool,
) -> BTreeMap<String, String> {
    let request = GetArchiveRequest {
        repository: Some(repository.clone()),
        commit_id: "main".into(),
        format: Format::Tar as i32,
        include_lfs_blobs,
        ..GetArchiveRequest::default()
    };
    let pieces = all(node.repositories().get_archive(request).await).await.unwrap();
    let whole: Vec<u8> = pieces.into_iter().flat_map(|piece| piece.data).collect();
    let mut archive = tar::Archive::new(whole.as_slice());
    let read = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
        let mut entry = entry.unwrap();
        let mut content = String::new();
        entry.read_to_string(&mut content).unwrap();
        (entry.path().unwrap().to_string_lossy().into_owned(), content)
    };
    archive.entries().unwrap().map(read).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_gitlab_keeps_is_in_the_archive() {
    let gitlab = Gitlab::deciding(|call| {
        if call.endpoint() != "lfs" {
            return None;
        }
        let id = call.query.split('&').find_map(|pair| pair.strip_prefix("oid=")).unwrap();
        let (status, body) = match &id[..1] {
            "a" => (200, "kept elsewhere".repeat(30_000)[..300_000].to_owned()),
            "c" => (200, "no".to_owned()),
            _ => return None,
        };
        Some(Reply { status, content_type: "application/octet-stream", body })
    });
    let directory = tempfile::tempdir().unwrap();
    let to_gitlab = config(&gitlab.serve().await, directory.path());
    let node = TestNode::start_with(move |config| config.gitlab = Some(to_gitlab)).await;
    let repository = repository(&node).await;
    let before = gitlab.calls().len();

    let plain = archive(&node, &repository, false).await;
    assert_eq!(plain["kept.bin"], pointer("a", 300_000));
    assert_eq!(gitlab.calls().len(), before);

    let with = archive(&node, &repository, true).await;
    assert_eq!(with.len(), plain.len());
    assert_eq!(with["kept.bin"].len(), 300_000);
    assert!(with["kept.bin"].starts_with("kept elsewherekept"));
    for (name, content) in &plain {
        if name != "kept.bin" {
            assert_eq!(with[name], *content, "{name}");
        }
    }
    let calls = gitlab.calls().split_off(before);
    assert_eq!(calls.len(), 3);
    for call in calls {
        assert_eq!((call.method.as_str(), call.path.as_str()), ("GET", "/api/v4/internal/lfs"));
        assert!(call.query.contains("gl_repository=project%2D7"), "{}", call.query);
        assert!(!call.header("gitlab-shell-api-request").is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_gitlab_pointers_stay() {
    let node = TestNode::start().await;
    let repository = repository(&node).await;
    let with = archive(&node, &repository, true).await;
    assert_eq!(with, archive(&node, &repository, false).await);
    assert_eq!(with["kept.bin"], pointer("a", 300_000));
}
