//! The database is lost and made anew from the nodes, one of which was set back to an older copy of its disk: nothing that
//! was acknowledged is lost, and all is as it was.

use std::fs;

use serde_json::Value;
use sqlx::{Connection as _, PgConnection};
use tabularium_testkit::{
    cluster::{TestCluster, local_cluster::HOME, service::Kind},
    git::GitClient,
    wait::wait_until,
};

use crate::{
    old_disk::copy,
    support::{
        FOLLOW, SOON, equal_replicas, home_only, must_git, no_open_writes, start, tabularium,
        tabularium_json, try_git, within,
    },
};

/// What the repositories are called in the end, and what they were created as.
const PATHS: [&str; 3] = ["a/one.git", "a/two.git", "b/three.git"];
const AT_FIRST: [&str; 3] = ["a/one.git", "a/two.git", "b/before.git"];

async fn rebuild(test: &TestCluster, arguments: &[&str]) -> (Option<i32>, Value) {
    tabularium_json(test, &[&["rebuild"], arguments].concat()).await
}

fn kinds(said: &Value) -> Vec<&str> {
    said["findings"].as_array().unwrap().iter().map(|finding| finding["kind"].as_str().unwrap()).collect()
}

/// What is in a repository, as every clone would have it.
async fn listed(git: &GitClient, test: &TestCluster, gateway: usize, path: &str) -> String {
    let url = test.url(HOME, gateway, path);
    within("ls-remote", SOON, git.run("small", &["ls-remote", &url])).await
}

async fn drop_schema(test: &TestCluster) {
    let url = test.home().database_url;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    sqlx::query("DROP SCHEMA tabularium CASCADE").execute(&mut connection).await.unwrap();
}

#[tokio::test]
async fn a_lost_database_is_made_anew_from_the_nodes() {
    let (mut test, _logs) = start(home_only).await;
    let git = GitClient::new();
    git.work_tree("small", 2).await;
    for path in AT_FIRST {
        test.create(path).await;
        must_git(&git, "small", &["push", "--quiet", &test.url(HOME, 0, path), "main"]).await;
        equal_replicas(&test, path).await;
    }
    let (code, said) = rebuild(&test, &[]).await;
    assert_eq!(code, Some(1), "a database that is there is not rebuilt: {said}");
    assert!(said.to_string().contains("it was not lost"), "{said}");

    // An older copy of one disk.
    let root = test.home().of(Kind::Node).next().unwrap().storage.clone().unwrap();
    let name = test.home().of(Kind::Node).next().unwrap().name.clone();
    let kept = tempfile::tempdir().unwrap();
    let (from, to) = (root.join("@cluster"), kept.path().join("@cluster"));
    copy(&from, &to);
    for round in 0..3 {
        git.commit("small", "file", &format!("later {round}\n")).await;
        for path in &PATHS[..2] {
            must_git(&git, "small", &["push", "--quiet", &test.url(HOME, round % 2, path), "main"]).await;
        }
    }
    for path in AT_FIRST {
        equal_replicas(&test, path).await;
    }
    no_open_writes(&test, SOON).await;
    let renamed = tabularium(&test, &["repo", "rename", "b/before.git", PATHS[2]]).await;
    assert!(renamed.status.success(), "{}", String::from_utf8_lossy(&renamed.stderr));
    let mut before = Vec::new();
    for path in PATHS {
        before.push(listed(&git, &test, 0, path).await);
    }
    let last_id = test.details(PATHS[2]).await.unwrap().route.unwrap().repository_id;

    test.cluster.terminate(&name).await.unwrap();
    fs::remove_dir_all(&from).unwrap();
    copy(&to, &from);
    within("a restart", FOLLOW, test.cluster.restart(&name)).await.unwrap();
    let coordinators: Vec<String> =
        test.home().of(Kind::Coordinator).map(|process| process.name.clone()).collect();
    for coordinator in &coordinators {
        test.cluster.kill(coordinator).unwrap();
    }
    drop_schema(&test).await;
    for coordinator in &coordinators {
        within("a restart", FOLLOW, test.cluster.restart(coordinator)).await.unwrap();
    }
    let (well, _) = try_git(&git, "small", &["ls-remote", &test.url(HOME, 0, PATHS[0])]).await;
    assert!(!well, "nobody knows the repository any more");

    let (code, said) = rebuild(&test, &["--dry-run"]).await;
    assert_eq!((code, said["repositories"].as_i64()), (Some(0), Some(3)), "{said}");
    assert_eq!(kinds(&said), ["behind", "behind"], "{said}");
    let (code, said) = rebuild(&test, &[]).await;
    assert_eq!(code, Some(0), "{said}");
    assert_eq!((said["repositories"].as_i64(), said["replicas"].as_i64()), (Some(3), Some(9)), "{said}");
    assert_eq!(said["replicas_behind"].as_i64(), Some(2), "{said}");
    assert!(said["last_repository_id"].as_i64() >= Some(last_id), "{said}");

    for (path, before) in PATHS.iter().zip(&before) {
        for gateway in [0, 1] {
            assert_eq!(listed(&git, &test, gateway, path).await, *before, "{path}, gateway {gateway}");
        }
    }
    for path in PATHS {
        equal_replicas(&test, path).await;
    }
    git.commit("small", "file", "and on\n").await;
    test.create("c/new.git").await;
    assert!(test.details("c/new.git").await.unwrap().route.unwrap().repository_id > last_id);
    for path in PATHS.iter().chain(&["c/new.git"]) {
        for gateway in [0, 1] {
            let branch = format!("main:refs/heads/through-{gateway}");
            wait_until("a push", FOLLOW, || async {
                let url = test.url(HOME, gateway, path);
                match try_git(&git, "small", &["push", "--quiet", &url, &branch]).await {
                    (true, _) => Ok(()),
                    (false, said) => Err(said),
                }
            })
            .await;
        }
        equal_replicas(&test, path).await;
    }
    let (code, said) = rebuild(&test, &["--add-missing"]).await;
    assert_eq!((code, said["repositories"].as_i64()), (Some(1), Some(0)), "{said}");
    assert!(kinds(&said).iter().all(|kind| *kind == "present"), "{said}");
}
