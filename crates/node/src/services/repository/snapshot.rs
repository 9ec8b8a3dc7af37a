//! GetSnapshot and CreateRepositoryFromSnapshot: a repository as a tar archive.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read as _, Seek as _, SeekFrom},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tabularium_proto::gitaly::{
    CreateRepositoryFromSnapshotRequest, CreateRepositoryFromSnapshotResponse, GetSnapshotRequest,
    GetSnapshotResponse,
};
use tokio::io::AsyncWriteExt as _;
use tonic::Status;

use super::{facts::is_loose, files};
use crate::{
    error::internal_io,
    node::Node,
    place::{Building, blocking},
    services::streams::{self, ResponseStream},
    votes::Voter,
};

/// Longest silence of the server a snapshot is downloaded from.
const SILENCE: Duration = Duration::from_secs(60);
/// The end of an archive.
const END: [u8; 1024] = [0; 1024];

pub(super) async fn get(
    node: &Node,
    request: &GetSnapshotRequest,
) -> Result<ResponseStream<GetSnapshotResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let get = |key| node.git.command(&repository, "config").reads().args(["--local", "--get-regexp", key]);
    let mut config = String::new();
    let version = get("^core\\.repositoryformatversion$").output().await?;
    push_section(&mut config, "core", &version.stdout);
    let extensions = get("^extensions\\.").output().await?;
    push_section(&mut config, "extensions", &extensions.stdout);
    // Repacking takes objects away from where a listing has just seen them.
    let calm = node.upkeep.lock(&repository.path).await;
    let path = repository.path;
    Ok(streams::produce(
        |data: Bytes| GetSnapshotResponse { data },
        move |writer| {
            let _calm = calm;
            archive(&path, config.as_bytes(), writer).map_err(internal_io("building snapshot"))
        },
    ))
}

/// Lines of `git config --get-regexp` as a section of a config file.
fn push_section(config: &mut String, section: &str, listed: &[u8]) {
    let listed = String::from_utf8_lossy(listed);
    let lines = listed.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        let name = key.strip_prefix(section)?.strip_prefix('.')?;
        Some(format!("\t{name} = {value}\n"))
    });
    let lines: Vec<String> = lines.collect();
    if !lines.is_empty() {
        config.extend(["[", section, "]\n"]);
        config.extend(lines);
    }
}

/// Refs before objects: what a ref says when it is read is there by then, and stays.
fn archive(repository: &Path, config: &[u8], writer: &mut dyn io::Write) -> io::Result<()> {
    let mut builder = tar::Builder::new(writer);
    builder.follow_symlinks(false);
    append_bytes(&mut builder, "config", config)?;
    for name in ["HEAD", "packed-refs"] {
        append_file(&mut builder, &repository.join(name), Path::new(name))?;
    }
    for name in ["refs", "branches", "reftable"] {
        append_tree(&mut builder, &repository.join(name), Path::new(name), &|file| {
            file.extension().is_none_or(|extension| extension != "lock")
        })?;
    }
    // Packed meanwhile, a ref is in neither of the two readings; the newer file has it.
    append_file(&mut builder, &repository.join("packed-refs"), Path::new("packed-refs"))?;
    append_file(&mut builder, &repository.join("shallow"), Path::new("shallow"))?;
    for objects in object_directories(repository)? {
        append_tree(&mut builder, &objects, Path::new("objects"), &|file| {
            is_loose(&objects, file) || is_pack(&objects, file)
        })?;
    }
    builder.finish()
}

fn is_pack(objects: &Path, file: &Path) -> bool {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let extension = file.extension().and_then(|extension| extension.to_str());
    file.parent() == Some(&objects.join("pack"))
        && name.starts_with("pack-")
        && matches!(extension, Some("pack" | "idx"))
}

/// The repository's own and those of its alternates, whose objects become the snapshot's own.
fn object_directories(repository: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = vec![repository.join("objects")];
    let mut next = 0;
    while let Some(objects) = found.get(next).cloned() {
        next += 1;
        let listed = match fs::read_to_string(objects.join("info/alternates")) {
            Ok(listed) => listed,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for line in listed.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let alternate = objects.join(line).canonicalize()?;
            if !found.contains(&alternate) {
                found.push(alternate);
            }
        }
    }
    Ok(found)
}

type TarBuilder<'a> = tar::Builder<&'a mut dyn io::Write>;

fn append_bytes(builder: &mut TarBuilder<'_>, name: &str, content: &[u8]) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, name, content)
}

/// Leaves out what is not there.
fn append_file(builder: &mut TarBuilder<'_>, path: &Path, name: &Path) -> io::Result<()> {
    match File::open(path) {
        Ok(mut file) => builder.append_file(name, &mut file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn append_tree(
    builder: &mut TarBuilder<'_>,
    directory: &Path,
    name: &Path,
    wanted: &dyn Fn(&Path) -> bool,
) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    builder.append_dir(name, directory)?;
    for entry in entries {
        let entry = entry?;
        let inside = name.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            if inside == Path::new("objects/info") {
                continue;
            }
            append_tree(builder, &entry.path(), &inside, wanted)?;
        } else if wanted(&entry.path()) {
            match File::open(entry.path()) {
                // A loose ref may be packed at any time; an object that goes would be missing.
                Err(error) if error.kind() == io::ErrorKind::NotFound && !inside.starts_with("objects") => {}
                Err(error) => return Err(error),
                Ok(mut file) => builder.append_file(&inside, &mut file)?,
            }
        }
    }
    Ok(())
}

pub(super) async fn create_from(
    node: &Node,
    request: CreateRepositoryFromSnapshotRequest,
    voter: &Voter,
) -> Result<CreateRepositoryFromSnapshotResponse, Status> {
    let target = node.storages.locate(request.repository.as_ref())?;
    if request.http_url.starts_with("https://") || !request.resolved_address.is_empty() {
        return Err(Status::unimplemented(
            "snapshots over https, or from a pinned address, are not built in",
        ));
    }
    let building = Building::prepare(node, &target)?;
    let archive = building.scratch().join("snapshot.tar");
    download(&request, &archive).await?;
    let directory = building.repository().path.clone();
    let config = blocking(move || {
        fs::create_dir(&directory)
            .and_then(|()| require_end(&archive))
            .and_then(|()| unpack(&archive, &directory))
            .and_then(|()| fs::create_dir_all(directory.join("refs")))
            .and_then(|()| fs::create_dir_all(directory.join("objects")))
            .and_then(|()| match fs::read(directory.join("config")) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Ok(b"[core]\n\trepositoryformatversion = 0\n\tbare = true\n".to_vec())
                }
                read => read,
            })
            .map_err(internal_io("untarring snapshot"))
    })
    .await?;
    let config = files::harmless_config(node, &target.storage, config).await?;
    files::replace_config(building.repository().clone(), config).await?;
    let command = node.git.command(building.repository(), "config").args(["core.bare", "true"]);
    command.checked().await?;
    building.publish_agreed(node, voter).await?;
    Ok(CreateRepositoryFromSnapshotResponse {})
}

async fn download(request: &CreateRepositoryFromSnapshotRequest, path: &Path) -> Result<(), Status> {
    let bad = |error: http::Error| Status::invalid_argument(format!("snapshot URL: {error}"));
    let mut get = Request::get(&request.http_url);
    if !request.http_auth.is_empty() {
        let mut value = header::HeaderValue::from_str(&request.http_auth)
            .map_err(|_| Status::invalid_argument("the authorization header cannot be sent"))?;
        value.set_sensitive(true);
        get = get.header(header::AUTHORIZATION, value);
    }
    let get = get.body(Empty::<Bytes>::new()).map_err(bad)?;
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let silent = |_| Status::deadline_exceeded("the snapshot's server says nothing");
    let response = tokio::time::timeout(SILENCE, client.request(get))
        .await
        .map_err(silent)?
        .map_err(|error| Status::internal(format!("executing request: {error}")))?;
    // Redirects count as failures: the authorization header is for this server only.
    if response.status() != http::StatusCode::OK {
        return Err(Status::internal(format!("HTTP server: {}", response.status())));
    }
    let mut file = tokio::fs::File::create(path).await.map_err(internal_io("keeping the snapshot"))?;
    let mut body = response.into_body();
    while let Some(frame) = tokio::time::timeout(SILENCE, body.frame()).await.map_err(silent)? {
        let frame = frame.map_err(|error| Status::internal(format!("reading the snapshot: {error}")))?;
        if let Ok(data) = frame.into_data() {
            file.write_all(&data).await.map_err(internal_io("keeping the snapshot"))?;
        }
    }
    file.flush().await.map_err(internal_io("keeping the snapshot"))
}

/// An archive that was cut off between two entries can be read to its end without an error, but lacks the two blocks of
/// zeros that every archive ends with.
fn require_end(archive: &Path) -> io::Result<()> {
    let mut file = File::open(archive)?;
    let mut end = [1; END.len()];
    let whole = file.seek(SeekFrom::End(-1024)).and_then(|_| file.read_exact(&mut end));
    match whole {
        Ok(()) if end == END => Ok(()),
        Ok(()) | Err(_) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is cut off")),
    }
}

/// Unpacks files and directories of a repository; links, devices, hooks and paths that lead elsewhere are errors.
fn unpack(archive: &Path, directory: &Path) -> io::Result<()> {
    const ENTRIES: [&str; 8] =
        ["HEAD", "packed-refs", "refs", "branches", "objects", "config", "shallow", "reftable"];
    let mut archive = tar::Archive::new(BufReader::new(File::open(archive)?));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let parts: Vec<Component<'_>> =
            path.components().filter(|part| !matches!(part, Component::CurDir)).collect();
        let Some(Component::Normal(first)) = parts.first() else { continue };
        let known = ENTRIES.iter().any(|name| first == name);
        let plain = parts.iter().all(|part| matches!(part, Component::Normal(_)));
        let kind = entry.header().entry_type();
        let alternates = path.starts_with("objects/info") && !kind.is_dir();
        if !known || !plain || alternates || !(kind.is_file() || kind.is_dir()) {
            return Err(io::Error::other(format!("unexpected entry {}", path.display())));
        }
        entry.unpack_in(directory)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_written_as_git_reads_them() {
        let mut config = String::new();
        push_section(&mut config, "core", b"core.repositoryformatversion 1\n");
        push_section(&mut config, "extensions", b"extensions.objectformat sha256\n");
        push_section(&mut config, "nothing", b"");
        assert_eq!(config, "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tobjectformat = sha256\n");
    }
}
