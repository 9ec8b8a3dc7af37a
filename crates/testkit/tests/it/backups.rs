//! Backups through a router: whichever replica is asked writes them, and a restored repository is the same on all nodes.

use std::fs;

use tabularium_proto::gitaly::{
    BackupRepositoryRequest, Repository, RepositoryExistsRequest, RestoreRepositoryRequest,
    SetCustomHooksRequest,
};
use tabularium_testkit::{
    cluster::{TestCluster, VIRTUAL_STORAGE, local_cluster::HOME},
    git::GitClient,
};
use tonic::{Code, Status};

use crate::support::{Disks, FOLLOW, equal_replicas, home_only, named, no_open_writes, request, start};

const PATH: &str = "a/b.git";
const STORAGES: [&str; 3] = ["node-1", "node-2", "node-3"];

async fn back_up(test: &TestCluster, id: &str) {
    let backup = BackupRepositoryRequest {
        repository: named(VIRTUAL_STORAGE, PATH),
        vanity_repository: named(VIRTUAL_STORAGE, PATH),
        backup_id: id.to_owned(),
        incremental: true,
        ..Default::default()
    };
    test.router(0).backup_repository(request(backup, id)).await.unwrap();
}

async fn restore(test: &TestCluster, to: &str, from: Option<Repository>, id: &str) -> Result<(), Status> {
    let restore = RestoreRepositoryRequest {
        repository: named(VIRTUAL_STORAGE, to),
        vanity_repository: from,
        backup_id: id.to_owned(),
        ..Default::default()
    };
    test.router(1).restore_repository(request(restore, to)).await.map(drop)
}

async fn exists(test: &TestCluster, path: &str) -> bool {
    let question = RepositoryExistsRequest { repository: named(VIRTUAL_STORAGE, path) };
    test.router(0).repository_exists(request(question, "exists")).await.unwrap().into_inner().exists
}

/// Of the replica of every node, once all of them are up to date: references, HEAD, and a hook.
async fn held(test: &TestCluster, git: &GitClient, path: &str) -> [String; 3] {
    equal_replicas(test, path).await;
    no_open_writes(test, FOLLOW).await;
    let disks = Disks::of(test, path).await;
    disks.check_integrity(git).await;
    let mut all = Vec::new();
    for storage in STORAGES {
        let replica = disks.replica(storage);
        let references = git.run_in(replica, &["for-each-ref"]).await;
        let head = fs::read_to_string(replica.join("HEAD")).unwrap();
        let hook = fs::read_to_string(replica.join("custom_hooks/update")).unwrap_or_default();
        all.push([references, head, hook]);
    }
    assert!(all.iter().all(|one| *one == all[0]), "{all:?}");
    all.remove(0)
}

async fn generations(test: &TestCluster, path: &str) -> Vec<i64> {
    let route = test.details(path).await.unwrap().route.unwrap();
    route.replicas.iter().map(|replica| replica.generation).collect()
}

/// An archive with a hook that allows everything.
fn hooks() -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let script = b"#!/bin/sh\nexit 0\n";
    let mut header = tar::Header::new_gnu();
    header.set_size(script.len().try_into().unwrap());
    header.set_mode(0o755);
    archive.append_data(&mut header, "custom_hooks/update", &script[..]).unwrap();
    archive.into_inner().unwrap()
}

#[tokio::test]
async fn a_repository_is_restored_on_all_nodes_at_once() {
    let sink = tempfile::tempdir().unwrap();
    let tables = format!("[backup]\ngo_cloud_url = \"file://{}\"\n", sink.path().display());
    let (test, _logs) = start(|options| {
        home_only(options);
        options.node_tables = tables.parse().unwrap();
    })
    .await;
    let git = GitClient::new();
    git.work_tree("source", 3).await;
    test.create(PATH).await;
    let url = test.url(HOME, 0, PATH);
    git.run("source", &["push", "--quiet", &url, "main"]).await;
    let set = SetCustomHooksRequest { repository: named(VIRTUAL_STORAGE, PATH), data: hooks() };
    test.router(0).set_custom_hooks(request(tokio_stream::once(set), "hooks")).await.unwrap();
    let first = held(&test, &git, PATH).await;
    back_up(&test, "one").await;
    git.commit("source", "more", "more").await;
    git.run("source", &["push", "--quiet", &url, "main", "main:side"]).await;
    let second = held(&test, &git, PATH).await;
    back_up(&test, "two").await;

    let from = || named(VIRTUAL_STORAGE, PATH);
    restore(&test, "new/c.git", from(), "").await.unwrap();
    assert_eq!(generations(&test, "new/c.git").await, [1, 1, 1], "all nodes agreed");
    assert_eq!(held(&test, &git, "new/c.git").await, second);

    // Over what is there, in one write, and writes go on afterwards.
    let before = generations(&test, PATH).await;
    restore(&test, PATH, from(), "one").await.unwrap();
    let after: Vec<_> = before.iter().map(|generation| generation + 1).collect();
    assert_eq!(generations(&test, PATH).await, after);
    assert_eq!(held(&test, &git, PATH).await, first);
    git.run("source", &["push", "--quiet", &url, "main"]).await;
    held(&test, &git, PATH).await;

    // Without a backup nothing comes into being, and what is there stays.
    let none = || named(VIRTUAL_STORAGE, "none.git");
    let refused = restore(&test, "none.git", none(), "").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(!exists(&test, "none.git").await);
    let before = held(&test, &git, PATH).await;
    let refused = restore(&test, PATH, none(), "").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert_eq!(held(&test, &git, PATH).await, before);
    test.create("none.git").await;
    test.stop().await.unwrap();
}
