//! What happened, in the order in which it ended: JSON lines that are enough to judge a session again.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

const FILE_NAME: &str = "history.jsonl";

/// Microseconds since the session began.
pub(crate) type Micros = u64;

/// What a ref points at; nothing when there is no such ref.
pub(crate) type Value = Option<String>;

/// One line.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    Session(Session),
    Write(Write),
    Read(Read),
    Fault(Fault),
    Disk(Disk),
    Finding(Finding),
}

/// How the session was started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Session {
    pub(crate) seed: u64,
    pub(crate) seconds: u64,
    pub(crate) nodes: u16,
}

/// How sure a client is of what became of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// git said that it is done.
    Acknowledged,
    /// git or the server said that it is not done and will not be.
    Failed,
    /// The connection broke, or what was said does not decide it.
    Unknown,
}

/// One ref of a push.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Update {
    pub(crate) reference: String,
    /// What it replaces: the server compares, so it is done on top of exactly this or not at all.
    pub(crate) old: Value,
    /// No two pushes ever bring the same value.
    pub(crate) new: Value,
    pub(crate) outcome: Outcome,
}

/// One `git push`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Write {
    pub(crate) client: String,
    pub(crate) gateway: usize,
    pub(crate) repository: String,
    pub(crate) invoked: Micros,
    pub(crate) completed: Micros,
    pub(crate) atomic: bool,
    pub(crate) updates: Vec<Update>,
    /// An error that is not the server's judgement on the push: something was not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<ErrorKind>,
    /// git's words, when it was not content.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) said: String,
}

/// When something was not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ErrorKind {
    /// Before the client had sent anything to be written.
    BeforeSending,
    /// While the push was under way.
    UnderWay,
}

/// One `git ls-remote`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Read {
    pub(crate) client: String,
    pub(crate) gateway: usize,
    pub(crate) repository: String,
    pub(crate) invoked: Micros,
    pub(crate) completed: Micros,
    /// Nothing when it failed.
    pub(crate) refs: Option<BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) said: String,
}

/// Something that was done to the cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Fault {
    pub(crate) kind: String,
    pub(crate) target: String,
    pub(crate) begun: Micros,
    /// When it was taken back and the cluster had a moment to notice.
    pub(crate) healed: Micros,
}

/// The refs of one replica when all was over, read from the node's disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Disk {
    pub(crate) repository: String,
    pub(crate) storage: String,
    pub(crate) refs: BTreeMap<String, String>,
}

/// Something else that is wrong after healing: what was left over, what `git fsck` said.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Finding {
    pub(crate) what: String,
    pub(crate) detail: String,
}

/// A whole session.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    pub(crate) session: Option<Session>,
    pub(crate) writes: Vec<Write>,
    pub(crate) reads: Vec<Read>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) findings: Vec<Finding>,
}

impl History {
    /// Reads what a [`Recorder`] wrote into a directory.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(FILE_NAME);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        let mut history = Self::default();
        for (number, line) in (1..).zip(BufReader::new(file).lines()) {
            let place = || format!("{}:{number}", path.display());
            history.add(serde_json::from_str(&line.with_context(place)?).with_context(place)?);
        }
        Ok(history)
    }

    pub(crate) fn add(&mut self, event: Event) {
        match event {
            Event::Session(session) => self.session = Some(session),
            Event::Write(write) => self.writes.push(write),
            Event::Read(read) => self.reads.push(read),
            Event::Fault(fault) => self.faults.push(fault),
            Event::Disk(disk) => self.disks.push(disk),
            Event::Finding(finding) => self.findings.push(finding),
        }
    }
}

/// Writes the history down while it happens.
pub(crate) struct Recorder {
    began: Instant,
    file: Mutex<File>,
    path: PathBuf,
}

impl Recorder {
    pub(crate) fn new(directory: &Path) -> Result<Self> {
        let path = directory.join(FILE_NAME);
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        Ok(Self { began: Instant::now(), file: Mutex::new(file), path })
    }

    pub(crate) fn now(&self) -> Micros {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// What has been written down until now.
    pub(crate) fn so_far(&self) -> Result<History> {
        let _no_half_line = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        History::read(self.path.parent().context("no directory")?)
    }

    /// One line, in one piece.
    pub(crate) fn record(&self, event: &Event) -> Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&line).with_context(|| self.path.display().to_string())
    }
}
