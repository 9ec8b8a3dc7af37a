//! How git reaches remotes over SSH.

use std::{io::Write as _, os::unix::fs::PermissionsExt as _};

use tonic::Status;

use crate::{error::internal_io, git::GitCommand, node::Node, place::Temporary, storage::RepositoryPath};

/// Key and known hosts of an SSH remote, in files only this process's user can read.
pub(crate) struct SshKeys {
    directory: Option<Temporary>,
    has_key: bool,
    has_hosts: bool,
}

impl SshKeys {
    /// Of a request; either may be empty.
    pub(crate) fn write(
        node: &Node,
        repository: &RepositoryPath,
        key: &str,
        hosts: &str,
    ) -> Result<Self, Status> {
        let (has_key, has_hosts) = (!key.is_empty(), !hosts.is_empty());
        if !has_key && !has_hosts {
            return Ok(Self { directory: None, has_key, has_hosts });
        }
        let directory = Temporary::new(node, &repository.storage, "ssh-")?;
        for (name, content) in [("key", key), ("hosts", hosts)] {
            let written = std::fs::File::create_new(directory.path().join(name)).and_then(|mut file| {
                file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
                file.write_all(content.as_bytes())?;
                file.write_all(b"\n")
            });
            written.map_err(internal_io("keeping the SSH key"))?;
        }
        Ok(Self { directory: Some(directory), has_key, has_hosts })
    }

    /// Has the command use them; the host's key is that of another name if `alias` says so.
    pub(crate) fn apply(&self, command: GitCommand, alias: Option<&str>) -> GitCommand {
        let mut ssh = "ssh -F /dev/null -o BatchMode=yes".to_owned();
        if let Some(alias) = alias {
            ssh = format!("{ssh} -o HostKeyAlias={alias}");
        }
        if let Some(directory) = &self.directory {
            let quoted =
                |name| format!("'{}'", directory.path().join(name).to_string_lossy().replace('\'', r"'\''"));
            if self.has_key {
                ssh = format!("{ssh} -o IdentitiesOnly=yes -i {}", quoted("key"));
            }
            if self.has_hosts {
                let hosts = quoted("hosts");
                ssh = format!("{ssh} -o StrictHostKeyChecking=yes -o UserKnownHostsFile={hosts}");
            }
        }
        command.env("GIT_SSH_COMMAND", ssh)
    }
}
