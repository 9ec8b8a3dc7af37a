//! Every RPC that the node serves, what it answers, and what that leaves on the disk, as tables of exchanges.
//!
//! [`table`] tells how they are read. Each table is gone through in repositories of both object formats. The answers are
//! Gitaly's: where its program is at hand it is asked the same,
//!
//! ```text
//! GITALY_BIN=FOLDER cargo test -p tabularium-node --test it conformance -- --ignored
//! ```
//!
//! and a line of the table says why where the node answers otherwise. `CONFORMANCE_WRITE=1` makes both runs write what
//! they are answered into the tables instead of comparing.

mod exchange;
mod seat;
mod sha256;
mod signatures;
mod table;
mod unusable;

use std::{collections::BTreeSet, path::PathBuf};

use self::{
    exchange::{Target, Wire},
    seat::{Format, Seat},
    table::{Answer, Row, Table},
};
use crate::api;

/// Ends an answer of which the rest differs from run to run.
const ANYTHING: &str = "...";

/// Compares, or writes.
fn writes() -> bool {
    std::env::var_os("CONFORMANCE_WRITE").is_some()
}

/// An answer without what only one of the formats, or one run, shows.
fn in_any_format(answer: &Answer) -> Answer {
    let id = regex::Regex::new("[0-9a-f]{64}|[0-9a-f]{40}").unwrap();
    let long = regex::Regex::new("^[0-9]+ bytes, .*").unwrap();
    answer.iter().map(|line| long.replace(&id.replace_all(line, "ID"), "LONG").into_owned()).collect()
}

/// Whether that is what was expected. What git says when it fails differs, and no client reads it.
fn same(expected: &Answer, answer: &Answer) -> bool {
    let code = |answer: &Answer| answer.first().and_then(|line| line.split(' ').next()).map(str::to_owned);
    if code(expected).is_some_and(|code| code == "INTERNAL") {
        return code(answer) == code(expected);
    }
    let told = expected.iter().position(|line| line == ANYTHING);
    told.map_or(expected == answer, |told| expected[..told] == answer[..answer.len().min(told)])
}

/// What is different, as the table would have it.
fn show(row: &Row, expected: &Answer, answer: &Answer) -> String {
    let lines = |kind: &str, answer: &Answer| {
        answer.iter().map(|line| format!("{kind} {line}\n")).collect::<Vec<_>>().concat()
    };
    format!("[{}]\n: {}\n{}{}", row.method, row.what, lines("- <", expected), lines("+ <", answer))
}

/// Goes through a table with the node.
async fn node_answers(name: &'static str, format: Format) {
    let wire = Wire::new();
    let seat = Seat::node(format).await;
    let mut table = Table::named(name);
    let mut wrong = Vec::new();
    for row in &mut table.rows {
        let answer = wire.exchange(&seat, row, Target::AsWritten).await;
        let (expected, answer) = match format {
            Format::Sha1 => (row.answer.clone(), answer),
            Format::Sha256 if row.sha256.is_empty() => (in_any_format(&row.answer), in_any_format(&answer)),
            Format::Sha256 => (row.sha256.clone(), in_any_format(&answer)),
        };
        if same(&expected, &answer) {
            continue;
        }
        wrong.push(show(row, &expected, &answer));
        match format {
            Format::Sha1 => row.learn(answer, false),
            Format::Sha256 => row.sha256 = answer,
        }
    }
    if writes() {
        table.write();
    } else {
        assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), table.rows.len(), wrong.concat());
    }
    seat.leave().await;
}

macro_rules! tables {
    ($($name:ident)*) => { $(
        mod $name {
            use super::{Format, node_answers};

            #[tokio::test(flavor = "multi_thread")]
            async fn in_sha1() {
                node_answers(stringify!($name), Format::Sha1).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn in_sha256() {
                node_answers(stringify!($name), Format::Sha256).await;
            }
        }
    )* };
}

tables!(blobs branches changes commits diffs operations references repositories transports trees);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs GitLab's program: GITALY_BIN"]
async fn gitaly_answers_the_same() {
    let programs = PathBuf::from(std::env::var_os("GITALY_BIN").expect("GITALY_BIN: a folder with gitaly"));
    let wire = Wire::new();
    let seat = Seat::gitaly(&programs, Format::Sha1).await;
    let mut wrong = Vec::new();
    for mut table in Table::all() {
        for row in table.rows.iter_mut().filter(|row| wire.in_gitaly_16(row)) {
            let answer = wire.exchange(&seat, row, Target::AsWritten).await;
            if same(row.of_gitaly(), &answer) {
                continue;
            }
            if writes() {
                row.learn(answer, true);
            } else {
                wrong.push(show(row, row.of_gitaly(), &answer));
            }
        }
        if writes() {
            table.write();
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.concat());
    seat.leave().await;
}

#[test]
fn every_rpc_is_in_a_table_and_every_difference_has_its_reason() {
    let tables = Table::all();
    let rows = || tables.iter().flat_map(|table| &table.rows);
    let tried: BTreeSet<String> = rows().map(exchange::path).collect();
    assert_eq!(tried, api::on_node());
    for row in rows() {
        assert!(!row.answer.is_empty(), "{}: no answer", row.name());
        assert_eq!(row.gitaly.is_empty(), row.why.is_empty(), "{}", row.name());
    }
}

/// Mutators that need more than a request to change something, and where that is tried.
const CHANGED_ELSEWHERE: &[(&str, &str)] = &[
    ("RepositoryService/CreateRepositoryFromSnapshot", "files.rs: from another repository's snapshot"),
    ("RepositoryService/CreateRepositoryFromURL", "copies.rs: over HTTP"),
    ("RepositoryService/FetchRemote", "copies.rs: over HTTP"),
    ("RepositoryService/MigrateReferenceBackend", "there is no other one"),
    ("RepositoryService/ReplicateRepository", "copies.rs: from another node"),
    ("RepositoryService/RestoreRepository", "backups.rs: from a backup"),
    ("OperationService/UserSquash", "operations.rs: a commit that no reference holds"),
    ("CommitService/CommitLanguages", "a mutator by its name only: nothing is kept"),
];

#[test]
fn every_mutator_is_seen_to_change_something() {
    let wire = Wire::new();
    let tables = Table::all();
    let rows: Vec<&Row> = tables.iter().flat_map(|table| &table.rows).collect();
    for method in
        rows.iter().filter(|row| wire.changes(row)).map(|row| row.method.as_str()).collect::<BTreeSet<_>>()
    {
        let changed = |row: &&Row| {
            let disk = |line: &String| line.starts_with("+ ") || line.starts_with("- ");
            row.method == method && row.answer[0] == "OK" && row.answer.iter().any(disk)
        };
        let elsewhere = CHANGED_ELSEWHERE.iter().any(|(known, _)| *known == method);
        assert!(rows.iter().any(changed) != elsewhere, "{method}");
    }
}
