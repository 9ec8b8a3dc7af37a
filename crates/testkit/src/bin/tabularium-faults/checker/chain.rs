//! Puts the chain of one ref together.

use std::collections::{BTreeMap, BTreeSet};

use super::{Broken, Look, Step, shortened};
use crate::history::Outcome;

/// A ref from its creation to its deletion, or to the end.
#[derive(Debug, Default)]
pub(super) struct Life<'a> {
    /// Each stands on the one before.
    pub(super) steps: Vec<Step<'a>>,
    /// Nothing when the ref is still there.
    pub(super) end: Option<Step<'a>>,
}

/// What was done to a ref.
pub(super) struct Chain<'a> {
    /// Every update that was done.
    pub(super) done: Vec<Step<'a>>,
    /// In an order that may be tested against time; nothing when there is no one chain.
    pub(super) lives: Option<Vec<Life<'a>>>,
}

struct Graph<'a> {
    /// What brought each value that was seen or acknowledged.
    brought: BTreeMap<&'a str, Step<'a>>,
    /// What was done on top of each value, deletions apart.
    followed: BTreeMap<&'a str, Vec<Step<'a>>>,
    /// Deletions of each value.
    deleted: BTreeMap<&'a str, Vec<Step<'a>>>,
}

impl<'a> Graph<'a> {
    /// A value that is there, and all that it stands on.
    fn insert(
        &mut self,
        value: &'a str,
        witness: &str,
        bringing: &BTreeMap<&'a str, Step<'a>>,
        known: &mut BTreeSet<&'a str>,
        report: &mut impl FnMut(Broken, String),
    ) {
        let mut next = Some((value, witness.to_owned()));
        while let Some((value, witness)) = next.take() {
            if !known.insert(value) {
                return;
            }
            let Some(step) = bringing.get(value) else {
                return report(Broken::Foreign, format!("nobody brought {}: {witness}", shortened(value)));
            };
            if step.update.outcome == Outcome::Failed {
                report(Broken::FailureDone, format!("{step}, and yet there: {witness}"));
            }
            self.brought.insert(value, *step);
            if let Some(old) = step.update.old.as_deref() {
                self.followed.entry(old).or_default().push(*step);
                next = Some((old, format!("under {step}")));
            }
        }
    }
}

/// `last` holds what the ref is on each disk; nothing at all in a history that has not come to its end.
pub(super) fn put_together<'a>(
    steps: &[Step<'a>],
    looks: &[Look<'a>],
    last: &[Option<&'a str>],
    report: &mut impl FnMut(Broken, String),
) -> Chain<'a> {
    let graph = graph(steps, looks, last, report);
    let mut sound = true;
    let mut lives = Vec::new();
    let roots = graph.brought.values().filter(|step| match step.update.old.as_deref() {
        None => true,
        Some(old) => !graph.brought.contains_key(old),
    });
    let mut done: Vec<_> = graph.brought.values().copied().collect();
    for root in roots {
        sound &= live(*root, &graph, last, &mut lives, &mut done, report);
    }
    Chain { done, lives: sound.then_some(lives) }
}

/// Which values count, and what connects them.
fn graph<'a>(
    steps: &[Step<'a>],
    looks: &[Look<'a>],
    last: &[Option<&'a str>],
    report: &mut impl FnMut(Broken, String),
) -> Graph<'a> {
    let bringing: BTreeMap<&str, Step<'a>> =
        steps.iter().filter_map(|step| Some((step.update.new.as_deref()?, *step))).collect();
    let mut graph = Graph { brought: BTreeMap::new(), followed: BTreeMap::new(), deleted: BTreeMap::new() };
    let mut known = BTreeSet::new();
    let acknowledged = steps.iter().filter(|step| step.acknowledged());
    let lasting = acknowledged
        .flat_map(|step| [step.update.new.as_deref(), step.update.old.as_deref()])
        .flatten()
        .map(|value| (value, "an acknowledged push".to_owned()))
        .chain(last.iter().flatten().map(|value| (*value, "a disk at the end".to_owned())));
    for (value, witness) in lasting {
        graph.insert(value, &witness, &bringing, &mut known, report);
    }
    let deletions = steps.iter().filter(|step| step.update.new.is_none());
    let deleted: BTreeSet<_> = deletions.filter_map(|step| step.update.old.as_deref()).collect();
    for look in looks {
        let Some(value) = look.value.filter(|value| !known.contains(value)) else { continue };
        let unknown = bringing.get(value).is_some_and(|step| step.update.outcome == Outcome::Unknown);
        if unknown && !last.is_empty() && !deleted.contains(value) {
            known.insert(value);
            report(Broken::Vanished, format!("{} was there: {look}", bringing[value]));
        } else {
            graph.insert(value, &look.to_string(), &bringing, &mut known, report);
        }
    }
    for step in steps.iter().filter(|step| step.update.outcome != Outcome::Failed) {
        if let (Some(old), None) = (step.update.old.as_deref(), &step.update.new) {
            graph.deleted.entry(old).or_default().push(*step);
        }
    }
    graph
}

/// Follows a life from its creation. Answers whether it is one line.
fn live<'a>(
    root: Step<'a>,
    graph: &Graph<'a>,
    last: &[Option<&'a str>],
    lives: &mut Vec<Life<'a>>,
    done: &mut Vec<Step<'a>>,
    report: &mut impl FnMut(Broken, String),
) -> bool {
    let mut sound = true;
    let mut life = Life::default();
    // Every step is visited once: each value has one step that brought it.
    let mut open = vec![root];
    while let Some(step) = open.pop() {
        life.steps.push(step);
        let Some(value) = step.update.new.as_deref() else { continue };
        let followed = graph.followed.get(value).map_or(&[][..], Vec::as_slice);
        let deleted = graph.deleted.get(value).map_or(&[][..], Vec::as_slice);
        let certain: Vec<_> = followed.iter().chain(deleted).filter(|step| step.acknowledged()).collect();
        let deletion = deleted.iter().find(|step| step.acknowledged());
        if let [one, other, ..] = &certain[..] {
            report(Broken::Twice, format!("{one} and {other}"));
            sound = false;
        } else if let ([one, other, ..], _) | ([one], Some(other)) = (followed, deletion) {
            report(Broken::Forked, format!("{one} and {other}"));
            sound = false;
        }
        if followed.is_empty() {
            sound &= end(step, value, deleted, last, &mut life, done, report);
        }
        open.extend(followed);
    }
    lives.push(life);
    sound
}

/// A value that nothing was done on top of is there at the end, or was deleted.
fn end<'a>(
    step: Step<'a>,
    value: &'a str,
    deleted: &[Step<'a>],
    last: &[Option<&'a str>],
    life: &mut Life<'a>,
    done: &mut Vec<Step<'a>>,
    report: &mut impl FnMut(Broken, String),
) -> bool {
    let there = last.contains(&Some(value));
    let certain = deleted.iter().find(|deletion| deletion.acknowledged());
    match (there, certain) {
        (true, Some(deletion)) => {
            report(Broken::Lost, format!("the deletion {deletion}: the value is there at the end"));
            return false;
        }
        (false, Some(deletion)) => {
            done.push(*deletion);
            life.end = Some(*deletion);
        }
        (false, None) if !last.is_empty() => {
            if let Some(deletion) = deleted.first() {
                done.push(*deletion);
                life.end = Some(*deletion);
            } else {
                let now = last.iter().map(|value| value.map_or("nothing", shortened)).collect::<Vec<_>>();
                report(Broken::Lost, format!("{step}; at the end the disks have {now:?}"));
                return false;
            }
        }
        _ => {}
    }
    true
}
