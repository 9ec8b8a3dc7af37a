//! FetchRemote: brings a repository up to date with one outside the cluster.

use std::time::Duration;

use tabularium_proto::gitaly::{FetchRemoteRequest, FetchRemoteResponse};
use tonic::Status;

use crate::{
    contents,
    git::Output,
    hooks,
    node::Node,
    peer::fetch_atomically,
    remote_url::{REMOTE, RemoteUrl},
    ssh_keys::SshKeys,
    storage::RepositoryPath,
    votes::{Voter, ballot},
};

pub(super) async fn fetch(
    node: &Node,
    request: FetchRemoteRequest,
    voter: &Voter,
) -> Result<FetchRemoteResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let remote =
        request.remote_params.as_ref().ok_or_else(|| Status::invalid_argument("missing remote params"))?;
    if remote.url.trim().is_empty() {
        return Err(Status::invalid_argument("blank or empty remote URL"));
    }
    let url = RemoteUrl::parse(&remote.url)?;
    let refspecs =
        remote.mirror_refmaps.iter().map(|refmap| refspec(refmap)).collect::<Result<Vec<_>, _>>()?;
    let refspecs = if refspecs.is_empty() { vec!["refs/*:refs/*"] } else { refspecs };
    let keys = SshKeys::write(node, &repository, &request.ssh_key, &request.known_hosts)?;
    let _alone = node.copying.lock(&repository.path).await;

    let before = Refs::read(node, &repository).await?;
    let configured = url.configure(
        node.git.command(&repository, "fetch"),
        &remote.http_authorization_header,
        &remote.resolved_address,
    )?;
    // Every attempt needs a command of its own; the checks above have passed for all of them.
    let options = options(&request);
    let session = node.hooks.session(voter, &repository);
    let command = || {
        let command = configured.clone().config("fetch.recurseSubmodules=false");
        let command = keys.apply(command, url.host_key_alias(&remote.resolved_address));
        hooks::attend(session.as_ref(), command).args(["--quiet", "--no-write-fetch-head"]).args(&options)
    };
    let fetching = fetch_atomically(command, REMOTE, &refspecs);
    let output = match u64::try_from(request.timeout) {
        Ok(0) | Err(_) => fetching.await?,
        Ok(seconds) => tokio::time::timeout(Duration::from_secs(seconds), fetching)
            .await
            .map_err(|_| Status::deadline_exceeded("fetch remote: context deadline exceeded"))??,
    };
    if !output.exit.success() {
        return Err(hooks::failure(session.as_ref()).unwrap_or_else(|| failure(&output)));
    }
    let after = Refs::read(node, &repository).await?;
    // Also when nothing was new: the replicas then still have the same.
    voter.committed(&repository.path, ballot(&after.all)).await?;
    Ok(FetchRemoteResponse {
        tags_changed: !request.check_tags_changed || before.tags != after.tags,
        repo_changed: before != after,
    })
}

fn failure(output: &Output) -> Status {
    let stderr = String::from_utf8_lossy(&output.stderr);
    Status::internal(format!("fetch remote: {:?}: {}", stderr.trim_end(), output.exit))
}

fn options(request: &FetchRemoteRequest) -> Vec<&'static str> {
    let mut options = vec![if request.no_tags { "--no-tags" } else { "--tags" }];
    if !request.no_prune {
        options.push("--prune");
    }
    if request.force {
        options.push("--force");
    }
    options
}

fn refspec(refmap: &str) -> Result<&str, Status> {
    match refmap {
        "all_refs" => Ok("+refs/*:refs/*"),
        "heads" => Ok("+refs/heads/*:refs/heads/*"),
        "tags" => Ok("+refs/tags/*:refs/tags/*"),
        literal if literal.is_empty() || literal.starts_with('-') => {
            Err(Status::invalid_argument("invalid mirror refmap"))
        }
        literal => Ok(literal),
    }
}

/// Digests of all refs and of the tags among them, to see whether a fetch changed anything.
#[derive(Debug, PartialEq, Eq)]
struct Refs {
    all: [u8; 32],
    tags: [u8; 32],
}

impl Refs {
    async fn read(node: &Node, repository: &RepositoryPath) -> Result<Self, Status> {
        Ok(Self {
            all: contents::references(&node.git, repository, "refs/").await?,
            tags: contents::references(&node.git, repository, "refs/tags/").await?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refmaps_have_short_names() {
        assert_eq!(refspec("all_refs").unwrap(), "+refs/*:refs/*");
        assert_eq!(refspec("+refs/a:refs/b").unwrap(), "+refs/a:refs/b");
        assert!(refspec("--upload-pack=id").is_err() && refspec("").is_err());
    }
}
