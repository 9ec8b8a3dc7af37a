//! What a session comes to, as a table.

mod gaps;

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
};

use crate::{
    checker::{Broken, Violation},
    history::{ErrorKind, Fault, History, Outcome},
};
use gaps::{Met, Stretch};

/// How many texts and breaches are shown.
const SHOWN: usize = 12;
/// From this many hexadecimal digits on, a word is an id.
const ID_LENGTH: usize = 16;
/// Faults that came together are told apart from all others: no gap can be laid to one of them.
const TOGETHER: &str = "(two at once)";

/// What a cluster of three cannot hide from clients: no quorum, no database, no way to another router.
const UNBEARABLE: [&str; 8] = [
    TOGETHER,
    "disk-full-2",
    "postgres-down",
    "postgres-gone",
    "postgres-restart",
    "postgres-stop",
    "lone-primary",
    "clock-router-1h",
];

/// Scenes are several faults at once.
fn is_bearable(kind: &str) -> bool {
    !UNBEARABLE.contains(&kind) && !kind.starts_with(crate::scenes::PREFIX)
}

/// Longest gaps in writes and in reads that are promised, in seconds.
const BARS: [(&str, f64, f64); 3] =
    [("kill-primary", 1.0, 1.0), ("kill-node", 1.0, 1.0), ("kill-router", 5.0, 1.0)];

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
}

/// One line of the table of faults.
struct Line<'a> {
    kind: &'a str,
    times: usize,
    /// Pushes with something acknowledged, in its time.
    acknowledged: usize,
    writes: Column,
    reads: Column,
}

struct Column {
    /// Longest time without a success anywhere in a hot repository.
    gap: f64,
    /// Longest time that one client needed until it had its success.
    wait: f64,
    errors: usize,
    /// Those of them that nothing had been sent for.
    errors_before_sending: usize,
}

impl Column {
    fn new(met: &Met, counts: impl Fn(&Stretch) -> bool) -> Self {
        let longest = |stretches: &[Stretch]| {
            let counted = stretches.iter().filter(|stretch| counts(stretch));
            counted.map(Stretch::seconds).fold(0.0, f64::max)
        };
        let errors = met.errors.iter().filter(|error| counts(error)).count();
        let errors_before_sending = met.errors_before_sending.iter().filter(|error| counts(error)).count();
        Self { gap: longest(&met.gaps), wait: longest(&met.waits), errors, errors_before_sending }
    }
}

fn lines<'a>(faults: &'a [Fault], writes: &Met, reads: &Met) -> Vec<Line<'a>> {
    let during = |fault: &Fault, stretch: &Stretch| stretch.meets(fault.begun, fault.healed);
    let alone = |fault: &Fault| {
        let span = Stretch { begun: fault.begun, ended: fault.healed };
        faults.iter().filter(|other| during(other, &span)).count() == 1
    };
    let mut kinds: BTreeMap<&str, Vec<&Fault>> = BTreeMap::new();
    for fault in faults {
        kinds.entry(if alone(fault) { &fault.kind } else { TOGETHER }).or_default().push(fault);
    }
    // A gap between two faults belongs to the one that it mostly fell into.
    let blamed = |stretch: &Stretch| {
        let met = faults.iter().filter(|fault| during(fault, stretch));
        met.max_by_key(|fault| stretch.ended.min(fault.healed) - stretch.begun.max(fault.begun))
    };
    let quiet = |stretch: &Stretch| blamed(stretch).is_none();
    let acknowledged = |counts: &dyn Fn(&Stretch) -> bool| {
        let moments = writes.successes.iter().map(|moment| Stretch { begun: *moment, ended: *moment });
        moments.filter(|moment| counts(moment)).count()
    };
    let none = Line {
        kind: "(none)",
        times: 0,
        acknowledged: acknowledged(&quiet),
        writes: Column::new(writes, quiet),
        reads: Column::new(reads, quiet),
    };
    let of_kind = kinds.into_iter().map(|(kind, faults)| {
        let counts = |stretch: &Stretch| {
            blamed(stretch).is_some_and(|blamed| faults.iter().any(|fault| std::ptr::eq(*fault, blamed)))
        };
        let acknowledged = acknowledged(&counts);
        let (writes, reads) = (Column::new(writes, counts), Column::new(reads, counts));
        Line { kind, times: faults.len(), acknowledged, writes, reads }
    });
    std::iter::once(none).chain(of_kind).collect()
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (writes, reads) = (Met::writes(self.history), Met::reads(self.history));
        let lines = lines(&self.history.faults, &writes, &reads);
        writeln!(
            f,
            "{:<32}{:>6}{:>8} |{:>9}{:>9}{:>7} |{:>9}{:>9}{:>7}",
            "fault", "times", "acknow-", "writes:", "", "", "reads:", "", ""
        )?;
        writeln!(
            f,
            "{:<32}{:>6}{:>8} |{:>9}{:>9}{:>7} |{:>9}{:>9}{:>7}",
            "", "", "ledged", "gap s", "wait s", "errors", "gap s", "wait s", "errors"
        )?;
        for Line { kind, times, acknowledged, writes, reads } in &lines {
            write!(f, "{kind:<32}{times:>6}{acknowledged:>8}")?;
            for Column { gap, wait, errors, .. } in [writes, reads] {
                write!(f, " |{gap:>9.2}{wait:>9.2}{errors:>7}")?;
            }
            writeln!(f)?;
        }
        writeln!(f)?;
        for (kind, writes, reads) in BARS {
            for line in lines.iter().filter(|line| line.kind == kind) {
                write_bar(f, &format!("{kind} longest write gap"), line.writes.gap, writes)?;
                write_bar(f, &format!("{kind} longest read gap"), line.reads.gap, reads)?;
            }
        }
        let failed_reads = self.history.reads.iter().filter(|read| read.refs.is_none()).count();
        let bearable = || lines.iter().filter(|line| is_bearable(line.kind));
        let errors: usize = bearable().map(|line| line.writes.errors_before_sending).sum();
        write_bar(f, "errors of writes that had not begun", count(errors), 0.0)?;
        let errors: usize = bearable().map(|line| line.reads.errors).sum();
        write_bar(f, "errors of reads", count(errors), 0.0)?;
        writeln!(f)?;
        writeln!(f, "{:<20}{:>8}", "acknowledged", self.updates(Outcome::Acknowledged))?;
        writeln!(f, "{:<20}{:>8}", "refused or not sent", self.updates(Outcome::Failed))?;
        writeln!(f, "{:<20}{:>8}", "unknown", self.updates(Outcome::Unknown))?;
        let (before, under_way) = (self.errors(ErrorKind::BeforeSending), self.errors(ErrorKind::UnderWay));
        writeln!(f, "{:<20}{before:>8} before sending, {under_way} under way", "pushes with errors")?;
        let answered = self.history.reads.len() - failed_reads;
        writeln!(f, "{:<20}{answered:>8} and {failed_reads} with errors", "reads")?;
        for broken in Broken::ALL {
            let count = self.violations.iter().filter(|violation| violation.broken == broken).count();
            writeln!(f, "{:<20}{count:>8}", broken.name())?;
        }
        write_texts(f, self.history)?;
        for violation in self.violations.iter().take(SHOWN) {
            writeln!(f, "BROKEN {violation}")?;
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn count(count: usize) -> f64 {
    count as f64
}

fn write_bar(f: &mut fmt::Formatter<'_>, name: &str, value: f64, bar: f64) -> fmt::Result {
    writeln!(f, "{name} {value:.2} <={bar} {}", if value <= bar { "ok" } else { "short" })
}

/// What git said most often, with what differs from push to push left out.
fn write_texts(f: &mut fmt::Formatter<'_>, history: &History) -> fmt::Result {
    let mut texts: BTreeMap<String, usize> = BTreeMap::new();
    let writes = history.writes.iter().map(|write| ("push", &write.said));
    let said = writes.chain(history.reads.iter().map(|read| ("read", &read.said)));
    for (what, said) in said.filter(|(_, said)| !said.is_empty()) {
        *texts.entry(format!("{what}: {}", generic(said))).or_default() += 1;
    }
    let mut texts: Vec<_> = texts.into_iter().collect();
    texts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (text, count) in texts.iter().take(SHOWN) {
        writeln!(f, "{count:>6} x {text}")?;
    }
    Ok(())
}

fn generic(said: &str) -> String {
    const LONGEST: usize = 200;
    let mut text = String::new();
    for word in said.split(' ').filter(|word| !word.starts_with("hint:")) {
        let id = word.len() >= ID_LENGTH && word.chars().take(ID_LENGTH).all(|c| c.is_ascii_hexdigit());
        let place = word.contains("refs/heads/") || word.contains("://");
        let word = match (id, place) {
            (true, _) => "ID",
            (false, true) => "…",
            (false, false) => word,
        };
        // Writing to a string cannot fail.
        let _ = write!(text, "{word} ");
    }
    text.chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(kind: &str, begun: u64, healed: u64) -> Fault {
        Fault { kind: kind.into(), target: "node-1".into(), begun, healed }
    }

    #[test]
    fn gaps_are_told_under_the_fault_they_fall_into() {
        let stretch = |begun, ended| Stretch { begun, ended };
        let writes = Met {
            gaps: vec![stretch(0, 10_000_000), stretch(90_000_000, 150_000_000)],
            waits: Vec::new(),
            errors: vec![stretch(310_000_000, 320_000_000)],
            errors_before_sending: Vec::new(),
            successes: vec![5_000_000, 110_000_000, 120_000_000],
        };
        let faults = [
            fault("kill", 100_000_000, 200_000_000),
            fault("stop", 300_000_000, 400_000_000),
            fault("cut", 350_000_000, 400_000_000),
        ];
        let lines = lines(&faults, &writes, &Met::default());
        let told: Vec<_> = lines.iter().map(|line| (line.kind, line.times, line.writes.gap)).collect();
        assert_eq!(told, [("(none)", 0, 10.0), (TOGETHER, 2, 0.0), ("kill", 1, 60.0)]);
        assert_eq!(lines[1].writes.errors, 1);
        let acknowledged: Vec<_> = lines.iter().map(|line| line.acknowledged).collect();
        assert_eq!(acknowledged, [1, 0, 2]);
    }

    #[test]
    fn texts_are_counted_without_what_differs() {
        let one = generic(
            "fatal: unable to access 'http://127.0.0.1:1/a.git/': x (943749b34f214f83ba47c7cf5594d48b)",
        );
        assert_eq!(one, "fatal: unable to access … x (943749b34f214f83ba47c7cf5594d48b) ");
        assert_eq!(generic("at 943749b34f214f83ba47c7cf5594d48b now"), "at ID now ");
    }
}
