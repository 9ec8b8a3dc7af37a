//! UserCommitFiles: a commit made of single changes to files.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    OperationBranchUpdate, UserCommitFilesActionHeader, UserCommitFilesError, UserCommitFilesRequest,
    UserCommitFilesRequestHeader, UserCommitFilesResponse,
    user_commit_files_action::UserCommitFilesActionPayload as ActionPayload,
    user_commit_files_action_header::ActionType, user_commit_files_error::Error,
    user_commit_files_request::UserCommitFilesRequestPayload as Payload,
};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tonic::{Code, Response, Status, Streaming};

use super::{
    commit_object::{NAMELESS, NewCommit, write_commit},
    content::Content,
    signature::Signature,
    tree_edit::{Action, IndexError, Path, TreeEdit, parse_path},
    update::{Change, Requester, UpdateError, expected_old, update},
};
use crate::{
    error::{internal_io, with_detail},
    git::{
        catfile::CatFile,
        objects::{ItemKind, TreeItem},
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash, is_zero},
    },
    node::Node,
    storage::RepositoryPath,
    votes::Voter,
};

/// Most changes in one commit.
const MAX_ACTIONS: usize = 100_000;

fn detailed(code: Code, text: &str, error: Error) -> Status {
    with_detail(code, text, "UserCommitFilesError", &UserCommitFilesError { error: Some(error) })
}

fn misfit(error: &IndexError) -> Status {
    detailed(error.code(), &error.text(), Error::IndexUpdate(error.detail()))
}

/// Everything about the request that does not change while its actions arrive.
struct Job {
    node: Arc<Node>,
    repository: RepositoryPath,
    quarantine: Quarantine,
    header: UserCommitFilesRequestHeader,
    hash: ObjectHash,
    /// What the branch points to now.
    target: Option<String>,
    /// What the commit is made on.
    parent: Option<String>,
    voter: Voter,
}

pub(super) async fn commit_files(
    node: &Arc<Node>,
    mut requests: Streaming<UserCommitFilesRequest>,
    voter: &Voter,
) -> Result<Response<UserCommitFilesResponse>, Status> {
    let first = requests.message().await?.and_then(|request| request.user_commit_files_request_payload);
    let Some(Payload::Header(header)) = first else {
        return Err(Status::invalid_argument("empty UserCommitFilesRequestHeader"));
    };
    let repository = node.storages.open(header.repository.as_ref())?;
    let hash = ObjectHash::of(&repository).await?;
    check(&header, hash)?;
    let reference = revision::branch_reference(&header.branch_name);
    let target = references::read(&node.git, &repository, &reference).await?;
    let parent = parent_commit(node, &repository, &header, target.clone()).await?;
    let quarantine = Quarantine::create(node, &repository)?;
    let voter = voter.clone();
    let job = Job { node: Arc::clone(node), repository, quarantine, header, hash, target, parent, voter };

    let actions = job.receive(&mut requests).await?;
    let tree = job.write_tree(&actions).await?;
    let commit_id = job.write_commit(&tree).await?;
    job.move_branch(reference, commit_id).await
}

fn check(header: &UserCommitFilesRequestHeader, hash: ObjectHash) -> Result<(), Status> {
    let refuse = |text: &str| Err(Status::invalid_argument(text));
    if header.user.is_none() {
        return refuse("empty User");
    }
    if header.commit_message.is_empty() {
        return refuse("empty CommitMessage");
    }
    if header.branch_name.is_empty() {
        return refuse("empty BranchName");
    }
    if !header.start_sha.is_empty() {
        hash.parse(header.start_sha.as_bytes())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
    }
    // Routers rewrite the path of `repository` and not that of `start_repository`, so the same repository may look like
    // two; the id that GitLab gives it is left alone.
    let same = match (&header.repository, &header.start_repository) {
        (Some(one), Some(other)) => {
            let same_place =
                one.storage_name == other.storage_name && one.relative_path == other.relative_path;
            same_place || (!one.gl_repository.is_empty() && one.gl_repository == other.gl_repository)
        }
        _ => true,
    };
    if !same {
        return Err(Status::unimplemented(
            "start_repository: starting from another repository is not supported",
        ));
    }
    Ok(())
}

async fn parent_commit(
    node: &Node,
    repository: &RepositoryPath,
    header: &UserCommitFilesRequestHeader,
    target: Option<String>,
) -> Result<Option<String>, Status> {
    let unresolved = |name: &str| {
        Status::invalid_argument(format!("cannot resolve parent commit: reference not found: {name:?}"))
    };
    if !header.start_sha.is_empty() {
        let commit = format!("{}^{{commit}}", header.start_sha);
        let found = references::resolve(&node.git, repository, commit.as_bytes()).await?;
        return found.map(Some).ok_or_else(|| unresolved(&header.start_sha));
    }
    if header.start_branch_name.is_empty() || !references::has_branches(&node.git, repository).await? {
        return Ok(target);
    }
    let start = revision::branch_reference(&header.start_branch_name);
    let found = references::read(&node.git, repository, &start).await?;
    found.map(Some).ok_or_else(|| unresolved(&String::from_utf8_lossy(&start)))
}

/// An action whose content is still arriving.
struct Open {
    header: UserCommitFilesActionHeader,
    kind: ActionType,
    path: Path,
    content: Option<Content>,
}

impl Job {
    /// Reads all actions; contents are blobs in the quarantine when this returns.
    async fn receive(&self, requests: &mut Streaming<UserCommitFilesRequest>) -> Result<Vec<Action>, Status> {
        let mut actions = Vec::new();
        let mut open: Option<Open> = None;
        while let Some(request) = requests.message().await? {
            let payload = match request.user_commit_files_request_payload {
                Some(Payload::Action(action)) => action.user_commit_files_action_payload,
                Some(Payload::Header(_)) | None => None,
            };
            match payload {
                Some(ActionPayload::Header(header)) => {
                    if let Some(open) = open.take() {
                        actions.push(self.complete(open).await?);
                    }
                    if actions.len() >= MAX_ACTIONS {
                        let text = format!("more than {MAX_ACTIONS} actions in one commit");
                        return Err(Status::resource_exhausted(text));
                    }
                    open = Some(self.begin(header).await?);
                }
                Some(ActionPayload::Content(piece)) => match &mut open {
                    Some(Open { content: Some(content), .. }) => content.push(&piece).await?,
                    // Content of an action that has no use for it.
                    Some(Open { content: None, .. }) => {}
                    None => return Err(Status::internal("content sent before action")),
                },
                None => return Err(Status::internal("unhandled action payload type")),
            }
        }
        if let Some(open) = open {
            actions.push(self.complete(open).await?);
        }
        Ok(actions)
    }

    async fn begin(&self, header: UserCommitFilesActionHeader) -> Result<Open, Status> {
        let kind = ActionType::try_from(header.action).map_err(|_| {
            let text = format!("NoMethodError: undefined method `downcase' for {}:Integer", header.action);
            Status::invalid_argument(text)
        })?;
        let path = parse_path(&header.file_path).map_err(|error| misfit(&error))?;
        if kind == ActionType::Move {
            parse_path(&header.previous_path).map_err(|error| misfit(&error))?;
        }
        let takes_content = match kind {
            ActionType::Create | ActionType::Update | ActionType::CreateDir => true,
            ActionType::Move => !header.infer_content,
            ActionType::Delete | ActionType::Chmod => false,
        };
        let content = if takes_content {
            Some(Content::start(&self.quarantine, header.base64_content).await?)
        } else {
            None
        };
        Ok(Open { header, kind, path, content })
    }

    async fn complete(&self, open: Open) -> Result<Action, Status> {
        let Open { header, kind, path, content } = open;
        // A new directory is an empty file in it, whatever content came along.
        let content = if kind == ActionType::CreateDir {
            drop(content);
            Some(Content::start(&self.quarantine, false).await?)
        } else {
            content
        };
        let id = match content {
            Some(content) => Some(content.into_blob(&self.node, &self.quarantine, &path).await?),
            None => None,
        };
        let executable = header.execute_filemode;
        Ok(match kind {
            ActionType::Create => Action::Create { path, id: id.unwrap_or_default(), executable },
            ActionType::CreateDir => Action::CreateDirectory { path, keep: id.unwrap_or_default() },
            ActionType::Update => Action::Update { path, id: id.unwrap_or_default() },
            ActionType::Move => {
                let from = parse_path(&header.previous_path).map_err(|error| misfit(&error))?;
                Action::Move { from, to: path, id }
            }
            ActionType::Delete => Action::Delete { path },
            ActionType::Chmod => Action::ChangeMode { path, executable },
        })
    }

    async fn write_tree(&self, actions: &[Action]) -> Result<String, Status> {
        let repository = self.quarantine.repository();
        let mut objects = CatFile::start(&self.node.git, repository).await?;
        let tree = match &self.parent {
            None => None,
            Some(parent) => {
                let tree = objects.info(format!("{parent}^{{tree}}").as_bytes()).await?;
                Some(tree.ok_or_else(|| Status::internal(format!("tree of {parent} is missing")))?.id)
            }
        };
        let mut edit = TreeEdit::new(tree);
        for action in actions {
            for path in action.paths() {
                while let Some((place, id)) = edit.unread(path) {
                    let items = objects.tree(id.as_bytes()).await?;
                    edit.read(
                        &place,
                        items.ok_or_else(|| Status::internal(format!("tree {id} is missing")))?,
                    );
                }
            }
            edit.apply(action).map_err(|error| misfit(&error))?;
        }
        objects.close().await?;
        write_trees(&self.node, repository, &mut edit).await?;
        edit.id().map(str::to_owned).ok_or_else(|| Status::internal("writing tree: no root"))
    }

    async fn write_commit(&self, tree: &str) -> Result<String, Status> {
        let user = self.header.user.clone().unwrap_or_default();
        let committer = Signature::of_request(&user, self.header.timestamp.as_ref())?;
        let or = |given: &[u8], fallback: &[u8]| {
            if given.trim_ascii().is_empty() { fallback.to_vec() } else { given.trim_ascii().to_vec() }
        };
        let author = committer.with_person(
            &or(&self.header.commit_author_name, &committer.name),
            &or(&self.header.commit_author_email, &committer.email),
        );
        for person in [&author, &committer] {
            if person.name.trim_ascii().is_empty() || person.email.trim_ascii().is_empty() {
                return Err(Status::invalid_argument(NAMELESS));
            }
        }
        let parents: Vec<&str> = self.parent.iter().map(String::as_str).collect();
        let commit = NewCommit {
            tree,
            parents: &parents,
            author: &author,
            committer: &committer,
            message: self.header.commit_message.clone().into(),
        };
        write_commit(&self.node, self.quarantine.repository(), commit).await
    }

    async fn move_branch(
        self,
        reference: Vec<u8>,
        commit_id: String,
    ) -> Result<Response<UserCommitFilesResponse>, Status> {
        let Self { node, repository, quarantine, header, hash, target, parent, voter } = self;
        let repo_created = !references::has_branches(&node.git, &repository).await?;
        let old = match expected_old(&node, &repository, hash, &header.expected_old_oid).await? {
            Some(expected) => expected,
            None => match (target, header.force) {
                (None, _) => hash.zero(),
                (Some(target), true) => target,
                (Some(target), false) => parent.unwrap_or(target),
            },
        };
        let branch_created = is_zero(&old);
        let change = Change { reference, old, new: commit_id.clone() };
        let (sent, user) = (header.repository.unwrap_or_default(), header.user.unwrap_or_default());
        let requester = Requester { repository: &sent, user: &user, voter: &voter };
        match update(&node, &repository, requester, Some(quarantine), &change).await {
            Ok(()) => Ok(Response::new(UserCommitFilesResponse {
                branch_update: Some(OperationBranchUpdate { commit_id, repo_created, branch_created }),
                ..UserCommitFilesResponse::default()
            })),
            Err(UpdateError::Hook(refusal)) => {
                let text = format!("denied by custom hooks: {}", refusal.message());
                Err(detailed(Code::PermissionDenied, &text, Error::CustomHook(refusal.detail())))
            }
            Err(UpdateError::Reference) => Err(Status::failed_precondition(change.refusal())),
            Err(UpdateError::Failed(status)) => Err(status),
        }
    }
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
