//! OptimizeRepository: packs objects and refs, and clears locks nobody holds any more.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use tabularium_proto::gitaly::{
    OptimizeRepositoryRequest, OptimizeRepositoryResponse, PruneUnreachableObjectsRequest,
    PruneUnreachableObjectsResponse, optimize_repository_request::Strategy,
};
use tonic::Status;

use super::facts::{is_loose, walk};
use crate::{
    error::internal_io,
    git::leftovers,
    node::Node,
    place::blocking,
    services::object_pool::{alternates, is_pool_path},
};

/// Loose objects that are worth a pack.
const MANY_LOOSE_OBJECTS: u64 = 1024;
/// Packs that are worth one instead.
const MANY_PACKS: u64 = 12;
/// Loose refs that are worth packing.
const MANY_LOOSE_REFS: u64 = 64;
/// A lock or temporary file older than this belongs to nobody: no git command holds a lock nearly as long.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 3600);
/// How long an unreachable object is kept, for whoever is about to refer to it.
const KEEP_UNREACHABLE: &str = "--cruft-expiration=2.weeks.ago";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Shape {
    loose_objects: u64,
    packs: u64,
    loose_refs: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repack {
    Nothing,
    LooseObjects,
    Everything,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    repack: Repack,
    pack_refs: bool,
}

fn plan(shape: Shape, eager: bool) -> Plan {
    let repack = if eager || shape.packs > MANY_PACKS {
        Repack::Everything
    } else if shape.loose_objects > MANY_LOOSE_OBJECTS {
        Repack::LooseObjects
    } else {
        Repack::Nothing
    };
    Plan { repack, pack_refs: eager || shape.loose_refs > MANY_LOOSE_REFS }
}

pub(crate) async fn optimize(
    node: &Node,
    request: &OptimizeRepositoryRequest,
) -> Result<OptimizeRepositoryResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let eager = match Strategy::try_from(request.strategy) {
        Ok(Strategy::Unspecified | Strategy::Heuristical) => false,
        Ok(Strategy::Eager) => true,
        Ok(Strategy::Offloading | Strategy::Rehydration) => {
            return Err(Status::unimplemented("offloading is not built in"));
        }
        Err(_) => {
            let text = format!("unsupported optimization strategy {}", request.strategy);
            return Err(Status::invalid_argument(text));
        }
    };
    let _alone = node.upkeep.lock(&repository.path).await;
    let shape = {
        let path = repository.path.clone();
        blocking(move || clear_and_look(&path)).await?
    };
    let plan = plan(shape, eager);
    let repack = || {
        let command = node.git.command(&repository, "repack").config("repack.updateServerInfo=false");
        command.args(["-d", "-l", "--quiet"])
    };
    match plan.repack {
        Repack::Nothing => {}
        Repack::LooseObjects => drop(repack().checked().await?),
        Repack::Everything => {
            // What no reference of a pool holds others may have borrowed.
            let unreachable: &[&str] = if is_pool_path(&repository.relative_path) {
                &["-a", "--keep-unreachable"]
            } else {
                &["--cruft", KEEP_UNREACHABLE]
            };
            let borrows = alternates::read(&repository.path).map_err(internal_io("reading alternates"))?;
            // Git makes none of a part of the objects, and complains.
            let bitmap: &[&str] = if borrows.is_none() { &["--write-bitmap-index"] } else { &[] };
            repack().args(unreachable).args(bitmap).checked().await?;
            let graph = node.git.command(&repository, "commit-graph");
            graph.args(["write", "--reachable", "--changed-paths", "--no-progress"]).checked().await?;
        }
    }
    if plan.pack_refs {
        node.git.command(&repository, "pack-refs").args(["--all", "--prune"]).checked().await?;
    }
    Ok(OptimizeRepositoryResponse {})
}

/// How long an unreachable object is kept when somebody wants them gone: no git command takes longer to refer to one.
const PRUNE_BEFORE: &str = "30.minutes.ago";

pub(super) async fn prune_unreachable(
    node: &Node,
    request: &PruneUnreachableObjectsRequest,
) -> Result<PruneUnreachableObjectsResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if is_pool_path(&repository.relative_path) {
        return Err(Status::invalid_argument("pruning objects for object pool"));
    }
    let _alone = node.upkeep.lock(&repository.path).await;
    let prune = node.git.command(&repository, "prune");
    prune.args([format!("--expire={PRUNE_BEFORE}"), "--no-progress".to_owned()]).checked().await?;
    // Those that are in packs go when everything is packed anew.
    let repack = node.git.command(&repository, "repack").config("repack.updateServerInfo=false");
    let expiration = format!("--cruft-expiration={PRUNE_BEFORE}");
    let repack = repack.args(["-d", "-l", "--quiet", "--cruft", &expiration]);
    let borrows = alternates::read(&repository.path).map_err(internal_io("reading alternates"))?.is_some();
    let repack = if borrows { repack } else { repack.arg("--write-bitmap-index") };
    repack.checked().await?;
    // The present one may name commits that are gone.
    let graph = node.git.command(&repository, "commit-graph");
    let graph = graph.args(["write", "--reachable", "--changed-paths", "--no-progress", "--split=replace"]);
    graph.checked().await?;
    Ok(PruneUnreachableObjectsResponse {})
}

fn clear_and_look(path: &Path) -> Result<Shape, Status> {
    leftovers::sweep(path, SystemTime::now() - ABANDONED_AFTER).map_err(internal_io("clearing old locks"))?;
    let objects = path.join("objects");
    let mut shape = Shape::default();
    let looked = walk(&objects, &mut |file: &Path, _| {
        if is_loose(&objects, file) {
            shape.loose_objects += 1;
        } else if file.extension().is_some_and(|extension| extension == "pack") {
            shape.packs += 1;
        }
    });
    looked
        .and_then(|()| walk(&path.join("refs"), &mut |_, _| shape.loose_refs += 1))
        .map_err(internal_io("looking at the repository"))?;
    Ok(shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_worth_it_is_packed() {
        let calm = Shape { loose_objects: 10, packs: 2, loose_refs: 3 };
        assert_eq!(plan(calm, false), Plan { repack: Repack::Nothing, pack_refs: false });
        assert_eq!(plan(calm, true), Plan { repack: Repack::Everything, pack_refs: true });
        let loose = Shape { loose_objects: 5000, ..calm };
        assert_eq!(plan(loose, false).repack, Repack::LooseObjects);
        let packs = Shape { packs: 50, loose_refs: 500, ..loose };
        assert_eq!(plan(packs, false), Plan { repack: Repack::Everything, pack_refs: true });
    }
}
