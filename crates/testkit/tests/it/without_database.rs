//! Postgres is gone for longer than every lease: reads go on and are as new as what was acknowledged, writes fail at once
//! and say why, and everything heals.

use std::time::Duration;

use tabularium_proto::gitaly::{
    ReadinessCheckRequest, readiness_check_response::Result as Readiness,
    server_service_client::ServerServiceClient,
};
use tabularium_testkit::{
    cluster::{TestCluster, local_cluster::HOME},
    git::GitClient,
    wait::wait_until,
};
use tokio::time::Instant;

use crate::support::{
    Disks, FOLLOW, SOON, equal_replicas, home_only, must_git, no_open_writes, primary, router, start,
    try_git, within,
};

const PATH: &str = "group/project.git";
const STORAGES: [&str; 3] = ["node-1", "node-2", "node-3"];

/// Waits until no router may use what it has cached.
async fn leases_over(test: &TestCluster) {
    wait_until("the end of all leases", FOLLOW, || async {
        for index in [0, 1] {
            let mut client = ServerServiceClient::new(router(test, index));
            let answer = client.readiness_check(ReadinessCheckRequest::default()).await;
            match answer.map_err(|status| status.to_string())?.into_inner().result {
                Some(Readiness::FailureResponse(failure))
                    if failure.failed_checks.iter().any(|check| check.name == "coordinator") => {}
                other => return Err(format!("router {index}: {other:?}")),
            }
        }
        Ok(())
    })
    .await;
}

/// Reads through both routers, several times, so that every replica that would serve does.
async fn reads_are_fresh(test: &TestCluster, git: &GitClient, expected: &str, when: &str) {
    for round in 0..4 {
        for gateway in [0, 1] {
            let url = test.url(HOME, gateway, PATH);
            let listing = ["ls-remote", &url, "refs/heads/main"];
            let seen = within("ls-remote", SOON, git.run("small", &listing)).await;
            assert_eq!(seen, format!("{expected}\trefs/heads/main"), "{when}, gateway {gateway}");
            if round == 0 {
                let clone = format!("clone-{gateway}-{}", when.replace(' ', "-"));
                must_git(git, ".", &["clone", "--quiet", &url, &clone]).await;
                assert_eq!(git.run(&clone, &["rev-parse", "HEAD"]).await, expected, "{when}");
            }
        }
    }
}

async fn push_fails_fast(test: &TestCluster, git: &GitClient) {
    for gateway in [0, 1] {
        let url = test.url(HOME, gateway, PATH);
        let began = Instant::now();
        let (well, said) = try_git(git, "small", &["push", &url, "main:refs/heads/never"]).await;
        let took = began.elapsed();
        assert!(!well, "a push is acknowledged that cannot have been recorded");
        assert!(said.contains("the storage service is unavailable"), "{said}");
        assert!(took < Duration::from_secs(2), "the push took {} ms to fail", took.as_millis());
        println!("a push through gateway {gateway} failed after {} ms", took.as_millis());
    }
}

#[tokio::test]
async fn reads_go_on_and_are_fresh_while_postgres_is_gone() {
    let (mut test, _logs) = start(home_only).await;
    let git = GitClient::new();
    git.work_tree("small", 2).await;
    test.create(PATH).await;
    let url = test.url(HOME, 0, PATH);
    must_git(&git, "small", &["push", "--quiet", &url, "main"]).await;
    equal_replicas(&test, PATH).await;
    let disks = Disks::of(&test, PATH).await;
    for storage in STORAGES {
        let record = std::fs::read_to_string(disks.replica(storage).join("tabularium-record")).unwrap();
        assert!(record.contains(PATH) && record.contains("\"complete\":true"), "{storage}: {record}");
    }
    let first = git.run("small", &["rev-parse", "main"]).await;
    reads_are_fresh(&test, &git, &first, "before").await;

    // One replica misses a write, and comes back when nobody can bring it up to date.
    let old = primary(&test, PATH).await;
    let missing = *STORAGES.iter().find(|storage| **storage != old).unwrap();
    test.cluster.kill(&format!("{HOME}/{missing}")).unwrap();
    git.commit("small", "file", "while one is away\n").await;
    must_git(&git, "small", &["push", "--quiet", &url, "main"]).await;
    let second = git.run("small", &["rev-parse", "main"]).await;
    test.cluster.kill("postgres").unwrap();
    leases_over(&test).await;
    reads_are_fresh(&test, &git, &second, "one node down").await;
    push_fails_fast(&test, &git).await;
    within("a restart", FOLLOW, test.cluster.restart(&format!("{HOME}/{missing}"))).await.unwrap();
    reads_are_fresh(&test, &git, &second, "an old node back").await;

    // The majority is still there when another one goes, and says that the old one is old.
    test.cluster.kill(&format!("{HOME}/{old}")).unwrap();
    reads_are_fresh(&test, &git, &second, "primary down").await;
    let newest = STORAGES.iter().find(|storage| **storage != old && **storage != missing).unwrap();
    test.cluster.kill(&format!("{HOME}/{newest}")).unwrap();
    for gateway in [0, 1] {
        let url = test.url(HOME, gateway, PATH);
        let (well, said) = try_git(&git, "small", &["ls-remote", &url]).await;
        assert!(!well, "one old replica of three is read: {said}");
    }

    for storage in [old.as_str(), newest] {
        within("a restart", FOLLOW, test.cluster.restart(&format!("{HOME}/{storage}"))).await.unwrap();
    }
    reads_are_fresh(&test, &git, &second, "all nodes back").await;
    within("a restart", FOLLOW, test.cluster.restart("postgres")).await.unwrap();
    git.commit("small", "file", "all is well\n").await;
    wait_until("a push", FOLLOW, || async {
        match try_git(&git, "small", &["push", "--quiet", &url, "main"]).await {
            (true, _) => Ok(()),
            (false, said) => Err(said),
        }
    })
    .await;
    let third = git.run("small", &["rev-parse", "main"]).await;
    reads_are_fresh(&test, &git, &third, "after").await;
    equal_replicas(&test, PATH).await;
    no_open_writes(&test, SOON).await;
    disks.clean(&test).await;
    disks.check_integrity(&git).await;
}
