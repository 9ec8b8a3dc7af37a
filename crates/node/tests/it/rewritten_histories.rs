//! RewriteHistory: what is taken out of a history is in none of its commits, and what is not asked for stays as it was.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use tabularium_proto::gitaly::{
    OptimizeRepositoryRequest, Repository, RewriteHistoryRequest,
    cleanup_service_client::CleanupServiceClient, optimize_repository_request::Strategy,
};
use tonic::{Code, Status};

use crate::{
    harness::{TestNode, commit, eventually, git, git_command},
    object_pools::{self, POOL},
    seed::{self, fast_import, id, refusal},
};

/// Both lists in one message.
async fn rewrite(
    node: &TestNode,
    repository: &Repository,
    blobs: &[&str],
    redactions: &[&str],
) -> Result<(), Status> {
    let request = RewriteHistoryRequest {
        repository: Some(repository.clone()),
        blobs: blobs.iter().map(|id| (*id).to_owned()).collect(),
        redactions: redactions.iter().map(|line| line.as_bytes().to_vec()).collect(),
    };
    let mut client = CleanupServiceClient::new(node.channel());
    client.rewrite_history(tokio_stream::once(request)).await.map(drop)
}

/// References by name, `HEAD` first.
fn references(repository: &Path) -> String {
    git(repository, &["show-ref", "--head"])
}

/// The content of a file.
fn content(node: &TestNode, revision: &str) -> String {
    git(&node.path("a.git"), &["cat-file", "blob", revision])
}

/// Every blob that a reference leads to.
fn blobs(repository: &Path) -> Vec<String> {
    let objects = git(
        repository,
        &["rev-list", "--objects", "--all", "--no-object-names", "--filter=object:type=blob"],
    );
    objects.lines().map(str::to_owned).collect()
}

/// Nothing of it is left beside the repositories.
async fn nothing_is_left(node: &TestNode) {
    let temporary = node.path("+gitaly/tmp");
    eventually("the staging repository goes", async || fs::read_dir(&temporary).unwrap().next().is_none())
        .await;
}

/// A git for nodes: the one of this machine, behind a script that does something first.
fn scripted(directory: &Path, script: &str) -> PathBuf {
    let found = Command::new("sh").args(["-c", "command -v git"]).output().unwrap();
    let git = String::from_utf8(found.stdout).unwrap();
    let file = directory.join("git");
    fs::write(&file, format!("#!/bin/sh\ngit={}\n{script}\n", git.trim_end())).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_out_of_a_history_is_nowhere_in_it() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let (first, big) = (id(&node, "a.git", "v1"), id(&node, "a.git", "main:big.bin"));
    let lonely = commit(&path, None, "nothing of it is asked for");
    let about = commit(&path, Some(&first), &format!("see {first}"));
    git(&path, &["update-ref", "refs/heads/lonely", &lonely]);
    git(&path, &["update-ref", "refs/keep-around/first", &first]);
    git(&path, &["update-ref", "refs/merge-requests/1/head", &about]);
    git(&path, &["symbolic-ref", "refs/remotes/up/HEAD", "refs/heads/side"]);
    git(&path, &["pack-refs", "--all"]);
    let hooks = path.join("custom_hooks");
    fs::create_dir(&hooks).unwrap();
    for name in ["pre-receive", "update", "post-receive"] {
        fs::write(hooks.join(name), "#!/bin/sh\nexit 1\n").unwrap();
        fs::set_permissions(hooks.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    rewrite(&node, &repository, &[&big], &["hello"]).await.unwrap();
    git(&path, &["fsck", "--strict", "--no-dangling"]);
    assert!(!blobs(&path).contains(&big));
    assert_eq!(content(&node, "v1:README"), "***REMOVED***");
    assert_eq!(content(&node, "main:README"), "***REMOVED*** again");
    assert_eq!(content(&node, "main:run.sh"), "#!/bin/sh");
    assert_eq!(
        git(&path, &["ls-tree", "-r", "--name-only", "main"]),
        "README\na/b/c/deep.txt\nmodule\nrun.sh",
        "the blob's name goes with it"
    );
    // The shape is the same: the same commits with the same words, by the same people at the same time.
    assert_eq!(
        git(&path, &["log", "--format=%an %at %s", "main"]),
        "A U Thor 1700000003 third\nA U Thor 1700000002 second\nA U Thor 1700000001 first"
    );
    let new_first = id(&node, "a.git", "main~2");
    assert_ne!(new_first, first);
    for name in ["v1", "side", "refs/keep-around/first", "refs/remotes/up/HEAD"] {
        assert_eq!(id(&node, "a.git", name), new_first, "{name}");
    }
    assert_eq!(git(&path, &["cat-file", "-t", "v2"]), "tag");
    assert_eq!(id(&node, "a.git", "v2^{commit}"), id(&node, "a.git", "main~1"));
    assert!(git(&path, &["cat-file", "tag", "v2"]).ends_with("Release two"));
    assert_eq!(id(&node, "a.git", "lonely"), lonely);
    assert_eq!(git(&path, &["symbolic-ref", "HEAD"]), "refs/heads/main");
    // Words that name a commit name what became of it.
    let about = git(&path, &["log", "-1", "--format=%s", "refs/merge-requests/1/head"]);
    assert_eq!(about, format!("see {new_first}"));

    // The old history is on the disk until upkeep finds that nobody wants it.
    git(&path, &["cat-file", "-e", &big]);
    nothing_is_left(&node).await;
    assert!(!path.join("FETCH_HEAD").exists() && !path.join("filter-repo").exists());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_are_literal_or_patterns_and_may_say_what_stands_there_instead() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    for (line, readme) in [
        ("nowhere", "hello again"),
        ("", "hello again"),
        ("hel", "***REMOVED***lo again"),
        ("literal:REMOVED", "******REMOVED******lo again"),
        ("lo==>", "******REMOVED****** again"),
        ("glob:again==>once more", "******REMOVED****** once more"),
        (r"regex:\*+([A-Z]+)\*+==>\1", "REMOVED once more"),
        ("glob:R*D", "***REMOVED*** once more"),
    ] {
        rewrite(&node, &repository, &[], &[line]).await.unwrap();
        assert_eq!(content(&node, "main:README"), readme, "{line}");
    }
    git(&node.path("a.git"), &["fsck", "--strict", "--no-dangling"]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn references_that_lead_to_nothing_any_more_go() {
    let node = TestNode::start().await;
    let repository = node.create("a.git").await;
    let path = node.path("a.git");
    fast_import(
        &path,
        b"commit refs/heads/main\ncommitter A <a@x> 1700000000 +0000\ndata 1\nm\nM 100644 inline secret\ndata 6\nsecret\n\n\
          commit refs/heads/other\ncommitter A <a@x> 1700000000 +0000\ndata 1\no\nM 100644 inline other\ndata 5\nother\n\n\
          tag gone\nfrom refs/heads/main\ntagger A <a@x> 1700000000 +0000\ndata 1\nt\n",
    );
    let (secret, other) = (id(&node, "a.git", "main:secret"), id(&node, "a.git", "other"));
    git(&path, &["update-ref", "refs/tags/blob", &id(&node, "a.git", "other:other")]);
    git(&path, &["update-ref", "refs/tags/tree", &id(&node, "a.git", "other^{tree}")]);
    rewrite(&node, &repository, &[&secret], &[]).await.unwrap();
    // The program does not know the last two.
    let left = git(&path, &["for-each-ref", "--format=%(refname) %(objectname)"]);
    assert_eq!(left, format!("refs/heads/other {other}"));
    assert_eq!(git(&path, &["symbolic-ref", "HEAD"]), "refs/heads/main");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pool_lends_is_taken_out_of_its_member_and_not_of_the_pool() {
    let node = TestNode::start().await;
    let member = seed::repository(&node, "a.git").await;
    let big = id(&node, "a.git", "main:big.bin");
    object_pools::create(&node, &member).await.unwrap();
    object_pools::link(&node, &member).await.unwrap();
    let upkeep =
        OptimizeRepositoryRequest { repository: Some(member.clone()), strategy: Strategy::Eager.into() };
    node.repositories().optimize_repository(upkeep).await.unwrap();
    let pool = references(&node.path(POOL));

    rewrite(&node, &member, &[&big], &[]).await.unwrap();
    assert!(!blobs(&node.path("a.git")).contains(&big));
    git(&node.path("a.git"), &["fsck", "--strict", "--no-dangling"]);
    assert_eq!(references(&node.path(POOL)), pool);
    let refused = refusal(rewrite(&node, &node.named(POOL), &[&big], &[]).await);
    let text = "the history of an object pool is not rewritten";
    assert_eq!(refused, (Code::FailedPrecondition, text.to_owned()));
    assert_eq!(references(&node.path(POOL)), pool);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_cannot_be_rewritten_stays() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let before = references(&node.path("a.git"));
    let refused = refusal(rewrite(&node, &repository, &[], &["hello", "regex:("]).await);
    let text = "rewriting repository history: git-filter-repo failed with exit code 1";
    assert_eq!(refused, (Code::Internal, text.to_owned()));
    let mut client = CleanupServiceClient::new(node.channel());
    let nothing = client.rewrite_history(tokio_stream::iter(Vec::<RewriteHistoryRequest>::new())).await;
    assert_eq!(refusal(nothing), (Code::Internal, "receiving initial request: EOF".to_owned()));
    assert_eq!(references(&node.path("a.git")), before);
    nothing_is_left(&node).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_comes_meanwhile_is_not_undone() {
    let scripts = tempfile::tempdir().unwrap();
    // Another branch, while the program runs.
    let script = scripted(
        scripts.path(),
        "for argument; do case $argument in --source=*)\n\
         $git --git-dir=\"${argument#*=}\" update-ref refs/heads/new refs/heads/side ;; esac; done\n\
         exec $git \"$@\"",
    );
    let node = TestNode::start_with(|config| config.git = script).await;
    let repository = seed::repository(&node, "a.git").await;
    let before = references(&node.path("a.git"));
    let refused = refusal(rewrite(&node, &repository, &[], &["hello"]).await);
    assert_eq!(refused, (Code::Aborted, "source repository checksum altered".to_owned()));
    let path = node.path("a.git");
    assert_eq!(id(&node, "a.git", "new"), id(&node, "a.git", "side"));
    git(&path, &["update-ref", "-d", "refs/heads/new"]);
    assert_eq!(references(&path), before);
    nothing_is_left(&node).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_ends_it() {
    let scripts = tempfile::tempdir().unwrap();
    let runs = scripts.path().join("runs");
    let script = format!(
        "case \" $* \" in *' --source='*) touch '{}'; exec sleep 1000 ;; esac; exec $git \"$@\"",
        runs.display()
    );
    let script = scripted(scripts.path(), &script);
    let node = TestNode::start_with(|config| config.git = script).await;
    let repository = seed::repository(&node, "a.git").await;
    let before = references(&node.path("a.git"));
    tokio::select! {
        ended = rewrite(&node, &repository, &[], &["hello"]) => panic!("ended by itself: {ended:?}"),
        () = eventually("the program runs", async || runs.exists()) => {}
    }
    eventually("the program ends", async || node.metric("tabularium_node_git_processes_running").await == 0)
        .await;
    nothing_is_left(&node).await;
    assert_eq!(references(&node.path("a.git")), before);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_the_program_says_so() {
    let scripts = tempfile::tempdir().unwrap();
    for (script, text) in [
        // Git's own programs, and no others.
        ("PATH=/nonexistent exec $git \"$@\"", "git-filter-repo is not installed on this node"),
        (
            "case \" $* \" in *' filter-repo '*) echo 'no Python here' >&2; exit 127 ;; esac; exec $git \"$@\"",
            "git-filter-repo does not run on this node: exit status 127, stderr: \"no Python here\"",
        ),
    ] {
        let script = scripted(scripts.path(), script);
        let node = TestNode::start_with(|config| config.git = script).await;
        let repository = seed::repository(&node, "a.git").await;
        let before = references(&node.path("a.git"));
        let refused = refusal(rewrite(&node, &repository, &[], &["hello"]).await);
        assert_eq!(refused, (Code::FailedPrecondition, text.to_owned()));
        assert_eq!(references(&node.path("a.git")), before);
        nothing_is_left(&node).await;
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn longer_ids_are_refused() {
    let node = TestNode::start().await;
    let path = node.path("long.git");
    fs::create_dir(&path).unwrap();
    git(&path, &["init", "--quiet", "--bare", "--object-format=sha256", "."]);
    let first = commit(&path, None, "first");
    git_command(&path).args(["update-ref", "HEAD", &first]).status().unwrap();
    let before = references(&path);
    let refused = refusal(rewrite(&node, &node.named("long.git"), &[], &["hello"]).await);
    let text = "git-filter-repo does not support repositories using the SHA256 object format";
    assert_eq!(refused, seed::invalid(text));
    assert_eq!(references(&path), before);
    node.stop().await;
}
