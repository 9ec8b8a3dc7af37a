//! Which replicas are the newest, by the records that nodes keep beside them.
//!
//! An acknowledged write has its record on as many of the assigned replicas as the write quorum, so among any answers that
//! leave out fewer than that, one is the newest.

use tabularium_common::records::Standing;
use tabularium_proto::{coordinator::Route, node::ReplicaRecord};

/// What a node said of its replica.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Answer {
    /// This is what it holds.
    Record(ReplicaRecord),
    /// The node keeps no record of it.
    Unrecorded,
    /// Nothing that counts: the node cannot be reached, the replica is gone, or a copy to it is under way.
    Nothing,
}

/// Whether replicas without a record may be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WithoutRecords {
    /// As the route that was known last says. It may be out of date.
    Serve,
    /// No.
    Refuse,
}

/// What follows from the answers.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Verdict {
    /// These storages hold the newest, which has this generation and epoch.
    Newest { storages: Vec<String>, generation: i64, epoch: i64 },
    /// Some replicas have no records, which is to be put up with: these may be the newest.
    AsRemembered { storages: Vec<String> },
    /// Too few have said what they hold.
    TooFew {
        /// So many have.
        answered: usize,
        /// So many have to.
        needed: usize,
    },
}

fn standing(record: &ReplicaRecord) -> Standing {
    tabularium_common::records::standing(record)
}

/// How many of the replicas have to answer: a majority, and so many that no write was acknowledged without one of them.
pub(super) fn needed(route: &Route) -> usize {
    let assigned = route.replicas.len();
    let quorum = (route.write_quorum as usize).clamp(1, assigned.max(1));
    (assigned / 2 + 1).max((assigned + 1).saturating_sub(quorum))
}

/// Judges the answers of the storages of a route that may be out of date.
pub(super) fn judge(route: &Route, answers: &[(String, Answer)], policy: WithoutRecords) -> Verdict {
    let needed = needed(route);
    let records: Vec<(&String, &ReplicaRecord)> = answers
        .iter()
        .filter_map(|(storage, answer)| match answer {
            Answer::Record(record) if record.complete && record.repository_id == route.repository_id => {
                Some((storage, record))
            }
            _ => None,
        })
        .collect();
    let newest = records.iter().max_by_key(|(_, record)| standing(record)).map(|(_, record)| *record);
    if let Some(newest) = newest.filter(|newest| {
        records.len() >= needed || (policy == WithoutRecords::Serve && newest.generation > route.generation)
    }) {
        let equal = records.iter().filter(|(_, record)| standing(record) == standing(newest));
        let storages = equal.map(|(storage, _)| (*storage).clone()).collect();
        return Verdict::Newest { storages, generation: newest.generation, epoch: newest.epoch };
    }
    let unrecorded = |storage: &str| {
        answers.iter().any(|(other, answer)| other == storage && *answer == Answer::Unrecorded)
    };
    let current = |storage: &str| {
        records.iter().any(|(other, record)| *other == storage && record.generation == route.generation)
    };
    if policy == WithoutRecords::Serve && answers.iter().any(|(_, answer)| *answer == Answer::Unrecorded) {
        let storages: Vec<String> = crate::routing::current(route)
            .filter(|storage| unrecorded(storage) || current(storage))
            .map(str::to_owned)
            .collect();
        if !storages.is_empty() {
            return Verdict::AsRemembered { storages };
        }
    }
    Verdict::TooFew { answered: records.len(), needed }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tabularium_proto::coordinator::Replica;

    use super::*;

    fn route(generations: &[i64], write_quorum: u32) -> Route {
        let replica = |(number, generation): (usize, &i64)| Replica {
            storage: number.to_string(),
            generation: *generation,
        };
        Route {
            repository_id: 7,
            generation: 5,
            write_quorum,
            replicas: generations.iter().enumerate().map(replica).collect(),
            ..Route::default()
        }
    }

    fn record(generation: i64, changes: u32) -> Answer {
        Answer::Record(ReplicaRecord {
            repository_id: 7,
            generation,
            changes,
            complete: true,
            ..ReplicaRecord::default()
        })
    }

    fn answers(given: &[Answer]) -> Vec<(String, Answer)> {
        given.iter().enumerate().map(|(number, answer)| (number.to_string(), answer.clone())).collect()
    }

    fn newest(storages: &[&str], generation: i64) -> Verdict {
        Verdict::Newest {
            storages: storages.iter().map(|&storage| storage.to_owned()).collect(),
            generation,
            epoch: 0,
        }
    }

    #[test]
    fn a_majority_says_who_is_the_newest() {
        let route = route(&[5, 5, 5], 2);
        let judged = |given: &[Answer]| judge(&route, &answers(given), WithoutRecords::Refuse);
        assert_eq!(judged(&[record(5, 1), record(5, 1), Answer::Nothing]), newest(&["0", "1"], 5));
        assert_eq!(judged(&[record(5, 1), record(6, 1), record(6, 1)]), newest(&["1", "2"], 6));
        assert_eq!(judged(&[record(6, 1), record(6, 2), record(5, 9)]), newest(&["1"], 6), "half a push");
        let few = Verdict::TooFew { answered: 1, needed: 2 };
        assert_eq!(judged(&[record(6, 1), Answer::Nothing, Answer::Unrecorded]), few);
        let Answer::Record(good) = record(6, 1) else { unreachable!() };
        let mixture = Answer::Record(ReplicaRecord { complete: false, ..good.clone() });
        let others = Answer::Record(ReplicaRecord { repository_id: 8, ..good });
        assert_eq!(judged(&[record(6, 1), mixture, others]), few);
    }

    #[test]
    fn where_one_replica_is_enough_for_a_write_all_are_needed_for_a_read() {
        for (replicas, quorum, expected) in [(1, 1, 1), (2, 2, 2), (3, 2, 2), (3, 1, 3), (5, 3, 3), (5, 0, 5)]
        {
            assert_eq!(needed(&route(&vec![5; replicas], quorum)), expected, "{replicas} {quorum}");
        }
    }

    #[test]
    fn replicas_without_records_serve_only_where_that_is_wanted() {
        let route = route(&[5, 5, 4], 2);
        let judged = |given: &[Answer], policy| judge(&route, &answers(given), policy);
        let none = [Answer::Unrecorded, Answer::Unrecorded, Answer::Unrecorded];
        let few = Verdict::TooFew { answered: 0, needed: 2 };
        assert_eq!(judged(&none, WithoutRecords::Refuse), few);
        let remembered = Verdict::AsRemembered { storages: vec!["0".into(), "1".into()] };
        assert_eq!(judged(&none, WithoutRecords::Serve), remembered);
        let newer = [Answer::Unrecorded, Answer::Unrecorded, record(6, 1)];
        assert_eq!(judged(&newer, WithoutRecords::Serve), newest(&["2"], 6));
        assert_eq!(judged(&[Answer::Nothing, Answer::Nothing], WithoutRecords::Serve), few);
    }

    proptest! {
        #[test]
        fn what_was_acknowledged_is_never_left_out(
            replicas in 1_usize..6, quorum in 1_usize..6, acknowledged in 3_i64..9,
            holders in prop::collection::vec(any::<bool>(), 6), older in prop::collection::vec(0_i64..9, 6),
            reachable in prop::collection::vec(any::<bool>(), 6),
        ) {
            let quorum = quorum.min(replicas);
            let holding: Vec<bool> = holders[..replicas].to_vec();
            prop_assume!(holding.iter().filter(|holds| **holds).count() >= quorum);
            let route = route(&vec![2; replicas], u32::try_from(quorum).unwrap());
            let given: Vec<Answer> = (0..replicas)
                .map(|number| match (reachable[number], holding[number]) {
                    (false, _) => Answer::Nothing,
                    (true, true) => record(acknowledged, 1),
                    (true, false) => record(older[number].min(acknowledged - 1), 1),
                })
                .collect();
            match judge(&route, &answers(&given), WithoutRecords::Refuse) {
                Verdict::Newest { storages, generation, .. } => {
                    prop_assert_eq!(generation, acknowledged);
                    prop_assert!(storages.iter().all(|storage| holding[storage.parse::<usize>().unwrap()]));
                }
                Verdict::TooFew { answered, needed } => prop_assert!(answered < needed),
                Verdict::AsRemembered { .. } => prop_assert!(false),
            }
        }
    }
}
