//! RepositoryInfo: how a repository's files are made up.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tabularium_proto::gitaly::{
    RepositoryInfoRequest, RepositoryInfoResponse,
    repository_info_response::{
        AlternatesInfo, ObjectsInfo, ReferencesInfo, references_info::ReferenceBackend,
    },
};
use tonic::Status;

use super::{
    facts::{is_loose, walk},
    indexes::Indexes,
};
use crate::{
    error::internal_io,
    node::Node,
    place::blocking,
    services::object_pool::{alternates, is_pool_path},
    storage::RepositoryPath,
};

/// Loose objects older than this count as stale.
const STALE_AFTER: Duration = Duration::from_secs(14 * 24 * 3600);
/// Gitaly touches this file when it has repacked everything.
const FULL_REPACK_TIMESTAMP: &str = ".gitaly-full-repack-timestamp";

pub(super) async fn get(
    node: &Node,
    request: RepositoryInfoRequest,
) -> Result<RepositoryInfoResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    blocking(move || {
        describe(&repository, SystemTime::now()).map_err(internal_io("looking at the repository"))
    })
    .await
}

fn describe(repository: &RepositoryPath, now: SystemTime) -> io::Result<RepositoryInfoResponse> {
    let path = &repository.path;
    let mut size = file_sizes(path)?;
    let objects_path = path.join("objects");
    let mut objects = count_objects(&objects_path, now)?;
    let mut indexes = Indexes::read(&objects_path)?;
    if let Some(pool) = pool_of(repository)? {
        // What a member borrows counts as its own.
        size += file_sizes(&pool)?;
        add(&mut objects, &count_objects(&pool.join("objects"), now)?);
        let borrowed = Indexes::read(&pool.join("objects"))?;
        indexes = Indexes { commit_graph: indexes.commit_graph, ..borrowed };
    }
    let last_full_repack = match fs::metadata(path.join(FULL_REPACK_TIMESTAMP)) {
        Ok(metadata) => metadata.modified().ok().map(prost_types::Timestamp::from),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok(RepositoryInfoResponse {
        size,
        references: Some(describe_references(path)?),
        objects: Some(objects),
        commit_graph: indexes.commit_graph,
        bitmap: indexes.bitmap,
        multi_pack_index: indexes.multi_pack_index,
        multi_pack_index_bitmap: indexes.multi_pack_index_bitmap,
        alternates: describe_alternates(&objects_path)?,
        is_object_pool: is_pool_path(&repository.relative_path),
        last_full_repack,
    })
}

fn file_sizes(directory: &Path) -> io::Result<u64> {
    let mut size = 0;
    walk(directory, &mut |_, metadata| size += metadata.len())?;
    Ok(size)
}

fn describe_references(path: &Path) -> io::Result<ReferencesInfo> {
    let mut loose_count = 0;
    walk(&path.join("refs"), &mut |_, _| loose_count += 1)?;
    let packed_size = fs::metadata(path.join("packed-refs")).map_or(0, |metadata| metadata.len());
    let reftable = path.join("reftable").is_dir();
    let backend = if reftable { ReferenceBackend::Reftable } else { ReferenceBackend::Files };
    Ok(ReferencesInfo { loose_count, packed_size, reference_backend: backend.into() })
}

fn describe_alternates(objects: &Path) -> io::Result<Option<AlternatesInfo>> {
    let file = objects.join("info/alternates");
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(AlternatesInfo {
        object_directories: text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect(),
        last_modified: fs::metadata(file)?.modified().ok().map(prost_types::Timestamp::from),
    }))
}

/// The pool that the repository borrows from, as long as it is one of the same storage.
fn pool_of(repository: &RepositoryPath) -> io::Result<Option<PathBuf>> {
    let lines = alternates::read(&repository.path)?.unwrap_or_default();
    let Some(line) = lines.first() else { return Ok(None) };
    let objects = alternates::resolve(&repository.path, line);
    let Some(pool) = objects.parent() else { return Ok(None) };
    let inside =
        pool.strip_prefix(&repository.storage.root).is_ok_and(|path| path.to_str().is_some_and(is_pool_path));
    Ok((inside && objects.is_dir()).then(|| pool.to_owned()))
}

fn count_objects(objects: &Path, now: SystemTime) -> io::Result<ObjectsInfo> {
    let mut info = ObjectsInfo::default();
    walk(objects, &mut |file, metadata| count(&mut info, objects, file, metadata, now))?;
    Ok(info)
}

fn count(info: &mut ObjectsInfo, objects: &Path, file: &Path, metadata: &fs::Metadata, now: SystemTime) {
    let Some(name) = file.file_name().and_then(|name| name.to_str()) else { return };
    let size = metadata.len();
    if file.parent() == Some(&objects.join("pack")) {
        let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
        match extension.filter(|_| name.starts_with("pack-")) {
            Some("pack") => {
                info.size += size;
                info.packfile_count += 1;
                let keep = file.with_extension("keep").exists();
                let cruft = !keep && file.with_extension("mtimes").exists();
                if keep {
                    info.keep_count += 1;
                    info.keep_size += size;
                }
                if cruft {
                    info.cruft_count += 1;
                    info.stale_size += size;
                } else {
                    info.recent_size += size;
                }
            }
            Some("rev") => info.reverse_index_count += 1,
            _ => {}
        }
    } else if is_loose(objects, file) {
        info.size += size;
        info.loose_objects_count += 1;
        let age = metadata.modified().ok().and_then(|modified| now.duration_since(modified).ok());
        if age.is_some_and(|age| age > STALE_AFTER) {
            info.stale_loose_objects_count += 1;
            info.stale_size += size;
        } else {
            info.recent_size += size;
        }
    } else if is_among_loose(objects, file) {
        info.loose_objects_garbage_count += 1;
    }
}

/// Whether a file is where loose objects are.
fn is_among_loose(objects: &Path, file: &Path) -> bool {
    let fan = file.parent().and_then(|directory| directory.strip_prefix(objects).ok()?.to_str());
    fan.is_some_and(|fan| fan.len() == 2 && fan.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn add(info: &mut ObjectsInfo, borrowed: &ObjectsInfo) {
    for (own, other) in [
        (&mut info.size, borrowed.size),
        (&mut info.recent_size, borrowed.recent_size),
        (&mut info.stale_size, borrowed.stale_size),
        (&mut info.keep_size, borrowed.keep_size),
        (&mut info.packfile_count, borrowed.packfile_count),
        (&mut info.reverse_index_count, borrowed.reverse_index_count),
        (&mut info.cruft_count, borrowed.cruft_count),
        (&mut info.keep_count, borrowed.keep_count),
        (&mut info.loose_objects_count, borrowed.loose_objects_count),
        (&mut info.stale_loose_objects_count, borrowed.stale_loose_objects_count),
        (&mut info.loose_objects_garbage_count, borrowed.loose_objects_garbage_count),
    ] {
        *own += other;
    }
}
