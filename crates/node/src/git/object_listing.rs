//! Which objects there are: all of a repository, or those that revisions lead to.

use super::{Exit, Git, Slot, catfile::ObjectInfo, catfile::ObjectKind, lines::Lines};
use crate::{error::GitError, storage::RepositoryPath};

/// Every object in the repository's object directories, in no order, whether anything leads to it or not.
pub(crate) struct AllObjects(Lines);

impl AllObjects {
    /// Starts git, in room that has been taken before.
    pub(crate) async fn start(git: &Git, repository: &RepositoryPath, slot: &Slot) -> Result<Self, GitError> {
        let command = git.command(repository, "cat-file").slot(slot);
        let command = command.args(["--batch-check", "--batch-all-objects", "--unordered", "--buffer"]);
        Ok(Self(Lines::start(command, "cat-file", b'\n').await?))
    }

    /// The next object. One that cannot be read is left out.
    pub(crate) async fn next(&mut self) -> Result<Option<ObjectInfo>, GitError> {
        while let Some(line) = self.0.next().await? {
            if let Some(info) = parse_info(&line) {
                return Ok(Some(info));
            }
        }
        Ok(None)
    }

    /// Waits for the end of git, which must be a good one.
    pub(crate) async fn checked(self) -> Result<(), GitError> {
        self.0.checked().await
    }
}

fn parse_info(line: &[u8]) -> Option<ObjectInfo> {
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (id, kind, size) = (words.next()?, words.next()?, words.next()?);
    Some(ObjectInfo { id: id.to_owned(), kind: ObjectKind::parse(kind)?, size: size.parse().ok()? })
}

/// What revisions lead to.
pub(crate) struct ReachableObjects(Lines);

/// How a listing of reachable objects ended.
#[derive(Debug)]
pub(crate) struct ListingEnd {
    exit: Exit,
    stderr: Vec<u8>,
}

impl ListingEnd {
    /// `Err` with the words of Gitaly's clients unless the end was a good one.
    pub(crate) fn checked(self) -> Result<(), String> {
        if self.exit.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&self.stderr);
        Err(format!("rev-list pipeline command: {}, stderr: {stderr:?}", self.exit))
    }
}

impl ReachableObjects {
    /// Starts git, in room that has been taken before: objects of one kind that these revisions, which have been
    /// checked, lead to; blobs only up to a size.
    pub(crate) async fn start(
        git: &Git,
        repository: &RepositoryPath,
        slot: &Slot,
        revisions: &[String],
        kind: ObjectKind,
        blob_limit: Option<u64>,
    ) -> Result<Self, GitError> {
        let mut command = git.command(repository, "rev-list").slot(slot);
        command = command.args(["--stdin", "--in-commit-order", "--objects", "--object-names"]);
        if let Some(bytes) = blob_limit {
            command = command.arg(format!("--filter=blob:limit={bytes}"));
        }
        command = command.arg(format!("--filter=object:type={}", kind.name()));
        let command = command.arg("--filter-provided-objects");
        let mut input = revisions.join("\n");
        input.push('\n');
        Ok(Self(Lines::start_with(command, "rev-list", b'\n', input).await?))
    }

    /// Id and path of the next object; a path of nothing if it has none.
    pub(crate) async fn next(&mut self) -> Result<Option<(Vec<u8>, Vec<u8>)>, GitError> {
        Ok(self.0.next().await?.map(|mut line| {
            let space = line.iter().position(|byte| *byte == b' ').unwrap_or(line.len());
            let path = line.get(space + 1..).unwrap_or_default().to_vec();
            line.truncate(space);
            (line, path)
        }))
    }

    /// Waits for the end of git.
    pub(crate) async fn finish(self) -> Result<ListingEnd, GitError> {
        let (exit, stderr) = self.0.finish().await?;
        Ok(ListingEnd { exit, stderr })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_listing() {
        let id = "4b825dc642cb6eb9a060e54bf8d69288fbee4904";
        let found = parse_info(format!("{id} blob 7").as_bytes()).unwrap();
        assert_eq!((found.id.as_str(), found.kind, found.size), (id, ObjectKind::Blob, 7));
        for other in ["", "x missing", "x blob y"] {
            assert!(parse_info(other.as_bytes()).is_none(), "{other}");
        }
    }

    #[test]
    fn ends() {
        let end = |code| ListingEnd { exit: Exit { code: Some(code) }, stderr: b"fatal: x\n".to_vec() };
        assert_eq!(end(0).checked(), Ok(()));
        let text = "rev-list pipeline command: exit status 128, stderr: \"fatal: x\\n\"";
        assert_eq!(end(128).checked(), Err(text.to_owned()));
    }
}
