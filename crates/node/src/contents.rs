//! What the replicas of a repository must have in common: references with their values, HEAD, the settings that describe
//! the repository, custom hooks. Not in common are how references and objects are packed, and what a disk brings along.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use tonic::Status;

use crate::{
    error::internal_io,
    git::{Git, references},
    hooks::CUSTOM_HOOKS,
    place::blocking,
    storage::RepositoryPath,
};

/// Settings under `core` that describe a repository. Others there name programs to run.
const CORE_SETTINGS: [&str; 7] = [
    "core.repositoryformatversion",
    "core.filemode",
    "core.bare",
    "core.ignorecase",
    "core.precomposeunicode",
    "core.symlinks",
    "core.logallrefupdates",
];
/// Those of them that describe the file system.
const DISK_SETTINGS: [&str; 4] =
    ["core.filemode", "core.ignorecase", "core.precomposeunicode", "core.symlinks"];
/// Whole sections that only describe.
const PLAIN_SECTIONS: [&str; 2] = ["extensions.", "gitlab."];

/// Whether a setting describes a repository and does nothing else.
pub(crate) fn is_description(key: &str) -> bool {
    PLAIN_SECTIONS.iter().any(|section| key.starts_with(section)) || CORE_SETTINGS.contains(&key)
}

/// Equal for equal replicas, and only for them.
pub(crate) async fn digest(git: &Git, repository: &RepositoryPath) -> Result<[u8; 32], Status> {
    let mut digest = Sha256::new();
    // Each part has a fixed length, so that none can pass for a piece of another.
    digest.update(Sha256::digest(head(git, repository).await?));
    digest.update(references(git, repository, "refs/").await?);
    digest.update(settings(git, repository).await?);
    let hooks = repository.path.join(CUSTOM_HOOKS);
    digest.update(blocking(move || custom_hooks(&hooks).map_err(internal_io("reading custom hooks"))).await?);
    Ok(digest.finalize().into())
}

/// Of all references below a prefix, with their values.
pub(crate) async fn references(
    git: &Git,
    repository: &RepositoryPath,
    prefix: &str,
) -> Result<[u8; 32], Status> {
    let command = git.command(repository, "for-each-ref").reads();
    let format = "--format=%(objectname) %(refname) %(symref)";
    let mut process = command.args([format, prefix]).spawn(false).await?;
    let mut digest = Sha256::new();
    while let Some(chunk) = process.read_chunk().await? {
        digest.update(&chunk);
    }
    let (exit, stderr) = process.finish().await?;
    if !exit.success() {
        let stderr = String::from_utf8_lossy(&stderr);
        return Err(Status::internal(format!("git for-each-ref: {exit}, stderr: {stderr:?}")));
    }
    Ok(digest.finalize().into())
}

async fn head(git: &Git, repository: &RepositoryPath) -> Result<Vec<u8>, Status> {
    if let Some(target) = references::head_target(git, repository).await? {
        return Ok([b"ref: ", target.as_slice()].concat());
    }
    let id = references::resolve(git, repository, b"HEAD").await?;
    Ok(id.unwrap_or_default().into_bytes())
}

async fn settings(git: &Git, repository: &RepositoryPath) -> Result<[u8; 32], Status> {
    let list = git.bare_command("config").reads().arg("--file").arg(repository.path.join("config"));
    let listed = list.args(["--no-includes", "--null", "--list"]).checked().await?;
    Ok(digest_of_settings(&listed))
}

/// Of `key`, newline, value, zero byte; whatever else there is, and in whichever order sections stand.
fn digest_of_settings(listed: &[u8]) -> [u8; 32] {
    let mut settings: BTreeMap<String, Vec<&[u8]>> = BTreeMap::new();
    for entry in listed.split(|byte| *byte == 0).filter(|entry| !entry.is_empty()) {
        let key = entry.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let key = String::from_utf8_lossy(key).into_owned();
        if is_description(&key) && !DISK_SETTINGS.contains(&key.as_str()) {
            settings.entry(key).or_default().push(entry);
        }
    }
    let mut digest = Sha256::new();
    for entry in settings.values().flatten() {
        digest.update(entry);
        digest.update([0]);
    }
    digest.finalize().into()
}

/// Of all files: name, whether it can be run, content.
fn custom_hooks(directory: &Path) -> io::Result<[u8; 32]> {
    let mut files = Vec::new();
    collect_files(directory, &mut files)?;
    files.sort();
    let mut digest = Sha256::new();
    for file in files {
        let name = file.strip_prefix(directory).unwrap_or(&file).as_os_str().as_encoded_bytes();
        let runnable = fs::metadata(&file)?.permissions().mode() & 0o100 != 0;
        let mut content = Sha256::new();
        let mut opened = io::BufReader::new(fs::File::open(&file)?);
        loop {
            let piece = opened.fill_buf()?;
            if piece.is_empty() {
                break;
            }
            content.update(piece);
            let length = piece.len();
            opened.consume(length);
        }
        digest.update(name);
        digest.update([0, u8::from(runnable)]);
        digest.update(content.finalize());
    }
    Ok(digest.finalize().into())
}

fn collect_files(directory: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect_files(&entry.path(), found)?;
        } else if entry.metadata()?.is_file() {
            found.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_count_when_they_describe_the_repository() {
        let of = |text: &str| digest_of_settings(text.as_bytes());
        let plain = of("core.bare\ntrue\0gitlab.fullpath\na/b\0");
        assert_eq!(of("gitlab.fullpath\na/b\0core.bare\ntrue\0"), plain);
        assert_eq!(
            of("core.bare\ntrue\0core.filemode\nfalse\0core.sshcommand\nx\0gitlab.fullpath\na/b\0"),
            plain
        );
        assert_ne!(of("core.bare\ntrue\0gitlab.fullpath\na/c\0"), plain);
        assert_ne!(of("core.bare\ntrue\0"), plain);
    }

    #[test]
    fn hooks_count_by_name_mode_and_content() {
        let directory = tempfile::tempdir().unwrap();
        let hooks = directory.path().join("custom_hooks");
        let none = custom_hooks(&hooks).unwrap();
        fs::create_dir_all(hooks.join("update.d")).unwrap();
        assert_eq!(custom_hooks(&hooks).unwrap(), none);
        let file = hooks.join("update.d/a");
        fs::write(&file, "x").unwrap();
        let one = custom_hooks(&hooks).unwrap();
        fs::write(&file, "y").unwrap();
        let changed = custom_hooks(&hooks).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        let runnable = custom_hooks(&hooks).unwrap();
        fs::rename(&file, hooks.join("update.d/b")).unwrap();
        let renamed = custom_hooks(&hooks).unwrap();
        let all = [none, one, changed, runnable, renamed];
        let different: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
    }
}
