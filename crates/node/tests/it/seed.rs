//! Repositories with files in them, and what the tests of the object services share.

use std::{io::Write as _, path::Path, process::Stdio};

use prost::Message;
use tabularium_proto::gitaly::Repository;
use tonic::{Code, Status, Streaming};

use crate::harness::{TestNode, git, git_command};

/// Puts objects and references into a repository.
pub(crate) fn fast_import(repository: &Path, stream: &[u8]) {
    let mut command = git_command(repository);
    let mut child =
        command.args(["fast-import", "--quiet", "--force"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(stream).unwrap();
    assert!(child.wait().unwrap().success());
}

/// `main` with three commits:
/// first (README, run.sh, a/b/c/deep.txt), second (README changed), third (big.bin of 300 KiB, a submodule).
/// `side` and the lightweight tag `v1` at the first; the annotated tag `v2` at the second.
pub(crate) async fn repository(node: &TestNode, path: &str) -> Repository {
    let repository = node.create(path).await;
    let mut stream = Vec::new();
    let who = "A U Thor <author@example.com> 1700000000 +0100";
    let commit = |mark: u32, message: &str| {
        let when = format!("A U Thor <author@example.com> {} +0100", 1_700_000_000 + mark);
        let length = message.len();
        format!(
            "commit refs/heads/main\nmark :{mark}\nauthor {when}\ncommitter {when}\ndata {length}\n{message}\n"
        )
    };
    let file = |mode: &str, path: &str, content: &str| {
        format!("M {mode} inline {path}\ndata {}\n{content}\n", content.len())
    };
    stream.extend(commit(1, "first\n\nbody\n\nReviewed-by: R <r@x>\nFixes: 7\n").bytes());
    stream.extend(file("100644", "README", "hello").bytes());
    stream.extend(file("100755", "run.sh", "#!/bin/sh").bytes());
    stream.extend(file("100644", "a/b/c/deep.txt", "deep").bytes());
    stream.extend(commit(2, "second").bytes());
    stream.extend(file("100644", "README", "hello again").bytes());
    stream.extend(commit(3, "third").bytes());
    stream.extend(format!("M 160000 {} module\n", "11".repeat(20)).bytes());
    stream.extend(format!("M 100644 inline big.bin\ndata {}\n", BIG.len()).bytes());
    stream.extend(BIG);
    stream.extend(b"\nreset refs/heads/side\nfrom :1\n\nreset refs/tags/v1\nfrom :1\n\n");
    let tag = "Release two\n";
    stream.extend(format!("tag v2\nfrom :2\ntagger {who}\ndata {}\n{tag}\n", tag.len()).bytes());
    fast_import(&node.path(path), &stream);
    repository
}

/// Two and a bit chunks.
pub(crate) const BIG: &[u8] = &[b'x'; 300 * 1024];

/// What a revision is in the repository.
pub(crate) fn id(node: &TestNode, path: &str, revision: &str) -> String {
    git(&node.path(path), &["rev-parse", "--verify", revision])
}

/// Everything a stream sends.
pub(crate) async fn all<T>(stream: Result<tonic::Response<Streaming<T>>, Status>) -> Result<Vec<T>, Status> {
    let mut stream = stream?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await? {
        messages.push(message);
    }
    Ok(messages)
}

/// The one detail message of a status.
pub(crate) fn detail<M: Message + Default>(status: &Status, name: &str) -> M {
    let details = tonic_types::Status::decode(status.details()).unwrap();
    assert_eq!(details.code, i32::from(status.code()));
    assert_eq!(details.message, status.message());
    assert_eq!(details.details.len(), 1, "{status:?}");
    assert_eq!(details.details[0].type_url, format!("type.googleapis.com/gitaly.{name}"));
    M::decode(details.details[0].value.as_slice()).unwrap()
}

/// Code and text of a refusal.
pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, String) {
    let status = result.unwrap_err();
    (status.code(), status.message().to_owned())
}

/// The refusal of a bad argument.
pub(crate) fn invalid(text: &str) -> (Code, String) {
    (Code::InvalidArgument, text.to_owned())
}
