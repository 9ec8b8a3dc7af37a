//! What is killed in the middle of a transfer takes neither the cluster nor what was acknowledged with it.

use std::time::Duration;

use tabularium_testkit::{cluster::local_cluster::HOME, git::GitClient, wait::wait_until};
use tokio::time::Instant;

use crate::support::{
    Disks, FOLLOW, PACK_BYTES, SOON, ended, equal_replicas, git_processes, home_only, incompressible,
    kill_git, must_git, no_open_writes, primary, spawn_git, start, try_git, under_way, within,
};

#[tokio::test]
async fn the_primarys_node_dies_in_the_middle_of_a_push() {
    let (mut test, _logs) = start(home_only).await;
    let git = GitClient::new();
    incompressible(&git, "source", PACK_BYTES).await;
    git.work_tree("small", 2).await;
    for path in ["a/b.git", "a/other.git"] {
        test.create(path).await;
        must_git(&git, "small", &["push", "--quiet", &test.url(HOME, 0, path), "main"]).await;
    }
    for path in ["a/b.git", "a/other.git"] {
        equal_replicas(&test, path).await;
    }
    let url = test.url(HOME, 0, "a/b.git");
    let before = git.run("small", &["rev-parse", "main"]).await;
    let disks = Disks::of(&test, "a/b.git").await;
    let old = primary(&test, "a/b.git").await;

    let push = ["push", "--quiet", &url, "main:refs/heads/large"];
    let pushing = spawn_git(&git, "source", &push);
    under_way("a push", || disks.quarantines(&old)).await;
    test.cluster.kill(&format!("{HOME}/{old}")).unwrap();
    let (output, took) = ended("the client of a push whose node died", pushing).await;
    assert!(!output.status.success(), "a push is acknowledged that cannot have been finished");
    println!("the client heard of it after {} ms", took.as_millis());

    // At once, and the first time: nobody has to try again because one node of three is gone.
    let listed = ["ls-remote", &url, "refs/heads/*"];
    let seen = within("reading on", SOON, git.run("small", &listed)).await;
    assert_eq!(seen, format!("{before}\trefs/heads/main"));
    git.commit("small", "file", "while one is away\n").await;
    for gateway in [0, 1] {
        let other = test.url(HOME, gateway, "a/other.git");
        let branch = format!("main:refs/heads/through-{gateway}");
        must_git(&git, "small", &["push", "--quiet", &other, &branch]).await;
        let clone = format!("clone-{gateway}");
        must_git(&git, ".", &["clone", "--quiet", "--mirror", &other, &clone]).await;
    }
    must_git(&git, "source", &push).await;
    assert_ne!(primary(&test, "a/b.git").await, old);
    no_open_writes(&test, SOON).await;

    within("a restart", FOLLOW, test.cluster.restart(&format!("{HOME}/{old}"))).await.unwrap();
    for path in ["a/b.git", "a/other.git"] {
        equal_replicas(&test, path).await;
    }
    disks.clean(&test).await;
    disks.check_integrity(&git).await;
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

/// As when the power goes: git has no time to take away what it holds.
#[tokio::test]
async fn a_node_that_lost_power_in_the_middle_of_a_push_is_cleared_when_it_is_back() {
    let (mut test, _logs) = start(home_only).await;
    let git = GitClient::new();
    incompressible(&git, "source", PACK_BYTES / 2).await;
    test.create("a/b.git").await;
    equal_replicas(&test, "a/b.git").await;
    let disks = Disks::of(&test, "a/b.git").await;
    let old = primary(&test, "a/b.git").await;
    let url = test.url(HOME, 0, "a/b.git");

    let pushing = spawn_git(&git, "source", &["push", "--quiet", &url, "main"]);
    under_way("a push", || disks.quarantines(&old)).await;
    // The node first, which would not let its git die unseen.
    test.cluster.pause(&format!("{HOME}/{old}")).unwrap();
    assert!(kill_git(disks.replica(&old)) > 0);
    test.cluster.kill(&format!("{HOME}/{old}")).unwrap();
    let (output, _) = ended("the client of a push whose node died", pushing).await;
    assert!(!output.status.success());
    assert!(!disks.quarantines(&old).is_empty(), "git was too fast for this test");
    // A second push's lock.
    std::fs::write(disks.replica(&old).join("refs/heads/main.lock"), "").unwrap();
    disks.age_leftovers();

    must_git(&git, "source", &["push", "--quiet", &url, "main"]).await;
    within("a restart", FOLLOW, test.cluster.restart(&format!("{HOME}/{old}"))).await.unwrap();
    equal_replicas(&test, "a/b.git").await;
    disks.clean(&test).await;
    disks.check_integrity(&git).await;
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

#[tokio::test]
async fn the_node_that_serves_a_clone_dies_in_the_middle() {
    let (mut test, _logs) = start(home_only).await;
    let git = GitClient::new();
    incompressible(&git, "source", PACK_BYTES).await;
    test.create("a/b.git").await;
    let url = test.url(HOME, 0, "a/b.git");
    must_git(&git, "source", &["push", "--quiet", &url, "main"]).await;
    equal_replicas(&test, "a/b.git").await;
    let disks = Disks::of(&test, "a/b.git").await;

    let clone = ["clone", "--quiet", "--mirror", &url, "broken"];
    let cloning = spawn_git(&git, ".", &clone);
    let packs = git.path("broken").join("objects/pack");
    under_way("a clone", || vec![packs.clone()]).await;
    let storages = ["node-1", "node-2", "node-3"];
    let serving = storages.into_iter().find(|storage| !git_processes(disks.replica(storage)).is_empty());
    let serving = serving.expect("a git that still serves the clone");
    test.cluster.kill(&format!("{HOME}/{serving}")).unwrap();
    let (output, took) = ended("the client of a clone whose node died", cloning).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "a clone that cannot be whole: {said}");
    assert!(!git.path("broken").exists(), "git takes a clone that failed away");
    println!("the client heard of it after {} ms: {said}", took.as_millis());

    let started = Instant::now();
    must_git(&git, ".", &["clone", "--quiet", "--mirror", &url, "whole"]).await;
    println!("the next clone took {} ms", started.elapsed().as_millis());
    assert_eq!(git.refs("whole").await, git.refs("source").await);
    must_git(&git, "whole", &["fsck", "--full", "--strict"]).await;
    must_git(&git, ".", &["clone", "--quiet", "--mirror", &test.url(HOME, 1, "a/b.git"), "other"]).await;

    within("a restart", FOLLOW, test.cluster.restart(&format!("{HOME}/{serving}"))).await.unwrap();
    equal_replicas(&test, "a/b.git").await;
    disks.clean(&test).await;
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

#[tokio::test]
async fn a_router_dies_in_the_middle_of_a_push() {
    /// Of the lease of a write and the sweep together, and what a busy machine adds.
    const SETTLED: Duration = Duration::from_millis(1000 + 200 + 2000);
    let (mut test, _logs) = start(|options| {
        home_only(options);
        let timing = [("write_lease", "1s"), ("sweep_interval", "200ms")];
        options.timing = timing.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    })
    .await;
    let git = GitClient::new();
    incompressible(&git, "source", PACK_BYTES).await;
    test.create("a/b.git").await;
    equal_replicas(&test, "a/b.git").await;
    let disks = Disks::of(&test, "a/b.git").await;
    let (first, second) = (test.url(HOME, 0, "a/b.git"), test.url(HOME, 1, "a/b.git"));
    let storage = primary(&test, "a/b.git").await;

    let pushing = spawn_git(&git, "source", &["push", "--quiet", &first, "main"]);
    under_way("a push", || disks.quarantines(&storage)).await;
    test.cluster.kill(&format!("{HOME}/router-1")).unwrap();
    let killed = Instant::now();
    let (output, took) = ended("the client of a push whose router died", pushing).await;
    assert!(!output.status.success());
    println!("the client heard of it after {} ms", took.as_millis());
    no_open_writes(&test, SETTLED.saturating_sub(killed.elapsed())).await;
    println!("settled after {} ms", killed.elapsed().as_millis());
    wait_until("the node to end what nobody wants", SOON, || async {
        let running = git_processes(disks.replica(&storage));
        if running.is_empty() { Ok(()) } else { Err(format!("{running:?}")) }
    })
    .await;
    equal_replicas(&test, "a/b.git").await;
    disks.clean(&test).await;

    must_git(&git, "source", &["push", "--quiet", &second, "main"]).await;
    within("a restart", FOLLOW, test.cluster.restart(&format!("{HOME}/router-1"))).await.unwrap();
    must_git(&git, "source", &["push", "--quiet", &first, "main:refs/heads/again"]).await;
    equal_replicas(&test, "a/b.git").await;
    disks.clean(&test).await;
    disks.check_integrity(&git).await;
    let (there, listed) = try_git(&git, "source", &["ls-remote", "--exit-code", &second, "main"]).await;
    assert!(there, "{listed}");
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}
