//! Custom hooks: which run, what they find, and how they are set.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Output};

use sha1::{Digest as _, Sha1};
use tabularium_proto::gitaly::{
    BackupCustomHooksRequest, GetCustomHooksRequest, Repository, RestoreCustomHooksRequest,
    SetCustomHooksRequest, UserCreateBranchRequest, repository_service_client::RepositoryServiceClient,
    vote_transaction_request::Phase,
};
use tonic::{Code, Status};

use crate::{
    bridge,
    harness::{TestNode, eventually, git, git_command},
    operations::{hook, operations, user},
    seed::{self, all},
    transport::work_tree,
    voting::router::{Answer, Router},
};

fn script(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

async fn push(url: &str, work: &Path, arguments: &[&str]) -> Output {
    let mut command = git_command(work);
    command.args(["push", url]).args(arguments);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// A node with hooks of all repositories in a directory, which is there as long as this is.
async fn with_hooks_of_all(prepare: impl FnOnce(&Path)) -> (TestNode, tempfile::TempDir) {
    let everywhere = tempfile::tempdir().unwrap();
    prepare(everywhere.path());
    let directory = everywhere.path().to_owned();
    let node = TestNode::start_with(|config| config.hooks.custom_hooks_dir = Some(directory)).await;
    (node, everywhere)
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_of_all_repositories_run_last_and_also_alone() {
    let (node, everywhere) = with_hooks_of_all(|directory| {
        for name in ["pre-receive", "update", "post-receive"] {
            script(&directory.join(format!("{name}.d/1")), &format!("echo all {name}"));
        }
    })
    .await;
    node.create("a.git").await;
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    let work = work_tree(1000);
    let said = async |branch: &str| {
        let pushed = push(&url, work.path(), &[&format!("main:refs/heads/{branch}")]).await;
        let words = String::from_utf8_lossy(&pushed.stderr).into_owned();
        let lines = words.lines().filter_map(|line| line.strip_prefix("remote: ")).map(str::trim_end);
        (pushed.status.success(), lines.map(str::to_owned).collect::<Vec<_>>())
    };
    assert_eq!(
        said("a").await,
        (true, ["all pre-receive", "all update", "all post-receive"].map(str::to_owned).to_vec())
    );
    hook(&node, "pre-receive.d/2", "echo own 2");
    hook(&node, "pre-receive.d/1", "echo own 1");
    let expected = ["own 1", "own 2", "all pre-receive", "all update", "all post-receive"];
    assert_eq!(said("b").await, (true, expected.map(str::to_owned).to_vec()));
    script(&everywhere.path().join("update.d/0"), "echo never >&2; exit 7");
    let expected = ["own 1", "own 2", "all pre-receive", "never"];
    let (succeeded, lines) = said("c").await;
    assert!(!succeeded && lines.iter().take(4).eq(&expected), "{lines:?}");
    hook(&node, "pre-receive.d/1", "echo no; exit 1");
    let (succeeded, lines) = said("d").await;
    assert!(!succeeded && lines == ["no"], "the first that fails ends it: {lines:?}");
    assert_eq!(
        git(&node.path("a.git"), &["for-each-ref", "--format=%(refname)"]),
        "refs/heads/a\nrefs/heads/b"
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_of_a_push_find_what_they_rely_on() {
    let (node, _everywhere) = with_hooks_of_all(|_| {}).await;
    node.create("a.git").await;
    let path = node.path("a.git");
    let record = "cat > seen-input; env | sort > seen; pwd >> seen; git cat-file -t \"$(cut -d' ' -f2 seen-input)\" >> seen";
    hook(&node, "pre-receive", record);
    hook(&node, "update", "echo \"$@\" > seen-update; readlink /proc/self/fd/0 >> seen-update");
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    let work = work_tree(1000);
    let pushed = push(&url, work.path(), &["-o", "one=1", "-o", "two", "main:side"]).await;
    assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));
    let new = git(work.path(), &["rev-parse", "main"]);
    // Git writes paths with a dot in the middle.
    let seen = fs::read_to_string(path.join("seen")).unwrap().replace("/./", "/");
    let objects = path.join("objects");
    for line in [
        "GL_ID=user-1",
        "GL_USERNAME=jane",
        "GL_REPOSITORY=project-1",
        "GL_PROJECT_PATH=",
        "GL_PROTOCOL=http",
        "GIT_PUSH_OPTION_COUNT=2",
        "GIT_PUSH_OPTION_0=one=1",
        "GIT_PUSH_OPTION_1=two",
        &format!("GIT_DIR={}", path.display()),
        &format!("GIT_ALTERNATE_OBJECT_DIRECTORIES={}", objects.display()),
        path.to_str().unwrap(),
        "commit",
    ] {
        assert!(seen.lines().any(|seen| seen == line), "{line} in {seen}");
    }
    assert!(seen.contains(&format!("GIT_OBJECT_DIRECTORY={}/tmp_objdir-", objects.display())), "{seen}");
    assert!(!seen.contains("TABULARIUM") && !seen.contains("CARGO"), "{seen}");
    let zero = "0".repeat(40);
    let line = format!("{zero} {new} refs/heads/side\n");
    assert_eq!(fs::read_to_string(path.join("seen-input")).unwrap(), line);
    let update = fs::read_to_string(path.join("seen-update")).unwrap();
    assert_eq!(update, format!("refs/heads/side {zero} {new}\n/dev/null\n"));

    // The same for a change that is no push.
    let request = UserCreateBranchRequest {
        repository: Some(Repository { gl_project_path: "group/project".into(), ..node.named("a.git") }),
        branch_name: b"new".to_vec(),
        user: Some(user()),
        start_point: b"side".to_vec(),
    };
    operations(&node).user_create_branch(request).await.unwrap();
    let seen = fs::read_to_string(path.join("seen")).unwrap();
    for line in
        ["GL_PROTOCOL=web", "GL_PROJECT_PATH=group/project", &format!("GIT_DIR={}", path.display()), "commit"]
    {
        assert!(seen.lines().any(|seen| seen == line), "{line} in {seen}");
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_need_not_listen_and_must_be_runnable() {
    let node = TestNode::start().await;
    node.create("a.git").await;
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    let work = work_tree(1000);
    hook(&node, "pre-receive", "exec <&-; echo deaf");
    let pushed = push(&url, work.path(), &["main"]).await;
    assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));
    let path = node.path("a.git").join("custom_hooks/update");
    fs::write(&path, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let pushed = push(&url, work.path(), &["main:side"]).await;
    let words = String::from_utf8_lossy(&pushed.stderr).into_owned();
    assert!(!pushed.status.success() && words.contains(path.to_str().unwrap()), "{words}");
    node.stop().await;
}

/// An archive of files, with their modes.
pub(crate) fn archive(files: &[(&str, u32, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, mode: u32, kind: tar::EntryType, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        builder.append_data(&mut header, name, content).unwrap();
    };
    add("custom_hooks/", 0o755, tar::EntryType::Directory, b"");
    for (name, mode, content) in files {
        add(name, *mode, tar::EntryType::Regular, content.as_bytes());
    }
    builder.into_inner().unwrap()
}

/// The request in pieces, of which the first names the repository.
fn pieces(repository: &Repository, archive: &[u8]) -> Vec<SetCustomHooksRequest> {
    let first = SetCustomHooksRequest { repository: Some(repository.clone()), ..Default::default() };
    let data =
        archive.chunks(700).map(|data| SetCustomHooksRequest { data: data.to_vec(), ..Default::default() });
    std::iter::once(first).chain(data).collect()
}

async fn set(node: &TestNode, repository: &Repository, archive: &[u8]) -> Result<(), Status> {
    let request = futures::stream::iter(pieces(repository, archive));
    node.repositories().set_custom_hooks(request).await.map(|_| ())
}

async fn got(node: &TestNode, repository: &Repository) -> Vec<u8> {
    let request = GetCustomHooksRequest { repository: Some(repository.clone()) };
    let got = all(node.repositories().get_custom_hooks(request).await).await.unwrap();
    got.into_iter().flat_map(|message| message.data).collect()
}

/// What lies on the disk: names, modes, contents.
fn on_disk(node: &TestNode) -> Vec<(String, u32, String)> {
    let mut found = Vec::new();
    let mut directories = vec![node.path("a.git").join("custom_hooks")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let name = path.strip_prefix(node.path("a.git")).unwrap().to_str().unwrap().to_owned();
            let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
            found.push((name, mode, fs::read_to_string(path).unwrap()));
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_are_set_got_and_set_again() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let first = [
        ("custom_hooks/pre-receive.d/1", 0o755, "#!/bin/sh\necho set; exit 1\n"),
        ("custom_hooks/update", 0o644, "not runnable"),
    ];
    set(&node, &repository, &archive(&first)).await.unwrap();
    let wanted = |files: &[(&str, u32, &str)]| -> Vec<(String, u32, String)> {
        files.iter().map(|(name, mode, content)| ((*name).to_owned(), *mode, (*content).to_owned())).collect()
    };
    assert_eq!(on_disk(&node), wanted(&first));
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    let pushed = push(&url, work_tree(1000).path(), &["main:other"]).await;
    assert!(!pushed.status.success() && String::from_utf8_lossy(&pushed.stderr).contains("remote: set"));

    let copy = got(&node, &repository).await;
    let request = BackupCustomHooksRequest { repository: Some(repository.clone()) };
    let backup = all(node.repositories().backup_custom_hooks(request).await).await.unwrap();
    assert_eq!(backup.into_iter().flat_map(|message| message.data).collect::<Vec<u8>>(), copy);

    let second = [("custom_hooks/post-receive", 0o700, "x")];
    let request = RestoreCustomHooksRequest { repository: Some(repository.clone()), data: archive(&second) };
    node.repositories().restore_custom_hooks(futures::stream::iter([request])).await.unwrap();
    assert_eq!(on_disk(&node), wanted(&second), "what was there is gone");

    set(&node, &repository, &copy).await.unwrap();
    assert_eq!(on_disk(&node), wanted(&first));
    set(&node, &repository, b"").await.unwrap();
    assert!(on_disk(&node).is_empty());
    let temporary = node.root().join("+gitaly/tmp");
    eventually("nothing is left", async || fs::read_dir(&temporary).unwrap().count() == 0).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_archive_of_hooks_changes_nothing() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let files = [("custom_hooks/update", 0o755, "x")];
    set(&node, &repository, &archive(&files)).await.unwrap();
    let before = on_disk(&node);
    let mut link = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    link.append_link(&mut header, "custom_hooks/out", "/etc").unwrap();
    let long = archive(&[("custom_hooks/update", 0o755, &"x".repeat(5000))]);
    let cut = &long[..3000];
    let (elsewhere, link) = (archive(&[("hooks/update", 0o755, "x")]), link.into_inner().unwrap());
    for bad in [&b"nonsense"[..], elsewhere.as_slice(), link.as_slice(), cut] {
        let status = set(&node, &repository, bad).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal, "{status}");
        assert!(status.message().starts_with("setting custom hooks: extracting hooks: "), "{status}");
        assert_eq!(on_disk(&node), before);
    }
    for (repository, code, text) in [
        (Repository::default(), Code::InvalidArgument, "repository not set"),
        (node.named("none.git"), Code::NotFound, "repository not found"),
    ] {
        let status = set(&node, &repository, &archive(&files)).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, text));
        let request = BackupCustomHooksRequest { repository: Some(repository) };
        let status = node.repositories().backup_custom_hooks(request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, text));
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_are_voted_on_as_gitaly_does() {
    let files = [("custom_hooks/pre-receive.d/1", 0o755, "one"), ("custom_hooks/update", 0o644, "two")];
    let bytes = [
        &b".\x80\x00\x01\xed"[..],
        b"pre-receive.d\x80\x00\x01\xed",
        b"pre-receive.d/1\x00\x00\x01\xedone",
        b"update\x00\x00\x01\xa4two",
    ];
    let ballot = Sha1::digest(bytes.concat()).to_vec();
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let router = Router::agreeing();
    let mut client = RepositoryServiceClient::new(router.client(&node, false));
    let request = || futures::stream::iter(pieces(&repository, &archive(&files)));
    client.set_custom_hooks(request()).await.unwrap();
    let cast: Vec<_> = router.votes(&node).into_iter().map(|vote| (vote.phase, vote.ballot)).collect();
    assert_eq!(cast, [(Phase::PreparedPhase, ballot.clone()), (Phase::CommittedPhase, ballot)]);

    let refusing = Router::deciding(|_| Answer::Abort);
    let mut client = RepositoryServiceClient::new(refusing.client(&node, true));
    let before = on_disk(&node);
    let none = futures::stream::iter(pieces(&repository, b""));
    let status = client.set_custom_hooks(none).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Aborted, "transaction was aborted"));
    assert_eq!(on_disk(&node), before);
    node.stop().await;
}
