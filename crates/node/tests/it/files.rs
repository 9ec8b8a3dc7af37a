//! Repositories as files: snapshots, bundles, archives, config.

use std::fs;

use tabularium_proto::gitaly::{
    CreateBundleRequest, CreateRepositoryFromSnapshotRequest, FetchBundleRequest, GetArchiveRequest,
    GetConfigRequest, GetCustomHooksRequest, GetSnapshotRequest, HasLocalBranchesRequest, Repository,
    RepositoryInfoRequest, get_archive_request::Format,
    repository_info_response::references_info::ReferenceBackend,
};
use tonic::{Code, Status, Streaming};

use crate::harness::{TestNode, git, git_command};

async fn collect<T>(stream: Streaming<T>, data: impl Fn(T) -> Vec<u8>) -> Result<Vec<u8>, Status> {
    let mut stream = stream;
    let mut collected = Vec::new();
    while let Some(message) = stream.message().await? {
        let data = data(message);
        assert!(data.len() <= 128 * 1024, "{}", data.len());
        collected.extend_from_slice(&data);
    }
    Ok(collected)
}

pub(crate) async fn snapshot(node: &TestNode, repository: &Repository) -> Vec<u8> {
    let request = GetSnapshotRequest { repository: Some(repository.clone()) };
    let stream = node.repositories().get_snapshot(request).await.unwrap().into_inner();
    collect(stream, |message| message.data.to_vec()).await.unwrap()
}

/// Serves one HTTP answer and gives back the request's text.
pub(crate) async fn serve_once(answer: Vec<u8>) -> (String, tokio::task::JoinHandle<String>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/snapshot", listener.local_addr().unwrap());
    #[allow(clippy::disallowed_methods, reason = "ends with the test's runtime")]
    let served = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        let length = stream.read(&mut request).await.unwrap();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", answer.len());
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&answer).await.unwrap();
        String::from_utf8_lossy(&request[..length]).into_owned()
    });
    (url, served)
}

#[tokio::test]
async fn a_snapshot_becomes_a_repository() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let path = node.path("a.git");
    fs::create_dir(path.join("hooks")).unwrap();
    fs::write(path.join("hooks/pre-receive"), "x").unwrap();
    let archive = snapshot(&node, &repository).await;
    let names: Vec<String> = tar::Archive::new(archive.as_slice())
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().to_string_lossy().into_owned())
        .collect();
    assert!(names.contains(&"HEAD".to_owned()) && names.contains(&"refs/heads/main".to_owned()), "{names:?}");
    assert!(!names.iter().any(|name| name.contains("hooks") || name.contains("objects/info/")), "{names:?}");

    let cut = archive[..archive.len() - 1024].to_vec();
    let (http_url, served) = serve_once(archive).await;
    let request = CreateRepositoryFromSnapshotRequest {
        repository: Some(node.named("copy.git")),
        http_url,
        http_auth: "Bearer x".into(),
        ..CreateRepositoryFromSnapshotRequest::default()
    };
    node.repositories().create_repository_from_snapshot(request.clone()).await.unwrap();
    let head = served.await.unwrap().to_lowercase();
    assert!(head.contains("authorization: bearer x"), "{head}");
    git(&node.path("copy.git"), &["fsck"]);
    assert_eq!(node.checksum(&node.named("copy.git")).await, node.checksum(&repository).await);

    // Cut between two entries, it reads like a smaller archive.
    let (http_url, _served) = serve_once(cut).await;
    let bad = CreateRepositoryFromSnapshotRequest {
        repository: Some(node.named("cut.git")),
        http_url,
        ..request.clone()
    };
    let status = node.repositories().create_repository_from_snapshot(bad).await.unwrap_err();
    assert!(status.message().contains("cut off"), "{status}");
    assert!(!node.path("cut.git").exists());

    let mut escaping = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.as_old_mut().name[..15].copy_from_slice(b"objects/../../x");
    header.set_cksum();
    escaping.append(&header, &b"x"[..]).unwrap();
    let (http_url, _served) = serve_once(escaping.into_inner().unwrap()).await;
    let bad =
        CreateRepositoryFromSnapshotRequest { repository: Some(node.named("bad.git")), http_url, ..request };
    let status = node.repositories().create_repository_from_snapshot(bad).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(!node.path("bad.git").exists() && !node.root().join("x").exists());
}

#[tokio::test]
async fn a_bundle_carries_refs_and_head() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    git(&node.path("a.git"), &["symbolic-ref", "HEAD", "refs/heads/side"]);
    let request = CreateBundleRequest { repository: Some(repository.clone()) };
    let stream = node.repositories().create_bundle(request).await.unwrap().into_inner();
    let bundle = collect(stream, |message| message.data.to_vec()).await.unwrap();

    let copy = node.create("copy.git").await;
    let messages = |bundle: Vec<u8>| {
        let first =
            FetchBundleRequest { repository: Some(copy.clone()), update_head: true, ..Default::default() };
        let pieces: Vec<_> = bundle.chunks(100).map(<[u8]>::to_vec).collect();
        let rest =
            pieces.into_iter().map(|data| FetchBundleRequest { data: data.into(), ..Default::default() });
        tokio_stream::iter(std::iter::once(first).chain(rest))
    };
    let truncated = bundle[..bundle.len() - 30].to_vec();
    let refused = node.repositories().fetch_bundle(messages(truncated)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Internal);
    assert_eq!(git(&node.path("copy.git"), &["for-each-ref"]), "");
    node.repositories().fetch_bundle(messages(bundle)).await.unwrap();
    assert_eq!(node.checksum(&copy).await, node.checksum(&repository).await);
    assert_eq!(git(&node.path("copy.git"), &["symbolic-ref", "HEAD"]), "refs/heads/side");

    let request = CreateBundleRequest { repository: Some(node.create("empty.git").await) };
    let stream = node.repositories().create_bundle(request).await.unwrap().into_inner();
    let empty = collect(stream, |message| message.data.to_vec()).await.unwrap_err();
    assert_eq!(empty.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn archives_hold_what_was_asked_for() {
    let node = TestNode::start().await;
    let repository = node.create("a.git").await;
    let work = tempfile::tempdir().unwrap();
    git(work.path(), &["init", "--quiet", "-b", "main", "."]);
    fs::create_dir_all(work.path().join("dir/sub")).unwrap();
    for name in ["top", "dir/one", "dir/sub/two"] {
        fs::write(work.path().join(name), name).unwrap();
    }
    git(work.path(), &["add", "."]);
    git(work.path(), &["commit", "-q", "-m", "x"]);
    git(&node.path("a.git"), &["fetch", "-q", work.path().to_str().unwrap(), "main:main"]);

    let get = async |change: &dyn Fn(&mut GetArchiveRequest)| -> Result<Vec<String>, Status> {
        let mut request = GetArchiveRequest {
            repository: Some(repository.clone()),
            commit_id: "main".into(),
            format: Format::Tar.into(),
            prefix: "p".into(),
            ..GetArchiveRequest::default()
        };
        change(&mut request);
        let stream = node.repositories().get_archive(request).await?.into_inner();
        let archive = collect(stream, |message| message.data.to_vec()).await?;
        let mut archive = tar::Archive::new(archive.as_slice());
        let paths = archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned());
        let files = paths.map(|path| path.to_string_lossy().into_owned()).filter(|name| !name.ends_with('/'));
        Ok(files.filter(|name| name != "pax_global_header").collect())
    };
    assert_eq!(get(&|_| {}).await.unwrap(), ["p/dir/one", "p/dir/sub/two", "p/top"]);
    assert_eq!(
        get(&|request| request.path = b"dir/".to_vec()).await.unwrap(),
        ["p/dir/one", "p/dir/sub/two"]
    );
    let elided = get(&|request| {
        request.path = b"dir".to_vec();
        request.elide_path = true;
        request.exclude = vec![b"dir/sub".to_vec()];
    });
    assert_eq!(elided.await.unwrap(), ["p/one"]);
    let excluded = get(&|request| request.exclude = vec![b"dir".to_vec()]).await.unwrap();
    assert_eq!(excluded, ["p/top"]);

    let failed = Code::FailedPrecondition;
    for (change, code, text) in [
        (
            (&|request: &mut GetArchiveRequest| request.path = b"none".to_vec())
                as &dyn Fn(&mut GetArchiveRequest),
            failed,
            "path doesn't exist",
        ),
        (&|request| request.exclude = vec![b"none".to_vec()], failed, "exclude[0] doesn't exist"),
        (
            &|request| {
                request.path = b"dir".to_vec();
                request.elide_path = true;
                request.exclude = vec![b"top".to_vec()];
            },
            Code::InvalidArgument,
            "invalid exclude: \"top\" is not a subdirectory of \"dir\"",
        ),
        (&|request| request.commit_id = "none".into(), Code::Internal, "object not found"),
        (
            &|request| (request.commit_id, request.path) = ("none".into(), b"dir".to_vec()),
            failed,
            "path doesn't exist",
        ),
        (&|request| request.format = 9, Code::InvalidArgument, "invalid format"),
        (
            &|request| request.commit_id = "-x".into(),
            Code::InvalidArgument,
            "invalid commitId: revision can't start with '-'",
        ),
        (
            &|request| request.path = b"../x".to_vec(),
            Code::InvalidArgument,
            "relative path escapes root directory",
        ),
    ] {
        let status = get(change).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, text));
    }
    let request = GetArchiveRequest {
        repository: Some(repository.clone()),
        commit_id: "main".into(),
        format: Format::TarGz.into(),
        ..GetArchiveRequest::default()
    };
    let stream = node.repositories().get_archive(request).await.unwrap().into_inner();
    let zipped = collect(stream, |message| message.data.to_vec()).await.unwrap();
    assert_eq!(zipped[..2], [0x1f, 0x8b]);
}

#[tokio::test]
async fn facts_are_those_on_disk() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let mut client = node.repositories();
    let config = client.get_config(GetConfigRequest { repository: Some(repository.clone()) }).await.unwrap();
    let config = collect(config.into_inner(), |message| message.data).await.unwrap();
    assert_eq!(config, fs::read(node.path("a.git/config")).unwrap());
    let hooks = client.get_custom_hooks(GetCustomHooksRequest { repository: Some(repository.clone()) }).await;
    assert!(hooks.unwrap().into_inner().message().await.unwrap().is_none());

    let info = client.repository_info(RepositoryInfoRequest { repository: Some(repository.clone()) }).await;
    let info = info.unwrap().into_inner();
    let (references, objects) = (info.references.unwrap(), info.objects.unwrap());
    assert_eq!(references.loose_count, 3);
    assert_eq!(references.reference_backend(), ReferenceBackend::Files);
    assert_eq!((objects.loose_objects_count, objects.packfile_count), (3, 0));

    let has = async |repository: &Repository| {
        let request = HasLocalBranchesRequest { repository: Some(repository.clone()) };
        node.repositories().has_local_branches(request).await.unwrap().into_inner().value
    };
    assert!(has(&repository).await);
    assert!(!has(&node.create("empty.git").await).await);

    fs::remove_file(node.path("a.git/config")).unwrap();
    let status = client.get_config(GetConfigRequest { repository: Some(repository) }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let version = git_command(&node.root()).arg("--version").output().unwrap();
    assert!(version.status.success());
}
