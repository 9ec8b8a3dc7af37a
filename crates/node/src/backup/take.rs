//! Writing a backup.

use std::{
    fs::{self, File},
    io::{self, BufRead, Seek as _, Write},
    path::Path,
};

use tokio::io::AsyncWriteExt as _;
use tonic::Status;

use super::{
    BackupError, BackupId, Backups, Place,
    frozen::Frozen,
    manifest::{Manifest, Step, Trace},
    references::References,
    sink::{Draft, Key, Sink},
};
use crate::{
    error::internal_io,
    git::{Exit, revision::ObjectHash},
    hooks::CUSTOM_HOOKS,
    node::Node,
    storage::RepositoryPath,
};

/// Git's word for a bundle that would hold nothing.
const EMPTY_BUNDLE: &str = "fatal: Refusing to create empty bundle.";
const OVERTAKEN: &str = "backup repository: another node has written a backup meanwhile";
const UNCHANGED: &str = "manager: write bundle: repository skipped: no changes to bundle";

/// What a backup builds on.
#[derive(Debug)]
pub(crate) enum Basis {
    /// Nothing.
    Nothing,
    /// The newest one there is, or nothing.
    Latest,
    /// This one, or the newest one, or nothing.
    Of(BackupId),
}

/// Writes a backup of a repository that is there.
pub(crate) async fn take(
    node: &Node,
    backups: &Backups,
    repository: &RepositoryPath,
    (place, id): (&Place, &BackupId),
    basis: Basis,
) -> Result<(), BackupError> {
    let turn = backups.taking.lock(Path::new(place.as_str())).await;
    let hash = ObjectHash::of(repository).await?;
    let (mut manifest, trace) = begin(backups, (place, id), basis, hash).await?;
    let previous = manifest.steps.last().cloned();
    let step = place.next_step(id, &manifest.steps);

    let frozen = Frozen::of(node, repository, hash).await?;
    let head = frozen.head_reference.as_deref().unwrap_or_default();
    let head = std::str::from_utf8(head).map_err(|_| Status::internal("HEAD is not UTF-8"))?;
    let same_head = manifest.head_reference == head;
    let listed = frozen.any || frozen.head.is_some();

    let (references, hooks, same) =
        write_small(backups, &frozen, repository, &step, previous.clone()).await?;
    if listed && previous.is_some() && same && same_head {
        return Err(BackupError::Skipped(UNCHANGED));
    }
    let bundle = if listed {
        let known = previous.as_ref().map(Step::references).transpose();
        let known = known.map_err(internal_io("finding references of the previous step"))?;
        write_bundle(node, backups, &frozen, &step, known, hash).await?
    } else {
        None
    };

    hash.name().clone_into(&mut manifest.object_format);
    head.clone_into(&mut manifest.head_reference);
    manifest.empty = !listed;
    manifest.steps.push(step.clone());
    let drafts = [Some(references), bundle, hooks];
    let sealing = backups.with_sink("syncing the backup", |_| {
        drafts.iter().flatten().try_for_each(Draft::seal)?;
        Ok(drafts)
    });
    let drafts = sealing.await?;
    let alone = backups.alone(place).await?;
    let (place, id) = (place.clone(), id.clone());
    let committing = backups.with_sink("writing the backup", move |sink| {
        let _turn = turn;
        let keys = [step.references()?, step.bundle()?, step.custom_hooks()?];
        let _alone = alone;
        if Manifest::trace(sink, &place, &id)? != trace {
            return Ok(false);
        }
        Manifest::withdraw(sink, &place, &id, &step)?;
        for (key, draft) in keys.into_iter().zip(drafts) {
            match draft {
                Some(draft) => sink.place(draft)?,
                // One that an earlier backup of the same name has left.
                None => sink.remove(&key)?,
            }
        }
        manifest.commit(sink, &place, &id).map(|()| true)
    });
    if committing.await? { Ok(()) } else { Err(Status::aborted(OVERTAKEN).into()) }
}

/// The backup that is built on, if it can be, else an empty one; and what shows whether another node writes one meanwhile.
async fn begin(
    backups: &Backups,
    (place, id): (&Place, &BackupId),
    basis: Basis,
    hash: ObjectHash,
) -> Result<(Manifest, Trace), Status> {
    let (place, id) = (place.clone(), id.clone());
    let looking = backups.with_sink("looking for an earlier backup", move |sink| {
        sink.clear_abandoned()?;
        let trace = Manifest::trace(sink, &place, &id)?;
        let named = match &basis {
            Basis::Nothing => return Ok((Manifest::default(), trace)),
            Basis::Latest => None,
            Basis::Of(id) => Manifest::find(sink, &place, id)?,
        };
        let found = match named {
            None => Manifest::latest(sink, &place)?,
            found => found,
        };
        let usable = |found: &Manifest| {
            let Some(last) = found.steps.last() else { return Ok(false) };
            let complete = sink.read(&last.references()?)?.is_some();
            Ok::<_, io::Error>(complete && !found.non_existent && found.object_format == hash.name())
        };
        match found {
            None => Ok((Manifest::default(), trace)),
            Some(found) if usable(&found)? => Ok((found, trace)),
            Some(_) => {
                let place = place.as_str();
                tracing::warn!(place, "an earlier backup cannot be built on; a full one is made");
                Ok((Manifest::default(), trace))
            }
        }
    });
    looking.await
}

/// Writes the references and the custom hooks; answers them, and whether both are what they were.
async fn write_small(
    backups: &Backups,
    frozen: &Frozen,
    repository: &RepositoryPath,
    step: &Step,
    previous: Option<Step>,
) -> Result<(Draft, Option<Draft>, bool), Status> {
    let (packed, head) = (frozen.packed(), frozen.head.clone());
    let (hooks, step) = (repository.path.join(CUSTOM_HOOKS), step.clone());
    let writing = backups.with_sink("writing references and custom hooks", move |sink| {
        let mut references = sink.draft(step.references()?)?;
        if let Some(head) = head {
            writeln!(references.file(), "{head} HEAD")?;
        }
        let mut lines = File::open(packed)?;
        lines.seek(io::SeekFrom::Start(Frozen::header_bytes()))?;
        io::copy(&mut lines, references.file())?;

        let mut archived = None;
        if hooks.is_dir() {
            let mut draft = sink.draft(step.custom_hooks()?)?;
            archive(&hooks, draft.file())?;
            archived = Some(draft);
        }
        let same = match previous {
            None => false,
            Some(previous) => {
                is_in_sink(sink, &previous.references()?, Some(&references))?
                    && is_in_sink(sink, &previous.custom_hooks()?, archived.as_ref())?
            }
        };
        Ok((references, archived, same))
    });
    writing.await
}

/// Whether what has been written is what stands under a key, or neither is there.
fn is_in_sink(sink: &Sink, key: &Key, written: Option<&Draft>) -> io::Result<bool> {
    match (sink.read(key)?, written) {
        (None, None) => Ok(true),
        (Some(there), Some(written)) => {
            let written = written.reopen()?;
            if there.metadata()?.len() != written.metadata()?.len() {
                return Ok(false);
            }
            have_same_bytes(io::BufReader::new(there), io::BufReader::new(written))
        }
        _ => Ok(false),
    }
}

fn have_same_bytes(mut one: impl BufRead, mut other: impl BufRead) -> io::Result<bool> {
    loop {
        let (left, right) = (one.fill_buf()?, other.fill_buf()?);
        let length = left.len().min(right.len());
        if length == 0 {
            return Ok(left.is_empty() && right.is_empty());
        }
        if left[..length] != right[..length] {
            return Ok(false);
        }
        one.consume(length);
        other.consume(length);
    }
}

/// Archives hooks so that equal ones make equal archives, on whichever replica.
fn archive(hooks: &Path, to: impl Write) -> io::Result<()> {
    let mut archive = tar::Builder::new(to);
    archive.mode(tar::HeaderMode::Deterministic);
    append(&mut archive, hooks, Path::new(CUSTOM_HOOKS))?;
    archive.finish()
}

fn append(archive: &mut tar::Builder<impl Write>, path: &Path, name: &Path) -> io::Result<()> {
    if !path.is_dir() {
        return archive.append_path_with_name(path, name);
    }
    archive.append_dir(name, path)?;
    let names = fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.file_name()));
    let mut names = names.collect::<io::Result<Vec<_>>>()?;
    names.sort();
    names.into_iter().try_for_each(|inner| append(archive, &path.join(&inner), &name.join(&inner)))
}

/// Writes a bundle of what is not reachable from `known`. If that is nothing, because references were only moved or removed,
/// it is one of everything: whoever restores a step that has references expects a bundle.
async fn write_bundle(
    node: &Node,
    backups: &Backups,
    frozen: &Frozen,
    step: &Step,
    known: Option<Key>,
    hash: ObjectHash,
) -> Result<Option<Draft>, BackupError> {
    if let Some(known) = known
        && let Some(draft) = bundle(node, backups, frozen, step, Some((known, hash))).await?
    {
        return Ok(Some(draft));
    }
    match bundle(node, backups, frozen, step, None).await? {
        Some(draft) => Ok(Some(draft)),
        None => Err(Status::internal("write bundle: git finds nothing to bundle").into()),
    }
}

/// Writes one bundle; `None`: it would hold nothing.
async fn bundle(
    node: &Node,
    backups: &Backups,
    frozen: &Frozen,
    step: &Step,
    known: Option<(Key, ObjectHash)>,
) -> Result<Option<Draft>, BackupError> {
    let writing = || internal_io("writing the bundle");
    let key = step.bundle().map_err(writing())?;
    let draft = backups.with_sink("writing the bundle", move |sink| sink.draft(key)).await?;
    let mut writer = draft.writer().map_err(writing())?;
    let command = node.git.command(frozen.repository(), "bundle").reads();
    let command = command.args(["create", "--quiet", "-"]);
    let command = match &known {
        Some(_) => command.args(["--ignore-missing", "--stdin"]),
        None => command.arg("--all"),
    };
    let mut process = command.spawn(known.is_some()).await?;
    let stdin = process.take_stdin();
    let feeding = async {
        match (known, stdin) {
            (Some((known, hash)), Some(stdin)) => exclude(backups, known, hash, stdin).await,
            _ => Ok(()),
        }
    };
    let reading = async {
        while let Some(chunk) = process.read_chunk().await? {
            writer.write_all(&chunk).await.map_err(writing())?;
        }
        writer.flush().await.map_err(writing())
    };
    tokio::try_join!(feeding, reading)?;
    let (exit, stderr) = process.finish().await?;
    Ok(bundled(exit, &stderr)?.then_some(draft))
}

/// Whether there is a bundle.
fn bundled(exit: Exit, stderr: &[u8]) -> Result<bool, Status> {
    let stderr = String::from_utf8_lossy(stderr);
    match exit.success() {
        true => Ok(true),
        // Behind any number of warnings about references that hold nothing new.
        false if stderr.contains(EMPTY_BUNDLE) => Ok(false),
        false => Err(Status::internal(format!("write bundle: {exit}, stderr: {stderr:?}"))),
    }
}

/// Tells git to bundle everything but what the objects in a list of references reach.
async fn exclude(
    backups: &Backups,
    known: Key,
    hash: ObjectHash,
    stdin: tokio::process::ChildStdin,
) -> Result<(), Status> {
    let doing = "reading references of the previous step";
    let listed = References::open(backups, Ok(known), hash, doing).await?;
    let listed = listed.ok_or_else(|| Status::internal("references of the previous step are gone"))?;
    listed.feed(stdin, "--all\n", "^").await.map_err(internal_io(doing))
}
