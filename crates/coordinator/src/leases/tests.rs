use std::collections::HashSet;

use proptest::prelude::*;
use tabularium_common::ids::RepositoryId;

use super::*;

const LEASE: Duration = Duration::from_millis(1000);
const ALWAYS: Moment = Duration::from_secs(1_000_000);

fn at(milliseconds: u64) -> Moment {
    Duration::from_millis(milliseconds)
}

fn key(number: usize) -> RepositoryKey {
    RepositoryKey {
        virtual_storage: "default".parse().unwrap(),
        relative_path: format!("{number}.git").parse().unwrap(),
    }
}

fn route(number: usize, generation: i64) -> RevokedRoute {
    RevokedRoute { key: key(number), id: RepositoryId(1), generation: Generation(generation) }
}

fn leases() -> Leases {
    let mut leases = Leases::new(LEASE, 10);
    leases.own_lease(ALWAYS);
    leases
}

fn fill(leases: &mut Leases, now: Moment, session: SessionId, number: usize) -> bool {
    let fill = leases.begin_fill(&key(number));
    leases.end_fill(now, fill, session, Some(Generation(1))).0
}

fn revocation(actions: &[Action]) -> u64 {
    match actions {
        [Action::Revoke { revocation, .. }] => *revocation,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_revocation_ends_with_the_acknowledgement() {
    let mut leases = leases();
    let session = leases.open(at(0), "r").unwrap();
    assert!(fill(&mut leases, at(1), session, 1));
    assert_eq!(leases.revoke(at(2), &route(2, 2)).0, None, "nobody has that one");
    let (wait, actions) = leases.revoke(at(2), &route(1, 2));
    let number = revocation(&actions);
    assert_eq!(leases.acknowledge(at(3), session, number), [Action::Settled(wait.unwrap())]);
    assert_eq!(leases.revoke(at(4), &route(1, 3)).0, None);
}

#[test]
fn a_router_that_does_not_acknowledge_delays_by_one_lease_at_most() {
    let mut leases = leases();
    let session = leases.open(at(0), "r").unwrap();
    assert_eq!(leases.renew(at(500), session, 1), [Action::Renewed { session, sequence: 1 }]);
    assert!(fill(&mut leases, at(500), session, 1));
    let wait = leases.revoke(at(600), &route(1, 2)).0.unwrap();
    assert_eq!(leases.renew(at(700), session, 2), [], "not before the acknowledgement");
    assert_eq!(leases.next_expiry(), Some(at(500) + with_drift(LEASE)));
    assert_eq!(leases.expire(at(1549)), []);
    assert_eq!(leases.expire(at(1550)), [Action::Close(session), Action::Settled(wait)]);
    assert_eq!(leases.renew(at(1551), session, 3), [Action::Close(session)]);
}

#[test]
fn a_renewal_that_crossed_a_revocation_is_granted_after_it() {
    let mut leases = leases();
    let session = leases.open(at(0), "r").unwrap();
    assert!(fill(&mut leases, at(1), session, 1));
    assert!(fill(&mut leases, at(1), session, 2));
    let (_, first) = leases.revoke(at(10), &route(1, 2));
    assert_eq!(leases.renew(at(20), session, 1), []);
    let (_, second) = leases.revoke(at(30), &route(2, 2));
    let actions = leases.acknowledge(at(40), session, revocation(&first));
    assert_eq!(actions.last(), Some(&Action::Renewed { session, sequence: 1 }), "the second came later");
    assert_eq!(leases.next_expiry(), Some(at(20) + with_drift(LEASE)), "counted from its arrival");
    assert_eq!(leases.acknowledge(at(50), session, revocation(&second)).len(), 1);
}

#[test]
fn an_answer_that_a_revocation_overtook_is_not_cached() {
    let mut leases = leases();
    let session = leases.open(at(0), "r").unwrap();
    let fill = leases.begin_fill(&key(1));
    assert_eq!(leases.revoke(at(1), &route(1, 2)).0, None);
    assert!(!leases.end_fill(at(2), fill, session, Some(Generation(1))).0);
}

#[test]
fn nothing_is_granted_beyond_our_own_lease() {
    let mut leases = Leases::new(LEASE, 10);
    assert_eq!(leases.open(at(0), "r"), None);
    leases.own_lease(at(1500));
    let session = leases.open(at(0), "r").unwrap();
    assert_eq!(leases.renew(at(449), session, 1).len(), 1);
    assert_eq!(leases.renew(at(451), session, 2), [], "its lease would outlive ours");
    assert_eq!(leases.stop_granting(), [Action::Close(session)]);
    assert!(!leases.is_empty(), "the router may still use what it has");
    leases.expire(at(1500));
    assert!(leases.is_empty());
}

#[test]
fn beyond_the_bound_the_oldest_route_is_taken_back() {
    let mut leases = leases();
    let session = leases.open(at(0), "r").unwrap();
    for number in 0..10 {
        assert!(fill(&mut leases, at(1), session, number));
    }
    let id = leases.begin_fill(&key(10));
    let (cacheable, actions) = leases.end_fill(at(2), id, session, Some(Generation(1)));
    assert!(cacheable);
    let evicted = revocation(&actions);
    let (wait, again) = leases.revoke(at(3), &route(0, 2));
    assert!(wait.is_some(), "it counts as held until the router says otherwise");
    assert_eq!(leases.acknowledge(at(4), session, evicted), []);
    assert_eq!(leases.acknowledge(at(5), session, revocation(&again)), [Action::Settled(wait.unwrap())]);
}

/// A router as the protocol wants it to be, with messages under way in both directions.
#[derive(Default)]
struct Router {
    session: Option<SessionId>,
    connected: bool,
    usable_until: Moment,
    sent: HashMap<u64, Moment>,
    sequence: u64,
    cache: HashMap<usize, i64>,
    inbox: VecDeque<Action>,
    to_coordinator: VecDeque<ToCoordinator>,
    /// Questions under way: what, the generation read (once it was), the floor set by revocations seen meanwhile.
    asking: Vec<Asking>,
}

enum ToCoordinator {
    Renew(u64),
    Acknowledge(u64),
}

struct Asking {
    number: usize,
    fill: FillId,
    read: Option<i64>,
    answer: Option<(i64, bool)>,
    floor: i64,
    session: SessionId,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Advance(u64),
    Connect(usize),
    Cut(usize),
    SendRenewal(usize),
    DeliverToCoordinator(usize),
    DeliverToRouter(usize),
    Ask(usize, usize),
    /// The database answers, then the coordinator, then the router reads the answer.
    Proceed(usize, usize),
    Commit(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let router = 0_usize..3;
    let number = 0_usize..3;
    prop_oneof![
        2 => (1_u64..400).prop_map(Step::Advance),
        2 => router.clone().prop_map(Step::Connect),
        1 => router.clone().prop_map(Step::Cut),
        4 => router.clone().prop_map(Step::SendRenewal),
        6 => router.clone().prop_map(Step::DeliverToCoordinator),
        5 => router.clone().prop_map(Step::DeliverToRouter),
        4 => (router.clone(), number.clone()).prop_map(|(r, n)| Step::Ask(r, n)),
        8 => (router, 0_usize..4).prop_map(|(r, n)| Step::Proceed(r, n)),
        2 => number.prop_map(Step::Commit),
    ]
}

struct World {
    now: Moment,
    leases: Leases,
    routers: Vec<Router>,
    database: [i64; 3],
    waits: HashMap<WaitId, (usize, i64, Moment)>,
}

impl World {
    fn new() -> Self {
        let mut leases = Leases::new(LEASE, 2);
        leases.own_lease(ALWAYS);
        let routers = (0..3).map(|_| Router::default()).collect();
        Self { now: at(1), leases, routers, database: [1; 3], waits: HashMap::new() }
    }

    fn apply(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Renewed { session, .. } | Action::Revoke { session, .. } | Action::Close(session) => {
                    let router = self.routers.iter_mut().find(|router| router.session == Some(session));
                    if let Some(router) = router
                        && router.connected
                    {
                        router.inbox.push_back(action);
                    }
                }
                Action::Settled(wait) => {
                    let (number, generation, since) = self.waits.remove(&wait).expect("settled once");
                    assert!(self.now <= since + with_drift(LEASE), "one lease at most");
                    self.nobody_reads_older(number, generation);
                }
            }
        }
    }

    fn nobody_reads_older(&self, number: usize, generation: i64) {
        for router in &self.routers {
            if self.now < router.usable_until {
                let cached = router.cache.get(&number).copied().unwrap_or(i64::MAX);
                assert!(cached >= generation, "{number} at {cached} after {generation} was confirmed");
            }
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Advance(milliseconds) => {
                // The driver's timer never sleeps past an expiry.
                let end = self.now + at(milliseconds);
                while let Some(next) = self.leases.next_expiry().filter(|next| *next <= end) {
                    self.now = self.now.max(next);
                    let actions = self.leases.expire(self.now);
                    self.apply(actions);
                }
                self.now = end;
            }
            Step::Connect(index) => {
                let session = self.leases.open(self.now, "r");
                // A new session starts with an empty cache; answers to the old one's questions are not cached.
                self.routers[index] = Router { session, connected: true, sequence: 0, ..Router::default() };
            }
            Step::Cut(index) => {
                let router = &mut self.routers[index];
                router.connected = false;
                router.inbox.clear();
                router.to_coordinator.clear();
            }
            Step::SendRenewal(index) => {
                let now = self.now;
                let router = &mut self.routers[index];
                if router.connected {
                    router.sequence += 1;
                    router.sent.insert(router.sequence, now);
                    router.to_coordinator.push_back(ToCoordinator::Renew(router.sequence));
                }
            }
            Step::DeliverToCoordinator(index) => {
                let router = &mut self.routers[index];
                let (Some(session), Some(message)) = (router.session, router.to_coordinator.pop_front())
                else {
                    return;
                };
                let actions = match message {
                    ToCoordinator::Renew(sequence) => self.leases.renew(self.now, session, sequence),
                    ToCoordinator::Acknowledge(number) => self.leases.acknowledge(self.now, session, number),
                };
                self.apply(actions);
            }
            Step::DeliverToRouter(index) => self.deliver_to_router(index),
            Step::Ask(index, number) => {
                let router = &mut self.routers[index];
                if let Some(session) = router.session
                    && router.asking.len() < 4
                {
                    let fill = self.leases.begin_fill(&key(number));
                    router.asking.push(Asking { number, fill, read: None, answer: None, floor: 0, session });
                }
            }
            Step::Proceed(index, which) => self.proceed(index, which),
            Step::Commit(number) => {
                self.database[number] += 1;
                let generation = self.database[number];
                let (wait, actions) = self.leases.revoke(self.now, &route(number, generation));
                match wait {
                    Some(wait) => {
                        self.waits.insert(wait, (number, generation, self.now));
                    }
                    None => self.nobody_reads_older(number, generation),
                }
                self.apply(actions);
            }
        }
    }

    fn deliver_to_router(&mut self, index: usize) {
        let router = &mut self.routers[index];
        match router.inbox.pop_front() {
            Some(Action::Renewed { sequence, .. }) => {
                router.usable_until = router.usable_until.max(router.sent[&sequence] + LEASE);
            }
            Some(Action::Revoke { revocation, route, .. }) => {
                let number = (0..3).find(|number| key(*number) == route.key).unwrap();
                if router.cache.get(&number).is_some_and(|cached| *cached < route.generation.0) {
                    router.cache.remove(&number);
                }
                for asking in router.asking.iter_mut().filter(|asking| asking.number == number) {
                    asking.floor = asking.floor.max(route.generation.0);
                }
                router.to_coordinator.push_back(ToCoordinator::Acknowledge(revocation));
            }
            Some(Action::Close(_)) => router.connected = false,
            Some(Action::Settled(_)) | None => {}
        }
    }

    fn proceed(&mut self, index: usize, which: usize) {
        let router = &mut self.routers[index];
        if router.asking.is_empty() {
            return;
        }
        let which = which % router.asking.len();
        let asking = &mut router.asking[which];
        match (asking.read, asking.answer) {
            (None, _) => asking.read = Some(self.database[asking.number]),
            (Some(read), None) => {
                let (fill, session) = (asking.fill, asking.session);
                let (cacheable, actions) =
                    self.leases.end_fill(self.now, fill, session, Some(Generation(read)));
                self.routers[index].asking[which].answer = Some((read, cacheable));
                self.apply(actions);
            }
            (Some(_), Some((read, cacheable))) => {
                let done = router.asking.swap_remove(which);
                if cacheable && read >= done.floor {
                    router.cache.insert(done.number, read);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn no_router_uses_a_route_that_was_taken_back(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        for step in steps {
            world.take(step);
        }
        // Whatever is left settles by itself, within a lease.
        world.take(Step::Advance(5000));
        prop_assert!(world.waits.is_empty());
        let routers: HashSet<_> = world.leases.routers().into_iter().collect();
        prop_assert!(routers.is_empty());
    }
}

#[test]
fn a_route_that_is_written_to_for_ever_takes_no_more_room() {
    let mut leases = leases();
    let session = leases.open(ALWAYS / 2, "r").unwrap();
    for round in 0..10_000 {
        let now = ALWAYS / 2 + at(round / 100);
        assert!(fill(&mut leases, now, session, 1));
        let (_, actions) = leases.revoke(now, &route(1, 2));
        leases.acknowledge(now, session, revocation(&actions));
        let held = &leases.sessions[&session];
        assert!(held.oldest.len() <= 21, "{} names for {} routes", held.oldest.len(), held.routes.len());
    }
}
