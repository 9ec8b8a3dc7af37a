//! UserApplyPatch: commits made of patches that came by mail.
//!
//! What `git am --3way` does, step by step and without a working copy: a patch that does not apply to what is there is applied
//! to what it was made for, as far as its index lines tell, and that change is merged.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, path::PathBuf, sync::Arc};

use tabularium_proto::gitaly::{
    OperationBranchUpdate, UserApplyPatchError, UserApplyPatchRequest, UserApplyPatchResponse,
    user_apply_patch_error::Error,
    user_apply_patch_request::{Header, UserApplyPatchRequestPayload as Payload},
};
use tokio::io::AsyncWriteExt as _;
use tonic::{Code, Response, Status, Streaming};

use super::{
    commit_object::{NewCommit, write_commit},
    mail::{Mail, message},
    signature::{Signature, moment},
    update::{Change, Requester, UpdateError, expected_old, update},
};
use crate::{
    error::{internal_io, with_detail},
    git::{
        GitCommand, merge,
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash},
    },
    node::Node,
    storage::RepositoryPath,
    votes::Voter,
};

fn check(header: &Header) -> Result<(), Status> {
    if header.user.is_none() {
        return Err(Status::invalid_argument("missing User"));
    }
    if header.target_branch.is_empty() {
        return Err(Status::invalid_argument("missing Branch"));
    }
    Ok(())
}

pub(super) async fn apply_patch(
    node: &Arc<Node>,
    mut requests: Streaming<UserApplyPatchRequest>,
    voter: &Voter,
) -> Result<Response<UserApplyPatchResponse>, Status> {
    let first = requests.message().await?.and_then(|request| request.user_apply_patch_request_payload);
    let Some(Payload::Header(header)) = first else {
        return Err(Status::invalid_argument("empty UserApplyPatch_Header"));
    };
    let repository = node.storages.open(header.repository.as_ref())?;
    check(&header)?;
    let hash = ObjectHash::of(&repository).await?;
    let reference = revision::branch_reference(&header.target_branch);
    let present = references::read(&node.git, &repository, &reference).await?;
    let branch_created = present.is_none();
    let parent = match &present {
        Some(present) => present.clone(),
        None => default_commit(node, &repository).await?,
    };
    let now = moment(header.timestamp.as_ref());
    let committer = Signature::of_request(&header.user.clone().unwrap_or_default(), Some(&now))?;
    let quarantine = Quarantine::create(node, &repository)?;
    let mails = receive(node, &quarantine, &mut requests).await?;
    let mut applying = Applying::begin(node, &quarantine, &committer, &parent).await?;
    for mail in &mails {
        applying.apply(mail).await?;
    }
    let new = applying.tip;

    let old = match expected_old(node, &repository, hash, &header.expected_old_oid).await? {
        Some(expected) => expected,
        None => present.unwrap_or_else(|| hash.zero()),
    };
    let change = Change { reference, old, new: new.clone() };
    let (sent, user) = (header.repository.unwrap_or_default(), header.user.unwrap_or_default());
    let requester = Requester { repository: &sent, user: &user, voter };
    match update(node, &repository, requester, Some(quarantine), &change).await {
        Ok(()) => {
            let update = OperationBranchUpdate { commit_id: new, repo_created: false, branch_created };
            Ok(Response::new(UserApplyPatchResponse { branch_update: Some(update) }))
        }
        Err(UpdateError::Hook(refusal)) if refusal.denied().is_some() => {
            Err(Status::internal(format!("update reference: {}", refusal.full_message())))
        }
        Err(UpdateError::Hook(refusal)) => {
            let detail = UserApplyPatchError { error: Some(Error::CustomHook(refusal.detail())) };
            let text = "denied by custom hooks";
            Err(with_detail(Code::PermissionDenied, text, "UserApplyPatchError", &detail))
        }
        Err(UpdateError::Reference) => {
            let text = format!("update reference: reference update: {}", change.refusal());
            Err(Status::internal(text))
        }
        Err(UpdateError::Failed(status)) => Err(status),
    }
}

/// Where a branch begins that is not there yet.
async fn default_commit(node: &Node, repository: &RepositoryPath) -> Result<String, Status> {
    let found = match references::default_branch(&node.git, repository).await? {
        Some(branch) => references::read(&node.git, repository, &branch).await?,
        None => None,
    };
    found.ok_or_else(|| Status::internal("no default branch"))
}

/// Keeps the mails that the client sends in a file each; in their order.
async fn receive(
    node: &Node,
    quarantine: &Quarantine,
    requests: &mut Streaming<UserApplyPatchRequest>,
) -> Result<Vec<PathBuf>, Status> {
    let keeping = || internal_io("keeping the patches");
    let (mailbox, directory) = (quarantine.scratch("mailbox"), quarantine.scratch("mails"));
    let mut file = tokio::fs::File::create(&mailbox).await.map_err(keeping())?;
    while let Some(request) = requests.message().await? {
        if let Some(Payload::Patches(patches)) = request.user_apply_patch_request_payload {
            file.write_all(&patches).await.map_err(keeping())?;
        }
    }
    file.flush().await.map_err(keeping())?;
    drop(file);
    tokio::fs::create_dir(&directory).await.map_err(keeping())?;
    let mut output = std::ffi::OsString::from("-o");
    output.push(&directory);
    let split = node.git.bare_command("mailsplit").args(["-d4", "-b"]).arg(output).arg("--").arg(&mailbox);
    let split = split.output().await?;
    if !split.exit.success() {
        let stderr = String::from_utf8_lossy(&split.stderr);
        return Err(Status::internal(format!("apply patch: {}, stderr: {stderr:?}", split.exit)));
    }
    let count = String::from_utf8_lossy(split.stdout.trim_ascii()).parse::<usize>();
    let count = count.map_err(|error| Status::internal(format!("apply patch: counting mails: {error}")))?;
    Ok((1..=count).map(|number| directory.join(format!("{number:04}"))).collect())
}

/// A branch that grows patch by patch.
struct Applying<'a> {
    node: &'a Arc<Node>,
    quarantine: &'a Quarantine,
    committer: &'a Signature,
    tip: String,
    tree: String,
}

impl<'a> Applying<'a> {
    async fn begin(
        node: &'a Arc<Node>,
        quarantine: &'a Quarantine,
        committer: &'a Signature,
        parent: &str,
    ) -> Result<Self, Status> {
        let tree = format!("{parent}^{{tree}}");
        let tree = references::resolve(&node.git, quarantine.repository(), tree.as_bytes()).await?;
        let tree = tree.ok_or_else(|| Status::internal(format!("tree of {parent} is missing")))?;
        let applying = Self { node, quarantine, committer, tip: parent.to_owned(), tree };
        applying.load_index().await?;
        Ok(applying)
    }

    /// A git command on an index of the quarantine's.
    fn on(&self, index: &str, subcommand: &'static str) -> GitCommand {
        let command = self.node.git.command(self.quarantine.repository(), subcommand);
        command.env("GIT_INDEX_FILE", self.quarantine.scratch(index))
    }

    async fn load_index(&self) -> Result<(), Status> {
        self.on("index", "read-tree").arg(&self.tree).checked().await?;
        Ok(())
    }

    async fn write_tree(&self, index: &str) -> Result<String, Status> {
        let tree = self.on(index, "write-tree").checked().await?;
        Ok(String::from_utf8_lossy(tree.trim_ascii()).into_owned())
    }

    /// Makes the commit of one mail.
    async fn apply(&mut self, file: &PathBuf) -> Result<(), Status> {
        let (body, patch) = (self.quarantine.scratch("message"), self.quarantine.scratch("patch"));
        let mail = tokio::fs::read(file).await.map_err(internal_io("reading a patch"))?;
        let info = self.node.git.bare_command("mailinfo").arg(&body).arg(&patch).output_with(mail).await?;
        let mail = Mail::parse(&info.checked()?);
        if mail.is_made_by_the_mail_system() {
            return Ok(());
        }
        let length = tokio::fs::metadata(&patch).await.map_err(internal_io("reading a patch"))?.len();
        if length == 0 {
            return Err(Status::internal("apply patch: exit status 128, stderr: \"Patch is empty.\""));
        }
        let applied = self.on("index", "apply").arg("--cached").arg("--").arg(&patch).output().await?;
        let tree = if applied.exit.success() {
            self.write_tree("index").await?
        } else {
            let number = file.file_name().map(OsStr::as_bytes).unwrap_or_default();
            let merged = self.merge(&patch).await?.ok_or_else(|| {
                let failed = [b"Patch failed at ", number, b" ", &mail.subject, b"\n"].concat();
                Status::failed_precondition(String::from_utf8_lossy(&failed).into_owned())
            })?;
            if merged == self.tree {
                // All of it is there already.
                return Ok(());
            }
            merged
        };
        let body = tokio::fs::read(&body).await.map_err(internal_io("reading a patch"))?;
        let commit = NewCommit {
            tree: &tree,
            parents: &[&self.tip],
            author: &self.committer.of_mail(&mail.name, &mail.email, &mail.date),
            committer: self.committer,
            message: message(&mail.subject, &body).into(),
        };
        self.tip = write_commit(self.node, self.quarantine.repository(), commit).await?;
        let in_index = applied.exit.success();
        self.tree = tree;
        if in_index { Ok(()) } else { self.load_index().await }
    }

    /// The tree that comes of merging the patch; `None` if it cannot be.
    async fn merge(&self, patch: &PathBuf) -> Result<Option<String>, Status> {
        const INDEX: &str = "ancestor";
        let mut option = std::ffi::OsString::from("--build-fake-ancestor=");
        option.push(self.quarantine.scratch(INDEX));
        let built = self.on("index", "apply").arg(option).arg("--").arg(patch).output().await?;
        if !built.exit.success() {
            return Ok(None);
        }
        let before = self.write_tree(INDEX).await?;
        let applied = self.on(INDEX, "apply").arg("--cached").arg("--").arg(patch).output().await?;
        if !applied.exit.success() {
            return Ok(None);
        }
        let after = self.write_tree(INDEX).await?;
        let git = &self.node.git;
        Ok(merge::merge_trees(git, self.quarantine, &before, &self.tree, &after).await?.clean().ok())
    }
}
