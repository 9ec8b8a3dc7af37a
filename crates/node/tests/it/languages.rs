//! CommitLanguages and CheckBlobsGenerated.

use std::fs;

use tabularium_proto::gitaly::{
    CheckBlobsGeneratedRequest, CommitLanguagesRequest, Repository,
    analysis_service_client::AnalysisServiceClient, check_blobs_generated_request::Blob,
    commit_languages_response::Language, commit_service_client::CommitServiceClient,
};
use tonic::{Code, Status};

use crate::{
    harness::{TestNode, git},
    seed::{all, invalid, refusal},
};

const RUST: &str = "fn main() {}\n";

/// A repository with one commit of these files on `main`.
async fn holding(node: &TestNode, name: &str, files: &[(&str, &str)]) -> Repository {
    let repository = node.create(name).await;
    add(node, name, files);
    repository
}

/// Another commit of these files, and no others.
fn add(node: &TestNode, name: &str, files: &[(&str, &str)]) {
    let work = tempfile::tempdir().unwrap();
    git(work.path(), &["init", "--quiet", "--initial-branch=main"]);
    for (path, content) in files {
        let path = work.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    git(work.path(), &["add", "--all", "--force"]);
    git(work.path(), &["commit", "--quiet", "--message=files"]);
    let target = node.path(name);
    git(work.path(), &["push", "--quiet", "--force", target.to_str().unwrap(), "main"]);
}

async fn languages(
    node: &TestNode,
    repository: &Repository,
    revision: &str,
) -> Result<Vec<Language>, Status> {
    let request = CommitLanguagesRequest {
        repository: Some(repository.clone()),
        revision: revision.as_bytes().to_vec(),
    };
    let mut client = CommitServiceClient::new(node.channel());
    client.commit_languages(request).await.map(|response| response.into_inner().languages)
}

fn named(languages: &[Language]) -> Vec<(&str, u64)> {
    languages.iter().map(|language| (language.name.as_str(), language.bytes)).collect()
}

#[tokio::test]
async fn bytes_are_added_up_by_language() {
    let node = TestNode::start().await;
    let script = "#!/usr/bin/env ruby\nputs 'a script without an extension'\n";
    let repository = holding(
        &node,
        "a.git",
        &[
            ("src/main.rs", RUST),
            ("src/lib.rs", RUST),
            ("run", script),
            ("empty.py", ""),
            ("data.json", "{\"not\": \"counted\"}\n"),
            ("README.md", "# Not counted\n"),
            ("Cargo.lock", "version = 3\n"),
            ("vendor/github.com/a/b.go", "package b\n"),
            ("docs/conf.py", "x = 1\n"),
            ("image.rs", "a\0b"),
        ],
    )
    .await;
    let found = languages(&node, &repository, "main").await.unwrap();
    assert_eq!(named(&found), [("Ruby", script.len() as u64), ("Rust", 2 * RUST.len() as u64)]);
    let (ruby, rust) = (&found[0], &found[1]);
    assert_eq!((rust.color.as_str(), rust.language_id), ("#dea584", 327));
    assert_eq!((ruby.color.as_str(), ruby.language_id), ("#701516", 326));
    assert!((ruby.share + rust.share - 100.0).abs() < 0.001 && ruby.share > rust.share);

    // The default branch, a tag, a full name and an id are the same commit.
    let path = node.path("a.git");
    git(&path, &["tag", "-a", "-m", "v1", "v1", "main"]);
    let id = git(&path, &["rev-parse", "main"]);
    for revision in ["", "v1", "refs/heads/main", id.as_str()] {
        assert_eq!(languages(&node, &repository, revision).await.unwrap(), found, "{revision}");
    }

    // What is pushed counts at once; the tag stays what it was.
    add(&node, "a.git", &[("main.c", "int main(void) { return 0; }\n")]);
    assert_eq!(named(&languages(&node, &repository, "").await.unwrap()), [("C", 29)]);
    assert_eq!(languages(&node, &repository, "v1").await.unwrap(), found);
    // A branch goes before a tag of the same name.
    git(&path, &["tag", "main", "v1"]);
    assert_eq!(named(&languages(&node, &repository, "main").await.unwrap()), [("C", 29)]);
}

#[tokio::test]
async fn attributes_have_the_last_word() {
    let node = TestNode::start().await;
    let attributes = "\
vendor/ours.rs -linguist-vendored\n\
docs/*.rs linguist-documentation=false\n\
old/* linguist-vendored\n\
made.rs linguist-generated\n\
package-lock.json -linguist-generated linguist-detectable\n\
hidden.rs -linguist-detectable\n\
*.inc linguist-language=php\n";
    let repository = holding(
        &node,
        "a.git",
        &[
            (".gitattributes", attributes),
            ("vendor/ours.rs", RUST),
            ("docs/a.rs", RUST),
            ("old/a.c", "int a;\n"),
            ("made.rs", RUST),
            ("package-lock.json", "{}\n"),
            ("hidden.rs", RUST),
            ("a.inc", "0123456\n"),
        ],
    )
    .await;
    let found = languages(&node, &repository, "main").await.unwrap();
    assert_eq!(named(&found), [("Rust", 2 * RUST.len() as u64), ("PHP", 8), ("JSON", 3)]);
    // Attributes of the next commit count for its files.
    add(&node, "a.git", &[("vendor/ours.rs", RUST), ("a.rs", RUST)]);
    let found = languages(&node, &repository, "main").await.unwrap();
    assert_eq!(named(&found), [("Rust", RUST.len() as u64)]);
}

#[tokio::test]
async fn what_is_no_commit_has_no_languages() {
    let node = TestNode::start().await;
    let repository = holding(&node, "a.git", &[("README.md", "nothing that counts\n")]).await;
    assert_eq!(languages(&node, &repository, "main").await.unwrap(), []);
    assert_eq!(
        refusal(languages(&node, &repository, "--all").await),
        invalid("revision can't start with '-'")
    );
    let status = languages(&node, &repository, "none").await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().starts_with("looking up revision: "), "{status}");
    let empty = node.create("empty.git").await;
    assert_eq!(languages(&node, &empty, "").await.unwrap_err().code(), Code::Internal);
    let absent = node.named("absent.git");
    assert_eq!(languages(&node, &absent, "main").await.unwrap_err().code(), Code::NotFound);
    let mut client = CommitServiceClient::new(node.channel());
    let status = client.commit_languages(CommitLanguagesRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "repository not set"));
}

#[tokio::test]
async fn generated_files_are_told() {
    let node = TestNode::start().await;
    let made = "package a\n\n// Code generated by a program. DO NOT EDIT.\n";
    let files = [("a.go", made), ("b.go", "package b\n"), ("Cargo.lock", "x\n")];
    let repository = holding(&node, "a.git", &files).await;
    let ask = async |repository: Option<Repository>, blobs: Vec<Vec<(&str, &str)>>| {
        let blob = |(revision, path): (&str, &str)| Blob {
            revision: revision.as_bytes().to_vec(),
            path: path.as_bytes().to_vec(),
        };
        let mut repository = repository;
        let requests: Vec<_> = blobs
            .into_iter()
            .map(|blobs| CheckBlobsGeneratedRequest {
                repository: repository.take(),
                blobs: blobs.into_iter().map(blob).collect(),
            })
            .collect();
        let mut client = AnalysisServiceClient::new(node.channel());
        let messages = all(client.check_blobs_generated(tokio_stream::iter(requests)).await).await?;
        let found = messages.into_iter().map(|message| {
            let blobs = message.blobs.into_iter();
            blobs.map(|blob| (String::from_utf8(blob.revision).unwrap(), blob.generated)).collect()
        });
        Ok::<Vec<Vec<(String, bool)>>, Status>(found.collect())
    };
    let here = || Some(repository.clone());
    // One answer to each message, by the path that the client gives it, whatever its name in the tree.
    let answers = ask(
        here(),
        vec![
            vec![("main:a.go", "a.go"), ("main:b.go", "b.go")],
            vec![("main:b.go", "node_modules/b.js"), ("main:Cargo.lock", "Cargo.lock")],
        ],
    );
    let told = |revision: &str, generated| (revision.to_owned(), generated);
    assert_eq!(
        answers.await.unwrap(),
        [
            [told("main:a.go", true), told("main:b.go", false)],
            [told("main:b.go", true), told("main:Cargo.lock", true)],
        ]
    );
    for (blobs, problem) in [
        (vec![], "validating request: empty blobs"),
        (vec![("", "a")], "validating request: empty revision"),
        (vec![("a b:c", "a")], "validating request: revision can't contain whitespace"),
        (vec![("main:a.go", "")], "validating request: empty path"),
        (vec![("main", "a.go")], "object is not a blob"),
    ] {
        assert_eq!(refusal(ask(here(), vec![blobs]).await), invalid(problem));
    }
    assert_eq!(refusal(ask(None, vec![vec![("main:a.go", "a.go")]]).await), invalid("repository not set"));
    let missing = refusal(ask(here(), vec![vec![("main:none", "none")]]).await);
    assert_eq!(missing, (Code::Internal, "reading object: object not found".to_owned()));
    let later = ask(here(), vec![vec![("main:a.go", "a.go")], vec![]]).await;
    assert_eq!(refusal(later), invalid("validating request: empty blobs"));
}
