//! RewriteHistory: the same history without certain blobs, or with certain text replaced.
//!
//! `git filter-repo`, a program of its own, writes the new history into a repository that nobody knows of. Git fetches it from
//! there in one transaction of references, on which the replicas vote. Which commits come of it depends on the program, so the
//! replicas agree only where it does the same, and the steps and the votes are Gitaly's.
//!
//! The program knows commits, and tags of commits. A reference to anything else goes. What only the old history holds is
//! left to the repository's upkeep.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tabularium_proto::gitaly::{RewriteHistoryRequest, RewriteHistoryResponse};
use tokio::{
    fs::File,
    io::{AsyncWriteExt as _, BufWriter},
};
use tonic::{Status, Streaming};

use crate::{
    error::internal_io,
    git::{Git, references, revision::ObjectHash},
    hooks,
    node::Node,
    place::Temporary,
    services::object_pool::{fetch_beside, is_pool_path},
    storage::RepositoryPath,
    votes::{Ballot, Voter, agreed, ballot},
};

/// Takes what is asked for, and does it.
pub(super) async fn rewrite(
    node: &Node,
    mut requests: Streaming<RewriteHistoryRequest>,
    voter: &Voter,
) -> Result<RewriteHistoryResponse, Status> {
    let first = requests.message().await?;
    let first = first.ok_or_else(|| Status::internal("receiving initial request: EOF"))?;
    let repository = node.storages.open(first.repository.as_ref())?;
    if ObjectHash::of(&repository).await? == ObjectHash::Sha256 {
        let text = "git-filter-repo does not support repositories using the SHA256 object format";
        return Err(Status::invalid_argument(text));
    }
    if is_pool_path(&repository.relative_path) {
        // Its members borrow objects that only the old history would hold.
        return Err(Status::failed_precondition("the history of an object pool is not rewritten"));
    }
    let place = Temporary::new(node, &repository.storage, "rewrite-")?;
    let changes = Changes::receive(place.path(), first, requests).await?;
    check_program(&node.git).await?;

    let _alone = node.copying.lock(&repository.path).await;
    let before = state(&node.git, &repository).await.map_err(while_doing("calculate initial checksum"))?;
    let rewritten = repository.elsewhere(place.path().join("repository"));
    let ballot = default_branch(&node.git, &repository).await?;
    let preparing = prepare(&node.git, &rewritten);
    agreed(&node.sections, voter, &repository.path, ballot.into(), preparing).await?;
    filter(&node.git, &repository, &rewritten, &changes).await?;
    // What was changed meanwhile would be undone, and may hold what is to go.
    let after = state(&node.git, &repository).await.map_err(while_doing("recalculate checksum"))?;
    if before != after {
        return Err(Status::aborted("source repository checksum altered"));
    }
    adopt(node, &repository, &rewritten, voter).await?;
    Ok(RewriteHistoryResponse {})
}

/// What is to be changed, in files as the program reads them: a line for each.
struct Changes {
    /// Ids of blobs that go.
    blobs: Option<PathBuf>,
    /// What is to be replaced: literally, or by patterns. Often a secret.
    redactions: Option<PathBuf>,
}

impl Changes {
    /// Reads the stream to its end.
    async fn receive(
        place: &Path,
        first: RewriteHistoryRequest,
        mut requests: Streaming<RewriteHistoryRequest>,
    ) -> Result<Self, Status> {
        let mut blobs = List::new(place.join("blobs"));
        let mut redactions = List::new(place.join("redactions"));
        let mut next = Some(RewriteHistoryRequest { repository: None, ..first });
        while let Some(request) = next {
            if request.repository.is_some() {
                return Err(Status::invalid_argument("subsequent requests must not contain repository"));
            }
            for id in &request.blobs {
                let parsed = ObjectHash::Sha1.parse(id.as_bytes());
                let id = parsed
                    .map_err(|error| Status::invalid_argument(format!("validating object ID: {error}")))?;
                blobs.push(id.as_bytes()).await?;
            }
            for redaction in &request.redactions {
                if redaction.contains(&b'\n') {
                    return Err(Status::invalid_argument("redaction pattern contains newline"));
                }
                redactions.push(redaction).await?;
            }
            next = requests.message().await?;
        }
        let changes = Self { blobs: blobs.finish().await?, redactions: redactions.finish().await? };
        if changes.blobs.is_none() && changes.redactions.is_none() {
            return Err(Status::invalid_argument("no object IDs or text replacements specified"));
        }
        Ok(changes)
    }
}

/// Most that is taken of either list; what is not wanted in a repository is little.
const MAX_LIST_BYTES: usize = 64 * 1024 * 1024;

/// Lines that go to a file as they come; the directory around it is this user's alone.
struct List {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    bytes: usize,
}

impl List {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None, bytes: 0 }
    }

    async fn push(&mut self, line: &[u8]) -> Result<(), Status> {
        let failed = || internal_io("keeping what is to be rewritten");
        self.bytes += line.len() + 1;
        if self.bytes > MAX_LIST_BYTES {
            let text = format!("more than {MAX_LIST_BYTES} bytes of object IDs or text replacements");
            return Err(Status::resource_exhausted(text));
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(BufWriter::new(File::create(&self.path).await.map_err(failed())?)),
        };
        file.write_all(line).await.map_err(failed())?;
        file.write_all(b"\n").await.map_err(failed())
    }

    /// Where the lines are, if there are any.
    async fn finish(self) -> Result<Option<PathBuf>, Status> {
        let Some(mut file) = self.file else { return Ok(None) };
        file.flush().await.map_err(internal_io("keeping what is to be rewritten"))?;
        Ok(Some(self.path))
    }
}

/// That the program is there, found out by starting it, before anything is voted on.
async fn check_program(git: &Git) -> Result<(), Status> {
    let output = git.bare_command("filter-repo").reads().arg("--version").output().await?;
    if output.exit.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let text = if stderr.contains("is not a git command") {
        "git-filter-repo is not installed on this node".to_owned()
    } else {
        let why = stderr.lines().last().unwrap_or_default();
        format!("git-filter-repo does not run on this node: {}, stderr: {why:?}", output.exit)
    };
    tracing::warn!("{text}");
    Err(Status::failed_precondition(text))
}

fn while_doing(what: &str) -> impl FnOnce(Status) -> Status + '_ {
    move |status| Status::new(status.code(), format!("{what}: {}", status.message()))
}

/// Of all references and `HEAD`. A repository without any has no history.
async fn state(git: &Git, repository: &RepositoryPath) -> Result<[u8; 32], Status> {
    let mut process = git.command(repository, "show-ref").reads().arg("--head").spawn(false).await?;
    let mut digest = Sha256::new();
    while let Some(chunk) = process.read_chunk().await? {
        digest.update(&chunk);
    }
    let (exit, stderr) = process.finish().await?;
    match exit.code {
        Some(0) => Ok(digest.finalize().into()),
        Some(code) => {
            tracing::info!(stderr = %String::from_utf8_lossy(&stderr), "references cannot be listed");
            Err(Status::internal(format!("git-show-ref failed with exit code {code}")))
        }
        None => Err(Status::internal(format!("running git-show-ref: {exit}"))),
    }
}

/// The first vote. Gitaly's nodes make the `HEAD` of the repository that they are going to write into point where this one's
/// does, and vote on that as on any other change of a reference. Here it can point anywhere: nobody reads it.
async fn default_branch(git: &Git, repository: &RepositoryPath) -> Result<Ballot, Status> {
    let target = references::head_target(git, repository).await?;
    let target = target.ok_or_else(|| Status::internal("finding HEAD reference: reference not found"))?;
    let old = ObjectHash::Sha1.zero();
    Ok(ballot(&[old.as_bytes(), b" ref:", target.as_slice(), b" HEAD\n"].concat()))
}

/// An empty repository to write into.
async fn prepare(git: &Git, rewritten: &RepositoryPath) -> Result<(), Status> {
    let command = git.bare_command("init").args(["--bare", "--quiet", "--template=", "--object-format=sha1"]);
    command.arg(&rewritten.path).checked().await?;
    Ok(())
}

/// Has the program write the new history.
async fn filter(
    git: &Git,
    repository: &RepositoryPath,
    rewritten: &RepositoryPath,
    changes: &Changes,
) -> Result<(), Status> {
    let option = |name: &str, path: &Path| {
        let mut option = std::ffi::OsString::from(name);
        option.push(path);
        option
    };
    // Outside of any repository: one that git is started in would count instead of the two places.
    let mut command = git
        .bare_command("filter-repo")
        // It goes in any case.
        .config("core.fsync=none")
        .arg(option("--target=", &rewritten.path))
        .arg(option("--source=", &repository.path))
        // No clean-up, and no question whether this is a fresh clone.
        .args(["--partial", "--force", "--replace-refs=update-no-add", "--quiet"]);
    if let Some(blobs) = &changes.blobs {
        command = command.arg(option("--strip-blobs-with-ids=", blobs));
    }
    if let Some(redactions) = &changes.redactions {
        command = command.arg(option("--replace-text=", redactions));
    }
    let output = command.output().await?;
    if output.exit.success() {
        return Ok(());
    }
    tracing::info!(stderr = %String::from_utf8_lossy(&output.stderr), "git-filter-repo failed");
    let text = match output.exit.code {
        Some(code) => format!("git-filter-repo failed with exit code {code}"),
        None => format!("running git-filter-repo: {}", output.exit),
    };
    Err(Status::internal(format!("rewriting repository history: {text}")))
}

/// Brings the new history into the repository: its objects, then all references in one transaction that the replicas vote on.
async fn adopt(
    node: &Node,
    repository: &RepositoryPath,
    rewritten: &RepositoryPath,
    voter: &Voter,
) -> Result<(), Status> {
    let session = node.hooks.session(voter, repository);
    let command = hooks::attend(session.as_ref(), node.git.command(repository, "fetch"));
    // Nobody is told which of the references went back: all of them may have.
    let command = fetch_beside(node, command.config("advice.fetchShowForcedUpdates=false"))
        .args(["--prune", "--no-tags", "--force", "--atomic", "--no-show-forced-updates"])
        .args(["--no-write-fetch-head", "--quiet"]);
    let output = command.arg(&rewritten.path).arg("+refs/*:refs/*").output().await?;
    if output.exit.success() {
        return Ok(());
    }
    if let Some(refused) = hooks::failure(session.as_ref()) {
        return Err(refused);
    }
    tracing::info!(stderr = %String::from_utf8_lossy(&output.stderr), "a rewritten history cannot be fetched");
    Err(Status::internal(format!("fetching rewritten history: {}", output.exit)))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn a_list_has_an_end() {
        let directory = tempfile::tempdir().unwrap();
        let mut list = List::new(directory.path().join("list"));
        list.push(&vec![b'x'; MAX_LIST_BYTES - 3]).await.unwrap();
        list.push(b"").await.unwrap();
        assert_eq!(list.push(b"x").await.unwrap_err().code(), Code::ResourceExhausted);
    }
}
