//! Reads objects through one `git cat-file --batch-command` per RPC.
//!
//! Requests are answered one after the other. What of an object was not read is skipped when the next one is asked for,
//! so memory holds one piece at a time whatever the size of the object.

use std::io;

use bytes::{BufMut as _, Bytes, BytesMut};
use tabularium_proto::gitaly;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{ChildStdin, ChildStdout},
};

use super::{
    CHUNK_BYTES, Git, GitProcess, Slot,
    command::MAX_CAPTURED_BYTES,
    objects::{self, MAX_HEAD_BYTES, TreeItem},
    revision::ObjectHash,
};
use crate::{error::GitError, storage::RepositoryPath};

/// Largest tree object that is read as a whole: one directory with about a million files.
const MAX_TREE_BYTES: usize = 64 * 1024 * 1024;

const SUBCOMMAND: &str = "cat-file";

/// The four types of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ObjectKind {
    /// Commit.
    Commit,
    /// Content of a file.
    Blob,
    /// Directory.
    Tree,
    /// Annotated tag.
    Tag,
}

impl ObjectKind {
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            "commit" => Some(Self::Commit),
            "blob" => Some(Self::Blob),
            "tree" => Some(Self::Tree),
            "tag" => Some(Self::Tag),
            _ => None,
        }
    }

    /// As git writes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Blob => "blob",
            Self::Tree => "tree",
            Self::Tag => "tag",
        }
    }
}

impl From<ObjectKind> for gitaly::ObjectType {
    fn from(kind: ObjectKind) -> Self {
        match kind {
            ObjectKind::Commit => Self::Commit,
            ObjectKind::Blob => Self::Blob,
            ObjectKind::Tree => Self::Tree,
            ObjectKind::Tag => Self::Tag,
        }
    }
}

/// What git says of an object before its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ObjectInfo {
    /// In hex.
    pub(crate) id: String,
    /// Its type.
    pub(crate) kind: ObjectKind,
    /// Length of the content in bytes.
    pub(crate) size: u64,
}

/// The answer to one request.
#[derive(Debug, PartialEq, Eq)]
enum Header {
    Found(ObjectInfo),
    /// Git names an object that is not here, such as a submodule's commit.
    Elsewhere,
    /// Anything else: the request again and a word such as `missing`.
    Other,
}

fn parse_header(line: &[u8]) -> Header {
    let Ok(line) = std::str::from_utf8(line) else { return Header::Other };
    let mut words = line.split(' ');
    let (Some(id), Some(kind)) = (words.next(), words.next()) else { return Header::Other };
    if id.len() < 40 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Header::Other;
    }
    match (ObjectKind::parse(kind), words.next().map(str::parse), words.next()) {
        (Some(kind), Some(Ok(size)), None) => Header::Found(ObjectInfo { id: id.to_owned(), kind, size }),
        (None, None, None) if kind == "submodule" => Header::Elsewhere,
        _ => Header::Other,
    }
}

/// A running `git cat-file`.
pub(crate) struct CatFile {
    process: GitProcess,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// Bytes of the present object that are still in the pipe, its final newline not counted.
    unread: u64,
    /// The newline behind the present object is still in the pipe.
    newline_due: bool,
    hash: ObjectHash,
}

fn broken(error: io::Error) -> GitError {
    GitError::Io { subcommand: SUBCOMMAND, source: error }
}

/// What leads to no object and would end the process or its line protocol: a NUL, and paths relative to a working
/// directory, which a bare repository has not.
fn unanswerable(revision: &[u8]) -> bool {
    let path = revision.iter().position(|byte| *byte == b':').and_then(|at| revision.get(at + 1..));
    let relative = path.is_some_and(|path| path.starts_with(b"./") || path.starts_with(b"../"));
    relative || revision.contains(&0)
}

impl CatFile {
    /// Starts the process.
    pub(crate) async fn start(git: &Git, repository: &RepositoryPath) -> Result<Self, GitError> {
        Self::start_in(git, repository, &git.slot().await?).await
    }

    /// Starts the process in room that has been taken before.
    pub(crate) async fn start_in(
        git: &Git,
        repository: &RepositoryPath,
        slot: &Slot,
    ) -> Result<Self, GitError> {
        let hash = ObjectHash::of(repository).await?;
        let command = git.command(repository, SUBCOMMAND).reads().slot(slot);
        let mut process = command.args(["--batch-command", "-z"]).spawn(true).await?;
        let (Some(stdin), Some(stdout)) = (process.take_stdin(), process.take_stdout()) else {
            return Err(broken(io::Error::other("pipes are missing")));
        };
        let stdout = BufReader::with_capacity(CHUNK_BYTES, stdout);
        Ok(Self { process, stdin, stdout, unread: 0, newline_due: false, hash })
    }

    /// The repository's hash.
    pub(crate) fn hash(&self) -> ObjectHash {
        self.hash
    }

    async fn request(&mut self, verb: &str, revision: &[u8]) -> Result<Option<ObjectInfo>, GitError> {
        self.skip().await?;
        if unanswerable(revision) {
            return Ok(None);
        }
        let request = [verb.as_bytes(), b" ", revision, b"\0"].concat();
        self.stdin.write_all(&request).await.map_err(broken)?;
        self.stdin.flush().await.map_err(broken)?;
        match parse_header(&self.line().await?) {
            Header::Found(info) => Ok(Some(info)),
            Header::Elsewhere => Ok(None),
            Header::Other => {
                // The request is repeated as it was, newlines included.
                for _ in revision.iter().filter(|byte| **byte == b'\n') {
                    self.line().await?;
                }
                Ok(None)
            }
        }
    }

    async fn line(&mut self) -> Result<Vec<u8>, GitError> {
        let mut line = Vec::new();
        self.stdout.read_until(b'\n', &mut line).await.map_err(broken)?;
        if line.pop() != Some(b'\n') {
            return Err(broken(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(line)
    }

    /// What the object is; `None` if the revision leads to none.
    pub(crate) async fn info(&mut self, revision: &[u8]) -> Result<Option<ObjectInfo>, GitError> {
        self.request("info", revision).await
    }

    /// Opens an object; its content is then read with [`CatFile::chunk`].
    pub(crate) async fn open(&mut self, revision: &[u8]) -> Result<Option<ObjectInfo>, GitError> {
        let info = self.request("contents", revision).await?;
        if let Some(info) = &info {
            self.unread = info.size;
            self.newline_due = true;
        }
        Ok(info)
    }

    /// The next piece of the open object, at most [`CHUNK_BYTES`]; `None` at its end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, GitError> {
        if self.unread == 0 {
            if self.newline_due {
                self.stdout.read_u8().await.map_err(broken)?;
                self.newline_due = false;
            }
            return Ok(None);
        }
        let wanted = usize::try_from(self.unread).map_or(CHUNK_BYTES, |unread| unread.min(CHUNK_BYTES));
        let mut piece = BytesMut::with_capacity(wanted);
        while piece.len() < wanted {
            let room = wanted - piece.len();
            let read = self.stdout.read_buf(&mut (&mut piece).limit(room)).await.map_err(broken)?;
            if read == 0 {
                return Err(broken(io::ErrorKind::UnexpectedEof.into()));
            }
            self.unread = self.unread.saturating_sub(u64::try_from(read).unwrap_or(u64::MAX));
        }
        Ok(Some(piece.freeze()))
    }

    async fn skip(&mut self) -> Result<(), GitError> {
        while self.chunk().await?.is_some() {}
        Ok(())
    }

    /// What the object is and its beginning: `limit` bytes and what of the next piece came with them.
    pub(crate) async fn head(
        &mut self,
        revision: &[u8],
        limit: usize,
    ) -> Result<Option<(ObjectInfo, Vec<u8>)>, GitError> {
        let Some(info) = self.open(revision).await? else { return Ok(None) };
        let mut head = Vec::new();
        while head.len() < limit {
            let Some(piece) = self.chunk().await? else { break };
            head.extend_from_slice(&piece);
        }
        Ok(Some((info, head)))
    }

    /// The first bytes of an object, whichever it is.
    pub(crate) async fn beginning(
        &mut self,
        revision: &[u8],
        limit: usize,
    ) -> Result<Option<Vec<u8>>, GitError> {
        Ok(self.head(revision, limit).await?.map(|(_, head)| head))
    }

    /// The commit a revision peels to.
    pub(crate) async fn commit(&mut self, revision: &[u8]) -> Result<Option<gitaly::GitCommit>, GitError> {
        let peeled = [revision, b"^{commit}"].concat();
        let found = self.head(&peeled, MAX_HEAD_BYTES).await?;
        Ok(found.map(|(info, head)| objects::parse_commit(&info.id, &head, info.size)))
    }

    /// The whole message of a commit; `None` if the revision leads to none.
    pub(crate) async fn commit_message(&mut self, revision: &[u8]) -> Result<Option<Vec<u8>>, GitError> {
        let commit = self.whole(&[revision, b"^{commit}"].concat()).await?;
        Ok(commit.map(|(_, raw)| objects::message(&raw).to_vec()))
    }

    /// A whole object, if it is no larger than what is ever held of one.
    pub(crate) async fn whole(&mut self, revision: &[u8]) -> Result<Option<(ObjectInfo, Vec<u8>)>, GitError> {
        let Some((info, raw)) = self.head(revision, MAX_CAPTURED_BYTES).await? else { return Ok(None) };
        if info.size > u64::try_from(raw.len()).unwrap_or(u64::MAX) {
            return Err(GitError::TooMuchOutput { subcommand: SUBCOMMAND, limit: MAX_CAPTURED_BYTES });
        }
        Ok(Some((info, raw)))
    }

    /// What a tag reference of this name points to, with the commit behind it if there is one.
    pub(crate) async fn tag(&mut self, id: &str, name: &[u8]) -> Result<Option<gitaly::Tag>, GitError> {
        let Some((info, head)) = self.head(id.as_bytes(), MAX_HEAD_BYTES).await? else { return Ok(None) };
        Ok(Some(match info.kind {
            ObjectKind::Tag => {
                let mut tag = objects::parse_tag(&info.id, name, &head, info.size);
                tag.target_commit = self.commit(id.as_bytes()).await?;
                tag
            }
            ObjectKind::Commit => gitaly::Tag {
                name: name.to_vec(),
                target_commit: Some(objects::parse_commit(&info.id, &head, info.size)),
                id: info.id,
                ..gitaly::Tag::default()
            },
            ObjectKind::Blob | ObjectKind::Tree => {
                gitaly::Tag { name: name.to_vec(), id: info.id, ..gitaly::Tag::default() }
            }
        }))
    }

    /// The entries of a tree; `None` if the revision leads to no tree.
    pub(crate) async fn tree(&mut self, revision: &[u8]) -> Result<Option<Vec<TreeItem>>, GitError> {
        let Some(info) = self.open(revision).await? else { return Ok(None) };
        if info.kind != ObjectKind::Tree {
            return Ok(None);
        }
        let too_large = usize::try_from(info.size).map_or(true, |size| size > MAX_TREE_BYTES);
        if too_large {
            return Err(GitError::TooMuchOutput { subcommand: SUBCOMMAND, limit: MAX_TREE_BYTES });
        }
        let mut raw = Vec::new();
        while let Some(piece) = self.chunk().await? {
            raw.extend_from_slice(&piece);
        }
        objects::parse_tree(&raw, self.hash.bytes())
            .map(Some)
            .map_err(|error| broken(io::Error::other(error)))
    }

    /// The entry at a path below a revision. The root is no entry, and nothing is what a path means beside its names.
    pub(crate) async fn entry(&mut self, revision: &[u8], path: &[u8]) -> Result<Option<TreeItem>, GitError> {
        let mut path = path;
        while let Some(rest) = path.strip_suffix(b"/") {
            path = rest;
        }
        let names = |part: &[u8]| !matches!(part, b"" | b"." | b"..");
        if !path.split(|byte| *byte == b'/').all(names) {
            return Ok(None);
        }
        let at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
        let (directory, name) = path.split_at(at);
        let directory = directory.strip_suffix(b"/").unwrap_or(directory);
        let items = self.tree(&[revision, b":", directory].concat()).await?;
        Ok(items.and_then(|items| items.into_iter().find(|item| item.name == name)))
    }

    /// Ends the process politely. Dropping it instead kills it.
    pub(crate) async fn close(self) -> Result<(), GitError> {
        let Self { process, stdin, stdout, .. } = self;
        drop(stdin);
        drop(stdout);
        process.finish().await.map(|_| ())
    }
}

/// A path as trees know it: without `./` in front and slashes behind.
pub(crate) fn clean_path(path: &[u8]) -> &[u8] {
    let mut path = path;
    while let Some(rest) = path.strip_prefix(b"./") {
        path = rest;
    }
    while let Some(rest) = path.strip_suffix(b"/") {
        path = rest;
    }
    if path == b"." { b"" } else { path }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_from_refusals() {
        let id = "4b825dc642cb6eb9a060e54bf8d69288fbee4904";
        assert_eq!(
            parse_header(format!("{id} blob 12").as_bytes()),
            Header::Found(ObjectInfo { id: id.into(), kind: ObjectKind::Blob, size: 12 })
        );
        assert_eq!(parse_header(format!("{id} submodule").as_bytes()), Header::Elsewhere);
        for other in [
            "main missing",
            "ab ambiguous",
            &format!("{id} missing"),
            "",
            "a blob 1",
            &format!("{id} blob x"),
        ] {
            assert_eq!(parse_header(other.as_bytes()), Header::Other, "{other}");
        }
    }
}
