//! A node comes back with an older state of its disk, as from a snapshot: what it lacks is never read and never built upon,
//! and it is made equal again.

use std::{fs, path::Path};

use tabularium_testkit::{
    cluster::{local_cluster::HOME, service::Kind},
    git::GitClient,
    wait::wait_until,
};

use crate::support::{Disks, FOLLOW, equal_replicas, home_only, must_git, primary, start, try_git, within};

const PATH: &str = "a/b.git";
/// Reads through each gateway right after the node is back.
const READS: usize = 10;

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

async fn comes_back_older(of_primary: bool) {
    let (mut test, _logs) = start(home_only).await;
    let git = GitClient::new();
    git.work_tree("work", 2).await;
    test.create(PATH).await;
    must_git(&git, "work", &["push", "--quiet", &test.url(HOME, 0, PATH), "main"]).await;
    equal_replicas(&test, PATH).await;
    let disks = Disks::of(&test, PATH).await;
    let first = primary(&test, PATH).await;
    let nodes: Vec<_> = test.home().of(Kind::Node).cloned().collect();
    let is_primary = |name: &str| name.ends_with(&format!("/{first}"));
    let node = nodes.iter().find(|node| is_primary(&node.name) == of_primary).unwrap();
    let storage = node.name.rsplit('/').next().unwrap();
    let here = node.storage.clone().unwrap().join("@cluster");
    let kept = tempfile::tempdir().unwrap();
    let there = kept.path().join("@cluster");
    copy(&here, &there);

    // What all routers know now, one of them knows when the node is back: it is not told of a write that leaves nobody behind.
    let read = async |gateway: usize, branch: &str| {
        let url = test.url(HOME, gateway, PATH);
        within("ls-remote", FOLLOW, git.run("work", &["ls-remote", &url, branch])).await
    };
    for gateway in [0, 1].repeat(READS) {
        assert!(!read(gateway, "refs/heads/main").await.is_empty());
    }
    git.commit("work", "file", "acknowledged by all\n").await;
    let newest = git.run("work", &["rev-parse", "main"]).await.trim().to_owned();
    must_git(&git, "work", &["push", "--quiet", &test.url(HOME, 0, PATH), "main"]).await;
    equal_replicas(&test, PATH).await;
    test.cluster.kill(&node.name).unwrap();
    fs::remove_dir_all(&here).unwrap();
    copy(&there, &here);
    within("a restart", FOLLOW, test.cluster.restart(&node.name)).await.unwrap();
    assert_ne!(
        git.run(disks.replica(storage).to_str().unwrap(), &["rev-parse", "main"]).await.trim(),
        newest
    );

    let all_see = async |branch: &str| {
        for gateway in [0, 1].repeat(READS) {
            let url = test.url(HOME, gateway, PATH);
            let seen = within("ls-remote", FOLLOW, git.run("work", &["ls-remote", &url, branch])).await;
            assert!(seen.starts_with(&newest), "{seen}");
        }
    };
    all_see("refs/heads/main").await;
    wait_until("a push to another branch", FOLLOW, || async {
        let url = test.url(HOME, 1, PATH);
        match try_git(&git, "work", &["push", "--quiet", &url, "main:refs/heads/other"]).await {
            (true, _) => Ok(()),
            (false, said) => Err(said),
        }
    })
    .await;
    all_see("refs/heads/other").await;
    all_see("refs/heads/main").await;
    equal_replicas(&test, PATH).await;
    for branch in ["main", "other"] {
        let replica = disks.replica(storage).to_str().unwrap();
        assert_eq!(git.run(replica, &["rev-parse", branch]).await.trim(), newest, "{branch}");
    }
    disks.check_integrity(&git).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secondary_whose_disk_is_older_than_it_was_is_not_believed() {
    comes_back_older(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_whose_disk_is_older_than_it_was_is_not_believed() {
    comes_back_older(true).await;
}
