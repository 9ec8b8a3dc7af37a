//! Judges a history. Knows nothing of clusters: what is written in the history decides.
//!
//! A ref is a register with compare-and-set, and no two pushes bring the same value. So the updates that were done form
//! one chain, each standing on the value before, and the chain can be put together without guessing: what was
//! acknowledged is in it, what failed is not, and what nobody knows is in it exactly when its value is found under an
//! acknowledged update or on a disk at the end. What only a reader saw has vanished. Where a ref was deleted the chain is cut into *lives*.
//!
//! With the chain known, the order of everything that touched the ref is known up to reads of one and the same value,
//! and real time decides: whatever ended before something else began must not come after it.

mod chain;
mod order;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::history::{Finding, History, Micros, Outcome, Read, Update, Value, Write};

/// A promise that was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Broken {
    /// Acknowledged, and gone.
    Lost,
    /// Replicas differ after healing.
    Diverged,
    /// A read that began after an acknowledgement shows less.
    Stale,
    /// Two updates were acknowledged on top of one value.
    Twice,
    /// Two updates were done on top of one value, whatever their clients were told.
    Forked,
    /// Reported as failed, and done.
    FailureDone,
    /// A value that nobody brought.
    Foreign,
    /// Part of an atomic push.
    Torn,
    /// Updates that are done in an order that real time forbids.
    Disordered,
    /// Something was left on a node, or is not as it should be there.
    Unclean,
    /// A read shows less than one that had ended before, of a write that was not acknowledged yet.
    Unsteady,
    /// Seen by a reader, never acknowledged, and gone.
    Vanished,
}

impl Broken {
    pub(crate) const ALL: [Self; 12] = [
        Self::Lost,
        Self::Diverged,
        Self::Stale,
        Self::Twice,
        Self::Forked,
        Self::FailureDone,
        Self::Foreign,
        Self::Torn,
        Self::Disordered,
        Self::Unclean,
        Self::Unsteady,
        Self::Vanished,
    ];

    /// Whether it was promised. Replicas take a write one after the other, so what is not acknowledged yet may be seen and
    /// not be seen, or go with the node that had it.
    pub(crate) fn is_promised(self) -> bool {
        !matches!(self, Self::Unsteady | Self::Vanished)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Diverged => "diverged",
            Self::Stale => "stale",
            Self::Twice => "acknowledged twice",
            Self::Forked => "forked",
            Self::FailureDone => "failure done",
            Self::Foreign => "foreign",
            Self::Torn => "torn",
            Self::Disordered => "disordered",
            Self::Unclean => "unclean",
            Self::Unsteady => "unsteady (told)",
            Self::Vanished => "vanished (told)",
        }
    }
}

/// One breach, with what is needed to find it in the history.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Violation {
    pub(crate) broken: Broken,
    pub(crate) place: String,
    pub(crate) detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.broken.name(), self.place, self.detail)
    }
}

/// When something happened. What nobody saw the end of may still happen at any time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) invoked: Micros,
    pub(crate) completed: Micros,
}

/// An update with its push.
#[derive(Debug, Clone, Copy)]
struct Step<'a> {
    push: usize,
    write: &'a Write,
    update: &'a Update,
}

impl Step<'_> {
    fn span(&self) -> Span {
        let completed = match self.update.outcome {
            Outcome::Acknowledged => self.write.completed,
            Outcome::Failed | Outcome::Unknown => Micros::MAX,
        };
        Span { invoked: self.write.invoked, completed }
    }

    fn acknowledged(&self) -> bool {
        self.update.outcome == Outcome::Acknowledged
    }
}

impl fmt::Display for Step<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match self.update.outcome {
            Outcome::Acknowledged => "acknowledged",
            Outcome::Failed => "failed",
            Outcome::Unknown => "unknown",
        };
        let Write { client, gateway, invoked, completed, .. } = self.write;
        let (old, new) = (short(&self.update.old), short(&self.update.new));
        write!(f, "{old}..{new} ({outcome}, {client} by gateway {gateway}, {invoked} to {completed})")
    }
}

/// A read as one ref sees it.
#[derive(Debug, Clone, Copy)]
struct Look<'a> {
    read: &'a Read,
    value: Option<&'a str>,
}

impl Look<'_> {
    fn span(&self) -> Span {
        Span { invoked: self.read.invoked, completed: self.read.completed }
    }
}

impl fmt::Display for Look<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Read { client, gateway, invoked, completed, .. } = self.read;
        let value = self.value.map_or("nothing", shortened);
        write!(f, "read of {value} ({client} by gateway {gateway}, {invoked} to {completed})")
    }
}

fn shortened(value: &str) -> &str {
    value.get(..10).unwrap_or(value)
}

fn short(value: &Value) -> &str {
    value.as_deref().map_or("nothing", shortened)
}

/// Whether nothing that was promised is broken.
pub(crate) fn promises_hold(violations: &[Violation]) -> bool {
    !violations.iter().any(|violation| violation.broken.is_promised())
}

/// All that is wrong, in a stable order.
pub(crate) fn check(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    let repositories: BTreeSet<&str> =
        history.writes.iter().map(|write| &*write.repository).chain(disk_names(history)).collect();
    for repository in repositories {
        check_repository(history, repository, &mut violations);
    }
    violations.extend(history.findings.iter().map(|Finding { what, detail }| Violation {
        broken: Broken::Unclean,
        place: what.clone(),
        detail: detail.clone(),
    }));
    violations.sort();
    violations
}

fn disk_names(history: &History) -> impl Iterator<Item = &str> {
    history.disks.iter().map(|disk| &*disk.repository)
}

fn check_repository(history: &History, repository: &str, violations: &mut Vec<Violation>) {
    let disks: Vec<_> = history.disks.iter().filter(|disk| disk.repository == repository).collect();
    for pair in disks.windows(2).filter(|pair| pair[0].refs != pair[1].refs) {
        let (one, other) = (pair[0], pair[1]);
        let names: BTreeSet<_> = one.refs.keys().chain(other.refs.keys()).collect();
        let differing: Vec<_> =
            names.into_iter().filter(|name| one.refs.get(*name) != other.refs.get(*name)).collect();
        let detail = format!("{} and {} differ in {differing:?}", one.storage, other.storage);
        violations.push(Violation { broken: Broken::Diverged, place: repository.to_owned(), detail });
    }

    let mut steps: BTreeMap<&str, Vec<Step<'_>>> = BTreeMap::new();
    for (push, write) in history.writes.iter().enumerate().filter(|(_, w)| w.repository == repository) {
        for update in &write.updates {
            steps.entry(&update.reference).or_default().push(Step { push, write, update });
        }
    }
    // A ref that is only on a disk or in a read is one that nobody brought.
    let reads = || history.reads.iter().filter(|read| read.repository == repository);
    let seen = reads().filter_map(|read| read.refs.as_ref()).chain(disks.iter().map(|disk| &disk.refs));
    for reference in seen.flat_map(BTreeMap::keys) {
        steps.entry(reference).or_default();
    }

    let mut done = BTreeSet::new();
    for (reference, steps) in &steps {
        let looks: Vec<_> = reads()
            .filter_map(|read| {
                let refs = read.refs.as_ref()?;
                Some(Look { read, value: refs.get(*reference).map(String::as_str) })
            })
            .collect();
        let last: Vec<Option<&str>> =
            disks.iter().map(|disk| disk.refs.get(*reference).map(String::as_str)).collect();
        let mut report = |broken, detail: String| {
            violations.push(Violation { broken, place: format!("{repository} {reference}"), detail });
        };
        let chain = chain::put_together(steps, &looks, &last, &mut report);
        if let Some(lives) = &chain.lives {
            order::check(lives, &looks, &mut report);
        }
        done.extend(chain.done.iter().map(|step| (step.push, *reference)));
    }
    check_atomic(history, repository, &done, violations);
}

fn check_atomic(
    history: &History,
    repository: &str,
    done: &BTreeSet<(usize, &str)>,
    violations: &mut Vec<Violation>,
) {
    let atomic = history.writes.iter().enumerate().filter(|(_, w)| w.atomic && w.repository == repository);
    for (push, write) in atomic {
        let is_done = |update: &&Update| done.contains(&(push, &*update.reference));
        let count = write.updates.iter().filter(is_done).count();
        if count != 0 && count != write.updates.len() {
            let missing =
                write.updates.iter().find(|update| !is_done(update)).map(|update| &update.reference);
            let detail = format!(
                "{count} of {} refs of {}'s push at {} are done; {missing:?} is not",
                write.updates.len(),
                write.client,
                write.invoked
            );
            violations.push(Violation { broken: Broken::Torn, place: repository.to_owned(), detail });
        }
    }
}
