//! Writing the trees that [`TreeEdit`] says have to be written.

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tonic::Status;

use super::tree_edit::{Action, IndexError, TreeEdit};
use crate::{
    error::{GitError, internal_io},
    git::{
        catfile::CatFile,
        objects::{ItemKind, TreeItem},
    },
    node::Node,
    storage::RepositoryPath,
};

/// Why there is no tree.
pub(crate) enum EditError {
    /// An action does not fit.
    Misfit(IndexError),
    /// Anything else.
    Failed(Status),
}

impl From<Status> for EditError {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

impl From<GitError> for EditError {
    fn from(error: GitError) -> Self {
        Self::Failed(error.into())
    }
}

/// The tree that comes of applying the actions, one after the other, to that of `before` (a commit or tree; nothing if `None`).
/// It is written.
pub(crate) async fn edited_tree(
    node: &Node,
    repository: &RepositoryPath,
    before: Option<&str>,
    actions: &[Action],
) -> Result<String, EditError> {
    let mut objects = CatFile::start(&node.git, repository).await?;
    let tree = match before {
        None => None,
        Some(before) => {
            let tree = objects.info(format!("{before}^{{tree}}").as_bytes()).await?;
            Some(tree.ok_or_else(|| Status::internal(format!("tree of {before} is missing")))?.id)
        }
    };
    let mut edit = TreeEdit::new(tree);
    for action in actions {
        for path in action.paths() {
            while let Some((place, id)) = edit.unread(path) {
                let items = objects.tree(id.as_bytes()).await?;
                edit.read(&place, items.ok_or_else(|| Status::internal(format!("tree {id} is missing")))?);
            }
        }
        edit.apply(action).map_err(EditError::Misfit)?;
    }
    objects.close().await?;
    write_trees(node, repository, &mut edit).await?;
    Ok(edit.id().map(str::to_owned).ok_or_else(|| Status::internal("writing tree: no root"))?)
}

/// Writes every changed tree through one `git mktree`.
async fn write_trees(node: &Node, repository: &RepositoryPath, edit: &mut TreeEdit) -> Result<(), Status> {
    let broken = internal_io("git mktree");
    let places = edit.changed();
    if places.is_empty() {
        return Ok(());
    }
    // Everything the entries name was read from a tree or has just been written: `--missing` saves looking again.
    let command = node.git.command(repository, "mktree").args(["-z", "--batch", "--missing"]);
    let mut process = command.spawn(true).await?;
    let (Some(mut stdin), Some(stdout)) = (process.take_stdin(), process.take_stdout()) else {
        return Err(Status::internal("git mktree: pipes are missing"));
    };
    let mut lines = BufReader::new(stdout).lines();
    let written = async {
        for place in &places {
            stdin.write_all(&tree_input(&edit.entries(place))).await?;
            let id = lines.next_line().await?.ok_or(std::io::ErrorKind::UnexpectedEof)?;
            edit.written(place, id);
        }
        Ok::<(), std::io::Error>(())
    };
    let written = written.await;
    drop(stdin);
    let (exit, stderr) = process.finish().await?;
    if !exit.success() {
        return Err(Status::internal(format!("git mktree: {exit}: {}", String::from_utf8_lossy(&stderr))));
    }
    written.map_err(broken)
}

/// A tree as `git mktree -z --batch` reads it.
fn tree_input(items: &[TreeItem]) -> Vec<u8> {
    let mut input = Vec::new();
    for item in items {
        let kind = match ItemKind::of_mode(item.mode) {
            ItemKind::Blob => "blob",
            ItemKind::Tree => "tree",
            ItemKind::Commit => "commit",
        };
        input.extend_from_slice(format!("{:06o} {kind} {}\t", item.mode, item.id).as_bytes());
        input.extend_from_slice(&item.name);
        input.push(0);
    }
    input.push(0);
    input
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_of_mktree() {
        let items = [
            TreeItem { mode: 0o100_644, name: b"a\n\xff".to_vec(), id: "11".into() },
            TreeItem { mode: 0o040_000, name: b"d".to_vec(), id: "22".into() },
        ];
        assert_eq!(tree_input(&items), b"100644 blob 11\ta\n\xff\x00040000 tree 22\td\0\0");
        assert_eq!(tree_input(&[]), b"\0");
    }
}
