//! The references of a repository as they are at one moment, over the objects that it has: a repository beside it with
//! references of its own, which stay as they are while the other one is written to.

use std::path::PathBuf;

use tokio::io::{AsyncWriteExt as _, BufWriter};
use tonic::Status;

use crate::{
    error::internal_io,
    git::{lines::Lines, references, revision::ObjectHash},
    node::Node,
    place::Temporary,
    storage::{Quarantine, RepositoryPath},
};

/// How git knows that it need not sort a file of references.
const HEADER: &[u8] = b"# pack-refs with: sorted \n";

/// The copy of the references. It goes when it is dropped.
pub(super) struct Frozen {
    repository: RepositoryPath,
    /// What `HEAD` stands for; `None`: an object itself.
    pub(super) head_reference: Option<Vec<u8>>,
    /// The object that `HEAD` leads to, if there is one.
    pub(super) head: Option<String>,
    /// Whether there is any reference.
    pub(super) any: bool,
    _scratch: Temporary,
}

impl Frozen {
    /// Of a repository now.
    pub(super) async fn of(node: &Node, original: &RepositoryPath, hash: ObjectHash) -> Result<Self, Status> {
        let scratch = Temporary::new(node, &original.storage, "backup-")?;
        let mut repository = original.elsewhere(scratch.path().join("references"));
        let init = node.git.bare_command("init").args(["--bare", "--quiet", "--template="]);
        init.arg(format!("--object-format={}", hash.name())).arg(&repository.path).checked().await?;
        repository.quarantine = Some(Quarantine {
            object_directory: Some(original.path.join("objects")),
            alternates: Vec::new(),
        });

        // Objects of a push that is not accepted yet are nothing to keep.
        let original = original.elsewhere(original.path.clone());
        let head_reference = references::head_target(&node.git, &original).await?;
        let mut frozen = Self { repository, head_reference, head: None, any: false, _scratch: scratch };
        frozen.copy_references(node, &original).await?;
        if frozen.head_reference.is_none() {
            frozen.head = references::resolve(&node.git, &original, b"HEAD").await?;
        }
        frozen.set_head().await?;
        Ok(frozen)
    }

    /// The repository as git commands want it.
    pub(super) fn repository(&self) -> &RepositoryPath {
        &self.repository
    }

    /// The file of references: [`HEADER`] and a line for each, an id and a name.
    pub(super) fn packed(&self) -> PathBuf {
        self.repository.path.join("packed-refs")
    }

    /// What that file begins with.
    pub(super) fn header_bytes() -> u64 {
        u64::try_from(HEADER.len()).unwrap_or_default()
    }

    async fn copy_references(&mut self, node: &Node, original: &RepositoryPath) -> Result<(), Status> {
        let copying = || internal_io("copying references");
        let mut packed = BufWriter::new(tokio::fs::File::create(self.packed()).await.map_err(copying())?);
        packed.write_all(HEADER).await.map_err(copying())?;
        let command = node.git.command(original, "for-each-ref");
        let command = command.args(["--format=%(objectname) %(refname)", "refs/"]);
        let mut lines = Lines::start(command, "for-each-ref", b'\n').await?;
        while let Some(mut line) = lines.next().await? {
            let space = line.iter().position(|byte| *byte == b' ').unwrap_or_default();
            if self.head_reference.as_deref() == line.get(space + 1..) {
                self.head = line.get(..space).map(|id| String::from_utf8_lossy(id).into_owned());
            }
            self.any = true;
            line.push(b'\n');
            packed.write_all(&line).await.map_err(copying())?;
        }
        packed.flush().await.map_err(copying())?;
        let (exit, stderr) = lines.finish().await?;
        // Git goes on without a reference that it cannot read.
        let stderr = String::from_utf8_lossy(&stderr);
        if exit.success() && !stderr.contains("broken ref") {
            return Ok(());
        }
        Err(Status::internal(format!("references cannot be read: {exit}, stderr: {stderr:?}")))
    }

    async fn set_head(&self) -> Result<(), Status> {
        let content = match (&self.head_reference, &self.head) {
            (Some(reference), _) => [b"ref: ", reference.as_slice(), b"\n"].concat(),
            (None, Some(id)) => format!("{id}\n").into_bytes(),
            (None, None) => return Err(Status::internal("HEAD leads nowhere")),
        };
        let head = self.repository.path.join("HEAD");
        tokio::fs::write(head, content).await.map_err(internal_io("copying HEAD"))
    }
}
