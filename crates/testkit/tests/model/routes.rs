//! Cached routes: kept under a session's lease, taken back when they do not hold any more.

use crate::{
    protocol::{Protocol, Safeguard, Step as AnyStep},
    state::{ROUTERS, State},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The router forgets the route, says so, and asks anew.
    Revoke(usize),
    /// A router that is stopped has not renewed its session: whoever waits for it need not any more.
    SessionRunsOut(usize),
    /// A replica is up to date again: routers are told, and nobody waits for it.
    Renew(usize),
}

pub(crate) fn open(state: &State, steps: &mut Vec<AnyStep>) {
    for id in 0..ROUTERS {
        let router = &state.routers[id];
        let revoked = state.database.revoking.contains(id);
        let differs = router.route.is_some_and(|route| route.nodes != state.database.up_to_date);
        let step = match router.stopped {
            true if revoked => Step::SessionRunsOut(id),
            false if revoked => Step::Revoke(id),
            false if differs => Step::Renew(id),
            _ => continue,
        };
        steps.push(AnyStep::Route(step));
    }
}

pub(crate) fn take(protocol: &Protocol, state: &mut State, step: Step) {
    match step {
        Step::Revoke(router) | Step::Renew(router) => state.renew_route(router),
        Step::SessionRunsOut(router) => {
            state.give_up_route(router);
            if protocol.has(Safeguard::RouteLease) {
                state.routers[router].route = None;
            }
        }
    }
}
