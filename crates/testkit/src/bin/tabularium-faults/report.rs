//! What a session comes to, as a table.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
};

use crate::{
    checker::{Broken, Violation},
    history::{ErrorKind, Fault, History, Micros, Outcome},
};

/// How many texts and breaches are shown.
const SHOWN: usize = 12;

/// From this many hexadecimal digits on, a word is an id.
const ID_LENGTH: usize = 16;

/// A time in which somebody waited for the cluster to do what was asked.
struct Pause {
    begun: Micros,
    ended: Micros,
}

/// What operations of one kind met.
#[derive(Default)]
struct Met {
    pauses: Vec<Pause>,
    /// When an operation that ended in an error began and ended.
    errors: Vec<Pause>,
}

/// The whole report.
pub(crate) struct Report<'a> {
    history: &'a History,
    violations: &'a [Violation],
}

impl<'a> Report<'a> {
    pub(crate) fn new(history: &'a History, violations: &'a [Violation]) -> Self {
        Self { history, violations }
    }

    fn updates(&self, outcome: Outcome) -> usize {
        let updates = self.history.writes.iter().flat_map(|write| &write.updates);
        updates.filter(|update| update.outcome == outcome).count()
    }

    fn errors(&self, kind: ErrorKind) -> usize {
        self.history.writes.iter().filter(|write| write.error == Some(kind)).count()
    }

    /// From the first try to the first answer that is no error, client by client.
    fn writes(&self) -> Met {
        met(self.history.writes.iter().map(|w| (&*w.client, w.invoked, w.completed, w.error.is_none())))
    }

    fn reads(&self) -> Met {
        let readers = self.history.reads.iter().filter(|read| read.client.starts_with("reader"));
        met(readers.map(|read| (&*read.client, read.invoked, read.completed, read.refs.is_some())))
    }
}

fn met<'h>(operations: impl Iterator<Item = (&'h str, Micros, Micros, bool)>) -> Met {
    let mut met = Met::default();
    let mut waiting: BTreeMap<&str, Micros> = BTreeMap::new();
    for (client, invoked, completed, well) in operations {
        let begun = *waiting.entry(client).or_insert(invoked);
        if well {
            waiting.remove(client);
            met.pauses.push(Pause { begun, ended: completed });
        } else {
            met.errors.push(Pause { begun: invoked, ended: completed });
        }
    }
    // Who still waits has waited until now; the history ends with the last operation.
    let end = met.errors.iter().chain(&met.pauses).map(|pause| pause.ended).max().unwrap_or(0);
    met.pauses.extend(waiting.into_values().map(|begun| Pause { begun, ended: end }));
    met
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn seconds(span: Micros) -> f64 {
    span as f64 / 1e6
}

/// One line of the table of faults.
struct Line {
    kind: String,
    times: usize,
    write_gap: Micros,
    read_gap: Micros,
    write_errors: usize,
    read_errors: usize,
}

fn lines(faults: &[Fault], writes: &Met, reads: &Met) -> Vec<Line> {
    let mut kinds: BTreeMap<&str, Vec<&Fault>> = BTreeMap::new();
    for fault in faults {
        kinds.entry(&fault.kind).or_default().push(fault);
    }
    let line = |kind: &str, times: usize, counts: &dyn Fn(&Pause) -> bool| {
        let longest = |met: &Met| {
            let pauses = met.pauses.iter().filter(|pause| counts(pause));
            pauses.map(|pause| pause.ended - pause.begun).max().unwrap_or(0)
        };
        let errors = |met: &Met| met.errors.iter().filter(|pause| counts(pause)).count();
        Line {
            kind: kind.to_owned(),
            times,
            write_gap: longest(writes),
            read_gap: longest(reads),
            write_errors: errors(writes),
            read_errors: errors(reads),
        }
    };
    let during = |fault: &Fault, pause: &Pause| pause.ended >= fault.begun && pause.begun <= fault.healed;
    let quiet = line("(none)", 0, &|pause| !faults.iter().any(|fault| during(fault, pause)));
    let of_kind = |(kind, faults): (&&str, &Vec<&Fault>)| {
        line(kind, faults.len(), &|pause| faults.iter().any(|fault| during(fault, pause)))
    };
    std::iter::once(quiet).chain(kinds.iter().map(of_kind)).collect()
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (writes, reads) = (self.writes(), self.reads());
        writeln!(
            f,
            "{:<30} {:>5} {:>12} {:>11} {:>9} {:>9}",
            "fault", "times", "write gap s", "read gap s", "write err", "read err"
        )?;
        for line in lines(&self.history.faults, &writes, &reads) {
            let Line { kind, times, write_gap, read_gap, write_errors, read_errors } = line;
            let (write_gap, read_gap) = (seconds(write_gap), seconds(read_gap));
            writeln!(
                f,
                "{kind:<30} {times:>5} {write_gap:>12.2} {read_gap:>11.2} {write_errors:>9} {read_errors:>9}"
            )?;
        }
        writeln!(f)?;
        let failed_reads = self.history.reads.iter().filter(|read| read.refs.is_none()).count();
        writeln!(f, "acknowledged {}", self.updates(Outcome::Acknowledged))?;
        writeln!(f, "failed       {}", self.updates(Outcome::Failed))?;
        writeln!(f, "unknown      {}", self.updates(Outcome::Unknown))?;
        writeln!(
            f,
            "errors       {} before sending, {} under way",
            self.errors(ErrorKind::BeforeSending),
            self.errors(ErrorKind::UnderWay)
        )?;
        writeln!(f, "reads        {} ({failed_reads} failed)", self.history.reads.len())?;
        for broken in Broken::ALL {
            let count = self.violations.iter().filter(|violation| violation.broken == broken).count();
            writeln!(f, "{:<18} {count}", broken.name())?;
        }
        write_texts(f, self.history)?;
        for violation in self.violations.iter().take(SHOWN) {
            writeln!(f, "BROKEN {violation}")?;
        }
        Ok(())
    }
}

/// What git said most often, with what differs from push to push left out.
fn write_texts(f: &mut fmt::Formatter<'_>, history: &History) -> fmt::Result {
    let mut texts: BTreeMap<String, usize> = BTreeMap::new();
    let said =
        history.writes.iter().map(|write| &write.said).chain(history.reads.iter().map(|read| &read.said));
    for said in said.filter(|said| !said.is_empty()) {
        *texts.entry(generic(said)).or_default() += 1;
    }
    let mut texts: Vec<_> = texts.into_iter().collect();
    texts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (text, count) in texts.iter().take(SHOWN) {
        writeln!(f, "{count:>6} x {text}")?;
    }
    Ok(())
}

fn generic(said: &str) -> String {
    let mut text = String::new();
    for word in said.split(' ').filter(|word| !word.starts_with("hint:")) {
        let id = word.len() >= ID_LENGTH && word.chars().take(ID_LENGTH).all(|c| c.is_ascii_hexdigit());
        let place = word.contains("refs/heads/") || word.contains("://");
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "{} ",
            if id {
                "ID"
            } else if place {
                "…"
            } else {
                word
            }
        );
    }
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_lasts_until_an_answer_that_is_no_error() {
        let operations = [("a", 0, 10, true), ("a", 20, 30, false), ("b", 25, 40, true), ("a", 35, 60, true)];
        let met = met(operations.into_iter());
        let longest = met.pauses.iter().map(|pause| pause.ended - pause.begun).max();
        assert_eq!(longest, Some(40));
        assert_eq!(met.errors.len(), 1);
    }

    #[test]
    fn who_never_gets_an_answer_waits_until_the_end() {
        let met = met([("a", 5, 10, false), ("b", 0, 90, true)].into_iter());
        assert_eq!(met.pauses.iter().map(|pause| pause.ended - pause.begun).max(), Some(90));
        assert_eq!(met.pauses.len(), 2);
    }

    #[test]
    fn pauses_are_told_under_the_faults_they_fall_into() {
        let fault = Fault { kind: "kill".into(), target: "node-1".into(), begun: 100, healed: 200 };
        let writes = met([("a", 0, 10, true), ("a", 90, 150, true)].into_iter());
        let lines = lines(&[fault], &writes, &Met::default());
        assert_eq!((lines[0].write_gap, lines[1].write_gap), (10, 60));
    }
}
