//! Replicas whose objects are damaged: found by looking through them, made again, and kept aside.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use tabularium_common::lifecycle::Tasks;
use tabularium_proto::{
    gitaly::{
        OptimizeRepositoryRequest, Repository, WalkReposRequest,
        internal_gitaly_client::InternalGitalyClient, optimize_repository_request::Strategy,
    },
    node::{
        CheckObjectsRequest, CheckObjectsResponse, KeptReplica, ListKeptRequest, MarkCorruptRequest,
        RemoveKeptRequest, replica_service_client::ReplicaServiceClient,
    },
};
use tonic::{Code, Status};

use crate::{
    copies::replicate,
    harness::{Client, TestNode, commit, eventually, git, git_async, git_command},
};

fn replicas(node: &TestNode) -> ReplicaServiceClient<Client> {
    ReplicaServiceClient::new(node.channel())
}

fn question(repository: &Repository) -> CheckObjectsRequest {
    CheckObjectsRequest {
        repository: Some(repository.clone()),
        patience_milliseconds: 20_000,
        limit_milliseconds: 60_000,
    }
}

async fn check(node: &TestNode, repository: &Repository) -> CheckObjectsResponse {
    replicas(node).check_objects(question(repository)).await.unwrap().into_inner()
}

async fn mark(node: &TestNode, repository: &Repository, reason: &str, rebuild: bool) {
    let mark = MarkCorruptRequest { repository: Some(repository.clone()), reason: reason.into(), rebuild };
    replicas(node).mark_corrupt(mark).await.unwrap();
}

async fn kept(node: &TestNode) -> Vec<KeptReplica> {
    let list = ListKeptRequest { storage_name: node.storage.clone() };
    replicas(node).list_kept(list).await.unwrap().into_inner().kept
}

async fn walked(node: &TestNode) -> Vec<String> {
    let request = WalkReposRequest { storage_name: node.storage.clone() };
    let walk = InternalGitalyClient::new(node.channel()).walk_repos(request).await.unwrap();
    let (mut walk, mut found) = (walk.into_inner(), Vec::new());
    while let Some(repository) = walk.message().await.unwrap() {
        found.push(repository.relative_path);
    }
    found
}

/// The file of a loose object.
fn loose(repository: &Path, revision: &str) -> PathBuf {
    let id = git(repository, &["rev-parse", revision]);
    repository.join("objects").join(&id[..2]).join(&id[2..])
}

fn overwrite(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).unwrap();
    change(&mut bytes);
    fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(file, bytes).unwrap();
}

fn flip(file: &Path) {
    overwrite(file, |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
    });
}

fn pack(repository: &Path) -> PathBuf {
    git(repository, &["repack", "-a", "-d", "--quiet"]);
    let packs = fs::read_dir(repository.join("objects/pack")).unwrap().map(|entry| entry.unwrap().path());
    packs.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "pack")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_and_what_is_only_odd_is_none() {
    let node = TestNode::start().await;
    for (name, named) in
        [("flipped", "corrupt"), ("missing", "missing"), ("cut", "pack"), ("reference", "main")]
    {
        let repository = node.create_with_commits(&format!("{name}.git")).await;
        let path = node.path(&format!("{name}.git"));
        let sound = check(&node, &repository).await;
        assert!(sound.exists && sound.sound && sound.findings.is_empty(), "{name}: {sound:?}");
        match name {
            "flipped" => flip(&loose(&path, "refs/heads/side")),
            "missing" => fs::remove_file(loose(&path, "refs/heads/main^{tree}")).unwrap(),
            "cut" => overwrite(&pack(&path), |bytes| bytes.truncate(bytes.len() - 30)),
            _ => fs::write(path.join("refs/heads/main"), format!("{}\n", "1".repeat(40))).unwrap(),
        }
        let found = check(&node, &repository).await;
        assert!(found.exists && !found.sound && found.findings.contains(named), "{name}: {found:?}");
        assert_eq!(check(&node, &repository).await, found, "and again");
    }
    assert!(!check(&node, &node.named("none.git")).await.exists);
    fs::remove_dir_all(node.path("cut.git/refs")).unwrap();
    let invalid = check(&node, &node.named("cut.git")).await;
    assert!(!invalid.sound && invalid.findings.contains("not valid"), "{invalid:?}");

    let odd = node.create("odd.git").await;
    let path = node.path("odd.git");
    let tree = git(&path, &["hash-object", "-t", "tree", "-w", "/dev/null"]);
    let text = path.join("text");
    fs::write(&text, format!("tree {tree}\nauthor A <a@b>\ncommitter A <a@b> 1 +0000\n\nodd\n")).unwrap();
    let id = git(&path, &["hash-object", "-t", "commit", "-w", "--literally", text.to_str().unwrap()]);
    fs::remove_file(text).unwrap();
    git(&path, &["update-ref", "refs/heads/main", &id]);
    assert!(!git_command(&path).args(["fsck"]).output().unwrap().status.success(), "git finds it odd");
    assert!(check(&node, &odd).await.sound);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_replica_is_sound_while_it_is_written_and_repacked() {
    /// Looks through it, at the least.
    const LOOKS: usize = 12;
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let path = node.path("a.git");
    let done = AtomicBool::new(false);
    let write = async {
        let mut number = 0;
        while !done.load(Ordering::Relaxed) {
            number += 1;
            let text = format!("number {number}");
            let path = path.clone();
            let made = tokio::task::spawn_blocking(move || {
                let id = commit(&path, None, &text);
                git(&path, &["update-ref", &format!("refs/heads/branch-{}", number % 5), &id]);
            });
            made.await.unwrap();
        }
        number
    };
    let keep_up = async {
        while !done.load(Ordering::Relaxed) {
            let strategy = Strategy::Eager.into();
            let request = OptimizeRepositoryRequest { repository: Some(repository.clone()), strategy };
            node.repositories().optimize_repository(request).await.unwrap();
        }
    };
    let look = async {
        for number in 0..LOOKS {
            let found = check(&node, &repository).await;
            assert!(found.sound, "look {number}: {}", found.findings);
        }
        done.store(true, Ordering::Relaxed);
    };
    let (written, (), ()) = tokio::join!(write, keep_up, look);
    assert!(written > LOOKS, "{written} writes");
    git_async(&path, &["fsck", "--full"]).await;
    node.stop().await;
}

/// Whether that is a process that works in the repository, with a low priority.
fn is_yielding(process: &Path, repository: &Path) -> bool {
    let Ok(directory) = fs::read_link(process.join("cwd")) else { return false };
    let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
    // Field 19, counted behind the program's name, which may hold anything.
    let nice = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(16)?.parse::<i32>().ok());
    directory == repository && nice.is_some_and(|nice| nice > 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_replica_at_a_time_is_looked_through_and_nobody_waits_for_ever() {
    let programs = tempfile::tempdir().unwrap();
    let program = programs.path().join("git");
    let script = "#!/bin/sh\ncase \" $* \" in *' fsck '*) exec sleep 1000 ;; esac\nexec git \"$@\"\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let node = TestNode::start_with(|config| config.git = program).await;
    let repository = node.create_with_commits("a.git").await;
    let path = node.path("a.git").canonicalize().unwrap();

    let hurried = CheckObjectsRequest { limit_milliseconds: 50, ..question(&repository) };
    let late = replicas(&node).check_objects(hurried).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded);
    let (mut client, long) = (replicas(&node), question(&repository));
    let looking = Tasks::new().spawn("look", async move { client.check_objects(long).await });
    eventually("git looks", async || node.metric("tabularium_node_git_processes_running").await == 1).await;
    eventually("it leaves the processor to others", async || {
        fs::read_dir("/proc").unwrap().flatten().any(|entry| is_yielding(&entry.path(), &path))
    })
    .await;
    let impatient = CheckObjectsRequest { patience_milliseconds: 20, ..question(&repository) };
    let refused = replicas(&node).check_objects(impatient).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    looking.abort();
    eventually("it ends with its call", async || {
        node.metric("tabularium_node_git_processes_running").await == 0
    })
    .await;

    // A stop does not wait for it.
    let (mut client, long) = (replicas(&node), question(&repository));
    let looking = Tasks::new().spawn("look", async move { client.check_objects(long).await });
    eventually("git looks", async || node.metric("tabularium_node_git_processes_running").await == 1).await;
    node.stop().await;
    assert_eq!(looking.await.unwrap().unwrap_err().code(), Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_replica_is_made_from_nothing_and_kept_aside() -> Result<(), Status> {
    let source = TestNode::start_named("one").await;
    let target = TestNode::start_with(|config| config.kept.most = 2).await;
    source.create_with_commits("a.git").await;
    replicate(&source, &target, "a.git").await?;
    let (replica, path) = (target.named("a.git"), target.path("a.git"));

    for round in 0..3 {
        flip(&loose_or_pack(&path));
        let found = check(&target, &replica).await;
        assert!(!found.sound);
        mark(&target, &replica, &format!("round {round}: {}", found.findings), true).await;
        replicate(&source, &target, "a.git").await?;
        assert!(check(&target, &replica).await.sound, "round {round}");
        assert_eq!(git(&source.path("a.git"), &["show-ref"]), git(&path, &["show-ref"]));
        assert!(!path.join("tabularium-corrupt").exists());
        replicate(&source, &target, "a.git").await?;
    }
    let found = kept(&target).await;
    assert_eq!(found.len(), 2, "the oldest has gone: {found:?}");
    assert!(found[0].reason.starts_with("round 1") && found[1].reason.starts_with("round 2"), "{found:?}");
    for one in &found {
        assert_eq!(
            (one.replica_path.as_str(), one.found_at > 0 && one.kept_at >= one.found_at),
            ("a.git", true)
        );
        assert!(one.bytes > 0);
        let checked = git_command(Path::new(&one.path)).args(["fsck", "--full"]).output().unwrap();
        assert!(!checked.status.success(), "it is what was found");
    }
    assert_eq!(walked(&target).await, ["a.git"], "it is nobody's repository");

    let remove = |kept_id: &str| {
        let request = RemoveKeptRequest { storage_name: target.storage.clone(), kept_id: kept_id.into() };
        let mut client = replicas(&target);
        async move { client.remove_kept(request).await.map(drop) }
    };
    for odd in ["", ".", "..", "a/b", "../tmp"] {
        assert_eq!(remove(odd).await.unwrap_err().code(), Code::InvalidArgument, "{odd}");
    }
    remove(&found[0].kept_id).await?;
    assert_eq!(remove(&found[0].kept_id).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(kept(&target).await, found[1..]);
    assert!(!Path::new(&found[0].path).exists());

    // One whose objects are gone altogether needs nobody to say so.
    fs::remove_dir_all(path.join("objects")).unwrap();
    replicate(&source, &target, "a.git").await?;
    assert!(kept(&target).await.last().unwrap().reason.contains("not valid"));
    assert!(check(&target, &replica).await.sound);
    source.stop().await;
    target.stop().await;
    Ok(())
}

/// Some file of objects, packed or not.
fn loose_or_pack(repository: &Path) -> PathBuf {
    let packs = fs::read_dir(repository.join("objects/pack")).unwrap().map(|entry| entry.unwrap().path());
    let pack = packs.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "pack"));
    pack.unwrap_or_else(|| loose(repository, "refs/heads/main"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_only_differs_is_changed_in_place_and_what_it_held_is_kept() -> Result<(), Status> {
    let (source, target) = (TestNode::start_named("one").await, TestNode::start_named("two").await);
    source.create_with_commits("a.git").await;
    replicate(&source, &target, "a.git").await?;
    let (replica, path) = (target.named("a.git"), target.path("a.git"));
    let other = commit(&path, None, "nobody pushed it");
    git(&path, &["update-ref", "refs/heads/main", &other]);
    mark(&target, &replica, "its references differ", false).await;
    replicate(&source, &target, "a.git").await?;
    assert_eq!(git(&source.path("a.git"), &["show-ref"]), git(&path, &["show-ref"]));
    assert!(loose(&path, &other).exists(), "what it has is not fetched again");
    let found = kept(&target).await;
    assert_eq!(found.len(), 1);
    assert_eq!(git(Path::new(&found[0].path), &["rev-parse", "refs/heads/main"]), other);
    git(Path::new(&found[0].path), &["fsck", "--full"]);
    replicate(&source, &target, "a.git").await?;
    assert_eq!(kept(&target).await.len(), 1, "once");
    // Nothing can be kept of what is not there.
    mark(&target, &target.named("none.git"), "gone", true).await;
    assert!(!target.path("none.git").exists());
    source.stop().await;
    target.stop().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_space_a_replica_is_made_again_and_not_kept() -> Result<(), Status> {
    let source = TestNode::start_named("one").await;
    let target = TestNode::start_with(|config| config.kept.minimum_free_mebibytes = u64::MAX >> 20).await;
    source.create_with_commits("a.git").await;
    replicate(&source, &target, "a.git").await?;
    for rebuild in [true, false] {
        mark(&target, &target.named("a.git"), "broken", rebuild).await;
        replicate(&source, &target, "a.git").await?;
        assert!(check(&target, &target.named("a.git")).await.sound);
        assert!(kept(&target).await.is_empty());
    }
    source.stop().await;
    target.stop().await;
    Ok(())
}
