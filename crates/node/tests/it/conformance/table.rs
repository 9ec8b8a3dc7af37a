//! The tables: text files of exchanges, each a request and what is answered to it.
//!
//! ```text
//! [RefService/FindTag]                      the RPC of what follows
//! : a tag that is not there                 what is tried
//! > tag_name: "none"                        a message of the request, in protobuf's text format
//! < NOT_FOUND tag does not exist            what the node answers: the status,
//! < detail [gitaly.FindTagError] { … }      its detail, or the messages of an answer that is OK,
//! < + a.git refs/heads/new $main            and what is on the disk afterwards that was not there before, or the reverse
//! = …                                       the same in a repository of SHA-256, where more than ids is different
//! ! NOT_FOUND …                             what Gitaly 16.11 answers, where that is something else
//! ? why                                     and why the node does not
//! ```
//!
//! In a first message the repository is filled in: `a.git`, unless another one is named.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

/// What one side says in the end.
pub(super) type Answer = Vec<String>;

/// One exchange.
#[derive(Debug, Clone, Default)]
pub(super) struct Row {
    /// `RefService/FindTag`.
    pub(super) method: String,
    pub(super) what: String,
    pub(super) request: Vec<String>,
    pub(super) answer: Answer,
    pub(super) sha256: Answer,
    pub(super) gitaly: Answer,
    pub(super) why: Vec<String>,
}

impl Row {
    /// What Gitaly 16.11 is expected to answer.
    pub(super) fn of_gitaly(&self) -> &Answer {
        if self.gitaly.is_empty() { &self.answer } else { &self.gitaly }
    }

    /// Takes an answer for what is to be expected.
    pub(super) fn learn(&mut self, answer: Answer, of_gitaly: bool) {
        if self.answer.is_empty() {
            self.answer = answer;
            return;
        }
        if of_gitaly {
            self.gitaly = answer;
        } else {
            let earlier = std::mem::replace(&mut self.answer, answer);
            if self.gitaly.is_empty() {
                self.gitaly = earlier;
            }
        }
        if self.answer == self.gitaly {
            self.gitaly.clear();
            self.why.clear();
        }
    }

    pub(super) fn name(&self) -> String {
        format!("{}: {}", self.method, self.what)
    }
}

/// A file of exchanges.
pub(super) struct Table {
    name: &'static str,
    /// What stands above the first exchange.
    preface: String,
    pub(super) rows: Vec<Row>,
}

/// The tables of exchanges with repositories that can be used.
const TABLES: &[&str] = &[
    "blobs",
    "branches",
    "changes",
    "commits",
    "diffs",
    "operations",
    "references",
    "repositories",
    "transports",
    "trees",
];

impl Table {
    pub(super) fn all() -> Vec<Self> {
        TABLES.iter().map(|name| Self::named(name)).collect()
    }

    pub(super) fn named(name: &'static str) -> Self {
        Self::parse(name, &fs::read_to_string(file(name)).unwrap())
    }

    fn parse(name: &'static str, text: &str) -> Self {
        let mut table = Self { name, preface: String::new(), rows: Vec::new() };
        let mut method = String::new();
        for (number, line) in text.lines().enumerate() {
            let place = format!("{name}.table, line {}", number + 1);
            if line.starts_with('#') {
                table.preface.push_str(line);
                table.preface.push('\n');
                assert!(table.rows.is_empty(), "{place}: a remark between exchanges");
            } else if let Some(header) = line.strip_prefix('[') {
                header.trim_end_matches(']').clone_into(&mut method);
            } else if let Some(what) = line.strip_prefix(": ") {
                let row = Row { method: method.clone(), what: what.to_owned(), ..Row::default() };
                assert!(table.rows.iter().all(|other| other.name() != row.name()), "{place}: twice");
                table.rows.push(row);
            } else if !line.is_empty() {
                let row = table.rows.last_mut().unwrap_or_else(|| panic!("{place}"));
                let (kind, rest) = line.split_at(1);
                let rest = rest.strip_prefix(' ').unwrap_or(rest).to_owned();
                match kind {
                    ">" => row.request.push(rest),
                    "<" => row.answer.push(rest),
                    "=" => row.sha256.push(rest),
                    "!" => row.gitaly.push(rest),
                    "?" => row.why.push(rest),
                    _ => panic!("{place}: {line}"),
                }
            }
        }
        table
    }

    /// Puts the table where it was read from.
    pub(super) fn write(&self) {
        let mut text = self.preface.clone();
        let mut method = "";
        for row in &self.rows {
            if row.method != method {
                method = &row.method;
                write!(text, "\n[{method}]\n").unwrap();
            }
            writeln!(text, ": {}", row.what).unwrap();
            for (kind, lines) in [
                ('>', &row.request),
                ('<', &row.answer),
                ('=', &row.sha256),
                ('!', &row.gitaly),
                ('?', &row.why),
            ] {
                for line in lines {
                    writeln!(text, "{}", format!("{kind} {line}").trim_end()).unwrap();
                }
            }
        }
        fs::write(file(self.name), text).unwrap();
    }
}

/// Where a table is.
fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/conformance").join(format!("{name}.table"))
}
