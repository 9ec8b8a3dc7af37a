//! Whole clusters: the way of a push, of a clone, of an event, and what a crash leaves behind.

use std::time::Duration;

use tabularium_testkit::{
    cluster::{
        TestCluster,
        local_cluster::{ClusterOptions, Gateways, HOME, MIRROR},
    },
    git::GitClient,
    wait::wait_until,
};

/// How long copies may take to follow on a busy machine.
const FOLLOW: Duration = Duration::from_secs(60);

fn two_gateways(options: &mut ClusterOptions) {
    options.gateways = Gateways::PerRouter;
}

fn without_mirror(options: &mut ClusterOptions) {
    two_gateways(options);
    options.mirror = None;
}

#[tokio::test]
async fn a_push_reaches_three_replicas_the_other_router_and_the_mirror_site() {
    let test = TestCluster::start(two_gateways).await;
    let git = GitClient::new();
    git.work_tree("source", 3).await;
    git.run("source", &["tag", "-a", "-m", "one", "v1"]).await;
    test.create("group/project.git").await;
    let url = test.url(HOME, 0, "group/project.git");
    git.run("source", &["push", "--quiet", &url, "main", "v1"]).await;

    let other = test.url(HOME, 1, "group/project.git");
    git.run(".", &["clone", "--quiet", "--mirror", &other, "clone"]).await;
    assert_eq!(git.refs("clone").await, git.refs("source").await);
    wait_until("three equal replicas", FOLLOW, || test.equal_checksums("group/project.git", 3)).await;

    let mirror = test.url(MIRROR, 0, "group/project.git");
    let expected = git.run("source", &["ls-remote", &url]).await;
    wait_until("the mirror's refs", FOLLOW, || async {
        let output = git.git().run(&git.path("source"), ["ls-remote", &mirror]).await;
        let refs = output.map_err(|error| error.to_string())?;
        if refs == expected { Ok(()) } else { Err(refs) }
    })
    .await;
    let (taken, said) = git.try_run("source", &["push", &mirror, "main:refs/heads/other"]).await;
    assert!(!taken && said.contains("is a mirror of home"), "{said}");
    test.cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_killed_node_catches_up_once_it_is_back() {
    let mut test = TestCluster::start(without_mirror).await;
    let git = GitClient::new();
    git.work_tree("source", 2).await;
    test.create("a/b.git").await;
    let url = test.url(HOME, 0, "a/b.git");
    git.run("source", &["push", "--quiet", &url, "main"]).await;
    wait_until("three equal replicas", FOLLOW, || test.equal_checksums("a/b.git", 3)).await;

    // The one that takes the writes.
    let primary = test.details("a/b.git").await.unwrap().route.unwrap().primary;
    test.cluster.kill(&format!("home/{primary}")).unwrap();
    git.commit("source", "file", "while it is away\n").await;
    wait_until("a push without the old primary", FOLLOW, || async {
        let (taken, said) = git.try_run("source", &["push", "--quiet", &url, "main"]).await;
        if taken { Ok(()) } else { Err(said) }
    })
    .await;
    git.run(".", &["clone", "--quiet", "--mirror", &test.url(HOME, 1, "a/b.git"), "clone"]).await;
    assert_eq!(git.refs("clone").await, git.refs("source").await);

    test.cluster.restart(&format!("home/{primary}")).await.unwrap();
    wait_until("three equal replicas again", FOLLOW, || test.equal_checksums("a/b.git", 3)).await;
    test.cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_cluster_survives_the_loss_of_a_coordinator_and_of_a_router() {
    let mut test = TestCluster::start(without_mirror).await;
    let git = GitClient::new();
    git.work_tree("source", 1).await;
    test.create("a/b.git").await;
    test.cluster.kill("home/coordinator-1").unwrap();
    test.cluster.kill("home/router-1").unwrap();
    let url = test.url(HOME, 1, "a/b.git");
    wait_until("a push through what is left", FOLLOW, || async {
        let (taken, said) = git.try_run("source", &["push", "--quiet", &url, "main"]).await;
        if taken { Ok(()) } else { Err(said) }
    })
    .await;
    test.cluster.restart("home/coordinator-1").await.unwrap();
    test.cluster.restart("home/router-1").await.unwrap();
    wait_until("three equal replicas", FOLLOW, || test.equal_checksums("a/b.git", 3)).await;
    test.cluster.stop().await.unwrap();
}

#[tokio::test]
async fn duties_survive_a_message_bus_that_loses_everything() {
    let mut test = TestCluster::start(|options| {
        without_mirror(options);
        // A message that was lost is missed after this time; a minute by default.
        options.timing = vec![("republish_after".into(), "2s".into())];
    })
    .await;
    let git = GitClient::new();
    git.work_tree("source", 1).await;
    test.create("a/b.git").await;
    test.cluster.terminate("home/nats").await.unwrap();
    git.run("source", &["push", "--quiet", &test.url(HOME, 0, "a/b.git"), "main"]).await;
    test.cluster.restart_nats_empty(HOME).await.unwrap();
    wait_until("three equal replicas", FOLLOW, || test.equal_checksums("a/b.git", 3)).await;
    test.cluster.stop().await.unwrap();
}
