//! The configuration files of docker-compose, read by the very programs that are started with them. No container runs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const SERVICES: [&str; 6] = ["node", "coordinator", "router", "gateway", "replicator", "geo-receiver"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn configurations() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for site in ["home", "mirror"] {
        let directory = fs::read_dir(root().join("deploy/compose").join(site)).unwrap();
        files.extend(directory.map(|entry| entry.unwrap().path()));
    }
    files.sort();
    files
}

/// `home-coordinator.toml` and `node-1.toml` are read by the service in their names.
fn service_of(file: &Path) -> &'static str {
    let name = file.file_stem().unwrap().to_str().unwrap();
    SERVICES.into_iter().find(|service| name.contains(service)).unwrap_or_else(|| panic!("{name}"))
}

#[test]
fn every_program_takes_its_file() {
    let secrets = tempfile::tempdir().unwrap();
    let secret = |name: &str| fs::write(secrets.path().join(name), format!("{name}-secret\n")).unwrap();
    for name in ["node", "router", "coordinator", "hook", "database"] {
        secret(name);
    }
    for name in ["mirror-node", "mirror-router", "mirror-coordinator"] {
        secret(name);
    }
    let storage = tempfile::tempdir().unwrap();
    for file in configurations() {
        let service = service_of(&file);
        let text = fs::read_to_string(&file).unwrap();
        let text = text.replace("/run/tabularium", secrets.path().to_str().unwrap());
        let text = text.replace("\"/storage\"", &format!("{:?}", storage.path()));
        let copy = secrets.path().join("config.toml");
        fs::write(&copy, text).unwrap();
        let program =
            Path::new(env!("CARGO_BIN_EXE_tabularium")).with_file_name(format!("tabularium-{service}"));
        let output = Command::new(program).arg("--config").arg(&copy).arg("--check-config").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", file.display());
    }
}

/// Every file is mounted by one of the compose files, and what they mount is there.
#[test]
fn the_compose_files_mount_what_there_is() {
    let mut mounted = Vec::new();
    for name in ["docker-compose.yml", "docker-compose.mirror.yml"] {
        let text = fs::read_to_string(root().join(name)).unwrap();
        let mounts = text.lines().filter_map(|line| line.trim().strip_prefix("- ./"));
        mounted.extend(mounts.map(|mount| root().join(mount.split(':').next().unwrap())));
    }
    mounted.sort();
    assert_eq!(mounted, configurations());
}

/// The home site with a mirror is the home site, and knows of the mirror.
#[test]
fn a_subscriber_is_all_that_a_mirror_changes_at_home() {
    for service in ["coordinator", "replicator"] {
        let read = |file: String| -> toml::Table {
            fs::read_to_string(root().join("deploy/compose").join(file)).unwrap().parse().unwrap()
        };
        let mut subscribed = read(format!("mirror/home-{service}.toml"));
        let subscriber = subscribed.remove("subscriber").unwrap();
        assert_eq!(subscriber[0]["name"].as_str(), Some("mirror"));
        assert_eq!(subscribed, read(format!("home/{service}.toml")), "{service}");
    }
}
