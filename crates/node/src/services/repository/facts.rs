//! What can be said about a repository: size, format, checksum, health.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use sha1::{Digest as _, Sha1};
use tabularium_proto::gitaly::{
    CalculateChecksumRequest, CalculateChecksumResponse, FsckRequest, FsckResponse,
    GetObjectDirectorySizeRequest, GetObjectDirectorySizeResponse, HasLocalBranchesRequest,
    HasLocalBranchesResponse, ObjectFormat, ObjectFormatRequest, ObjectFormatResponse, RepositorySizeRequest,
    RepositorySizeResponse,
};
use tonic::Status;

use crate::{error::internal_io, git::Git, node::Node, place::blocking, storage::RepositoryPath};

/// Ref names (and anything else in a line of `show-ref`) that the checksum looks for, as Gitaly does.
const CHECKSUM_NAMESPACES: [&[u8]; 6] = [
    b"refs/heads/",
    b"refs/tags/",
    b"refs/keep-around/",
    b"refs/merge-requests/",
    b"refs/environments/",
    b"refs/notes/",
];

/// Calls `see` for every file below `directory`. What vanishes meanwhile is left out.
pub(super) fn walk(directory: &Path, see: &mut dyn FnMut(&Path, &fs::Metadata)) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if metadata.is_dir() {
            walk(&entry.path(), see)?;
        } else {
            see(&entry.path(), &metadata);
        }
    }
    Ok(())
}

async fn kibibytes(directory: PathBuf) -> Result<i64, Status> {
    blocking(move || {
        let mut bytes = 0;
        walk(&directory, &mut |_, metadata| bytes += metadata.len()).map_err(internal_io("measuring"))?;
        Ok(i64::try_from(bytes / 1024).unwrap_or(i64::MAX))
    })
    .await
}

pub(super) async fn size(
    node: &Node,
    request: RepositorySizeRequest,
) -> Result<RepositorySizeResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    Ok(RepositorySizeResponse { size: kibibytes(repository.path).await? })
}

pub(super) async fn object_directory_size(
    node: &Node,
    request: GetObjectDirectorySizeRequest,
) -> Result<GetObjectDirectorySizeResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let quarantined = repository.quarantine.and_then(|quarantine| quarantine.object_directory);
    let objects = quarantined.unwrap_or_else(|| repository.path.join("objects"));
    Ok(GetObjectDirectorySizeResponse { size: kibibytes(objects).await? })
}

/// `objects/ab/cdef…`.
pub(super) fn is_loose(objects: &Path, file: &Path) -> bool {
    let hexadecimal = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let parts: Option<Vec<&str>> =
        file.strip_prefix(objects).ok().and_then(|rest| rest.iter().map(|part| part.to_str()).collect());
    match parts.as_deref() {
        Some([fan, rest]) => {
            fan.len() == 2 && matches!(rest.len(), 38 | 62) && hexadecimal(fan) && hexadecimal(rest)
        }
        _ => false,
    }
}

/// `sha1` or `sha256`.
pub(super) async fn format_name(git: &Git, repository: &RepositoryPath) -> Result<String, Status> {
    let said = git.command(repository, "rev-parse").reads().arg("--show-object-format").checked().await?;
    Ok(String::from_utf8_lossy(said.trim_ascii()).into_owned())
}

pub(super) async fn object_format(
    node: &Node,
    request: &ObjectFormatRequest,
) -> Result<ObjectFormatResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let format = match format_name(&node.git, &repository).await?.as_str() {
        "sha1" => ObjectFormat::Sha1,
        "sha256" => ObjectFormat::Sha256,
        other => return Err(Status::internal(format!("unknown object format: {other:?}"))),
    };
    Ok(ObjectFormatResponse { format: format.into() })
}

pub(super) async fn has_local_branches(
    node: &Node,
    request: &HasLocalBranchesRequest,
) -> Result<HasLocalBranchesResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let command = node.git.command(&repository, "for-each-ref").reads();
    let first = command.args(["--count=1", "--format=%(refname)", "refs/heads"]).checked().await?;
    Ok(HasLocalBranchesResponse { value: !first.is_empty() })
}

pub(super) async fn calculate_checksum(
    node: &Node,
    request: &CalculateChecksumRequest,
) -> Result<CalculateChecksumResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let mut process = node.git.command(&repository, "show-ref").reads().arg("--head").spawn(false).await?;
    let mut checksum = Checksum::default();
    while let Some(chunk) = process.read_chunk().await? {
        checksum.feed(&chunk);
    }
    let (exit, stderr) = process.finish().await?;
    match exit.code {
        Some(0) => {}
        // No refs.
        Some(1) if stderr.is_empty() => {}
        _ => {
            let valid = node.git.command(&repository, "rev-parse").reads().arg("--is-bare-repository");
            let output = valid.output().await?;
            if output.stdout.trim_ascii() != b"true" {
                return Err(Status::data_loss(format!(
                    "not a git repository '{}'",
                    repository.path.display()
                )));
            }
            let stderr = String::from_utf8_lossy(&stderr).into_owned();
            return Err(Status::data_loss(format!("git show-ref: {exit}, stderr: {stderr:?}")));
        }
    }
    Ok(CalculateChecksumResponse { checksum: checksum.finish() })
}

/// Gitaly's checksum of refs, which replicas and storage moves compare to the byte.
#[derive(Default)]
struct Checksum {
    sum: [u8; 20],
    partial: Vec<u8>,
}

impl Checksum {
    fn feed(&mut self, mut bytes: &[u8]) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(&bytes[..end]);
            let line = std::mem::take(&mut self.partial);
            self.line(&line);
            bytes = &bytes[end + 1..];
        }
        self.partial.extend_from_slice(bytes);
    }

    fn line(&mut self, line: &[u8]) {
        let contains = |needle: &[u8]| line.windows(needle.len()).any(|window| window == needle);
        if contains(b"HEAD") || CHECKSUM_NAMESPACES.iter().any(|namespace| contains(namespace)) {
            let digest = Sha1::digest(line);
            for (sum, byte) in self.sum.iter_mut().zip(digest.iter()) {
                *sum ^= byte;
            }
        }
    }

    /// The minimal big-endian bytes in hexadecimal, as a big integer prints: leading zero bytes are dropped.
    fn finish(mut self) -> String {
        if !self.partial.is_empty() {
            let line = std::mem::take(&mut self.partial);
            self.line(&line);
        }
        match self.sum.iter().position(|byte| *byte != 0) {
            Some(first) => hex::encode(&self.sum[first..]),
            None => "0".repeat(40),
        }
    }
}

pub(super) async fn fsck(node: &Node, request: &FsckRequest) -> Result<FsckResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let mut command = node.git.command(&repository, "fsck").reads().args(["--no-progress", "--no-dangling"]);
    if request.repo_only {
        command = command.arg("--no-full");
    }
    let output = command.output().await?;
    let mut error = Vec::new();
    if !output.exit.success() {
        error.extend_from_slice(&output.stdout);
        error.extend_from_slice(&output.stderr);
        if error.is_empty() {
            error.extend_from_slice(format!("git fsck: {}", output.exit).as_bytes());
        }
    }
    Ok(FsckResponse { error })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(lines: &str, cut: usize) -> String {
        let mut checksum = Checksum::default();
        lines.as_bytes().chunks(cut).for_each(|chunk| checksum.feed(chunk));
        checksum.finish()
    }

    #[test]
    fn the_checksum_is_the_exclusive_or_of_the_lines_digests() {
        let a = "1111111111111111111111111111111111111111 refs/heads/a";
        let b = "2222222222222222222222222222222222222222 refs/tags/b";
        let other = "3333333333333333333333333333333333333333 refs/remotes/origin/c";
        let mut expected = [0; 20];
        for (index, byte) in expected.iter_mut().enumerate() {
            *byte = Sha1::digest(a)[index] ^ Sha1::digest(b)[index];
        }
        let lines = format!("{a}\n{b}\n{other}\n");
        for cut in [1, 7, 1000] {
            assert_eq!(checksum(&lines, cut), hex::encode(expected));
        }
        assert_eq!(checksum(&format!("{a}\n{a}\n"), 10), "0".repeat(40));
        assert_eq!(checksum("", 1), "0".repeat(40));
        assert_ne!(
            checksum(&format!("{a} HEAD\n"), 10),
            "0".repeat(40),
            "a match anywhere in the line counts"
        );
    }

    #[test]
    fn leading_zero_bytes_are_dropped() {
        let mut sum = [0; 20];
        sum[1] = 0x0a;
        let checksum = Checksum { sum, partial: Vec::new() };
        assert_eq!(checksum.finish(), format!("0a{}", "00".repeat(18)));
    }

    #[test]
    fn loose_objects_are_told_from_packs() {
        let objects = Path::new("/r/objects");
        let rest = "c".repeat(38);
        assert!(is_loose(objects, &objects.join("ab").join(&rest)));
        assert!(!is_loose(objects, &objects.join("pack").join("pack-1.pack")));
        assert!(!is_loose(objects, &objects.join("zz").join(&rest)));
    }
}
