//! Rules of the house that a compiler does not check.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Longest source file. A longer one is two thoughts.
const MAX_FILE_LINES: usize = 700;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

fn source_files(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            source_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn dependencies_run_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("common", &["proto"][..]),
        ("router", &["common", "proto"]),
        ("coordinator", &["common", "proto"]),
        ("replicator", &["common", "proto"]),
        ("geo-receiver", &["common", "proto"]),
        ("gateway", &["common", "proto"]),
        ("node", &["common", "proto"]),
        ("cli", &["common", "proto"]),
        ("praefect", &["common", "coordinator", "proto", "replicator", "router"]),
        ("testkit", &["cli", "common", "proto"]),
    ]);
    for entry in fs::read_dir(root().join("crates")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let allowed = allowed.get(name).unwrap_or_else(|| panic!("crates/{name}: say what it may depend on"));
        let manifest: toml::Table = fs::read_to_string(path.join("Cargo.toml")).unwrap().parse().unwrap();
        let dependencies = manifest["dependencies"].as_table().unwrap();
        for dependency in dependencies.keys().filter_map(|key| key.strip_prefix("tabularium-")) {
            assert!(allowed.contains(&dependency), "crates/{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn only_the_coordinator_talks_sql() {
    for entry in fs::read_dir(root().join("crates")).unwrap() {
        let path = entry.unwrap().path();
        let manifest: toml::Table = fs::read_to_string(path.join("Cargo.toml")).unwrap().parse().unwrap();
        let uses = manifest["dependencies"].as_table().unwrap().contains_key("sqlx");
        let name = path.file_name().unwrap().to_str().unwrap();
        // The test kit makes throw-away databases; nothing of it ships.
        assert_eq!(uses, matches!(name, "coordinator" | "testkit"), "crates/{name}");
    }
}

#[test]
fn files_can_be_held_in_the_head() {
    let mut files = Vec::new();
    source_files(&root().join("crates"), &mut files);
    assert!(files.len() > 100, "only {} files found", files.len());
    for file in files {
        let lines = fs::read_to_string(&file).unwrap().lines().count();
        assert!(lines <= MAX_FILE_LINES, "{}: {lines} lines", file.display());
    }
}

#[test]
fn the_documents_name_only_what_exists() {
    let root = root();
    let mut documents: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md"].iter().map(|name| root.join(name)).collect();
    documents.extend(fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    let mut checked = 0;
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        for word in text.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_'))) {
            let word = word.trim_end_matches(['.', ',', '-']);
            if ["crates/", "docs/", "script/", "deploy/", "proto/"]
                .iter()
                .any(|start| word.starts_with(start))
            {
                assert!(root.join(word).exists(), "{}: {word}", document.display());
                checked += 1;
            }
        }
    }
    assert!(checked > 15, "only {checked} paths found");
}

#[test]
fn the_promises_are_held_by_tests_that_exist() {
    let mut files = Vec::new();
    source_files(&root().join("crates"), &mut files);
    let sources: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let text = fs::read_to_string(root().join("docs/guarantees.md")).unwrap();
    // Names of tests are sentences; settings and the like are shorter.
    let names: Vec<&str> =
        text.split('`').skip(1).step_by(2).filter(|name| name.matches('_').count() > 3).collect();
    assert!(names.len() > 30, "only {} tests are named", names.len());
    for name in names {
        assert!(sources.contains(&format!("fn {name}(")), "docs/guarantees.md names {name}");
    }
}
