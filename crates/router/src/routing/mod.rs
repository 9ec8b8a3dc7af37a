//! Where an RPC goes: pure decisions over a route, the opinion about nodes, and a number that spreads the load.
//!
//! Nothing here knows connections, time or coordinators.

use tabularium_proto::coordinator::{Replica, Route, WriteKind};
use tonic::Code;

use crate::refusal::Refusal;

pub(crate) mod judgement;
#[cfg(test)]
mod tests;

/// What a read asks of the replica that serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    /// Any that is up to date.
    Any,
    /// Only the primary.
    Primary,
}

fn is_current(route: &Route, replica: &Replica) -> bool {
    replica.generation >= 0 && replica.generation == route.generation
}

/// Storages whose replica has the newest generation.
pub(crate) fn current(route: &Route) -> impl Iterator<Item = &str> {
    route.replicas.iter().filter(|replica| is_current(route, replica)).map(|replica| replica.storage.as_str())
}

/// The generation that a read has at least.
pub(crate) fn generation_read(route: &Route, reader: Reader) -> i64 {
    match reader {
        Reader::Any => route.generation,
        Reader::Primary => generation_of(route, &route.primary),
    }
}

/// The generation that a storage's replica has at least; -1: there is none.
pub(crate) fn generation_of(route: &Route, storage: &str) -> i64 {
    let replica = route.replicas.iter().find(|replica| replica.storage == storage);
    replica.map_or(-1, |replica| replica.generation)
}

/// A known route after a write by `written` was recorded of which `storages` have it. `None`: the route is another one, or
/// newer.
pub(crate) fn advanced(known: &Route, written: &Route, storages: &[String]) -> Option<Route> {
    let same = known.repository_id == written.repository_id && known.epoch == written.epoch;
    if !same || known.generation > written.generation {
        return None;
    }
    let mut route = known.clone();
    route.generation = written.generation + 1;
    for replica in &mut route.replicas {
        if storages.contains(&replica.storage) {
            replica.generation = route.generation;
        }
    }
    Some(route)
}

/// The storage that serves a read. `spread` is any number; successive ones walk through the replicas. Storages in
/// `tried` are left out.
pub(crate) fn reader<'r>(
    route: &'r Route,
    reader: Reader,
    healthy: impl Fn(&str) -> bool,
    tried: &[String],
    spread: usize,
) -> Result<&'r str, Refusal> {
    if reader == Reader::Primary {
        let primary = route.primary.as_str();
        let usable =
            !primary.is_empty() && healthy(primary) && !tried.iter().any(|storage| storage == primary);
        return usable.then_some(primary).ok_or(Refusal::PrimaryUnhealthy);
    }
    let usable = |storage: &&str| healthy(storage) && !tried.iter().any(|other| other == storage);
    let count = current(route).filter(usable).count();
    if let Some(index) = spread.checked_rem(count)
        && let Some(storage) = current(route).filter(usable).nth(index)
    {
        return Ok(storage);
    }
    if route.replicas.iter().any(|replica| healthy(&replica.storage)) {
        Err(Refusal::NoSuitableNode)
    } else {
        Err(Refusal::NoHealthyNodes)
    }
}

/// The storages that a maintenance RPC goes to: every healthy one that holds the repository, of whatever generation, the
/// primary first: its answer is the one returned.
pub(crate) fn maintained(route: &Route, healthy: impl Fn(&str) -> bool) -> Result<Vec<&str>, Refusal> {
    let mut storages: Vec<&str> = route
        .replicas
        .iter()
        .filter(|replica| replica.generation >= 0 && healthy(&replica.storage))
        .map(|replica| replica.storage.as_str())
        .collect();
    storages.sort_by_key(|storage| *storage != route.primary);
    if storages.is_empty() { Err(Refusal::NoHealthyNodes) } else { Ok(storages) }
}

/// The storage, out of those of a virtual storage, that serves an RPC aimed at any of them: its place in the list.
pub(crate) fn any_storage(healthy: &[bool], spread: usize) -> Result<usize, Refusal> {
    let count = healthy.iter().filter(|healthy| **healthy).count();
    let index = spread.checked_rem(count).ok_or(Refusal::NoHealthyNodes)?;
    let chosen = healthy.iter().enumerate().filter(|(_, healthy)| **healthy).nth(index);
    chosen.map(|(place, _)| place).ok_or(Refusal::NoHealthyNodes)
}

/// How the node's part in a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With a status of its own.
    Status(Code),
    /// Without one.
    Lost,
}

/// What is presumed of a write on which nodes do not vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presumed {
    /// The primary has it.
    Written,
    /// It did not happen.
    NotWritten,
    /// Nobody knows.
    Unknown,
}

/// What is presumed of a write whose request reached the primary, when nodes do not vote on it.
///
/// A node may have written before it answered with an error, so an update counts as a write unless the node cannot even
/// have started it. A creation that failed has left nothing that anybody was promised.
pub(crate) fn presumed(kind: WriteKind, ending: Ending) -> Presumed {
    match (kind, ending) {
        (_, Ending::Status(Code::Ok)) => Presumed::Written,
        (_, Ending::Status(Code::Unimplemented | Code::Unauthenticated))
        | (WriteKind::Create, Ending::Status(_)) => Presumed::NotWritten,
        (WriteKind::Upsert, Ending::Status(_)) | (_, Ending::Lost) => Presumed::Unknown,
        (WriteKind::Update | WriteKind::Unspecified, Ending::Status(_)) => Presumed::Written,
    }
}

/// Storages that a coordinator is told not to choose as the primary. When all look dead it is told nothing: then the
/// fault may be here, and `None` says so.
pub(crate) fn unreachable_storages<'s>(
    storages: impl Iterator<Item = (&'s str, bool)>,
) -> Option<Vec<String>> {
    let mut any_healthy = false;
    let mut dead = Vec::new();
    for (storage, healthy) in storages {
        any_healthy |= healthy;
        if !healthy {
            dead.push(storage.to_owned());
        }
    }
    any_healthy.then_some(dead)
}
