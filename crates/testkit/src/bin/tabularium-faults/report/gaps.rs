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
    /// Between two successes in one hot repository, whoever had them.
    pub(super) gaps: Vec<Stretch>,
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
        let (mut waiting, mut last): (BTreeMap<_, Micros>, BTreeMap<_, Micros>) = Default::default();
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
            if operation.success
                && operation.repository.starts_with("hot")
                && let Some(before) = last.insert(operation.repository, ended)
            {
                met.gaps.push(Stretch { begun: before.min(ended), ended });
            }
        }
        // Whoever still waits has waited until now.
        met.waits.extend(waiting.into_values().map(|begun| Stretch { begun, ended: end }));
        met.gaps.extend(last.into_values().map(|begun| Stretch { begun, ended: end }));
        met
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
        assert_eq!(longest(&met.gaps), Some(30));
        assert_eq!(met.errors.len(), 1);
    }

    #[test]
    fn who_never_gets_an_answer_waits_until_the_end() {
        let met = Met::new([operation("a", 5, 10, false), operation("b", 0, 90, true)].into_iter());
        assert_eq!(longest(&met.waits), Some(90));
        assert_eq!(met.waits.len(), 2);
    }
}
