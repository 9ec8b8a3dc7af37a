//! Commits that are signed for users: what git says of them, who made them, and that every node makes the same.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command};

use tabularium_node::config::SigningConfig;
use tabularium_proto::gitaly::{
    CommitAuthor, CreateRepositoryRequest, GetCommitSignaturesRequest, GetCommitSignaturesResponse,
    GitCommit, ObjectFormat, Repository, ServerSignatureRequest, UserCherryPickRequest,
    UserCommitFilesRequest, UserCommitFilesRequestHeader, UserMergeBranchRequest, UserMergeToRefRequest,
    UserRebaseToRefRequest, UserRevertRequest, UserSquashRequest, commit_service_client::CommitServiceClient,
    get_commit_signatures_response::Signer, server_service_client::ServerServiceClient,
    user_commit_files_request::UserCommitFilesRequestPayload as Payload,
};

use crate::{
    harness::{TestNode, git, git_command},
    operations::{moment, operations, user},
    seed::{all, fast_import},
};

/// One of the keys beside the tests.
pub(crate) fn key_file(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/keys")).join(name)
}

fn signing(key: &str) -> SigningConfig {
    SigningConfig {
        signing_key: key_file(key),
        rotated_signing_keys: Vec::new(),
        committer_name: String::new(),
        committer_email: String::new(),
        sign_unasked: false,
    }
}

async fn node_with(signing: SigningConfig) -> TestNode {
    TestNode::start_with(|config| config.signing = Some(signing)).await
}

/// `main` with two commits, and `feature` with one that is older than all keys.
async fn repository(node: &TestNode, format: ObjectFormat) -> Repository {
    let repository = node.named("a.git");
    let request = CreateRepositoryRequest {
        repository: Some(repository.clone()),
        object_format: format.into(),
        ..CreateRepositoryRequest::default()
    };
    node.repositories().create_repository(request).await.unwrap();
    fast_import(
        &node.path("a.git"),
        b"commit refs/heads/main\nmark :1\ncommitter C <c@x> 1600000000 +0000\ndata 1\na\nM 100644 inline a\ndata 1\na\n\n\
          commit refs/heads/main\ncommitter C <c@x> 1600000001 +0000\ndata 1\nb\nfrom :1\nM 100644 inline b\ndata 1\nb\n\n\
          commit refs/heads/feature\ncommitter F <f@x> 1600000002 +0130\ndata 1\nc\nfrom :1\nM 100644 inline c\ndata 1\nc\n\n",
    );
    repository
}

/// Asks for a commit by each RPC that signs, and answers what they are called.
async fn commits(node: &TestNode, repository: &Repository, sign: bool) -> Vec<(&'static str, String)> {
    let mut client = operations(node);
    let path = node.path("a.git");
    let id = |revision: &str| git(&path, &["rev-parse", "--verify", revision]);
    let (main, feature) = (id("main"), id("feature"));
    let (repository, timestamp) = (Some(repository.clone()), Some(moment()));
    let commit = |id: &str| Some(GitCommit { id: id.to_owned(), ..GitCommit::default() });
    let mut made = Vec::new();

    let request = UserSquashRequest {
        repository: repository.clone(),
        user: Some(user()),
        author: Some(user()),
        start_sha: main.clone(),
        end_sha: feature.clone(),
        commit_message: b"Squashed".to_vec(),
        timestamp,
        sign,
    };
    made.push(("squash", client.user_squash(request).await.unwrap().into_inner().squash_sha));
    let request = UserMergeToRefRequest {
        repository: repository.clone(),
        user: Some(user()),
        source_sha: feature.clone(),
        target_ref: b"refs/merge-requests/1/merge".to_vec(),
        first_parent_ref: b"refs/heads/main".to_vec(),
        message: b"Merged to a reference".to_vec(),
        timestamp,
        sign,
        ..UserMergeToRefRequest::default()
    };
    made.push(("merge to ref", client.user_merge_to_ref(request).await.unwrap().into_inner().commit_id));
    let request = UserCherryPickRequest {
        repository: repository.clone(),
        user: Some(user()),
        commit: commit(&feature),
        branch_name: b"main".to_vec(),
        message: b"Picked".to_vec(),
        timestamp,
        sign,
        ..UserCherryPickRequest::default()
    };
    let update = client.user_cherry_pick(request).await.unwrap().into_inner().branch_update;
    made.push(("cherry-pick", update.unwrap().commit_id));
    let request = UserRevertRequest {
        repository: repository.clone(),
        user: Some(user()),
        commit: commit(&main),
        branch_name: b"main".to_vec(),
        message: b"Reverted".to_vec(),
        timestamp,
        sign,
        ..UserRevertRequest::default()
    };
    let update = client.user_revert(request).await.unwrap().into_inner().branch_update;
    made.push(("revert", update.unwrap().commit_id));
    let header = UserCommitFilesRequestHeader {
        repository: repository.clone(),
        user: Some(user()),
        branch_name: b"main".to_vec(),
        commit_message: "Text\n\nUml\u{e4}ut, and no line end".into(),
        commit_author_name: b"Somebody".to_vec(),
        commit_author_email: b"s@x".to_vec(),
        timestamp,
        sign,
        ..UserCommitFilesRequestHeader::default()
    };
    let request = UserCommitFilesRequest { user_commit_files_request_payload: Some(Payload::Header(header)) };
    let update = client.user_commit_files(tokio_stream::iter([request])).await.unwrap().into_inner();
    made.push(("commit files", update.branch_update.unwrap().commit_id));
    let request = UserMergeBranchRequest {
        repository,
        user: Some(user()),
        commit_id: feature,
        branch: b"main".to_vec(),
        message: b"Merged\n".to_vec(),
        timestamp,
        sign,
        ..UserMergeBranchRequest::default()
    };
    let apply = UserMergeBranchRequest { apply: true, ..UserMergeBranchRequest::default() };
    let answers = all(client.user_merge_branch(tokio_stream::iter([request, apply])).await).await.unwrap();
    made.push(("merge", answers[0].commit_id.clone()));
    assert_eq!(id("main"), answers[0].commit_id);
    made
}

async fn signatures(
    node: &TestNode,
    repository: &Repository,
    ids: &[&str],
) -> Vec<GetCommitSignaturesResponse> {
    let request = GetCommitSignaturesRequest {
        repository: Some(repository.clone()),
        commit_ids: ids.iter().map(ToString::to_string).collect(),
    };
    let found = all(CommitServiceClient::new(node.channel()).get_commit_signatures(request).await).await;
    found.unwrap().into_iter().filter(|message| !message.commit_id.is_empty()).collect()
}

async fn public_key(node: &TestNode) -> Vec<u8> {
    let mut client = ServerServiceClient::new(node.channel());
    client.server_signature(ServerSignatureRequest {}).await.unwrap().into_inner().public_key
}

/// What git says of a commit's signature, with nothing but the node's public key.
async fn verified_by_git(node: &TestNode, key: &str, id: &str) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let public = public_key(node).await;
    let mut command = git_command(&node.path("a.git"));
    if key.starts_with("ssh-") {
        let signers = directory.path().join("signers");
        fs::write(&signers, [b"* ".as_slice(), &public].concat()).unwrap();
        command.args(["-c", "gpg.format=ssh"]);
        command.arg("-c").arg(format!("gpg.ssh.allowedSignersFile={}", signers.display()));
    } else {
        let import = |text: &[u8]| {
            let file = directory.path().join("public");
            fs::write(&file, text).unwrap();
            let mut gpg = Command::new("gpg");
            gpg.env("GNUPGHOME", directory.path()).args(["--batch", "--quiet", "--import"]).arg(file);
            gpg.output().unwrap().status.success()
        };
        fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        assert!(import(&public), "gpg takes the public key");
        command.env("GNUPGHOME", directory.path());
    }
    command.args(["verify-commit", id]).output().unwrap().status.success()
}

/// Objects of the repository that are commits.
fn commits_on_disk(node: &TestNode) -> BTreeSet<String> {
    let listed = git(
        &node.path("a.git"),
        &["cat-file", "--batch-all-objects", "--batch-check=%(objecttype) %(objectname)"],
    );
    listed.lines().filter_map(|line| line.strip_prefix("commit ")).map(str::to_owned).collect()
}

async fn every_commit_is_signed(key: &str, format: ObjectFormat) {
    let (node, other) = (node_with(signing(key)).await, node_with(signing(key)).await);
    let repository = repository(&node, format).await;
    self::repository(&other, format).await;
    let before = commits_on_disk(&node);
    let made = commits(&node, &repository, true).await;
    let elsewhere = commits(&other, &repository, true).await;
    assert_eq!(made, elsewhere, "the same on every node");
    let gpg = Command::new("gpg").arg("--version").output().is_ok();
    for (what, id) in &made {
        if key.starts_with("ssh-") || gpg {
            assert!(verified_by_git(&node, key, id).await, "{what}: git believes it");
        }
        let found = signatures(&node, &repository, &[id]).await;
        assert_eq!(found[0].signer(), Signer::System, "{what}");
        let committer = found[0].committer.clone().unwrap();
        assert_eq!(
            (committer.name.as_slice(), committer.email.as_slice()),
            (&b"Jane Doe"[..], &b"jane@example.com"[..])
        );
    }
    git(&node.path("a.git"), &["fsck", "--strict", "--no-dangling"]);
    let after = commits_on_disk(&node);
    let new: BTreeSet<String> = after.difference(&before).cloned().collect();
    assert_eq!(new, made.into_iter().map(|(_, id)| id).collect(), "no commit without a signature is left");
    node.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_ssh_key_of_ed25519() {
    every_commit_is_signed("ssh-ed25519", ObjectFormat::Sha1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_ssh_key_of_rsa_in_sha256() {
    every_commit_is_signed("ssh-rsa", ObjectFormat::Sha256).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_open_pgp_key_of_ed25519_in_sha256() {
    every_commit_is_signed("openpgp-ed25519", ObjectFormat::Sha256).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_open_pgp_key_of_rsa_below_another() {
    every_commit_is_signed("openpgp-subkey", ObjectFormat::Sha1).await;
}

#[tokio::test]
async fn only_what_asks_is_signed() {
    let plain = TestNode::start().await;
    let quiet = node_with(signing("ssh-ed25519")).await;
    let eager = node_with(SigningConfig { sign_unasked: true, ..signing("ssh-ed25519") }).await;
    let mut made = Vec::new();
    for (node, sign) in [(&plain, true), (&quiet, false), (&eager, false), (&eager, true)] {
        let _ = fs::remove_dir_all(node.path("a.git"));
        let repository = repository(node, ObjectFormat::Sha1).await;
        let ids: Vec<String> = commits(node, &repository, sign).await.into_iter().map(|(_, id)| id).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let signed = signatures(node, &repository, &ids).await.len();
        made.push((signed, ids.iter().map(ToString::to_string).collect::<Vec<_>>()));
    }
    assert_eq!(made.iter().map(|(signed, _)| *signed).collect::<Vec<_>>(), [0, 0, 6, 6]);
    assert_eq!(made[0], made[1], "a key that is not used changes nothing");
    assert_eq!(made[2], made[3]);
    assert!(public_key(&plain).await.is_empty());
    assert!(public_key(&quiet).await.starts_with(b"ssh-ed25519 "));
}

#[tokio::test]
async fn somebody_else_may_be_the_committer_and_keys_are_rotated() {
    let named = SigningConfig {
        committer_name: "GitLab".into(),
        committer_email: "noreply@example.com".into(),
        ..signing("openpgp-rsa")
    };
    let node = node_with(named).await;
    let before = repository(&node, ObjectFormat::Sha1).await;
    let made = commits(&node, &before, true).await;
    let ids: Vec<&str> = made.iter().map(|(_, id)| id.as_str()).collect();
    let (picked, files) = (made[2].1.as_str(), made[4].1.as_str());
    let who =
        |id: &str| git(&node.path("a.git"), &["show", "--no-patch", "--format=%an %at|%cn <%ce> %ct", id]);
    assert_eq!(who(picked), "F 1600000002|GitLab <noreply@example.com> 1690000000");
    assert_eq!(who(files), "Somebody 1690000000|GitLab <noreply@example.com> 1690000000");
    for found in signatures(&node, &before, &ids).await {
        assert_eq!(found.signer(), Signer::System);
        let committer = CommitAuthor {
            name: b"GitLab".to_vec(),
            email: b"noreply@example.com".to_vec(),
            date: Some(moment()),
            timezone: b"+0200".to_vec(),
        };
        assert_eq!(found.committer, Some(committer));
    }

    // The same disk's commits, as nodes with other keys see them.
    let copy = |to: &TestNode| {
        let copied = Command::new("cp").arg("-a").arg(node.path("a.git")).arg(to.root()).status().unwrap();
        assert!(copied.success());
    };
    let rotated = SigningConfig { rotated_signing_keys: vec![key_file("openpgp-rsa")], ..signing("ssh-rsa") };
    for (config, signer) in [(rotated, Signer::System), (signing("ssh-rsa"), Signer::User)] {
        let later = node_with(config).await;
        copy(&later);
        let found = signatures(&later, &later.named("a.git"), &ids).await;
        assert_eq!(found.len(), ids.len());
        assert!(found.iter().all(|found| found.signer() == signer), "{signer:?}");
    }
}

#[tokio::test]
async fn rebases_are_not_signed() {
    let node = node_with(SigningConfig { sign_unasked: true, ..signing("ssh-ed25519") }).await;
    let repository = repository(&node, ObjectFormat::Sha1).await;
    let request = UserRebaseToRefRequest {
        repository: Some(repository.clone()),
        user: Some(user()),
        source_sha: git(&node.path("a.git"), &["rev-parse", "feature"]),
        target_ref: b"refs/merge-requests/1/merge".to_vec(),
        first_parent_ref: b"refs/heads/main".to_vec(),
        timestamp: Some(moment()),
        ..UserRebaseToRefRequest::default()
    };
    let rebased = operations(&node).user_rebase_to_ref(request).await.unwrap().into_inner().commit_id;
    assert!(signatures(&node, &repository, &[&rebased]).await.is_empty());
}

#[tokio::test]
async fn a_key_that_cannot_be_used_keeps_the_node_from_starting() {
    let error = TestNode::try_start_with(|config| config.signing = Some(signing("ssh-passphrase"))).await;
    let error = error.err().unwrap().to_string();
    assert!(error.ends_with("tests/keys/ssh-passphrase: it has a passphrase"), "{error}");
}

#[test]
fn the_configuration_is_checked() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("node.toml");
    let check = |signing: &str| {
        let text = format!(
            "listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n[[storage]]\nname = \"a\"\npath = {:?}\n[signing]\n{signing}",
            directory.path()
        );
        fs::write(&path, text).unwrap();
        let mut node = Command::new(env!("CARGO_BIN_EXE_tabularium-node"));
        let output = node.arg("--check-config").arg("--config").arg(&path).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let key = |name: &str| format!("{:?}", key_file(name));
    let good = format!("signing_key = {}\nrotated_signing_keys = [{}]\n", key("ssh-rsa"), key("openpgp-rsa"));
    assert_eq!(check(&good), (Some(0), String::new()));
    for (signing, expected) in [
        (format!("signing_key = {}\n", key("ssh-passphrase")), "it has a passphrase"),
        (format!("signing_key = {}\n", key("openpgp-ecdsa")), "its kind is OpenPGP algorithm 19"),
        (good.replace("openpgp-rsa", "none"), "No such file"),
        (format!("{good}committer_name = \"GitLab\"\n"), "`signing.committer_email`"),
        (String::new(), "missing field `signing_key`"),
    ] {
        let (code, said) = check(&signing);
        assert_eq!(code, Some(78), "{said}");
        assert!(said.contains(expected) && !said.contains("BEGIN"), "{said}");
    }
}
