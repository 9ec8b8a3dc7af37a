//! The protocol as the checker runs it: how a run begins, which steps are open, where each is described.

use stateright::{Model, Property};

use crate::{
    properties, recovery, repair, routes,
    state::{Database, Mishaps, NODES, Node, Part, ROUTERS, Route, Router, Set, Stage, State, WRITES, Write},
    voting, writing,
};

/// Something that one party does at once: a vote, an RPC's effect, a transaction, a crash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Write(writing::Step),
    Vote(voting::Step),
    Recovery(recovery::Step),
    Repair(repair::Step),
    Route(routes::Step),
    /// `kill -9`. The disk stays; votes and copies under way are gone.
    CrashNode(usize),
    RestartNode(usize),
    /// `kill -9` and a new process. Its clients know nothing of their writes.
    CrashRouter(usize),
    StopRouter(usize),
    ResumeRouter(usize),
}

/// What makes the protocol safe. A run may leave one out, to show that the checker misses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Safeguard {
    /// `BeginWrite` records an intent and hands out the one ticket. Without it a write is recorded once it is done.
    Intent,
    /// `BeginWrite` turns away a router that asked the nodes by the route of an older epoch.
    EpochCheck,
    /// Of the nodes asked only those take part that are up to date now.
    ParticipantsUpToDate,
    /// A router answers votes only while the lease of its ticket runs.
    LeaseFence,
    /// `CommitWrite` of a write that was settled meanwhile is refused.
    SettledIsSettled,
    /// A write that shrank the up-to-date set is acknowledged only when no router can still read elsewhere.
    RevocationWait,
    /// So is a write that found such a revocation unfinished.
    EarlierRevocations,
    /// A router that was stopped does not read by its route once the session's lease has run out.
    RouteLease,
    /// The majority must have a write, not the primary alone.
    Majority,
    /// A replica is up to date again only when nothing was, or is being, written since its copy began.
    RepairTicket,
    /// A node refuses a copy once it has seen a later attempt.
    AttemptFence,
    /// It remembers the attempt across a crash.
    AttemptOnDisk,
    /// A node whose router is silent gives up its vote, and with it the lock of the reference.
    SilenceEndsVotes,
    /// Who is asked what it holds first gives up every vote that waits for an answer.
    Quiesce,
    /// So does who is made equal to another replica.
    QuietTarget,
}

/// One client's push.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) router: usize,
    /// References it moves, in order, each in a transaction of its own.
    pub(crate) references: &'static [usize],
}

/// A bounded run: who writes, what may go wrong, which safeguard is missing.
#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    pub(crate) plans: Vec<Plan>,
    pub(crate) mishaps: Mishaps,
    /// Replicas that are behind when the run begins.
    pub(crate) behind: usize,
    /// Whether replicas that are behind are copied to. Where that is not what a run is about it would only multiply it.
    pub(crate) repairs: bool,
    pub(crate) without: Option<Safeguard>,
}

impl Protocol {
    pub(crate) fn has(&self, safeguard: Safeguard) -> bool {
        self.without != Some(safeguard)
    }

    /// What the parties can do by themselves. Without mishaps this must lead to an end.
    pub(crate) fn progress(&self, state: &State, steps: &mut Vec<Step>) {
        writing::open(self, state, steps);
        voting::open(self, state, steps);
        recovery::open(self, state, steps);
        if self.repairs {
            repair::open(self, state, steps);
        }
        routes::open(state, steps);
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        assert!(self.plans.len() <= WRITES, "{} writes", self.plans.len());
        let up_to_date: Set = (0..NODES - self.behind).collect();
        let database = Database {
            generation: 0,
            epoch: 0,
            primary: Set::only(0),
            up_to_date,
            ticket: None,
            revoking: Set::EMPTY,
        };
        let route = Route { nodes: up_to_date, primary: database.primary, epoch: 0 };
        let mut writes: [Write; WRITES] = Default::default();
        for write in &mut writes[self.plans.len()..] {
            // A write that nobody plans is over before it begins.
            write.stage = Stage::Refused;
        }
        vec![State {
            nodes: std::array::from_fn(|_| Node::default()),
            routers: std::array::from_fn::<_, ROUTERS, _>(|_| Router { stopped: false, route: Some(route) }),
            database,
            writes,
            repair: None,
            late: None,
            left: self.mishaps,
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        self.progress(state, steps);
        for node in 0..NODES {
            if state.is_up(node) {
                if state.left.node_crashes > 0 {
                    steps.push(Step::CrashNode(node));
                }
            } else {
                steps.push(Step::RestartNode(node));
            }
        }
        for (id, router) in state.routers.iter().enumerate() {
            if router.stopped {
                steps.push(Step::ResumeRouter(id));
                continue;
            }
            // One that carries nothing has nothing to lose.
            let carries = self.plans.iter().zip(&state.writes).any(|(plan, write)| {
                plan.router == id && write.stage != Stage::Waiting && !write.stage.is_over()
            });
            if carries && state.left.router_crashes > 0 {
                steps.push(Step::CrashRouter(id));
            }
            if (carries || router.route.is_some()) && state.left.router_stops > 0 {
                steps.push(Step::StopRouter(id));
            }
        }
        recovery::mishaps(state, steps);
        repair::mishaps(state, steps);
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        match step {
            Step::Write(step) => writing::take(self, &mut next, step),
            Step::Vote(step) => voting::take(self, &mut next, step),
            Step::Recovery(step) => recovery::take(self, &mut next, step),
            Step::Repair(step) => repair::take(self, &mut next, step),
            Step::Route(step) => routes::take(self, &mut next, step),
            Step::CrashNode(node) => {
                next.left.node_crashes -= 1;
                next.nodes[node].down = true;
                next.nodes[node].parts = [Part::Nothing; WRITES];
                repair::target_crashed(self, &mut next, node);
            }
            Step::RestartNode(node) => next.nodes[node].down = false,
            Step::CrashRouter(router) => {
                next.left.router_crashes -= 1;
                next.renew_route(router);
                for (write, plan) in self.plans.iter().enumerate() {
                    let stage = next.writes[write].stage;
                    if plan.router == router && stage != Stage::Waiting && !stage.is_over() {
                        next.end_write(write, Stage::Unknown);
                    }
                }
            }
            Step::StopRouter(router) => {
                next.left.router_stops -= 1;
                next.routers[router].stopped = true;
            }
            Step::ResumeRouter(router) => {
                next.routers[router].stopped = false;
                if next.routers[router].route.is_none() {
                    next.renew_route(router);
                }
            }
        }
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
