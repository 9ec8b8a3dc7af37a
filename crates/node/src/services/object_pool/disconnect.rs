//! DisconnectGitAlternates: a member gets what it has borrowed and stands on its own.
//!
//! The link is cut when it is certain that nothing is missing without it, and not tried out: nobody who reads meanwhile notices.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use tabularium_proto::gitaly::{DisconnectGitAlternatesRequest, DisconnectGitAlternatesResponse};
use tonic::Status;

use super::{alternates, members};
use crate::{
    error::internal_io,
    git::durable,
    node::Node,
    place::{Temporary, blocking},
    storage::{Quarantine, RepositoryPath},
    votes::{Voter, agreed, ballot},
};

/// What is voted on: that nothing is borrowed,
const NOTHING: &[u8] = b"no alternates";
/// that everything borrowed becomes the member's own,
const MIGRATE: &[u8] = b"migrate objects";
/// and that the link is cut.
const CUT: &[u8] = b"disconnect alternate";

pub(super) async fn disconnect(
    node: &Node,
    request: &DisconnectGitAlternatesRequest,
    voter: &Voter,
) -> Result<DisconnectGitAlternatesResponse, Status> {
    let member = node.storages.open(request.repository.as_ref())?;
    stand_alone(node, &member, voter).await?;
    Ok(DisconnectGitAlternatesResponse {})
}

/// Disconnects all members of a repository that is to go, if it is a pool.
pub(crate) async fn release_members(node: &Node, pool: &RepositoryPath) -> Result<(), Status> {
    let looked = pool.clone();
    let members = blocking(move || members::of(&looked).map_err(internal_io("looking for members"))).await?;
    for member in members {
        tracing::info!(
            pool = pool.relative_path,
            member = member.relative_path,
            "a pool goes; its member stays"
        );
        stand_alone(node, &member, &Voter::none()).await?;
    }
    let pool = pool.clone();
    blocking(move || members::forget(&pool).map_err(internal_io("forgetting members"))).await
}

async fn stand_alone(node: &Node, member: &RepositoryPath, voter: &Voter) -> Result<(), Status> {
    // Upkeep leaves out what can be borrowed.
    let _calm = node.upkeep.lock(&member.path).await;
    let lines = alternates::read(&member.path).map_err(internal_io("reading alternates"))?;
    let Some(lines) = lines else {
        voter.committed(&member.path, ballot(NOTHING)).await?;
        return Ok(());
    };
    let [line] = lines.as_slice() else {
        return Err(Status::internal("multiple alternate object directories"));
    };
    let lender = alternates::resolve(&member.path, line);
    if !lender.is_dir() {
        return Err(Status::internal("alternate object entry is not a directory"));
    }
    // What comes into the pool now would not come along.
    let _alone = node.copying.lock(lender.parent().unwrap_or(&lender)).await;
    let taking = {
        let (from, to) = (lender.clone(), member.path.join("objects"));
        blocking(move || take_over(&from, &to).map_err(internal_io("linking objects")))
    };
    agreed(&node.sections, voter, &member.path, ballot(MIGRATE).into(), taking).await?;
    let cutting = async {
        require_whole(node, member).await?;
        let path = member.path.clone();
        blocking(move || alternates::remove(&path).map_err(internal_io("removing alternates"))).await
    };
    agreed(&node.sections, voter, &member.path, ballot(CUT).into(), cutting).await
}

/// Gives one object directory every object of another. They share the files.
fn take_over(from: &Path, to: &Path) -> io::Result<()> {
    let mut touched = vec![to.to_owned()];
    let mut directories = Vec::new();
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() && entry.file_name() != "info" {
            directories.push(entry.file_name());
        }
    }
    for name in directories {
        let target = to.join(&name);
        match fs::create_dir(&target) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let files = fs::read_dir(from.join(&name))?.map(|file| file.map(|file| file.path()));
        let mut files: Vec<PathBuf> = files.collect::<io::Result<_>>()?;
        files.retain(|file| file.is_file() && !is_temporary(file));
        // A pack counts from the moment its index is there.
        files.sort_by_key(|file| file.extension().is_some_and(|extension| extension == "idx"));
        for file in files {
            let Some(name) = file.file_name() else { continue };
            match fs::hard_link(&file, target.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        touched.push(target);
    }
    durable::sync_directories(&touched)
}

fn is_temporary(file: &Path) -> bool {
    let name = file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    name.starts_with("tmp_") || name.starts_with(".tmp")
}

/// Whether all that references lead to is there without what is borrowed.
async fn require_whole(node: &Node, member: &RepositoryPath) -> Result<(), Status> {
    let view = Temporary::new(node, &member.storage, "own-objects-")?;
    let own = view.path().to_owned();
    let objects = member.path.join("objects");
    blocking(move || show_own(&objects, &own).map_err(internal_io("looking at own objects"))).await?;
    let objects = Quarantine { object_directory: Some(view.path().to_owned()), alternates: Vec::new() };
    let alone = RepositoryPath { quarantine: Some(objects), ..member.clone() };
    let command = node.git.command(&alone, "rev-list").reads().args(["--objects", "--all", "--quiet"]);
    let output = command.output().await?;
    if output.exit.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(Status::internal(format!(
        "git connectivity error while disconnected: {}, stderr: {stderr:?}",
        output.exit
    )))
}

/// Everything in an object directory but what it says of others.
fn show_own(objects: &Path, view: &Path) -> io::Result<()> {
    for entry in fs::read_dir(objects)? {
        let entry = entry?;
        if entry.file_name() != "info" {
            symlink(entry.path(), view.join(entry.file_name()))?;
        }
    }
    Ok(())
}
