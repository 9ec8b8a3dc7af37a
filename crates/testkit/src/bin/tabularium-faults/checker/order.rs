//! Tests the order of the chain against the order of time.

use super::{Broken, Look, Span, chain::Life};
use crate::history::Micros;

/// Everything that happened between two changes of the ref, or one change.
struct Group {
    spans: Vec<(Span, String)>,
    /// Reads of one value are in no order among each other.
    reads: bool,
}

/// Reports whatever comes before something that had ended when it began.
pub(super) fn check(lives: &[Life<'_>], looks: &[Look<'_>], report: &mut impl FnMut(Broken, String)) {
    let groups = groups(lives, looks);
    // Of what comes later in the chain: the first acknowledgement, and the first of anything.
    let mut acknowledged: Option<(Micros, &str)> = None;
    let mut anything: Option<(Micros, &str)> = None;
    for group in groups.iter().rev() {
        for (span, what) in &group.spans {
            let before = |earliest: Option<(Micros, &'_ str)>| {
                earliest.filter(|(completed, _)| *completed < span.invoked).map(|(_, later)| later.to_owned())
            };
            let (broken, later) = match (before(acknowledged), before(anything)) {
                (Some(later), _) if group.reads => (Broken::Stale, later),
                (None, Some(later)) if group.reads => (Broken::Unsteady, later),
                (_, Some(later)) => (Broken::Disordered, later),
                (_, None) => continue,
            };
            report(broken, format!("{what}, though before it began there was: {later}"));
        }
        for (span, what) in &group.spans {
            for earliest in
                [Some(&mut anything), (!group.reads).then_some(&mut acknowledged)].into_iter().flatten()
            {
                if earliest.is_none_or(|(completed, _)| span.completed < completed) {
                    *earliest = Some((span.completed, what));
                }
            }
        }
    }
}

/// In the order of the chain: reads of nothing, a creation, reads of its value, an update, … a deletion, and again.
fn groups(lives: &[Life<'_>], looks: &[Look<'_>]) -> Vec<Group> {
    let of = |value: Option<&str>| -> Vec<(Span, String)> {
        let of_value = looks.iter().filter(|look| look.value == value);
        of_value.map(|look| (look.span(), look.to_string())).collect()
    };
    let mut lives: Vec<_> = lives.iter().collect();
    lives.sort_by_key(|life| first_evidence(life, looks));
    let mut groups = vec![Group { spans: Vec::new(), reads: true }];
    let mut absences = vec![0];
    for life in lives {
        for step in &life.steps {
            groups.push(Group { spans: vec![(step.span(), step.to_string())], reads: false });
            groups.push(Group { spans: of(step.update.new.as_deref()), reads: true });
        }
        if let Some(step) = &life.end {
            groups.push(Group { spans: vec![(step.span(), step.to_string())], reads: false });
            absences.push(groups.len());
            groups.push(Group { spans: Vec::new(), reads: true });
        }
    }
    // A read of nothing may belong to any of the times when there was nothing: to the last that time allows, because
    // that asks the least of all that follows.
    let latest_before: Vec<Micros> = absences
        .iter()
        .map(|absence| {
            let before = groups[..*absence].iter().flat_map(|group| &group.spans);
            before.map(|(span, _)| span.invoked).max().unwrap_or(0)
        })
        .collect();
    for (span, what) in of(None) {
        let allowed = latest_before.iter().rposition(|invoked| *invoked <= span.completed).unwrap_or(0);
        groups[absences[allowed]].spans.push((span, what));
    }
    groups
}

/// The first time by which a life had certainly begun. Of one that is not over it is later than all others.
fn first_evidence(life: &Life<'_>, looks: &[Look<'_>]) -> (bool, Micros) {
    let steps = life.steps.iter().chain(&life.end).map(|step| step.span().completed);
    let seen = looks.iter().filter(|look| {
        look.value.is_some() && life.steps.iter().any(|step| step.update.new.as_deref() == look.value)
    });
    let first = steps.chain(seen.map(|look| look.span().completed)).min().unwrap_or(Micros::MAX);
    (life.end.is_none(), first)
}
