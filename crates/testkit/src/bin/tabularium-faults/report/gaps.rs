//! How long there was nothing, for a repository and for a client.

use std::collections::BTreeMap;

use crate::history::{ErrorKind, History, Micros};

/// A time in which something did not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) begun: Micros,
    pub(super) ended: Micros,
}

impl Stretch {
    pub(super) fn meets(&self, begun: Micros, ended: Micros) -> bool {
        self.ended >= begun && self.begun <= ended
    }

    #[expect(clippy::cast_precision_loss, reason = "for people")]
    pub(super) fn seconds(&self) -> f64 {
        (self.ended - self.begun) as f64 / 1e6
    }
}

/// What operations of one kind met.
#[derive(Debug, Default)]
pub(super) struct Met {
    /// Times without a success in one hot repository, while somebody wanted one: from the success before, or from when
    /// somebody asked if that was later. What others had in other repositories does not end them.
    pub(super) gaps: Vec<Stretch>,
    /// When there was a success, in whatever repository.
    pub(super) successes: Vec<Micros>,
    /// From a client's first try to its first answer that was no error.
    pub(super) waits: Vec<Stretch>,
    /// Operations that ended in an error.
    pub(super) errors: Vec<Stretch>,
    /// Those of them that nothing had been sent for.
    pub(super) errors_before_sending: Vec<Stretch>,
}

/// An operation, as far as it matters here.
struct Operation<'a> {
    client: &'a str,
    repository: &'a str,
    span: Stretch,
    error: bool,
    before_sending: bool,
    /// Something was done. A push that lost a race was answered well and did nothing.
    success: bool,
    /// Whether the client does nothing but this.
    waits: bool,
}

impl Met {
    pub(super) fn writes(history: &History) -> Self {
        use crate::history::Outcome::Acknowledged;
        let operations = history.writes.iter().map(|write| Operation {
            client: &write.client,
            repository: &write.repository,
            span: Stretch { begun: write.invoked, ended: write.completed },
            error: write.error.is_some(),
            before_sending: write.error == Some(ErrorKind::BeforeSending),
            success: write.updates.iter().any(|update| update.outcome == Acknowledged),
            waits: true,
        });
        Self::new(operations)
    }

    pub(super) fn reads(history: &History) -> Self {
        let operations = history.reads.iter().map(|read| Operation {
            client: &read.client,
            repository: &read.repository,
            span: Stretch { begun: read.invoked, ended: read.completed },
            error: read.refs.is_none(),
            before_sending: read.refs.is_none(),
            success: read.refs.is_some(),
            // Writers read only now and then.
            waits: read.client.starts_with("reader"),
        });
        Self::new(operations)
    }

    fn new<'a>(operations: impl Iterator<Item = Operation<'a>>) -> Self {
        let mut met = Self::default();
        let mut waiting: BTreeMap<_, Micros> = BTreeMap::new();
        let mut hot: BTreeMap<_, Wanted> = BTreeMap::new();
        let mut end = 0;
        for operation in operations {
            let Stretch { begun, ended } = operation.span;
            end = end.max(ended);
            if operation.error {
                met.errors.push(operation.span);
            }
            if operation.before_sending {
                met.errors_before_sending.push(operation.span);
            }
            let first =
                if operation.waits { *waiting.entry(operation.client).or_insert(begun) } else { begun };
            if operation.waits && !operation.error {
                waiting.remove(operation.client);
                met.waits.push(Stretch { begun: first, ended });
            }
            if operation.success {
                met.successes.push(ended);
            }
            if operation.repository.starts_with("hot") {
                let wanted = hot.entry(operation.repository).or_default();
                met.gaps.extend(wanted.learn(operation.span, operation.success));
            }
        }
        // Whoever still waits has waited until now.
        met.waits.extend(waiting.into_values().map(|begun| Stretch { begun, ended: end }));
        met.gaps.extend(hot.into_values().filter_map(|wanted| wanted.gap()));
        met
    }
}

/// What is wanted of one repository, told in the order in which operations end.
#[derive(Default)]
struct Wanted {
    /// The last success.
    had: Micros,
    /// Who has asked for another one since it, or still did at that time: the first such question, and the last answer.
    asked: Option<Stretch>,
}

impl Wanted {
    fn gap(&self) -> Option<Stretch> {
        self.asked.map(|Stretch { begun, ended }| Stretch { begun: begun.max(self.had).min(ended), ended })
    }

    /// Answers the gap that a success ends.
    fn learn(&mut self, span: Stretch, success: bool) -> Option<Stretch> {
        let asked = self.asked.get_or_insert(span);
        asked.begun = asked.begun.min(span.begun);
        asked.ended = asked.ended.max(span.ended);
        if !success {
            return None;
        }
        let gap = self.gap();
        *self = Self { had: span.ended, asked: None };
        gap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(client: &str, begun: Micros, ended: Micros, success: bool) -> Operation<'_> {
        let span = Stretch { begun, ended };
        Operation {
            client,
            repository: "hot-0.git",
            span,
            error: !success,
            before_sending: false,
            success,
            waits: true,
        }
    }

    fn longest(stretches: &[Stretch]) -> Option<Micros> {
        stretches.iter().map(|stretch| stretch.ended - stretch.begun).max()
    }

    #[test]
    fn a_client_waits_until_an_answer_that_is_no_error() {
        let operations = [
            operation("a", 0, 10, true),
            operation("a", 20, 30, false),
            operation("b", 25, 40, true),
            operation("a", 35, 60, true),
        ];
        let met = Met::new(operations.into_iter());
        assert_eq!(longest(&met.waits), Some(40));
        assert_eq!(longest(&met.gaps), Some(20), "nobody wanted anything before 20");
        assert_eq!(met.errors.len(), 1);
    }

    #[test]
    fn a_gap_is_that_of_one_repository() {
        let elsewhere =
            |begun, ended| Operation { repository: "hot-1.git", ..operation("b", begun, ended, true) };
        let operations = [
            operation("a", 0, 10, true),
            elsewhere(10, 20),
            operation("a", 15, 30, false),
            elsewhere(25, 40),
            operation("a", 35, 90, true),
            elsewhere(90, 95),
        ];
        let met = Met::new(operations.into_iter());
        assert_eq!(longest(&met.gaps), Some(75), "what others have elsewhere does not end it");
        let unanswered = Met::new([operation("a", 0, 10, true), operation("a", 20, 90, false)].into_iter());
        assert_eq!(longest(&unanswered.gaps), Some(70));
        let idle = Met::new([operation("a", 0, 10, true), elsewhere(10, 500)].into_iter());
        assert_eq!(longest(&idle.gaps), Some(490), "of the other one");
        assert_eq!(idle.gaps.iter().filter(|gap| gap.begun < 10).count(), 1);
    }

    #[test]
    fn who_never_gets_an_answer_waits_until_the_end() {
        let met = Met::new([operation("a", 5, 10, false), operation("b", 0, 90, true)].into_iter());
        assert_eq!(longest(&met.waits), Some(90));
        assert_eq!(met.waits.len(), 2);
    }
}
