use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{
    ballot::{BEFORE_LAST_HOOKS, BEFORE_UPDATE_HOOK, Ballot, Phase},
    transaction::{Action, Conclusion, Event, PRIMARY, Safety, Ticket, Transaction, Verdict, VoterId},
};

const ALL: Safety = Safety { ticket: true, quorum: true, record: true, fence: true };
const GRACE: Duration = Duration::from_millis(400);

fn names(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("s{number}")).collect()
}

fn transaction(voters: usize, quorum: usize, ticket: Ticket, now: Instant) -> Transaction {
    let voters = names(voters).into_iter().map(|name| (Arc::from(name), GRACE));
    Transaction::new(voters, quorum, ticket, ALL, now)
}

fn ballot(phase: Phase, value: u8) -> Ballot {
    Ballot { phase, value: [value; 20] }
}

/// A transaction and its time.
struct Play {
    transaction: Transaction,
    now: Instant,
    answers: HashMap<VoterId, Vec<Verdict>>,
    other: Vec<Action>,
}

impl Play {
    fn new(voters: usize, quorum: usize, ticket: Ticket) -> Self {
        let now = Instant::now();
        Self {
            transaction: transaction(voters, quorum, ticket, now),
            now,
            answers: HashMap::new(),
            other: Vec::new(),
        }
    }

    fn take(&mut self, event: Event<'_>) {
        for action in self.transaction.handle(event, self.now) {
            match action {
                Action::Answer(voter, verdict) => self.answers.entry(voter).or_default().push(verdict),
                other => self.other.push(other),
            }
        }
    }

    fn vote(&mut self, voters: &[VoterId], phase: Phase, value: u8) {
        for voter in voters {
            self.take(Event::Voted(*voter, ballot(phase, value)));
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.take(Event::Tick);
    }

    fn ticket(&mut self, participants: usize, quorum: usize) {
        self.take(Event::Ticketed { participants: &names(participants), quorum });
    }

    fn last(&self, voter: VoterId) -> Option<Verdict> {
        self.answers.get(&voter).and_then(|answers| answers.last().copied())
    }
}

#[test]
fn a_push_waits_for_its_ticket_and_for_its_record() {
    let mut play = Play::new(3, 2, Ticket::Wanted);
    play.vote(&[0, 1], Phase::Synchronized, 1);
    assert!(play.other.is_empty(), "the third may still come");
    play.vote(&[2], Phase::Synchronized, 1);
    assert_eq!(play.other, [Action::TakeTicket]);
    assert!(play.answers.is_empty());
    play.ticket(3, 2);
    assert_eq!((play.last(0), play.last(2)), (Some(Verdict::Commit), Some(Verdict::Commit)));
    for (phase, value) in [(Phase::Synchronized, 2), (Phase::Prepared, 3), (Phase::Committed, 3)] {
        play.vote(&[0, 1, 2], phase, value);
        assert_eq!(play.last(2), Some(Verdict::Commit));
    }
    play.vote(&[2, 1, 0], Phase::Synchronized, 4);
    assert_eq!(play.other[1..], [Action::Record(vec![0, 1, 2])]);
    assert_eq!(play.answers[&0].len(), 4, "not before the record");
    play.take(Event::Recorded);
    assert_eq!(play.answers[&0].len(), 5);
    play.vote(&[0, 1, 2], Phase::Committed, 0);
    assert_eq!(play.answers[&2], vec![Verdict::Commit; 6]);
    assert_eq!(play.transaction.conclusion(), None);
}

#[test]
fn a_push_of_several_references_is_recorded_once_when_all_are_changed() {
    let mut play = Play::new(3, 2, Ticket::Held);
    for reference in 1..=3 {
        for voter in 0..3 {
            let ballot = Ballot { phase: Phase::Synchronized, value: BEFORE_UPDATE_HOOK };
            play.take(Event::Voted(voter, ballot));
        }
        play.vote(&[0, 1, 2], Phase::Prepared, reference);
        play.vote(&[0, 1, 2], Phase::Committed, reference);
        assert!(play.other.is_empty(), "more may come");
    }
    assert_eq!(play.answers[&2], vec![Verdict::Commit; 9]);
    play.vote(&[0, 1, 2], Phase::Synchronized, 9);
    assert_eq!(play.other, [Action::Record(vec![0, 1, 2])]);
}

#[test]
fn who_votes_differently_is_out_and_not_recorded() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.vote(&[2], Phase::Prepared, 9);
    play.vote(&[0, 1], Phase::Prepared, 1);
    assert_eq!(
        (play.last(0), play.last(1), play.last(2)),
        (Some(Verdict::Commit), Some(Verdict::Commit), Some(Verdict::Abort))
    );
    play.vote(&[0, 1, 2], Phase::Committed, 1);
    assert_eq!(play.answers[&2], [Verdict::Abort, Verdict::Abort]);
    play.take(Event::Ended { voter: PRIMARY, ok: true });
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::Commit(vec![0, 1])));
}

#[test]
fn without_a_quorum_all_are_told_to_take_it_back() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.vote(&[0], Phase::Prepared, 1);
    play.vote(&[1], Phase::Prepared, 2);
    play.vote(&[2], Phase::Prepared, 3);
    for voter in 0..3 {
        assert_eq!(play.answers[&voter], [Verdict::Abort]);
    }
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::NotApplied));
}

#[test]
fn nobody_waits_for_a_node_that_ended_without_a_vote() {
    let mut play = Play::new(2, 2, Ticket::Held);
    play.vote(&[0], Phase::Prepared, 1);
    play.take(Event::Ended { voter: 1, ok: true });
    assert_eq!(play.last(0), Some(Verdict::Abort));
}

#[test]
fn a_laggard_has_its_grace_and_is_dropped_before_the_record() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.vote(&[0, 1, 2], Phase::Prepared, 1);
    play.vote(&[0, 1], Phase::Committed, 1);
    play.vote(&[0, 1], Phase::Synchronized, 2);
    assert!(play.other.is_empty(), "the third may have applied it any moment");
    play.pass(GRACE / 2);
    assert!(play.other.is_empty());
    play.pass(GRACE / 2);
    assert_eq!(play.other, [Action::Drop(2), Action::Record(vec![0, 1])]);
    play.vote(&[2], Phase::Committed, 1);
    assert_eq!(play.last(2), Some(Verdict::Cancelled));
}

#[test]
fn a_laggard_that_comes_in_time_is_recorded() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.vote(&[0, 1, 2], Phase::Prepared, 1);
    play.vote(&[0, 1], Phase::Committed, 1);
    play.vote(&[0, 1], Phase::Synchronized, 2);
    play.pass(GRACE / 2);
    play.vote(&[2], Phase::Committed, 1);
    assert_eq!(play.other, [Action::Record(vec![0, 1, 2])]);
}

#[test]
fn a_long_upload_gives_a_longer_grace() {
    let mut play = Play::new(3, 2, Ticket::Wanted);
    play.now += Duration::from_secs(30);
    play.vote(&[0, 1], Phase::Synchronized, 1);
    play.pass(Duration::from_secs(2));
    assert!(play.other.is_empty());
    play.pass(Duration::from_secs(1));
    assert_eq!(play.other, [Action::Drop(2), Action::TakeTicket]);
}

#[test]
fn nodes_that_have_changed_their_refs_agree_without_a_dead_primary() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.vote(&[0, 1, 2], Phase::Prepared, 1);
    play.vote(&[1], Phase::Committed, 1);
    play.take(Event::Ended { voter: PRIMARY, ok: false });
    assert_eq!(play.transaction.conclusion(), None, "the third may have changed them too");
    play.vote(&[2], Phase::Committed, 1);
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::Commit(vec![1, 2])));
}

#[test]
fn a_primary_that_hangs_after_the_change_is_waited_for_only_so_long() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.vote(&[0, 1, 2], Phase::Prepared, 1);
    play.vote(&[1, 2], Phase::Committed, 1);
    assert_eq!(play.answers[&1].len(), 1);
    play.pass(crate::limits::PRIMARY_GRACE);
    assert_eq!(play.other, [Action::Drop(PRIMARY)]);
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::Commit(vec![1, 2])));
}

#[test]
fn a_primary_that_dies_after_it_was_told_to_go_on_leaves_doubt() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.vote(&[0, 1, 2], Phase::Prepared, 1);
    for voter in [0, 1, 2] {
        assert_eq!(play.transaction.conclusion(), None);
        play.take(Event::Ended { voter, ok: false });
    }
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::InDoubt));
}

#[test]
fn a_primary_that_dies_before_that_leaves_nothing() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.vote(&[1, 2], Phase::Prepared, 1);
    play.take(Event::Ended { voter: PRIMARY, ok: false });
    assert_eq!((play.last(1), play.last(2)), (Some(Verdict::Abort), Some(Verdict::Abort)));
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::NotApplied));
}

#[test]
fn nobody_goes_on_once_the_lease_is_over() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.transaction.leased_until(play.now + Duration::from_secs(1));
    play.now += Duration::from_secs(1);
    play.vote(&[0, 1, 2], Phase::Prepared, 1);
    for voter in 0..3 {
        assert_eq!(play.answers[&voter], [Verdict::Cancelled]);
    }
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::NotApplied));
}

#[test]
fn whoever_lost_the_ticket_is_out() {
    let mut play = Play::new(3, 2, Ticket::Wanted);
    play.vote(&[0, 1, 2], Phase::Synchronized, 1);
    play.ticket(2, 2);
    assert_eq!((play.last(1), play.last(2)), (Some(Verdict::Commit), Some(Verdict::Cancelled)));
    let mut play = Play::new(3, 2, Ticket::Wanted);
    play.vote(&[0, 1, 2], Phase::Synchronized, 1);
    play.take(Event::TicketRefused);
    assert_eq!(play.last(0), Some(Verdict::Abort));
}

#[test]
fn a_primary_that_dies_while_the_ticket_is_taken_stops_the_write() {
    let mut play = Play::new(3, 2, Ticket::Wanted);
    play.vote(&[0, 1, 2], Phase::Synchronized, 1);
    play.take(Event::Ended { voter: PRIMARY, ok: false });
    play.ticket(3, 2);
    assert_eq!((play.last(1), play.last(2)), (Some(Verdict::Abort), Some(Verdict::Abort)));
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::NotApplied));
}

#[test]
fn a_stop_reaches_everybody() {
    let mut play = Play::new(3, 2, Ticket::Wanted);
    play.vote(&[1], Phase::Synchronized, 1);
    play.take(Event::Stopped);
    play.take(Event::Stopped);
    play.vote(&[0, 2], Phase::Synchronized, 1);
    for voter in 0..3 {
        assert_eq!(play.answers[&voter], [Verdict::Stop]);
    }
}

#[test]
fn a_write_without_a_vote_is_known_from_one_that_changed_nothing() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.take(Event::Ended { voter: PRIMARY, ok: true });
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::Unvoted));
    let mut play = Play::new(3, 2, Ticket::Wanted);
    play.vote(&[0, 1, 2], Phase::Synchronized, 1);
    play.ticket(3, 2);
    play.vote(&[0, 1, 2], Phase::Committed, 0);
    play.take(Event::Ended { voter: PRIMARY, ok: true });
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::NotApplied));
}

/// The vote before the hooks that follow a change.
fn after_change() -> Ballot {
    Ballot { phase: Phase::Synchronized, value: BEFORE_LAST_HOOKS }
}

#[test]
fn whoever_went_ahead_without_asking_is_to_be_compared() {
    let zero = ballot(Phase::Committed, 0);
    let (hook, announced) = (ballot(Phase::Synchronized, 1), ballot(Phase::Preparing, 1));
    let (prepared, changed) = (ballot(Phase::Prepared, 1), ballot(Phase::Committed, 1));
    for (votes, expected) in [
        (vec![zero], Conclusion::Compare(vec![0, 1])),
        (vec![hook, hook, after_change()], Conclusion::Compare(vec![0, 1])),
        (vec![hook, announced, after_change()], Conclusion::Compare(vec![0, 1])),
        (vec![announced], Conclusion::Compare(vec![0, 1])),
        (vec![hook], Conclusion::NotApplied),
        (vec![hook, hook, zero], Conclusion::NotApplied),
        (vec![announced, prepared, changed], Conclusion::Commit(vec![0, 1])),
        (vec![prepared, changed, zero], Conclusion::Commit(vec![0, 1])),
    ] {
        let mut play = Play::new(3, 2, Ticket::Held);
        for vote in &votes {
            for voter in 0..2 {
                play.take(Event::Voted(voter, *vote));
            }
        }
        play.take(Event::Ended { voter: PRIMARY, ok: true });
        play.take(Event::Ended { voter: 1, ok: true });
        play.take(Event::Ended { voter: 2, ok: false });
        assert_eq!(play.transaction.conclusion(), Some(expected), "{votes:?}");
    }
}

#[test]
fn whoever_changes_first_and_votes_then_leaves_doubt_when_the_others_did_something_else() {
    let mut play = Play::new(3, 2, Ticket::Held);
    for voter in 0..3 {
        play.vote(&[voter], Phase::Unknown, 1 + u8::try_from(voter).unwrap());
    }
    assert_eq!(play.last(PRIMARY), Some(Verdict::Abort));
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::InDoubt));
}

#[test]
fn a_primary_whose_hooks_refuse_the_push_has_asked() {
    for voted in [false, true] {
        let mut play = Play::new(3, 2, Ticket::Wanted);
        if voted {
            play.vote(&[1, 2], Phase::Synchronized, 1);
        }
        play.take(Event::Stopped);
        play.vote(&[0], Phase::Committed, 0);
        play.vote(&[1, 2], if voted { Phase::Committed } else { Phase::Synchronized }, u8::from(!voted));
        for voter in 0..3 {
            play.take(Event::Ended { voter, ok: true });
        }
        assert!(!play.transaction.is_unasked());
    }
}

#[test]
fn nodes_that_announce_their_changes_are_in_step_with_those_that_do_not() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.vote(&[0], Phase::Preparing, 1);
    assert_eq!(play.answers[&0], [Verdict::Commit]);
    for phase in [Phase::Prepared, Phase::Committed] {
        play.vote(&[0, 1, 2], phase, 1);
    }
    play.take(Event::Ended { voter: PRIMARY, ok: true });
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::Commit(vec![0, 1, 2])));
    let mut play = Play::new(3, 2, Ticket::Held);
    play.take(Event::Stopped);
    play.vote(&[0], Phase::Preparing, 1);
    assert_eq!(play.answers[&0], [Verdict::Stop]);
}

#[test]
fn nodes_that_vote_on_different_things_of_a_new_repository_are_compared() {
    for (values, primary_lives, expected) in [
        ([1, 1, 1], true, Conclusion::Commit(vec![0, 1, 2])),
        ([1, 2, 2], true, Conclusion::Compare(vec![0, 1, 2])),
        ([1, 2, 2], false, Conclusion::Commit(vec![1, 2])),
        ([1, 1, 2], false, Conclusion::InDoubt),
    ] {
        let now = Instant::now();
        let transaction = transaction(3, 2, Ticket::Held, now).creating();
        let mut play = Play { transaction, now, answers: HashMap::new(), other: Vec::new() };
        for phase in [Phase::Prepared, Phase::Committed] {
            for voter in [2, 1, 0] {
                if primary_lives || voter != PRIMARY || phase == Phase::Prepared {
                    play.vote(&[voter], phase, values[voter]);
                }
            }
        }
        for voter in 0..3 {
            play.take(Event::Ended { voter, ok: primary_lives || voter != PRIMARY });
        }
        assert_eq!(play.transaction.conclusion(), Some(expected), "{values:?} {primary_lives}");
    }
}

#[test]
fn one_that_went_ahead_is_waited_for_until_it_has_ended_but_not_longer_than_its_grace() {
    let mut play = Play::new(3, 2, Ticket::Held);
    play.vote(&[0, 1, 2], Phase::Committed, 0);
    play.take(Event::Ended { voter: PRIMARY, ok: true });
    play.take(Event::Ended { voter: 1, ok: true });
    assert_eq!(play.transaction.conclusion(), None);
    play.pass(GRACE);
    assert_eq!(play.transaction.conclusion(), Some(Conclusion::Compare(vec![0, 1])));
}

#[test]
fn one_that_went_ahead_leaves_doubt_when_the_others_were_refused() {
    for stops in [false, true] {
        let mut play = Play::new(3, 2, Ticket::Held);
        play.vote(&[2], Phase::Committed, 0);
        play.vote(&[0, 1], Phase::Synchronized, 1);
        if stops {
            play.take(Event::Stopped);
        }
        play.take(Event::Ended { voter: PRIMARY, ok: false });
        assert!(play.transaction.is_unasked());
        assert_eq!(play.transaction.primary_was_stopped(), stops);
        assert_eq!(play.transaction.conclusion(), Some(Conclusion::InDoubt));
    }
}

#[derive(Debug, Clone)]
enum Step {
    Vote(VoterId, u8),
    Withdraw(VoterId),
    End(VoterId, bool),
    Drop(VoterId),
    Stop,
    Ticket(usize),
    Refuse,
    Record(bool),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0usize..4, prop_oneof![9 => Just(1u8), 1 => Just(2u8)]).prop_map(|(voter, value)| Step::Vote(voter, value)),
        1 => (0usize..4).prop_map(Step::Withdraw),
        1 => (0usize..4, any::<bool>()).prop_map(|(voter, ok)| Step::End(voter, ok)),
        1 => (0usize..4).prop_map(Step::Drop),
        1 => Just(Step::Stop),
        4 => (2usize..5).prop_map(Step::Ticket),
        1 => Just(Step::Refuse),
        4 => any::<bool>().prop_map(Step::Record),
        3 => (0u64..800).prop_map(Step::Pass),
    ]
}

/// What a push votes, in order.
const PHASES: [Phase; 6] = [
    Phase::Synchronized,
    Phase::Synchronized,
    Phase::Prepared,
    Phase::Committed,
    Phase::Synchronized,
    Phase::Committed,
];

proptest! {
    #[test]
    fn no_schedule_breaks_a_promise(
        voters in 1usize..5,
        quorum in 1usize..4,
        wanted in any::<bool>(),
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let quorum = quorum.min(voters);
        let mut now = Instant::now();
        let ticket = if wanted { Ticket::Wanted } else { Ticket::Held };
        let mut subject = transaction(voters, quorum, ticket, now);
        let lease = now + Duration::from_secs(4);
        subject.leased_until(lease);
        let mut cast: Vec<Vec<Ballot>> = vec![Vec::new(); voters];
        let mut told: Vec<Vec<Verdict>> = vec![Vec::new(); voters];
        let mut out = vec![false; voters];
        let (mut asked, mut held, mut record_asked, mut recorded) = (false, !wanted, false, false);

        for step in steps {
            let event = match step {
                Step::Vote(voter, value) if voter < voters && !subject.waits(voter) => {
                    let number = cast[voter].len();
                    let value = if number == 5 { 0 } else { value };
                    let vote = ballot(PHASES[number.min(5)], value);
                    cast[voter].push(vote);
                    Event::Voted(voter, vote)
                }
                Step::Withdraw(voter) if voter < voters => Event::Withdrawn(voter),
                Step::End(voter, ok) if voter < voters => Event::Ended { voter, ok },
                Step::Drop(voter) if voter < voters => Event::Dropped(voter),
                Step::Stop => Event::Stopped,
                Step::Ticket(_) | Step::Refuse if !asked || held => continue,
                Step::Ticket(count) => {
                    held = true;
                    let names = names(count);
                    let actions = subject.handle(Event::Ticketed { participants: &names, quorum }, now);
                    check(&subject, actions, &cast, &mut told, &mut out, quorum, held, recorded, now < lease, &mut asked, &mut record_asked)?;
                    continue;
                }
                Step::Refuse => Event::TicketRefused,
                Step::Record(_) if !record_asked || recorded => continue,
                Step::Record(true) => { recorded = true; Event::Recorded }
                Step::Record(false) => { recorded = true; Event::NotRecorded }
                Step::Pass(milliseconds) => { now += Duration::from_millis(milliseconds); Event::Tick }
                Step::Vote(..) | Step::Withdraw(_) | Step::End(..) | Step::Drop(_) => continue,
            };
            let actions = subject.handle(event, now);
            check(&subject, actions, &cast, &mut told, &mut out, quorum, held, recorded, now < lease, &mut asked, &mut record_asked)?;
            if let Some(conclusion) = subject.conclusion() {
                prop_assert!(held);
                if let Conclusion::Commit(holders) = conclusion {
                    prop_assert!(holders.len() >= quorum);
                }
            }
        }

        // However it went so far: when everybody has ended, nobody waits, and what is to be recorded is known.
        if asked && !held {
            held = true;
            let actions = subject.handle(Event::TicketRefused, now);
            check(&subject, actions, &cast, &mut told, &mut out, quorum, held, recorded, now < lease, &mut asked, &mut record_asked)?;
        }
        for voter in (0..voters).rev() {
            let actions = subject.handle(Event::Ended { voter, ok: false }, now);
            check(&subject, actions, &cast, &mut told, &mut out, quorum, held, recorded, now < lease, &mut asked, &mut record_asked)?;
        }
        for voter in 0..voters {
            prop_assert!(!subject.waits(voter));
        }
        if !wanted && !record_asked {
            prop_assert!(subject.conclusion().is_some());
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "the whole state of the check")]
fn check(
    subject: &Transaction,
    actions: Vec<Action>,
    cast: &[Vec<Ballot>],
    told: &mut [Vec<Verdict>],
    out: &mut [bool],
    quorum: usize,
    held: bool,
    recorded: bool,
    leased: bool,
    asked: &mut bool,
    record_asked: &mut bool,
) -> Result<(), TestCaseError> {
    for action in actions {
        match action {
            Action::Answer(voter, Verdict::Commit) => {
                prop_assert!(!out[voter], "a voter that was dropped is told to go on");
                let index = told[voter].len();
                told[voter].push(Verdict::Commit);
                let vote = cast[voter][index];
                let agreeing = (0..cast.len())
                    .filter(|other| cast[*other].get(index) == Some(&vote))
                    .collect::<Vec<_>>();
                prop_assert!(agreeing.len() >= quorum);
                if vote.phase != Phase::Committed {
                    prop_assert!(agreeing.contains(&PRIMARY));
                }
                prop_assert!(held || vote.value == [0; 20], "before the ticket");
                prop_assert!(leased || recorded, "after the lease");
                for (other, verdicts) in told.iter().enumerate() {
                    if verdicts.get(index) == Some(&Verdict::Commit) {
                        prop_assert_eq!(cast[other][index], vote, "two values in one subtransaction");
                    }
                }
                prop_assert!(index != 4 || recorded, "hooks before the record");
            }
            Action::Answer(voter, verdict) => {
                told[voter].push(verdict);
                out[voter] = true;
            }
            Action::Drop(voter) => out[voter] = true,
            Action::TakeTicket => {
                prop_assert!(!std::mem::replace(asked, true), "two tickets");
            }
            Action::Record(holders) => {
                prop_assert!(!std::mem::replace(record_asked, true), "two records");
                prop_assert!(holders.len() >= quorum);
                for holder in holders {
                    prop_assert!(cast[holder].len() > 3, "has not changed anything");
                }
            }
        }
    }
    for (voter, verdicts) in told.iter().enumerate() {
        prop_assert!(verdicts.len() <= cast[voter].len());
        prop_assert_eq!(
            subject.waits(voter),
            verdicts.len() < cast[voter].len() && subject.takes_part(voter)
        );
    }
    Ok(())
}
