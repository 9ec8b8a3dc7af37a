//! Backups to a directory, in Gitaly's layout, and repositories that are restored from there.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use tabularium_node::config::{BackupConfig, BackupLayout};
use tabularium_proto::gitaly::{
    BackupRepositoryRequest, CreateRepositoryRequest, ObjectFormat, Repository, RestoreRepositoryRequest,
};
use tonic::{Code, Status};

use crate::{
    harness::{TestNode, commit, eventually, git},
    transport::leftovers,
};

const NOT_THERE: &str =
    "restore repository: manager: repository skipped: manifest: find: read manifest: doesn't exist";
const NONE_THERE: &str =
    "restore repository: repository skipped: manifest: find latest: read manifest: doesn't exist";
const SAME: &str = "backup repository: manager: write bundle: repository skipped: no changes to bundle";

/// A node with a sink of its own.
struct Scene {
    node: TestNode,
    sink: tempfile::TempDir,
}

impl Scene {
    async fn new() -> Self {
        let sink = tempfile::tempdir().unwrap();
        let backup = BackupConfig {
            go_cloud_url: format!("file://{}", sink.path().display()),
            layout: BackupLayout::Manifest,
        };
        Self { node: TestNode::start_with(|config| config.backup = Some(backup)).await, sink }
    }

    async fn back_up(&self, request: BackupRepositoryRequest) -> Result<(), Status> {
        self.node.repositories().backup_repository(request).await.map(drop)
    }

    async fn restore(&self, request: RestoreRepositoryRequest) -> Result<(), Status> {
        self.node.repositories().restore_repository(request).await.map(drop)
    }

    fn full(&self, path: &str, id: &str) -> BackupRepositoryRequest {
        BackupRepositoryRequest {
            repository: Some(self.node.named(path)),
            vanity_repository: Some(vanity("group/a.git")),
            backup_id: id.to_owned(),
            ..Default::default()
        }
    }

    fn incremental(&self, path: &str, id: &str) -> BackupRepositoryRequest {
        BackupRepositoryRequest { incremental: true, ..self.full(path, id) }
    }

    fn restored(&self, path: &str, id: &str) -> RestoreRepositoryRequest {
        RestoreRepositoryRequest {
            repository: Some(self.node.named(path)),
            vanity_repository: Some(vanity("group/a.git")),
            backup_id: id.to_owned(),
            ..Default::default()
        }
    }

    fn in_sink(&self, path: &str) -> PathBuf {
        self.sink.path().join(path)
    }

    /// All files in the sink, in the order of their names.
    fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut directories = vec![self.sink.path().to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else if !path.file_name().unwrap().to_str().unwrap().starts_with("lock-") {
                    found.push(path.strip_prefix(self.sink.path()).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        found.sort();
        found
    }
}

fn vanity(path: &str) -> Repository {
    Repository { storage_name: "vs".into(), relative_path: path.into(), ..Repository::default() }
}

fn hook(repository: &Path, text: &str) {
    let path = repository.join("custom_hooks/pre-receive.d/1");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// What a backup has to bring back: references, HEAD, objects, hooks.
fn contents(repository: &Path) -> [String; 4] {
    let hook = repository.join("custom_hooks/pre-receive.d/1");
    let mode = fs::metadata(&hook).map_or(0, |found| found.permissions().mode() & 0o777);
    let references = git(repository, &["for-each-ref"]);
    let objects = git(repository, &["rev-list", "--objects", "--all"]);
    let head = fs::read_to_string(repository.join("HEAD")).unwrap();
    git(repository, &["fsck", "--strict", "--no-dangling"]);
    [references, head, objects, format!("{mode:o} {}", fs::read_to_string(hook).unwrap_or_default())]
}

fn is_skipped(status: &Status, text: &str, detail: &str) {
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text));
    let details = String::from_utf8_lossy(status.details()).into_owned();
    assert!(details.contains(&format!("type.googleapis.com/gitaly.{detail}.SkippedError")), "{details}");
}

async fn full_and_incremental(scene: &Scene) {
    let path = scene.node.path("a.git");
    let restored = |name: &str| contents(&scene.node.path(name));

    hook(&path, "exit 0");
    let whole = contents(&path);
    scene.back_up(scene.full("a.git", "one")).await.unwrap();

    // A new commit, an annotated tag of it, a branch at an old commit, a branch less, another HEAD, another hook.
    let second = git(&path, &["rev-parse", "main"]);
    let third = commit(&path, Some(&second), "third");
    git(&path, &["update-ref", "refs/heads/next", &third]);
    git(&path, &["tag", "-a", "-m", "two", "v2", &third]);
    git(&path, &["update-ref", "refs/heads/old", &second]);
    git(&path, &["update-ref", "-d", "refs/heads/side"]);
    git(&path, &["symbolic-ref", "HEAD", "refs/heads/next"]);
    hook(&path, "exit 1");
    let grown = contents(&path);
    scene.back_up(scene.incremental("a.git", "two")).await.unwrap();

    let same = scene.back_up(scene.incremental("a.git", "three")).await.unwrap_err();
    is_skipped(&same, SAME, "BackupRepositoryResponse");
    let base = "vs/group/a.git";
    let steps = ["bundle", "custom_hooks.tar", "refs"];
    let manifests = ["+latest", "one", "two"].map(|name| format!("manifests/{base}/{name}.toml"));
    let one = steps.map(|suffix| format!("{base}/one/001.{suffix}"));
    let two = steps.map(|suffix| format!("{base}/two/002.{suffix}"));
    assert_eq!(scene.files(), [manifests.to_vec(), one.to_vec(), two.to_vec()].concat());
    let refs = fs::read_to_string(scene.in_sink("vs/group/a.git/two/002.refs")).unwrap();
    assert_eq!(refs.trim_end(), git(&path, &["show-ref", "--head"]));

    scene.restore(scene.restored("one.git", "one")).await.unwrap();
    assert_eq!(restored("one.git"), whole);
    scene.restore(scene.restored("two.git", "two")).await.unwrap();
    assert_eq!(restored("two.git"), grown);
    scene.restore(scene.restored("latest.git", "")).await.unwrap();
    assert_eq!(restored("latest.git"), grown);
    let fallback = RestoreRepositoryRequest { use_latest: true, ..scene.restored("fallback.git", "none") };
    scene.restore(fallback).await.unwrap();
    assert_eq!(restored("fallback.git"), grown);

    // Over what is there, which keeps what the node has noted beside it and nothing else.
    let path = scene.node.path("two.git");
    let fourth = commit(&path, None, "fourth");
    git(&path, &["update-ref", "refs/heads/foreign", &fourth]);
    fs::write(path.join("tabularium-copy-attempt"), "7").unwrap();
    scene.restore(scene.restored("two.git", "one")).await.unwrap();
    assert_eq!(restored("two.git"), whole);
    assert_eq!(fs::read_to_string(path.join("tabularium-copy-attempt")).unwrap(), "7");
    assert!(!path.join("objects").join(&fourth[..2]).join(&fourth[2..]).exists());
    let root = scene.node.root();
    eventually("nothing is left", async || leftovers(&root).iter().all(|name| name == "node.lock")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_restored_is_what_was_there() {
    let scene = Scene::new().await;
    scene.node.create_with_commits("a.git").await;
    full_and_incremental(&scene).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repositories_with_longer_ids_too() {
    let scene = Scene::new().await;
    let request = CreateRepositoryRequest {
        repository: Some(scene.node.named("a.git")),
        object_format: ObjectFormat::Sha256.into(),
        ..Default::default()
    };
    scene.node.repositories().create_repository(request).await.unwrap();
    let path = scene.node.path("a.git");
    let first = commit(&path, None, "first");
    let second = commit(&path, Some(&first), "second");
    git(&path, &["update-ref", "refs/heads/main", &second]);
    git(&path, &["update-ref", "refs/heads/side", &first]);
    full_and_incremental(&scene).await;
    let manifest = fs::read_to_string(scene.in_sink("manifests/vs/group/a.git/+latest.toml")).unwrap();
    assert!(manifest.contains("object_format = \"sha256\""), "{manifest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn references_that_were_only_moved_are_backed_up_with_a_whole_bundle() {
    let scene = Scene::new().await;
    scene.node.create_with_commits("a.git").await;
    let path = scene.node.path("a.git");
    scene.back_up(scene.full("a.git", "one")).await.unwrap();
    git(&path, &["update-ref", "refs/heads/main", "side"]);
    let back = contents(&path);
    scene.back_up(scene.incremental("a.git", "two")).await.unwrap();
    git(&path, &["symbolic-ref", "HEAD", "refs/heads/side"]);
    scene.back_up(scene.incremental("a.git", "three")).await.unwrap();
    for (id, head) in [("two", "refs/heads/main"), ("three", "refs/heads/side")] {
        scene.restore(scene.restored("r.git", id)).await.unwrap();
        let restored = contents(&scene.node.path("r.git"));
        assert_eq!((&restored[0], &restored[2]), (&back[0], &back[2]), "{id}");
        assert_eq!(restored[1], format!("ref: {head}\n"));
    }
    // Then all of them go.
    for name in ["refs/heads/main", "refs/heads/side", "refs/tags/v1"] {
        git(&path, &["update-ref", "-d", name]);
    }
    scene.back_up(scene.incremental("a.git", "four")).await.unwrap();
    scene.restore(scene.restored("r.git", "four")).await.unwrap();
    assert_eq!(git(&scene.node.path("r.git"), &["for-each-ref"]), "");
    assert!(!scene.in_sink("vs/group/a.git/four/004.bundle").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_increment_cannot_be_built_on_is_not_built_on() {
    let scene = Scene::new().await;
    scene.node.create_with_commits("a.git").await;
    scene.back_up(scene.incremental("a.git", "one")).await.unwrap();
    assert!(scene.in_sink("vs/group/a.git/one/001.bundle").exists(), "the first one is a full one");
    fs::remove_file(scene.in_sink("vs/group/a.git/one/001.refs")).unwrap();
    scene.back_up(scene.incremental("a.git", "two")).await.unwrap();
    assert!(scene.in_sink("vs/group/a.git/two/001.bundle").exists());
    let of = |id: &str, latest: &str| BackupRepositoryRequest {
        latest_backup_id: latest.to_owned(),
        ..scene.incremental("a.git", id)
    };
    // The newest one stands in for one that is not there.
    let same = scene.back_up(of("three", "none")).await.unwrap_err();
    is_skipped(&same, SAME, "BackupRepositoryResponse");
    let path = scene.node.path("a.git");
    let next = commit(&path, None, "next");
    git(&path, &["update-ref", "refs/heads/next", &next]);
    scene.back_up(of("three", "two")).await.unwrap();
    assert!(scene.in_sink("vs/group/a.git/three/002.bundle").exists());
    // One of the same name takes the place of the files and leaves nothing of the earlier one.
    hook(&path, "exit 0");
    scene.back_up(scene.full("a.git", "three")).await.unwrap();
    fs::remove_dir_all(path.join("custom_hooks")).unwrap();
    scene.back_up(scene.full("a.git", "three")).await.unwrap();
    assert!(!scene.in_sink("vs/group/a.git/three/001.custom_hooks.tar").exists());
    scene.restore(scene.restored("r.git", "three")).await.unwrap();
    assert_eq!(contents(&scene.node.path("r.git")), contents(&path));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_repository_borrows_is_backed_up_with_it() {
    let scene = Scene::new().await;
    scene.node.create_with_commits("a.git").await;
    scene.node.create("member.git").await;
    let (pool, member) = (scene.node.path("a.git"), scene.node.path("member.git"));
    fs::write(member.join("objects/info/alternates"), "../../a.git/objects\n").unwrap();
    git(&member, &["update-ref", "refs/heads/main", &git(&pool, &["rev-parse", "main"])]);
    let before = contents(&member);
    scene.back_up(scene.full("member.git", "one")).await.unwrap();
    scene.restore(scene.restored("member.git", "one")).await.unwrap();
    assert!(!member.join("objects/info/alternates").exists());
    assert_eq!(contents(&member), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_repository_is_a_backup_too() {
    let scene = Scene::new().await;
    scene.node.create("a.git").await;
    scene.back_up(scene.full("a.git", "one")).await.unwrap();
    scene.back_up(scene.incremental("a.git", "two")).await.unwrap();
    let manifest = fs::read_to_string(scene.in_sink("manifests/vs/group/a.git/+latest.toml")).unwrap();
    assert!(manifest.starts_with("empty = true\n"), "{manifest}");
    scene.restore(scene.restored("r.git", "")).await.unwrap();
    assert_eq!(contents(&scene.node.path("r.git")), contents(&scene.node.path("a.git")));
    assert!(scene.files().iter().all(|file| !file.ends_with(".bundle")));
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_gitalys() {
    let scene = Scene::new().await;
    let known = scene.node.create_with_commits("a.git").await;
    let good = scene.full("a.git", "one");
    let elsewhere = |storage: &str, path: &str| {
        Some(Repository { storage_name: storage.into(), relative_path: path.into(), ..Repository::default() })
    };
    let invalid = Code::InvalidArgument;
    type Backup = BackupRepositoryRequest;
    for (request, code, text) in [
        (Backup { backup_id: String::new(), ..good.clone() }, invalid, "empty BackupId"),
        (Backup { backup_id: "../x".into(), ..good.clone() }, invalid, "invalid BackupId"),
        (Backup { backup_id: "+latest".into(), ..good.clone() }, invalid, "invalid BackupId"),
        (Backup { repository: None, ..good.clone() }, invalid, "repository not set"),
        (Backup { vanity_repository: None, ..good.clone() }, invalid, "repository not set"),
        (
            Backup { vanity_repository: elsewhere("vs", ""), ..good.clone() },
            invalid,
            "repository path not set",
        ),
        (
            Backup { vanity_repository: elsewhere("vs", "../a.git"), ..good.clone() },
            invalid,
            "relative path escapes root directory",
        ),
        (
            Backup { vanity_repository: elsewhere("..", "a.git"), ..good.clone() },
            invalid,
            "relative path escapes root directory",
        ),
        (
            Backup { repository: elsewhere("other", "a.git"), ..good.clone() },
            invalid,
            "storage name not found",
        ),
        (
            Backup { repository: Some(scene.node.named("none.git")), ..good.clone() },
            Code::NotFound,
            "repository not found",
        ),
    ] {
        let status = scene.back_up(request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, text));
    }
    assert_eq!(scene.files(), [""; 0]);

    let good = scene.restored("r.git", "one");
    type Restore = RestoreRepositoryRequest;
    for (request, text) in [
        (Restore { repository: None, ..good.clone() }, "restore repository: repository: repository not set"),
        (
            Restore { repository: elsewhere("other", "r.git"), ..good.clone() },
            "restore repository: repository: storage name not found",
        ),
        (
            Restore { repository: elsewhere("default", "../r.git"), ..good.clone() },
            "restore repository: repository: relative path escapes root directory",
        ),
        (
            Restore { repository: elsewhere("default", ""), ..good.clone() },
            "restore repository: repository: repository path not set",
        ),
        (
            Restore { vanity_repository: None, ..good.clone() },
            "restore repository: vanity repository: repository not set",
        ),
        (
            Restore { vanity_repository: elsewhere("vs", ""), ..good.clone() },
            "restore repository: vanity repository: repository path not set",
        ),
        (
            Restore { vanity_repository: elsewhere("vs", "a/../../../b"), ..good.clone() },
            "restore repository: vanity repository: relative path escapes root directory",
        ),
        (Restore { backup_id: "../x".into(), ..good.clone() }, "invalid BackupId"),
    ] {
        let status = scene.restore(request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (invalid, text));
    }

    // Without a backup.
    let skipped = scene.restore(good.clone()).await.unwrap_err();
    is_skipped(&skipped, NOT_THERE, "RestoreRepositoryResponse");
    let always = Restore { always_create: true, ..good };
    let skipped = scene.restore(always.clone()).await.unwrap_err();
    is_skipped(&skipped, NOT_THERE, "RestoreRepositoryResponse");
    let skipped = scene.restore(scene.restored("r.git", "")).await.unwrap_err();
    is_skipped(&skipped, NONE_THERE, "RestoreRepositoryResponse");
    assert!(!scene.node.path("r.git").exists());
    scene.restore(Restore { backup_id: String::new(), ..always.clone() }).await.unwrap();
    assert_eq!(git(&scene.node.path("r.git"), &["for-each-ref"]), "");
    // What is there stays.
    let before = contents(&scene.node.path("a.git"));
    let over = Restore { repository: Some(known), backup_id: String::new(), ..always };
    let skipped = scene.restore(over).await.unwrap_err();
    is_skipped(&skipped, NONE_THERE, "RestoreRepositoryResponse");
    assert_eq!(contents(&scene.node.path("a.git")), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_place_for_backups_says_so() {
    let node = TestNode::start().await;
    let request = BackupRepositoryRequest::default();
    let status = node.repositories().backup_repository(request).await.unwrap_err();
    let text = "backup repository: server-side backups are not configured";
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text));
    let request = RestoreRepositoryRequest::default();
    let status = node.repositories().restore_repository(request).await.unwrap_err();
    let text = "restore repository: server-side backups are not configured";
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text));
}

#[tokio::test(flavor = "multi_thread")]
async fn older_layouts_are_restored() {
    let scene = Scene::new().await;
    scene.node.create_with_commits("a.git").await;
    let path = scene.node.path("a.git");
    // HEAD is at a commit that has other branches too.
    git(&path, &["update-ref", "refs/heads/another", "main"]);
    let write = |name: &str, text: &str| {
        let path = scene.in_sink(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    let bundle = |name: &str, what: &[&str]| {
        let path = scene.in_sink(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let create = ["bundle", "create", "--quiet", path.to_str().unwrap(), "--all"];
        git(&scene.node.path("a.git"), &[&create, what].concat());
    };
    let refs = || format!("{}\n", git(&path, &["show-ref", "--head"]));
    bundle("group/a.bundle", &[]);
    write("group/a.refs", &refs());
    let oldest = contents(&path);
    scene.restore(scene.restored("oldest.git", "")).await.unwrap();
    assert_eq!(contents(&scene.node.path("oldest.git")), oldest);

    bundle("group/a/one/001.bundle", &[]);
    write("group/a/one/001.refs", &refs());
    let next = commit(&path, Some(&git(&path, &["rev-parse", "main"])), "next");
    git(&path, &["update-ref", "refs/heads/main", &next]);
    bundle("group/a/one/002.bundle", &["^another"]);
    write("group/a/one/002.refs", &refs());
    write("group/a/one/LATEST", "002");
    write("group/a/LATEST", "one");
    for (name, id) in [("named.git", "one"), ("newest.git", "")] {
        scene.restore(scene.restored(name, id)).await.unwrap();
        assert_eq!(contents(&scene.node.path(name)), contents(&path), "{name}");
    }
    // One more step in the newer layout.
    let last = commit(&path, Some(&next), "last");
    git(&path, &["update-ref", "refs/heads/main", &last]);
    scene.back_up(scene.incremental("a.git", "two")).await.unwrap();
    assert!(scene.in_sink("vs/group/a.git/two/003.bundle").exists());
    scene.restore(scene.restored("both.git", "two")).await.unwrap();
    assert_eq!(contents(&scene.node.path("both.git")), contents(&path));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_not_whole_changes_nothing() {
    let scene = Scene::new().await;
    scene.node.create_with_commits("a.git").await;
    scene.node.create_with_commits("there.git").await;
    let path = scene.node.path("a.git");
    scene.back_up(scene.full("a.git", "one")).await.unwrap();
    let next = commit(&path, Some(&git(&path, &["rev-parse", "main"])), "next");
    git(&path, &["update-ref", "refs/heads/main", &next]);
    scene.back_up(scene.incremental("a.git", "two")).await.unwrap();
    let there = contents(&scene.node.path("there.git"));
    let base = "vs/group/a.git";
    let manifest = format!("manifests/{base}/two.toml");
    type Damage = fn(&Path);
    let gone: Damage = |file| fs::remove_file(file).unwrap();
    let cut: Damage = |file| {
        let length = fs::metadata(file).unwrap().len();
        fs::File::options().write(true).open(file).unwrap().set_len(length - 5).unwrap();
    };
    for (file, damage, says) in [
        (format!("{base}/one/001.bundle"), gone, "restore repository: the backup lacks objects:"),
        (format!("{base}/two/002.bundle"), gone, "restore repository: the backup lacks objects:"),
        (format!("{base}/two/002.bundle"), cut, "restore repository: restore bundle:"),
        (
            format!("{base}/two/002.bundle"),
            |file| fs::write(file, "gitdir: /\n\n").unwrap(),
            "restore repository: reading a bundle:",
        ),
        (format!("{base}/two/002.refs"), gone, "restore repository: read refs: doesn't exist"),
        (format!("{base}/two/002.refs"), cut, "restore repository: restoring references:"),
        (
            format!("{base}/two/002.refs"),
            |file| fs::write(file, format!("{} refs/../x\n", "1".repeat(40))).unwrap(),
            "restore repository: restoring references:",
        ),
        (
            manifest.clone(),
            |file| fs::write(file, "steps = 1").unwrap(),
            "restore repository: looking for the backup:",
        ),
        (
            manifest.clone(),
            |file| fs::write(file, "[[steps]]\nbundle_path = '../../etc/passwd'\nref_path = 'x'").unwrap(),
            "restore repository: reading a bundle:",
        ),
        (
            manifest.clone(),
            |file| fs::write(file, "object_format = 'md5'").unwrap(),
            "restore repository: unknown object format",
        ),
        (manifest, |file| fs::write(file, "").unwrap(), "restore repository: manager: no backup steps"),
    ] {
        let file = scene.in_sink(&file);
        let whole = fs::read(&file).unwrap();
        damage(&file);
        for target in ["there.git", "new/r.git"] {
            let status = scene.restore(scene.restored(target, "two")).await.unwrap_err();
            let told = (status.code(), status.message().starts_with(says));
            assert_eq!(told, (Code::Internal, true), "{}: {}", file.display(), status.message());
        }
        fs::write(&file, whole).unwrap();
        assert_eq!(contents(&scene.node.path("there.git")), there);
        assert!(!scene.node.path("new").exists());
    }
    scene.restore(scene.restored("there.git", "two")).await.unwrap();
    assert_eq!(contents(&scene.node.path("there.git")), contents(&path));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_no_repository_restores_none() {
    let scene = Scene::new().await;
    let manifest = scene.in_sink("manifests/vs/group/a.git/one.toml");
    fs::create_dir_all(manifest.parent().unwrap()).unwrap();
    fs::write(&manifest, "empty = true\nnon_existent = true\nobject_format = ''\n[[steps]]\n").unwrap();
    let skipped = scene.restore(scene.restored("r.git", "one")).await.unwrap_err();
    let text = "restore repository: manager: repository skipped: there was no repository to back up";
    is_skipped(&skipped, text, "RestoreRepositoryResponse");
    assert!(!scene.node.path("r.git").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_fails_leaves_the_earlier_one() {
    let scene = Scene::new().await;
    scene.node.create_with_commits("a.git").await;
    let path = scene.node.path("a.git");
    scene.back_up(scene.full("a.git", "one")).await.unwrap();
    let before = scene.files();
    let lost = commit(&path, None, "lost");
    git(&path, &["update-ref", "refs/heads/lost", &lost]);
    fs::remove_file(path.join("objects").join(&lost[..2]).join(&lost[2..])).unwrap();
    for request in [scene.full("a.git", "two"), scene.incremental("a.git", "two"), scene.full("a.git", "one")]
    {
        let status = scene.back_up(request).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal, "{status:?}");
        assert_eq!(scene.files(), before);
    }
    fs::write(path.join("refs/heads/broken"), "no id\n").unwrap();
    let status = scene.back_up(scene.full("a.git", "two")).await.unwrap_err();
    assert!(status.message().contains("references cannot be read"), "{status:?}");
    assert_eq!(scene.files(), before);
    scene.restore(scene.restored("r.git", "")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn of_nodes_that_back_up_at_once_one_does() {
    let one = Scene::new().await;
    one.node.create_with_commits("a.git").await;
    let directory = one.sink.path().to_str().unwrap().to_owned();
    let backup = BackupConfig { go_cloud_url: directory, layout: BackupLayout::Manifest };
    let other = TestNode::start_with(|config| config.backup = Some(backup)).await;
    other.create_with_commits("a.git").await;
    let newer = commit(&other.path("a.git"), None, "newer");
    git(&other.path("a.git"), &["update-ref", "refs/heads/newer", &newer]);

    for id in ["one", "two", "three"] {
        let request = one.full("a.git", id);
        let mut client = other.repositories();
        let (first, second) =
            tokio::join!(one.back_up(request.clone()), client.backup_repository(request.clone()));
        let overtaken = "backup repository: another node has written a backup meanwhile";
        let mut ends = [first, second.map(drop)];
        // Either both were made, one behind the other, or one was too late.
        for end in &mut ends {
            if let Err(status) = end {
                assert_eq!((status.code(), status.message()), (Code::Aborted, overtaken));
            }
        }
        assert!(ends.iter().any(Result::is_ok), "{ends:?}");
        one.restore(one.restored("r.git", id)).await.unwrap();
        let restored = contents(&one.node.path("r.git"));
        assert!(restored == contents(&one.node.path("a.git")) || restored == contents(&other.path("a.git")));
    }
}
