//! LinkRepositoryToObjectPool.

use std::{io, path::Path};

use tabularium_proto::gitaly::{LinkRepositoryToObjectPoolRequest, LinkRepositoryToObjectPoolResponse};
use tonic::Status;

use super::{alternates, locate, members};
use crate::{
    error::internal_io,
    node::Node,
    place::blocking,
    storage::{RepositoryPath, check_repository},
    votes::{Voter, agreed, ballot},
};

/// What is voted on when there is nothing to do.
const LINKED: &[u8] = b"repository linked";

pub(super) async fn link(
    node: &Node,
    request: &LinkRepositoryToObjectPoolRequest,
    voter: &Voter,
) -> Result<LinkRepositoryToObjectPoolResponse, Status> {
    let member = node.storages.open(request.repository.as_ref())?;
    let (pool, _) = locate(node, request.object_pool.as_ref())?;
    check_repository(&pool.path)
        .map_err(|_| Status::failed_precondition("object pool is not a valid git repository"))?;
    if pool.storage.name != member.storage.name || pool.path == member.path {
        return Err(Status::invalid_argument("repository and object pool cannot be linked"));
    }
    let line = alternates::line(&member.path, &pool.path);
    // Meanwhile nothing is repacked: it would go by what was borrowed before.
    let _calm = node.upkeep.lock(&member.path).await;
    let present = alternates::read(&member.path).map_err(internal_io("reading alternates"))?;
    let present = present.and_then(|lines| lines.into_iter().next());
    match present {
        Some(present) if present == line => {
            voter.committed(&member.path, ballot(LINKED)).await?;
            return Ok(LinkRepositoryToObjectPoolResponse {});
        }
        Some(other) if Path::new(&other) != pool.path.join("objects") => {
            return Err(Status::internal(format!("unexpected alternates content: {other:?}")));
        }
        Some(_) | None => {}
    }
    let noted = (pool.clone(), member.clone());
    blocking(move || members::note(&noted.0, &noted.1).map_err(internal_io("noting a member"))).await?;
    let writing = {
        let (member, line) = (member.clone(), line.clone());
        blocking(move || alternates::write(&member, &line).map_err(internal_io("writing alternates")))
    };
    agreed(&node.sections, voter, &member.path, ballot(line.as_bytes()).into(), writing).await?;
    blocking(move || one_bitmap(&pool, &member).map_err(internal_io("removing bitmaps"))).await?;
    Ok(LinkRepositoryToObjectPoolResponse {})
}

/// Git warns its users when it finds two bitmaps, so a member of a pool that has one has none.
fn one_bitmap(pool: &RepositoryPath, member: &RepositoryPath) -> io::Result<()> {
    if bitmaps(&pool.path)?.is_empty() {
        return Ok(());
    }
    for bitmap in bitmaps(&member.path)? {
        match std::fs::remove_file(bitmap) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn bitmaps(repository: &Path) -> io::Result<Vec<std::path::PathBuf>> {
    let entries = match std::fs::read_dir(repository.join("objects/pack")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    paths.filter(|path| path.as_ref().map_or(true, |path| is_bitmap(path))).collect()
}

fn is_bitmap(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with("pack-") && path.extension().is_some_and(|extension| extension == "bitmap")
}
