//! What operators do to a cluster that works: replicas that come and go, a storage that is drained, a disk that is lost or
//! exchanged, a replica that rots.

use std::{fs, path::PathBuf};

use tabularium_proto::coordinator::{
    AcceptStorageRequest, DrainStorageRequest, GetReplicasRequest, ListStoragesRequest,
    MarkUnverifiedRequest, RemoveStorageRequest, RepositoryName, RepositoryReplicas,
    SetReplicationFactorRequest, StorageDetails, StorageName, UndrainStorageRequest, get_replicas_request,
    repair_service_client::RepairServiceClient, storage_service_client::StorageServiceClient,
};
use tabularium_testkit::{
    cluster::{
        Signed, TestCluster, VIRTUAL_STORAGE,
        local_cluster::{ClusterOptions, HOME},
        service::Kind,
        signed,
    },
    git::GitClient,
    wait::wait_until,
};

use crate::support::{FOLLOW, home_only, start};

const PATH: &str = "a/b.git";

fn quick(options: &mut ClusterOptions) {
    home_only(options);
    options.timing =
        [("movement_interval", "100ms"), ("replica_removal_grace", "1s"), ("verification_interval", "500ms")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .to_vec();
}

fn storages(test: &TestCluster) -> StorageServiceClient<Signed> {
    let home = test.home();
    StorageServiceClient::new(signed(&home.grpc(Kind::Coordinator)[0], &home.coordinator_token_file))
}

fn repair(test: &TestCluster) -> RepairServiceClient<Signed> {
    let home = test.home();
    RepairServiceClient::new(signed(&home.grpc(Kind::Coordinator)[0], &home.coordinator_token_file))
}

fn name() -> RepositoryName {
    RepositoryName { virtual_storage: VIRTUAL_STORAGE.into(), relative_path: PATH.into() }
}

fn storage(name: &str) -> StorageName {
    StorageName { virtual_storage: VIRTUAL_STORAGE.into(), storage: name.into() }
}

async fn replicas(test: &TestCluster) -> RepositoryReplicas {
    let repository = Some(get_replicas_request::Repository::Name(name()));
    let answer = repair(test).get_replicas(GetReplicasRequest { repository }).await;
    answer.unwrap().into_inner().repository.unwrap()
}

async fn details(test: &TestCluster, name: &str) -> StorageDetails {
    let list = ListStoragesRequest { virtual_storage: VIRTUAL_STORAGE.into() };
    let listed = storages(test).list_storages(list).await.unwrap().into_inner().storages;
    listed.into_iter().find(|storage| storage.name == name).unwrap()
}

async fn set_factor(test: &TestCluster, replication_factor: u32) {
    let set = SetReplicationFactorRequest { name: Some(name()), replication_factor, default: false };
    repair(test).set_replication_factor(set).await.unwrap();
}

async fn has_replicas(test: &TestCluster, count: usize) -> Result<(), String> {
    let found = replicas(test).await.replicas;
    if found.len() == count { Ok(()) } else { Err(format!("{found:?}")) }
}

/// The directory of a storage.
fn disk(test: &TestCluster, storage: &str) -> PathBuf {
    let state = test.cluster.state_directory();
    let mut found = Vec::new();
    let mut directories = vec![state.to_owned()];
    while let Some(directory) = directories.pop() {
        if directory.join(".gitaly-metadata").is_file() {
            found.push(directory);
            continue;
        }
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        directories.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    let mut matching = found.iter().filter(|path| path.components().any(|part| part.as_os_str() == storage));
    matching.next().unwrap_or_else(|| panic!("no disk of {storage} among {found:?}")).clone()
}

async fn filled(git: &GitClient, test: &TestCluster) -> String {
    git.work_tree("source", 2).await;
    test.create(PATH).await;
    let url = test.url(HOME, 0, PATH);
    git.run("source", &["push", "--quiet", &url, "main"]).await;
    wait_until("three equal replicas", FOLLOW, || test.equal_checksums(PATH, 3)).await;
    url
}

async fn push(git: &GitClient, url: &str, text: &str) {
    git.commit("source", "file", text).await;
    git.run("source", &["push", "--quiet", url, "main"]).await;
}

#[tokio::test]
async fn replicas_come_and_go_while_clients_push() {
    let (test, _logs) = start(quick).await;
    let git = GitClient::new();
    let url = filled(&git, &test).await;
    set_factor(&test, 1).await;
    wait_until("one replica", FOLLOW, || has_replicas(&test, 1)).await;
    push(&git, &url, "alone\n").await;
    let kept = replicas(&test).await;
    let gone = ["node-1", "node-2", "node-3"].into_iter().filter(|node| *node != kept.primary);
    for node in gone {
        let path = disk(&test, node).join(&kept.replica_path);
        wait_until("the files go", FOLLOW, || async {
            if path.exists() { Err(path.display().to_string()) } else { Ok(()) }
        })
        .await;
    }

    set_factor(&test, 3).await;
    push(&git, &url, "while copies are made\n").await;
    wait_until("three equal replicas", FOLLOW, || test.equal_checksums(PATH, 3)).await;
    push(&git, &url, "with all three\n").await;
    assert_eq!(replicas(&test).await.write_quorum, 2);

    // Away from the primary, with nowhere else to go but what is there: two replicas stay.
    let primary = replicas(&test).await.primary;
    let drain =
        |allow_fewer_replicas| DrainStorageRequest { storage: Some(storage(&primary)), allow_fewer_replicas };
    let refused = storages(&test).drain_storage(drain(false)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    storages(&test).drain_storage(drain(true)).await.unwrap();
    wait_until("an empty storage", FOLLOW, || async {
        let storage = details(&test, &primary).await;
        if storage.replicas == 0 { Ok(()) } else { Err(format!("{storage:?}")) }
    })
    .await;
    push(&git, &url, "by two\n").await;
    storages(&test)
        .undrain_storage(UndrainStorageRequest { storage: Some(storage(&primary)) })
        .await
        .unwrap();
    wait_until("three equal replicas", FOLLOW, || test.equal_checksums(PATH, 3)).await;

    storages(&test).drain_storage(drain(true)).await.unwrap();
    wait_until("an empty storage", FOLLOW, || async {
        let storage = details(&test, &primary).await;
        if storage.replicas == 0 { Ok(()) } else { Err(format!("{storage:?}")) }
    })
    .await;
    let remove = RemoveStorageRequest { storage: Some(storage(&primary)), force_lost: false };
    storages(&test).remove_storage(remove).await.unwrap();
    push(&git, &url, "without it\n").await;
    git.run(".", &["clone", "--quiet", "--mirror", &test.url(HOME, 1, PATH), "clone"]).await;
    assert_eq!(git.refs("clone").await, git.refs("source").await);
    test.stop().await.unwrap();
}

/// Its process is well, and answers.
#[tokio::test]
async fn a_disk_that_is_not_there_serves_nobody_and_another_one_waits_for_an_operator() {
    let (mut test, _logs) = start(quick).await;
    let git = GitClient::new();
    let url = filled(&git, &test).await;
    let primary = replicas(&test).await.primary;
    wait_until("its disk is known", FOLLOW, || async {
        let known = details(&test, &primary).await.filesystem_id;
        if known.is_empty() { Err("not yet".to_owned()) } else { Ok(()) }
    })
    .await;

    // As if the volume were unmounted below a node that runs.
    let root = disk(&test, &primary);
    let aside = root.with_extension("aside");
    fs::rename(&root, &aside).unwrap();
    fs::create_dir(&root).unwrap();
    wait_until("it is not used", FOLLOW, || async {
        let storage = details(&test, &primary).await;
        if storage.healthy { Err("healthy".to_owned()) } else { Ok(()) }
    })
    .await;
    wait_until("a push without it", FOLLOW, || async {
        let (taken, said) =
            git.try_run("source", &["push", "--quiet", &url, "main:refs/heads/without"]).await;
        if taken { Ok(()) } else { Err(said) }
    })
    .await;
    fs::remove_dir_all(&root).unwrap();
    fs::rename(&aside, &root).unwrap();
    wait_until("it is back and level", FOLLOW, || test.equal_checksums(PATH, 3)).await;

    // A new, empty disk, and a restart that puts up with it.
    let node = format!("home/{primary}");
    test.cluster.kill(&node).unwrap();
    fs::rename(&root, &aside).unwrap();
    fs::create_dir(&root).unwrap();
    test.cluster.restart(&node).await.unwrap();
    wait_until("it is told", FOLLOW, || async {
        let storage = details(&test, &primary).await;
        let told = !storage.healthy && storage.problem.contains("another file system");
        if told { Ok(()) } else { Err(storage.problem) }
    })
    .await;
    wait_until("a push without it", FOLLOW, || async {
        let (taken, said) = git.try_run("source", &["push", "--quiet", &url, "main:refs/heads/empty"]).await;
        if taken { Ok(()) } else { Err(said) }
    })
    .await;
    for gateway in 0..2 {
        let refs = git.run("source", &["ls-remote", &test.url(HOME, gateway, PATH)]).await;
        assert!(refs.contains("refs/heads/empty"), "{refs}");
    }
    let accept = AcceptStorageRequest { storage: Some(storage(&primary)), force_lost: false };
    let accepted = storages(&test).accept_storage(accept).await.unwrap().into_inner();
    assert_eq!(accepted.lost_repositories, 0);
    wait_until("three equal replicas on two old disks and a new one", FOLLOW, || {
        test.equal_checksums(PATH, 3)
    })
    .await;
    test.stop().await.unwrap();
}

#[tokio::test]
async fn a_replica_that_rots_is_found_and_made_again() {
    let (test, _logs) = start(quick).await;
    let git = GitClient::new();
    filled(&git, &test).await;
    // A comparison that has begun already sees nothing of it.
    wait_until("all are compared", FOLLOW, || async {
        let now = replicas(&test).await;
        let compared = now.replicas.iter().all(|replica| replica.verified_at.is_some());
        if compared { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
    let before = replicas(&test).await;
    let rotten = before.primary.clone();
    let branch = disk(&test, &rotten).join(&before.replica_path).join("refs/heads");
    let head = git.run("source", &["rev-parse", "HEAD~1"]).await;
    fs::write(branch.join("main"), head).unwrap();
    let mark = MarkUnverifiedRequest { name: Some(name()), storage: None, objects: false };
    repair(&test).mark_unverified(mark).await.unwrap();
    wait_until("another primary", FOLLOW, || async {
        let now = replicas(&test).await;
        if now.primary == rotten { Err(format!("{now:?}")) } else { Ok(()) }
    })
    .await;
    wait_until("three equal replicas", FOLLOW, || test.equal_checksums(PATH, 3)).await;
    let tip = git.run("source", &["rev-parse", "HEAD"]).await;
    for gateway in 0..2 {
        let refs = git.run("source", &["ls-remote", &test.url(HOME, gateway, PATH), "refs/heads/main"]).await;
        assert!(refs.starts_with(tip.trim()), "{refs}");
    }
    test.stop().await.unwrap();
}
