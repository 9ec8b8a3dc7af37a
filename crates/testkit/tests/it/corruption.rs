//! Damage inside a replica's objects, which no reference shows: found when git looks through them, read around from then on,
//! made again, and kept for whoever wants to know.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use serde_json::{Value, json};
use tabularium_testkit::{
    cluster::{TestCluster, local_cluster::HOME},
    git::GitClient,
    wait::wait_until,
};

use crate::support::{
    Disks, FOLLOW, equal_replicas, files_below, home_only, must_git, primary, start, tabularium_json,
    try_git, within,
};

const PATH: &str = "a/b.git";
/// Clones through each gateway, at the least, beside the repair.
const CLONES: usize = 4;

/// Flips a bit in the middle of an object of the newest commit, loose or packed.
fn damage(replica: &Path, tree: &str) {
    let loose = replica.join("objects").join(&tree[..2]).join(&tree[2..]);
    let is_pack = |path: &&std::path::PathBuf| path.extension().is_some_and(|extension| extension == "pack");
    let packs = files_below(&replica.join("objects/pack"));
    let file = if loose.exists() { &loose } else { packs.iter().find(is_pack).unwrap() };
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(file, bytes).unwrap();
}

async fn check(test: &TestCluster) -> (Option<i32>, Value) {
    tabularium_json(test, &["verify", "a/b", "--fsck"]).await
}

fn states(said: &Value) -> Vec<(&str, &str)> {
    let replicas = said["replicas"].as_array().unwrap_or_else(|| panic!("{said}")).iter();
    replicas
        .map(|replica| (replica["storage"].as_str().unwrap(), replica["state"].as_str().unwrap()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_replica_is_found_read_around_made_again_and_kept() {
    let (test, _logs) = start(home_only).await;
    let git = GitClient::new();
    git.work_tree("source", 3).await;
    test.create(PATH).await;
    must_git(&git, "source", &["push", "--quiet", &test.url(HOME, 0, PATH), "main"]).await;
    equal_replicas(&test, PATH).await;
    let (code, said) = check(&test).await;
    assert_eq!((code, states(&said).len()), (Some(0), 3), "{said}");
    assert!(states(&said).iter().all(|(_, state)| *state == "whole"), "{said}");

    let disks = Disks::of(&test, PATH).await;
    let first = primary(&test, PATH).await;
    let rotten = *["node-1", "node-2", "node-3"].iter().find(|name| **name != first).unwrap();
    let tree = git.run("source", &["rev-parse", "main^{tree}"]).await.trim().to_owned();
    damage(disks.replica(rotten), &tree);
    let (code, said) = check(&test).await;
    assert_eq!(code, Some(1), "{said}");
    for (storage, state) in states(&said) {
        assert_eq!(state, if storage == rotten { "damaged" } else { "whole" }, "{said}");
    }
    assert_eq!(said["made_again"], json!([rotten]), "{said}");

    // From the answer on nobody reads it, whatever becomes of it meanwhile.
    let content = git.run("source", &["ls-tree", "-r", "main"]).await;
    let clones = async {
        for number in 0..CLONES {
            for gateway in [0, 1] {
                let name = format!("clone-{gateway}-{number}");
                let url = test.url(HOME, gateway, PATH);
                must_git(&git, ".", &["clone", "--quiet", &url, &name]).await;
                assert_eq!(git.run(&name, &["ls-tree", "-r", "origin/main"]).await, content);
                must_git(&git, &name, &["fsck", "--full"]).await;
            }
        }
    };
    let mended = wait_until("it is made again", FOLLOW, || async {
        let (code, said) = check(&test).await;
        let whole = states(&said).iter().all(|(_, state)| *state == "whole");
        if code == Some(0) && whole { Ok(()) } else { Err(said.to_string()) }
    });
    tokio::join!(clones, mended);
    equal_replicas(&test, PATH).await;
    disks.check_integrity(&git).await;

    let (code, listed) = tabularium_json(&test, &["kept", "list"]).await;
    let kept = listed["kept"].as_array().unwrap_or_else(|| panic!("{listed}"));
    assert_eq!((code, kept.len()), (Some(0), 1), "{listed}");
    assert_eq!((&kept[0]["storage"], &kept[0]["relative_path"]), (&json!(rotten), &json!(PATH)), "{listed}");
    assert!(!kept[0]["reason"].as_str().unwrap().is_empty(), "{listed}");
    let (path, id) = (kept[0]["path"].as_str().unwrap(), kept[0]["id"].as_str().unwrap());
    let looked = git.git().output(Path::new(path), ["fsck", "--full"]);
    assert!(!within("fsck", FOLLOW, looked).await.unwrap().status.success(), "it is what was found");
    let (_, untracked) = tabularium_json(&test, &["list-untracked", "--older-than", "0"]).await;
    assert_eq!(untracked, json!([]), "it is no repository");
    let (_, metadata) = tabularium_json(&test, &["metadata", "a/b"]).await;
    for replica in metadata["replicas"].as_array().unwrap() {
        assert!(replica["damage"] == "" && !replica["checked_at"].is_null(), "{metadata}");
    }

    let (code, said) = tabularium_json(&test, &["kept", "remove", rotten, id]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(!Path::new(path).exists());
    let (code, said) = tabularium_json(&test, &["kept", "remove", rotten, id]).await;
    assert_eq!(code, Some(1), "{said}");
    git.commit("source", "file", "and on\n").await;
    let (well, said) = try_git(&git, "source", &["push", "--quiet", &test.url(HOME, 1, PATH), "main"]).await;
    assert!(well, "{said}");
    equal_replicas(&test, PATH).await;
    within("stopping", FOLLOW, test.stop()).await.unwrap();
}
