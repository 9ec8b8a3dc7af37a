//! Histories written by hand: good ones pass, and each promise is broken at least once.

use std::collections::BTreeMap;

use Outcome::{Acknowledged, Failed, Unknown};

use super::*;
use crate::history::{Disk, Finding};

const REPOSITORY: &str = "a.git";
const MAIN: &str = "refs/heads/main";

#[derive(Default)]
struct Told(History);

impl Told {
    fn push(
        mut self,
        (invoked, completed): (Micros, Micros),
        updates: &[(&str, &str, &str, Outcome)],
    ) -> Self {
        let updates: Vec<_> = updates
            .iter()
            .map(|(reference, old, new, outcome)| Update {
                reference: (*reference).to_owned(),
                old: value(old),
                new: value(new),
                outcome: *outcome,
            })
            .collect();
        self.0.writes.push(Write {
            client: "client".into(),
            gateway: 0,
            repository: REPOSITORY.into(),
            invoked,
            completed,
            atomic: updates.len() > 1,
            updates,
            error: None,
            said: String::new(),
        });
        self
    }

    /// Of `main`; an empty text is no ref.
    fn update(self, span: (Micros, Micros), old: &str, new: &str, outcome: Outcome) -> Self {
        self.push(span, &[(MAIN, old, new, outcome)])
    }

    fn read(mut self, (invoked, completed): (Micros, Micros), seen: &str) -> Self {
        self.0.reads.push(Read {
            client: "reader".into(),
            gateway: 0,
            repository: REPOSITORY.into(),
            invoked,
            completed,
            refs: Some(refs(&[(MAIN, seen)])),
            said: String::new(),
        });
        self
    }

    fn disk(mut self, storage: &str, seen: &[(&str, &str)]) -> Self {
        let disk = Disk { repository: REPOSITORY.into(), storage: storage.into(), refs: refs(seen) };
        self.0.disks.push(disk);
        self
    }

    /// Three replicas that have `main` there.
    fn at_the_end(self, seen: &str) -> Self {
        ["node-1", "node-2", "node-3"].iter().fold(self, |told, storage| told.disk(storage, &[(MAIN, seen)]))
    }

    fn broken(&self) -> Vec<Broken> {
        let mut broken: Vec<_> = check(&self.0).iter().map(|violation| violation.broken).collect();
        broken.dedup();
        broken
    }
}

fn value(text: &str) -> Value {
    (!text.is_empty()).then(|| text.to_owned())
}

fn refs(seen: &[(&str, &str)]) -> BTreeMap<String, String> {
    let there = seen.iter().filter(|(_, value)| !value.is_empty());
    there.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// `main` is created as `a` and goes to `b`.
fn two_updates() -> Told {
    Told::default().update((0, 10), "", "a", Acknowledged).update((20, 30), "a", "b", Acknowledged)
}

#[test]
fn a_quiet_history_is_good() {
    let told = two_updates().read((5, 6), "").read((11, 12), "a").read((21, 40), "a").read((31, 32), "b");
    assert_eq!(check(&told.at_the_end("b").0), []);
}

#[test]
fn what_nobody_knows_may_be_done_or_not() {
    let told = || two_updates().update((40, 50), "b", "c", Unknown);
    assert_eq!(told().at_the_end("b").broken(), []);
    assert_eq!(told().at_the_end("c").broken(), []);
    // Also long after its client gave up.
    assert_eq!(told().read((60, 61), "b").read((70, 71), "c").at_the_end("c").broken(), []);
    // And proved by what was done on top of it.
    let on_top = told().update((60, 70), "c", "d", Acknowledged);
    assert_eq!(on_top.at_the_end("d").broken(), []);
}

#[test]
fn an_acknowledged_update_that_is_gone_is_lost() {
    assert_eq!(two_updates().at_the_end("a").broken(), [Broken::Lost]);
    assert_eq!(two_updates().at_the_end("").broken(), [Broken::Lost]);
}

#[test]
fn what_only_a_reader_saw_and_is_gone_is_told() {
    let told = two_updates().update((40, 50), "b", "c", Unknown).read((60, 61), "c");
    assert_eq!(told.at_the_end("b").broken(), [Broken::Vanished]);
}

#[test]
fn one_value_is_replaced_once() {
    let told = two_updates().update((40, 50), "a", "c", Acknowledged);
    assert_eq!(told.at_the_end("c").broken(), [Broken::Lost, Broken::Twice]);
    let told = two_updates().update((40, 50), "a", "c", Unknown).update((60, 70), "c", "d", Acknowledged);
    assert_eq!(told.at_the_end("d").broken(), [Broken::Lost, Broken::Forked]);
}

#[test]
fn a_reported_failure_must_not_be_done() {
    let told = two_updates().update((40, 50), "b", "c", Failed);
    assert_eq!(told.at_the_end("c").broken(), [Broken::FailureDone]);
    let told = two_updates().update((40, 50), "b", "c", Failed).update((60, 70), "c", "d", Acknowledged);
    assert_eq!(told.at_the_end("d").broken(), [Broken::FailureDone]);
    assert_eq!(two_updates().update((40, 50), "b", "c", Failed).at_the_end("b").broken(), []);
}

#[test]
fn a_read_after_an_acknowledgement_shows_it() {
    let stale = two_updates().read((31, 32), "a").at_the_end("b");
    assert_eq!(stale.broken(), [Broken::Stale]);
    let stale = two_updates().read((11, 12), "").at_the_end("b");
    assert_eq!(stale.broken(), [Broken::Stale]);
}

#[test]
fn a_read_that_shows_less_than_a_read_before_is_told() {
    let stale =
        two_updates().update((40, 90), "b", "c", Acknowledged).read((50, 51), "c").read((60, 61), "b");
    assert_eq!(stale.at_the_end("c").broken(), [Broken::Unsteady]);
    let good = two_updates().update((40, 90), "b", "c", Acknowledged).read((50, 61), "c").read((60, 62), "b");
    assert_eq!(good.at_the_end("c").broken(), []);
}

#[test]
fn a_read_does_not_show_the_future() {
    let told = two_updates().read((12, 13), "b").at_the_end("b");
    assert_eq!(told.broken(), [Broken::Disordered]);
}

#[test]
fn a_value_that_nobody_brought_is_foreign() {
    assert_eq!(two_updates().at_the_end("x").broken(), [Broken::Lost, Broken::Foreign]);
    let told = two_updates().disk("node-1", &[(MAIN, "b"), ("refs/heads/x", "y")]);
    assert_eq!(told.broken(), [Broken::Foreign]);
}

#[test]
fn a_deleted_ref_may_come_again() {
    let told = two_updates()
        .update((40, 50), "b", "", Acknowledged)
        .read((51, 52), "")
        .update((60, 70), "", "c", Acknowledged)
        .read((71, 72), "c");
    assert_eq!(told.at_the_end("c").broken(), []);
    let stale = two_updates()
        .update((40, 50), "b", "", Acknowledged)
        .update((60, 70), "", "c", Acknowledged)
        .read((71, 72), "")
        .at_the_end("c");
    assert_eq!(stale.broken(), [Broken::Stale]);
    let stale = two_updates().update((40, 50), "b", "", Acknowledged).read((51, 52), "b").at_the_end("");
    assert_eq!(stale.broken(), [Broken::Stale]);
}

#[test]
fn deletions_are_updates_too() {
    let undone = two_updates().update((40, 50), "b", "", Acknowledged).at_the_end("b");
    assert_eq!(undone.broken(), [Broken::Lost]);
    let unknown = || two_updates().update((40, 50), "b", "", Unknown);
    assert_eq!(unknown().at_the_end("").broken(), []);
    assert_eq!(unknown().at_the_end("b").broken(), []);
    let both = two_updates().update((40, 50), "b", "", Acknowledged).update((40, 50), "b", "c", Acknowledged);
    assert_eq!(both.at_the_end("").broken(), [Broken::Lost, Broken::Twice]);
}

#[test]
fn an_atomic_push_is_done_whole_or_not_at_all() {
    const OTHER: &str = "refs/heads/other";
    let both =
        |outcome| Told::default().push((0, 10), &[(MAIN, "", "a", outcome), (OTHER, "", "b", outcome)]);
    let halves = both(Unknown).disk("node-1", &[(MAIN, "a")]).disk("node-2", &[(MAIN, "a")]);
    assert_eq!(halves.broken(), [Broken::Torn]);
    assert_eq!(both(Unknown).disk("node-1", &[(MAIN, "a"), (OTHER, "b")]).broken(), []);
    assert_eq!(both(Unknown).disk("node-1", &[]).broken(), []);
    assert_eq!(both(Acknowledged).disk("node-1", &[(MAIN, "a")]).broken(), [Broken::Lost]);
    assert_eq!(both(Failed).disk("node-1", &[(MAIN, "a")]).broken(), [Broken::FailureDone, Broken::Torn]);
}

#[test]
fn replicas_that_differ_have_diverged() {
    let told = two_updates().update((40, 50), "b", "c", Unknown);
    let told = told.disk("node-1", &[(MAIN, "b")]).disk("node-2", &[(MAIN, "c")]);
    assert_eq!(told.broken(), [Broken::Diverged]);
}

#[test]
fn a_finding_counts() {
    let mut told = two_updates().at_the_end("b");
    told.0.findings.push(Finding { what: "leftover".into(), detail: "packed-refs.lock".into() });
    assert_eq!(told.broken(), [Broken::Unclean]);
}

#[test]
fn without_disks_nothing_is_lost_yet() {
    assert_eq!(two_updates().broken(), []);
}
