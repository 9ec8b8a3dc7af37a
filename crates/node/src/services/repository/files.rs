//! The `config` of a repository.

use std::{collections::BTreeSet, io};

use tabularium_proto::gitaly::{GetConfigRequest, GetConfigResponse};
use tonic::Status;

use crate::{
    contents::is_description,
    error::internal_io,
    git::CHUNK_BYTES,
    node::Node,
    place::{Temporary, blocking, replace_file},
    services::streams::ResponseStream,
    storage::{RepositoryPath, Storage},
};

pub(super) async fn config(
    node: &Node,
    request: &GetConfigRequest,
) -> Result<ResponseStream<GetConfigResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let config = match tokio::fs::read(repository.path.join("config")).await {
        Ok(config) => config,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Status::not_found("opening gitconfig: no such file or directory"));
        }
        Err(error) => return Err(internal_io("opening gitconfig")(error)),
    };
    let messages: Vec<_> =
        config.chunks(CHUNK_BYTES).map(|data| Ok(GetConfigResponse { data: data.to_vec() })).collect();
    Ok(Box::pin(tokio_stream::iter(messages)))
}

/// Another node's `config`, without what could make git run programs here.
pub(super) async fn harmless_config(
    node: &Node,
    storage: &Storage,
    config: Vec<u8>,
) -> Result<Vec<u8>, Status> {
    let scratch = Temporary::new(node, storage, "config-")?;
    let path = scratch.path().join("config");
    tokio::fs::write(&path, config).await.map_err(internal_io("keeping the config"))?;
    let list = node.git.bare_command("config").arg("--file").arg(&path);
    let listed = list.args(["--no-includes", "--null", "--name-only", "--list"]).checked().await?;
    for key in foreign_settings(&listed) {
        let unset = node.git.bare_command("config").arg("--file").arg(&path);
        unset.arg("--unset-all").arg(key).checked().await?;
    }
    tokio::fs::read(&path).await.map_err(internal_io("reading the config"))
}

/// Replaces the `config` of `target`, if it is another one.
pub(super) async fn replace_config(target: RepositoryPath, wanted: Vec<u8>) -> Result<(), Status> {
    blocking(move || {
        if std::fs::read(target.path.join("config")).is_ok_and(|present| present == wanted) {
            return Ok(());
        }
        replace_file(&target, "config", &wanted).map_err(internal_io("replacing the config"))
    })
    .await
}

fn foreign_settings(listed: &[u8]) -> BTreeSet<String> {
    listed
        .split(|byte| *byte == 0)
        .filter(|key| !key.is_empty())
        .map(|key| String::from_utf8_lossy(key).into_owned())
        .filter(|key| !is_description(key))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_run_programs_are_foreign() {
        let listed = b"core.bare\0core.sshcommand\0extensions.objectformat\0include.path\0gitlab.fullpath\0";
        let foreign: Vec<_> = foreign_settings(listed).into_iter().collect();
        assert_eq!(foreign, ["core.sshcommand", "include.path"]);
    }
}
