//! Repositories and branches that come from elsewhere: FetchSourceBranch, CreateRepositoryFromURL, CreateRepositoryFromBundle.
//! And the few settings that older clients write.

use tabularium_proto::gitaly::{
    ApplyGitattributesRequest, CreateRepositoryFromBundleRequest, CreateRepositoryFromUrlError,
    CreateRepositoryFromUrlRequest, FetchSourceBranchRequest, FullPathRequest,
    PruneUnreachableObjectsRequest, SetFullPathRequest, create_repository_from_url_error::Error,
};
use tonic::{Code, Status};

use crate::{
    bridge,
    harness::{TestNode, commit, git, git_command, with_servers},
    operations::assert_no_quarantine,
    seed::{self, detail, fast_import, id, invalid, refusal},
};

#[tokio::test]
async fn a_branch_of_another_repository_is_fetched() {
    let node = TestNode::start().await;
    let source = seed::repository(&node, "a.git").await;
    let target = node.create("b.git").await;
    let whole = FetchSourceBranchRequest {
        repository: Some(target.clone()),
        source_repository: Some(source.clone()),
        source_branch: b"main".to_vec(),
        target_ref: b"refs/merge-requests/1/head".to_vec(),
        expected_target_old_oid: String::new(),
    };
    let fetch = async |request: FetchSourceBranchRequest| {
        let answer = node.repositories().fetch_source_branch(with_servers(request, &[&node])).await;
        answer.map(|response| response.into_inner().result)
    };
    let main = id(&node, "a.git", "main");
    assert!(fetch(whole.clone()).await.unwrap());
    assert_eq!(id(&node, "b.git", "refs/merge-requests/1/head"), main);
    git(&node.path("b.git"), &["fsck", "--strict"]);
    // Back to an earlier one, if it is where it was.
    let earlier = FetchSourceBranchRequest {
        source_branch: b"refs/heads/side".to_vec(),
        expected_target_old_oid: main.clone(),
        ..whole.clone()
    };
    assert!(fetch(earlier.clone()).await.unwrap());
    assert_eq!(id(&node, "b.git", "refs/merge-requests/1/head"), id(&node, "a.git", "side"));
    let expected = "reference does not point to expected object";
    assert_eq!(refusal(fetch(earlier).await), (Code::FailedPrecondition, expected.into()));
    let absent = FetchSourceBranchRequest { source_branch: b"none".to_vec(), ..whole.clone() };
    assert!(!fetch(absent).await.unwrap());
    // Within one repository nothing has to be fetched.
    let same = FetchSourceBranchRequest { repository: Some(source), ..whole.clone() };
    assert!(fetch(same).await.unwrap());
    assert_eq!(id(&node, "a.git", "refs/merge-requests/1/head"), main);
    for (change, text) in [
        (FetchSourceBranchRequest { repository: None, ..whole.clone() }, "repository not set"),
        (FetchSourceBranchRequest { source_branch: Vec::new(), ..whole.clone() }, "empty revision"),
        (
            FetchSourceBranchRequest { source_branch: b"-x".to_vec(), ..whole.clone() },
            "revision can't start with '-'",
        ),
        (FetchSourceBranchRequest { target_ref: Vec::new(), ..whole.clone() }, "empty revision"),
        (
            FetchSourceBranchRequest { target_ref: b"refs/heads/a..b".to_vec(), ..whole.clone() },
            "invalid reference name",
        ),
        (FetchSourceBranchRequest { source_repository: None, ..whole.clone() }, "empty source repository"),
    ] {
        assert_eq!(refusal(fetch(change).await), invalid(text));
    }
    assert_no_quarantine(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_is_cloned_from_an_address() {
    let node = TestNode::start().await;
    seed::repository(&node, "a.git").await;
    git(&node.path("a.git"), &["update-ref", "refs/merge-requests/1/head", "main"]);
    git(&node.path("a.git"), &["symbolic-ref", "HEAD", "refs/heads/side"]);
    let address = bridge::serve(&node, Some("Basic dTpw")).await;
    let whole = CreateRepositoryFromUrlRequest {
        repository: Some(node.named("x/b.git")),
        url: format!("{address}/a.git").replace("http://", "http://u:p@"),
        ..CreateRepositoryFromUrlRequest::default()
    };
    let create = async |request: CreateRepositoryFromUrlRequest| {
        node.repositories().create_repository_from_url(request).await.map(drop)
    };
    create(whole.clone()).await.unwrap();
    let path = node.path("x/b.git");
    assert_eq!(git(&path, &["symbolic-ref", "HEAD"]), "refs/heads/side");
    assert_eq!(id(&node, "x/b.git", "main"), id(&node, "a.git", "main"));
    assert_eq!(git(&path, &["for-each-ref", "--format=%(refname)"]).lines().count(), 4);
    let config = std::fs::read_to_string(path.join("config")).unwrap();
    assert!(!config.contains("remote") && !config.contains("127.0.0.1"), "{config}");
    git(&path, &["fsck", "--strict"]);
    let again = refusal(create(whole.clone()).await);
    assert_eq!(again, (Code::AlreadyExists, "creating repository: repository exists already".into()));

    let mirror = CreateRepositoryFromUrlRequest {
        repository: Some(node.named("c.git")),
        url: format!("{address}/a.git"),
        http_authorization_header: "Basic dTpw".into(),
        mirror: true,
        ..CreateRepositoryFromUrlRequest::default()
    };
    create(mirror.clone()).await.unwrap();
    assert_eq!(id(&node, "c.git", "refs/merge-requests/1/head"), id(&node, "a.git", "main"));

    let other = |url: &str| CreateRepositoryFromUrlRequest {
        repository: Some(node.named("d.git")),
        url: url.to_owned(),
        ..mirror.clone()
    };
    let status = create(other(&format!("{address}/none.git"))).await.unwrap_err();
    let text = "creating repository: cloning repository: repository at given URL not found";
    assert_eq!((status.code(), status.message()), (Code::NotFound, text));
    let error = detail::<CreateRepositoryFromUrlError>(&status, "CreateRepositoryFromURLError").error;
    assert!(matches!(error, Some(Error::RemoteNotFound(_))), "{error:?}");
    let denied = CreateRepositoryFromUrlRequest {
        http_authorization_header: String::new(),
        ..other(&whole.url.replace("u:p@", ""))
    };
    assert_eq!(refusal(create(denied).await).0, Code::Internal);
    assert_eq!(refusal(create(other("")).await), invalid("empty Url"));
    assert_eq!(refusal(create(other("file:///etc")).await).0, Code::InvalidArgument);
    assert!(!node.path("d.git").exists());
}

#[tokio::test]
async fn a_repository_is_made_of_a_bundle() {
    let node = TestNode::start().await;
    seed::repository(&node, "a.git").await;
    let (source, file) = (node.path("a.git"), node.root().join("bundle"));
    git(&source, &["update-ref", "refs/keep-around/x", "main"]);
    git(&source, &["bundle", "create", "--quiet", file.to_str().unwrap(), "--all"]);
    let bundle = std::fs::read(&file).unwrap();
    let create = async |path: &str, data: &[u8]| -> Result<(), Status> {
        let mut requests: Vec<_> = data
            .chunks(1000)
            .map(|data| CreateRepositoryFromBundleRequest { repository: None, data: data.to_vec() })
            .collect();
        requests.insert(
            0,
            CreateRepositoryFromBundleRequest {
                repository: Some(node.named(path)),
                ..CreateRepositoryFromBundleRequest::default()
            },
        );
        node.repositories().create_repository_from_bundle(tokio_stream::iter(requests)).await.map(drop)
    };
    create("b.git", &bundle).await.unwrap();
    let path = node.path("b.git");
    assert_eq!(git(&path, &["for-each-ref"]), git(&source, &["for-each-ref"]));
    assert_eq!(git(&path, &["symbolic-ref", "HEAD"]), "refs/heads/main");
    assert!(!std::fs::read_to_string(path.join("config")).unwrap().contains("remote"));
    git(&path, &["fsck", "--strict"]);
    let exists = refusal(create("b.git", &bundle).await);
    assert_eq!(exists, (Code::AlreadyExists, "creating repository: repository exists already".into()));
    let half = bundle.get(..bundle.len() / 2).unwrap();
    for bad in [b"no bundle".as_slice(), b"gitdir: ../a.git/////////", half] {
        let (code, text) = refusal(create("c.git", bad).await);
        assert_eq!(code, Code::Internal);
        assert!(text.starts_with("creating repository: cloning bundle: "), "{text}");
    }
    assert!(!node.path("c.git").exists());
    let nothing = node.repositories().create_repository_from_bundle(tokio_stream::empty()).await;
    assert_eq!(refusal(nothing).0, Code::Internal);
}

#[tokio::test]
async fn settings_of_older_clients() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let full_path = || FullPathRequest { repository: Some(repository.clone()) };
    assert_eq!(refusal(node.repositories().full_path(full_path()).await).0, Code::Internal);
    let set = async |path: &str| {
        let request = SetFullPathRequest { repository: Some(repository.clone()), path: path.to_owned() };
        node.repositories().set_full_path(request).await.map(drop)
    };
    for name in ["group/project", "other/name with space"] {
        set(name).await.unwrap();
        assert_eq!(git(&path, &["config", "gitlab.fullpath"]), name);
        assert_eq!(node.repositories().full_path(full_path()).await.unwrap().into_inner().path, name);
    }
    assert_eq!(refusal(set("").await), invalid("no path provided"));

    let apply = async |revision: &str| {
        let request =
            ApplyGitattributesRequest { repository: Some(repository.clone()), revision: revision.into() };
        node.repositories().apply_gitattributes(request).await.map(drop)
    };
    let stream = b"commit refs/heads/with\ncommitter C <c@x> 1600000000 +0000\ndata 1\nc\nM 100644 inline .gitattributes\ndata 6\n* text\n\n";
    fast_import(&path, stream);
    apply("with").await.unwrap();
    assert_eq!(std::fs::read(path.join("info/attributes")).unwrap(), b"* text");
    apply("main").await.unwrap();
    assert!(!path.join("info/attributes").exists());
    apply("main").await.unwrap();
    assert_eq!(refusal(apply("none").await), invalid("revision does not exist"));
    assert_eq!(refusal(apply("").await), invalid("revision: empty revision"));
}

#[tokio::test]
async fn unreachable_objects_go_when_they_are_old() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let (old, young) = (commit(&path, None, "old"), commit(&path, None, "young"));
    let file = path.join("objects").join(&old[..2]).join(&old[2..]);
    let aged = std::process::Command::new("touch").args(["-d", "1 hour ago"]).arg(&file).status().unwrap();
    assert!(aged.success());
    let prune = PruneUnreachableObjectsRequest { repository: Some(repository) };
    node.repositories().prune_unreachable_objects(prune).await.unwrap();
    let has = |id: &str| git_command(&path).args(["cat-file", "-e", id]).status().unwrap().success();
    assert!(!has(&old) && has(&young));
    git(&path, &["fsck", "--strict"]);
    let nothing = PruneUnreachableObjectsRequest { repository: None };
    let refused = node.repositories().prune_unreachable_objects(nothing).await;
    assert_eq!(refusal(refused), invalid("repository not set"));
}
