//! Repositories that cannot be used, for every RPC that is aimed at one. What all of them answer is the table's first
//! part; whoever answers otherwise is named behind it.

use super::{
    exchange::{Target, Wire},
    same,
    seat::{Format, STORAGE, Seat},
    show,
    table::{Row, Table},
    writes,
};

/// What is wrong, and what the repository is.
fn repositories() -> Vec<(&'static str, Option<String>)> {
    let named =
        |storage: &str, path: &str| Some(format!(r#"storage_name: "{storage}" relative_path: "{path}""#));
    vec![
        ("no repository", None),
        ("an empty repository", named("", "")),
        ("no storage", named("", "a.git")),
        ("an unknown storage", named("unknown", "a.git")),
        ("no path", named(STORAGE, "")),
        ("a path that escapes", named(STORAGE, "../a.git")),
        ("nothing there", named(STORAGE, "nothing.git")),
        ("no repository there", named(STORAGE, "broken.git")),
    ]
}

/// One request for every RPC: the first that the tables have.
fn requests(wire: &Wire) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for row in Table::all().into_iter().flat_map(|table| table.rows) {
        if rows.iter().all(|known| known.method != row.method) && wire.aims_at_a_repository(&row) {
            rows.push(row);
        }
    }
    rows
}

/// Tries everything, and answers the exchanges, and which of them went otherwise than expected.
async fn tried(seat: &Seat, table: &Table, of_gitaly: bool) -> (Vec<Row>, Vec<String>) {
    let wire = Wire::new();
    let find = |method: &str, what: &str| {
        table.rows.iter().find(|row| row.method == method && row.what == what).cloned().unwrap_or_default()
    };
    let mut rows = Vec::new();
    let mut wrong = Vec::new();
    for (what, repository) in repositories() {
        let all = find("*", what);
        if !all.answer.is_empty() {
            rows.push(all.clone());
        }
        for request in requests(&wire) {
            let mut row = find(&request.method, what);
            if row.answer.is_empty() {
                row.answer.clone_from(&all.answer);
            }
            row = Row { method: request.method, what: what.to_owned(), request: request.request, ..row };
            if !of_gitaly || wire.in_gitaly_16(&row) {
                let answer = wire.exchange(seat, &row, Target::Instead(repository.as_deref())).await;
                let expected = if of_gitaly { row.of_gitaly() } else { &row.answer };
                if !same(expected, &answer) {
                    wrong.push(show(&row, expected, &answer));
                    row.learn(answer, of_gitaly);
                    if !wire.in_gitaly_16(&row) {
                        row.gitaly.clear();
                    }
                }
            }
            row.request.clear();
            if row.answer != all.answer || !row.gitaly.is_empty() {
                rows.push(row);
            }
        }
    }
    rows.sort_by(|one, other| one.method.cmp(&other.method));
    (rows, wrong)
}

async fn try_all(seat: Seat, of_gitaly: bool) {
    let mut table = Table::named("unusable");
    let (rows, wrong) = tried(&seat, &table, of_gitaly).await;
    seat.leave().await;
    if writes() {
        table.rows = rows;
        table.write();
    } else {
        assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.concat());
        assert_eq!(rows.len(), table.rows.len(), "exchanges that nobody has");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_refuses_them() {
    try_all(Seat::node(Format::Sha1).await, false).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs GitLab's program: GITALY_BIN"]
async fn gitaly_refuses_them_alike() {
    let programs = std::env::var_os("GITALY_BIN").expect("GITALY_BIN: a folder with gitaly");
    try_all(Seat::gitaly(programs.as_ref(), Format::Sha1).await, true).await;
}
