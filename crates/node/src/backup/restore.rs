//! Making a repository from a backup.

use std::{io, path::Path};

use tokio::io::{AsyncWriteExt as _, BufReader, BufWriter};
use tonic::Status;

use super::{
    BackupError, BackupId, Backups, Place, bundle, manifest::Manifest, manifest::Step, references::References,
};
use crate::{
    error::internal_io,
    git::{
        CHUNK_BYTES,
        revision::{ObjectHash, check_reference},
    },
    node::Node,
    place::{Building, blocking},
    services::{object_pool::release_members, repository::unpack_custom_hooks},
    storage::RepositoryPath,
    votes::Voter,
};

/// The branch that `HEAD` stands for when nothing says which.
const DEFAULT_BRANCH: &str = "main";

const NO_SUCH_BACKUP: &str = "manager: repository skipped: manifest: find: read manifest: doesn't exist";
const NO_BACKUP: &str = "repository skipped: manifest: find latest: read manifest: doesn't exist";
const NO_REPOSITORY: &str = "manager: repository skipped: there was no repository to back up";

/// Which backup.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// Its name; `None`: the newest one.
    pub(crate) id: Option<BackupId>,
    /// If there is none of that name, the newest one.
    pub(crate) or_latest: bool,
    /// If there is none at all, and no repository either, an empty repository.
    pub(crate) always_create: bool,
}

/// Has the repository of a backup where `target` is or will be, if the replicas agree. Where there is no backup nothing is
/// touched.
pub(crate) async fn restore(
    node: &Node,
    backups: &Backups,
    target: &RepositoryPath,
    place: &Place,
    wanted: Wanted,
    voter: &Voter,
) -> Result<(), BackupError> {
    let (sought, always_create) = (place.clone(), wanted.always_create);
    let named = wanted.id.is_some();
    let finding = backups.with_sink("looking for the backup", move |sink| {
        let found = match &wanted.id {
            Some(id) => Manifest::find(sink, &sought, id)?,
            None => None,
        };
        match found {
            None if !named || wanted.or_latest => Manifest::latest(sink, &sought),
            found => Ok(found),
        }
    });
    let present = target.path.symlink_metadata().is_ok();
    let manifest = match finding.await? {
        Some(manifest) if manifest.non_existent => return Err(BackupError::Skipped(NO_REPOSITORY)),
        Some(manifest) => manifest,
        None if always_create && !named && !present => Manifest { empty: true, ..Manifest::default() },
        None => return Err(BackupError::Skipped(if named { NO_SUCH_BACKUP } else { NO_BACKUP })),
    };
    let hash = match manifest.object_format.as_str() {
        "" | "sha1" => ObjectHash::Sha1,
        "sha256" => ObjectHash::Sha256,
        other => return Err(Status::internal(format!("unknown object format: {other:?}")).into()),
    };

    let building = if present {
        Building::begin_instead(node, target, DEFAULT_BRANCH, hash.name()).await?
    } else {
        Building::begin(node, target, DEFAULT_BRANCH, hash.name()).await.map_err(Status::from)?
    };
    build(node, backups, &manifest, hash, building.repository()).await?;
    if present {
        release_members(node, target).await?;
        building.take_over_agreed(node, voter).await?;
    } else {
        building.publish_agreed(node, voter).await.map_err(Status::from)?;
    }
    Ok(())
}

/// Makes an empty repository what a backup says.
async fn build(
    node: &Node,
    backups: &Backups,
    manifest: &Manifest,
    hash: ObjectHash,
    repository: &RepositoryPath,
) -> Result<(), Status> {
    let Some(last) = manifest.steps.last() else {
        return if manifest.empty { Ok(()) } else { Err(Status::internal("manager: no backup steps")) };
    };
    for step in &manifest.steps {
        take_objects(node, backups, step, repository).await?;
    }
    let listed = set_references(backups, last, hash, repository).await?;
    set_head(manifest, &listed, repository).await?;
    if listed.any {
        require_all_objects(node, backups, last, hash, repository).await?;
        node.git.command(repository, "pack-refs").arg("--all").checked().await?;
    }
    restore_hooks(backups, last, repository).await
}

/// Takes in the pack of a step. That one is missing where it is needed shows when objects are.
async fn take_objects(
    node: &Node,
    backups: &Backups,
    step: &Step,
    repository: &RepositoryPath,
) -> Result<(), Status> {
    let reading = || internal_io("reading a bundle");
    let Some(file) = backups.open_file(step.bundle(), "reading a bundle").await? else { return Ok(()) };
    let mut file = BufReader::with_capacity(CHUNK_BYTES, file);
    bundle::skip_header(&mut file).await.map_err(reading())?;
    let command = node.git.command(repository, "index-pack").args(["--stdin", "--fix-thin"]);
    let mut process = command.spawn(true).await?;
    if let Some(mut stdin) = process.take_stdin() {
        match tokio::io::copy_buf(&mut file, &mut stdin).await {
            // How git ends says why it wants no more.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => return Err(reading()(error)),
            Ok(_) => {}
        }
    }
    while process.read_chunk().await?.is_some() {}
    let (exit, stderr) = process.finish().await?;
    if exit.success() {
        return Ok(());
    }
    Err(Status::internal(format!("restore bundle: {exit}, stderr: {:?}", String::from_utf8_lossy(&stderr))))
}

/// What a file of references says besides the references.
#[derive(Debug, Default, PartialEq, Eq)]
struct Listed {
    /// Whether there is any, or a `HEAD`.
    any: bool,
    /// What `HEAD` leads to.
    head: Option<String>,
    /// The branch there, the likeliest one.
    branch: Option<Vec<u8>>,
}

impl Listed {
    fn see(&mut self, id: String, name: &[u8]) {
        self.any = true;
        if name == b"HEAD" {
            self.head = Some(id);
        } else if self.head.as_ref() == Some(&id) && name.starts_with(b"refs/heads/") {
            let better = match name {
                b"refs/heads/main" => true,
                b"refs/heads/master" => self.branch.as_deref() != Some(b"refs/heads/main"),
                _ => self.branch.is_none(),
            };
            if better {
                self.branch = Some(name.to_vec());
            }
        }
    }
}

async fn references(backups: &Backups, step: &Step, hash: ObjectHash) -> Result<References, Status> {
    let references = References::open(backups, step.references(), hash, "read refs").await?;
    references.ok_or_else(|| Status::internal("read refs: doesn't exist"))
}

/// Gives the repository, which has none, the references of a step.
async fn set_references(
    backups: &Backups,
    step: &Step,
    hash: ObjectHash,
    repository: &RepositoryPath,
) -> Result<Listed, Status> {
    let mut references = references(backups, step, hash).await?;
    let mut listed = Listed::default();
    let writing = async {
        let packed = tokio::fs::File::create(repository.path.join("packed-refs")).await?;
        let mut packed = BufWriter::new(packed);
        while let Some((id, name)) = references.next().await? {
            if name != b"HEAD" {
                packed.write_all(&[id.as_bytes(), b" ", &name, b"\n"].concat()).await?;
            }
            listed.see(id, &name);
        }
        packed.flush().await
    };
    writing.await.map_err(internal_io("restoring references"))?;
    Ok(listed)
}

async fn set_head(manifest: &Manifest, listed: &Listed, repository: &RepositoryPath) -> Result<(), Status> {
    let known = match manifest.head_reference.as_bytes() {
        b"" => listed.branch.as_deref(),
        reference if check_reference(reference).is_ok() => Some(reference),
        _ => return Err(Status::internal(format!("HEAD cannot be {:?}", manifest.head_reference))),
    };
    let content = match (known, &listed.head) {
        (Some(reference), _) => [b"ref: ", reference, b"\n"].concat(),
        (None, Some(id)) => format!("{id}\n").into_bytes(),
        (None, None) => return Ok(()),
    };
    let head = repository.path.join("HEAD");
    tokio::fs::write(head, content).await.map_err(internal_io("restoring HEAD"))
}

/// Looks whether everything that references reach has been brought along.
async fn require_all_objects(
    node: &Node,
    backups: &Backups,
    step: &Step,
    hash: ObjectHash,
    repository: &RepositoryPath,
) -> Result<(), Status> {
    let references = references(backups, step, hash).await?;
    let command = node.git.command(repository, "rev-list").reads();
    let mut process = command.args(["--objects", "--quiet", "--stdin"]).spawn(true).await?;
    if let Some(stdin) = process.take_stdin() {
        references.feed(stdin, "", "").await.map_err(internal_io("looking for objects"))?;
    }
    while process.read_chunk().await?.is_some() {}
    let (exit, stderr) = process.finish().await?;
    if exit.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&stderr);
    Err(Status::internal(format!("the backup lacks objects: {exit}, stderr: {stderr:?}")))
}

async fn restore_hooks(backups: &Backups, step: &Step, repository: &RepositoryPath) -> Result<(), Status> {
    let doing = "restoring custom hooks";
    let key = step.custom_hooks().map_err(internal_io(doing))?;
    let Some(archive) = backups.with_sink(doing, move |sink| sink.read(&key)).await? else { return Ok(()) };
    let directory = repository.path.clone();
    let unpacking = move || unpack_custom_hooks(io::BufReader::new(archive), Path::new(&directory));
    blocking(move || unpacking().map_err(internal_io(doing))).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(lines: &[(&str, &str)]) -> Listed {
        let mut listed = Listed::default();
        for (id, name) in lines {
            listed.see((*id).to_owned(), name.as_bytes());
        }
        listed
    }

    #[test]
    fn head_is_the_likeliest_branch_at_its_object() {
        let branch = |lines: &[(&str, &str)]| {
            listed(lines).branch.map(|name| String::from_utf8_lossy(&name).into_owned())
        };
        let some = |name: &str| Some(format!("refs/heads/{name}"));
        let head = ("1", "HEAD");
        let (a, z) = (("1", "refs/heads/a"), ("1", "refs/heads/z"));
        let (main, master) = (("1", "refs/heads/main"), ("1", "refs/heads/master"));
        assert_eq!(branch(&[head, a, z]), some("a"));
        assert_eq!(branch(&[head, a, main, master, z]), some("main"));
        assert_eq!(branch(&[head, a, ("2", "refs/heads/main"), master, z]), some("master"));
        assert_eq!(branch(&[head, ("2", "refs/heads/a"), ("1", "refs/tags/v1")]), None);
        assert_eq!(branch(&[a]), None);
        assert_eq!(listed(&[]), Listed::default());
        assert!(listed(&[a]).any);
    }
}
