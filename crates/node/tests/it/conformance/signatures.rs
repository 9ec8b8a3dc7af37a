//! Commits that are signed have the same ids on the node and on GitLab's Gitaly: its replicas vote on them together.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use tabularium_node::config::SigningConfig;

use super::{
    exchange::{Target, Wire},
    same,
    seat::{Format, Seat},
    table::Table,
};
use crate::signing::key_file;

/// The RPCs whose commits are signed.
const SIGNING: [&str; 6] = [
    "OperationService/UserCherryPick",
    "OperationService/UserCommitFiles",
    "OperationService/UserMergeBranch",
    "OperationService/UserMergeToRef",
    "OperationService/UserRevert",
    "OperationService/UserSquash",
];

/// OpenPGP is not among them: Gitaly 16.11 puts a random number into such a signature.
const KEYS: [&str; 2] = ["ssh-ed25519", "ssh-rsa"];

async fn the_same_commits(programs: &Path, key: &str, format: Format, committer: bool) {
    let wire = Wire::new();
    // Beside what else that Gitaly reads, which may have another root.
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::copy(key_file(key), directory.path().join(key)).unwrap();
    let key = directory.path().join(key);
    let (committer_name, committer_email) = if committer { ("GitLab", "noreply@x") } else { ("", "") };
    let settings = format!(
        "signing_key = {:?}\ncommitter_name = {committer_name:?}\ncommitter_email = {committer_email:?}",
        key.display().to_string()
    );
    let gitaly = Seat::gitaly_with(programs, format, &settings).await;
    let signing = SigningConfig {
        signing_key: key,
        rotated_signing_keys: Vec::new(),
        committer_name: committer_name.to_owned(),
        committer_email: committer_email.to_owned(),
        // This Gitaly is not asked.
        sign_unasked: true,
    };
    let node = Seat::node_with(format, |config| config.signing = Some(signing)).await;
    let mut signed = BTreeSet::new();
    let tables = Table::all();
    let rows = tables.iter().flat_map(|table| &table.rows);
    for row in rows.filter(|row| SIGNING.contains(&row.method.as_str()) && row.gitaly.is_empty()) {
        let expected = wire.exchange(&gitaly, row, Target::AsWritten).await;
        let answer = wire.exchange(&node, row, Target::AsWritten).await;
        assert!(same(&expected, &answer), "{}:\n{expected:#?}\n{answer:#?}", row.name());
        if answer[0] == "OK" && answer != row.answer {
            signed.insert(row.method.as_str());
        }
    }
    assert_eq!(signed.into_iter().collect::<Vec<_>>(), SIGNING);
    node.leave().await;
    gitaly.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs GitLab's program: GITALY_BIN"]
async fn gitaly_makes_the_same_commits() {
    let programs = PathBuf::from(std::env::var_os("GITALY_BIN").expect("GITALY_BIN: a folder with gitaly"));
    for key in KEYS {
        the_same_commits(&programs, key, Format::Sha1, false).await;
    }
    the_same_commits(&programs, KEYS[0], Format::Sha1, true).await;
    the_same_commits(&programs, KEYS[0], Format::Sha256, false).await;
}
