//! `gitaly.InternalGitaly`: which repositories a storage really holds (wire reference, section b.13).

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use tabularium_proto::gitaly::{WalkReposRequest, WalkReposResponse, internal_gitaly_server::InternalGitaly};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use crate::{
    node::Node,
    services::streams::ResponseStream,
    storage::{MAX_DEPTH, OWN_DIRECTORY, check_repository},
};

/// Repositories found ahead of the client.
const FOUND_QUEUE: usize = 64;

pub(crate) struct InternalServer(Arc<Node>);

impl InternalServer {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

/// Is shown a repository, with its path below the storage. `false`: it wants no more of them.
type Visit<'v> = dyn FnMut(&Path, &str) -> io::Result<bool> + 'v;

/// Shows every repository of the storage with this directory.
pub(super) fn walk(root: &Path, visit: &mut Visit<'_>) -> io::Result<()> {
    walk_below(root, root, 0, visit).map(drop)
}

fn walk_below(root: &Path, directory: &Path, depth: usize, visit: &mut Visit<'_>) -> io::Result<bool> {
    if check_repository(directory).is_ok() {
        let Some(relative_path) = directory.strip_prefix(root).ok().and_then(Path::to_str) else {
            tracing::warn!(path = %directory.display(), "a repository whose path is not UTF-8 is left out");
            return Ok(true);
        };
        return visit(directory, relative_path);
    }
    if depth == MAX_DEPTH {
        return Ok(true);
    }
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        // Removed since it was listed.
        Err(error) if error.kind() == io::ErrorKind::NotFound && depth > 0 => return Ok(true),
        Err(error) => return Err(error),
    };
    let mut directories: Vec<PathBuf> = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() && !(depth == 0 && entry.file_name() == OWN_DIRECTORY) {
            directories.push(entry.path());
        }
    }
    directories.sort();
    for directory in directories {
        if !walk_below(root, &directory, depth + 1, visit)? {
            return Ok(false);
        }
    }
    Ok(true)
}

#[tonic::async_trait]
impl InternalGitaly for InternalServer {
    async fn walk_repos(
        &self,
        request: Request<WalkReposRequest>,
    ) -> Result<Response<ResponseStream<WalkReposResponse>>, Status> {
        let name = request.into_inner().storage_name;
        let what = if name.is_empty() { "set" } else { "found" };
        let unknown = || Status::invalid_argument(format!("looking up storage: storage name not {what}"));
        let storage = self.0.storages.get(&name).ok_or_else(unknown)?;
        let root = storage.root.clone();
        let (found, receiver) = mpsc::channel(FOUND_QUEUE);
        tokio::task::spawn_blocking(move || {
            let walked = walk(&root, &mut |directory, relative_path| {
                let modified = fs::metadata(directory)?.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                let response = WalkReposResponse {
                    relative_path: relative_path.to_owned(),
                    modification_time: Some(modified.into()),
                };
                Ok(found.blocking_send(Ok(response)).is_ok())
            });
            if let Err(error) = walked {
                let _ = found.blocking_send(Err(Status::internal(format!("walking the storage: {error}"))));
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }
}
