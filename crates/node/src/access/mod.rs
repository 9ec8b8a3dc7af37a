//! Who decides whether a change may be made: GitLab, where there is one (wire reference, section i), and otherwise nobody.
//!
//! A change is asked about three times, on the primary only: [`Access::check`] before anything of it can be seen,
//! [`Access::announce`] when the repository's own hooks have agreed, and [`Access::report`] when it has been made. While it is
//! asked, GitLab looks at the new objects where they are kept until then, so the question says where that is.
//!
//! GitLab that cannot be reached allows nothing.
//!
//! * [`gitlab`]: what is asked and answered.
//! * [`http`]: how; [`token`] and [`trust`] say who is who.
//! * [`messages`]: what the pushing user sees of the answer.

mod gitlab;
mod http;
mod messages;
mod token;
mod trust;

use std::path::{Component, Path, PathBuf};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tabularium_proto::gitaly::{AccessCheckError, Repository, User};
use tonic::{Status, metadata::MetadataMap};

use crate::{config::GitlabConfig, metrics::Metrics, storage::RepositoryPath};
use gitlab::Gitlab;
use http::Caller;
pub(crate) use http::{Body as LfsObject, GitlabError};

/// Who is asked.
pub(crate) enum Access {
    /// Nobody: whoever may call the node may do everything.
    Nobody,
    /// GitLab's Rails.
    Gitlab(Box<Gitlab>),
}

/// How a change comes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// `git push` over HTTP.
    Http,
    /// `git push` over SSH.
    Ssh,
    /// A user at GitLab's web interface, or its API.
    #[default]
    Web,
}

impl Protocol {
    /// As GitLab and custom hooks know it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Ssh => "ssh",
            Self::Web => "web",
        }
    }
}

/// Whoever asked for a change, as GitLab and custom hooks are told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Requester {
    /// `user-1`, `key-1` or `username-jane`.
    pub(crate) gl_id: String,
    pub(crate) gl_username: String,
    /// The repository's name at GitLab: `project-1`.
    pub(crate) gl_repository: String,
    pub(crate) gl_project_path: String,
    pub(crate) protocol: Protocol,
    /// What GitLab's clients pass on for GitLab, in base64.
    pub(crate) client_context: String,
    pub(crate) caller: Caller,
}

impl Requester {
    /// Of a request that a user of the web interface caused.
    pub(crate) fn web(repository: &Repository, user: &User) -> Self {
        Self {
            gl_id: user.gl_id.clone(),
            gl_username: user.gl_username.clone(),
            gl_repository: repository.gl_repository.clone(),
            gl_project_path: repository.gl_project_path.clone(),
            protocol: Protocol::Web,
            ..Self::default()
        }
    }

    /// With what the request's metadata says of where it comes from.
    pub(crate) fn sent_with(mut self, metadata: &MetadataMap) -> Self {
        let header = |key: &str| {
            let value = metadata.get(key)?.as_encoded_bytes();
            ::http::HeaderValue::from_bytes(value).ok()
        };
        self.caller =
            Caller { remote_ip: header("remote_ip"), correlation_id: header("x-gitlab-correlation-id") };
        let context = metadata.get_bin("gitaly-client-context-bin").and_then(|value| value.to_bytes().ok());
        self.client_context = context.map(|bytes| STANDARD.encode(bytes)).unwrap_or_default();
        self
    }
}

/// Where the new objects of a change are, and those it builds on. Relative to the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ObjectDirectories {
    pub(crate) directory: String,
    pub(crate) alternates: Vec<String>,
}

impl ObjectDirectories {
    /// From absolute paths. `repository` is without symbolic links, or git has another idea of where it is.
    pub(crate) fn relative_to(repository: &Path, directory: &Path, alternates: &[PathBuf]) -> Self {
        let relative = |path: &Path| relative(repository, path).to_string_lossy().into_owned();
        Self {
            directory: relative(directory),
            alternates: alternates.iter().map(|path| relative(path)).collect(),
        }
    }
}

/// The way from one absolute path to another.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let (from, to): (Vec<_>, Vec<_>) = (from.components().collect(), to.components().collect());
    let common = from.iter().zip(&to).take_while(|(one, other)| one == other).count();
    let up = from.iter().skip(common).map(|_| Component::ParentDir);
    let way: PathBuf = up.chain(to.into_iter().skip(common)).collect();
    if way.as_os_str().is_empty() { ".".into() } else { way }
}

/// A change that is asked about.
pub(crate) struct ChangeRequest<'a> {
    pub(crate) repository: &'a RepositoryPath,
    pub(crate) requester: &'a Requester,
    /// Lines of `<old> <new> <reference>`.
    pub(crate) changes: &'a [u8],
    /// Absent: all objects are in the repository.
    pub(crate) objects: Option<ObjectDirectories>,
    pub(crate) push_options: &'a [String],
}

/// A change was not allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("GitLab: {message}")]
pub(crate) struct Denied {
    message: String,
    protocol: Protocol,
    user_id: String,
    changes: Vec<u8>,
    /// GitLab was asked too often to say whether it is allowed.
    rate_limited: bool,
}

impl Denied {
    /// Whether it may be allowed when it is asked about later.
    pub(crate) fn is_rate_limited(&self) -> bool {
        self.rate_limited
    }

    /// For the status details.
    pub(crate) fn detail(&self) -> AccessCheckError {
        AccessCheckError {
            error_message: self.message.clone(),
            protocol: self.protocol.name().to_owned(),
            user_id: self.user_id.clone(),
            changes: self.changes.clone(),
        }
    }
}

/// Why a change was not even asked about, or could not be told of. The texts are Gitaly's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RequestError {
    /// There is nothing to ask about.
    #[error("hook got no reference updates")]
    NoChanges,
    /// GitLab would not know what it is asked about.
    #[error("repository not set")]
    NoRepository,
    /// GitLab would not know for whom it is asked.
    #[error("user ID not set")]
    NoUser,
    /// GitLab could not be told that the change comes.
    #[error("calling pre_receive endpoint: {0}")]
    PreReceive(String),
    /// GitLab does not count the change as one that is under way, or as over, and does not say why.
    #[error("")]
    NotCounted,
    /// GitLab could not be told that the change has been made.
    #[error("GitLab: {0}")]
    PostReceive(String),
    /// GitLab said something after the change that cannot be shown.
    #[error(transparent)]
    Message(#[from] messages::UnknownKind),
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        Self::internal(error.to_string())
    }
}

/// Why a change must not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CheckError {
    /// GitLab says no, or cannot be asked.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The question cannot be put.
    #[error(transparent)]
    Request(#[from] RequestError),
}

impl Access {
    /// As configured.
    pub(crate) fn new(config: Option<&GitlabConfig>, metrics: &Metrics) -> Result<Self, GitlabError> {
        match config {
            None => Ok(Self::Nobody),
            Some(config) => Ok(Self::Gitlab(Box::new(Gitlab::new(config, metrics.clone())?))),
        }
    }

    /// Whether anybody is asked at all.
    pub(crate) fn asks(&self) -> bool {
        matches!(self, Self::Gitlab(_))
    }

    /// Asks whether the change may be made.
    pub(crate) async fn check(&self, change: &ChangeRequest<'_>) -> Result<(), CheckError> {
        let Self::Gitlab(gitlab) = self else { return Ok(()) };
        change.require_names()?;
        Ok(gitlab.allowed(change).await?)
    }

    /// The file of Git LFS that has this id, if GitLab gives it for this repository.
    pub(crate) async fn lfs_object(&self, id: &str, gl_repository: &str) -> Option<LfsObject> {
        let Self::Gitlab(gitlab) = self else { return None };
        match gitlab.lfs_object(id, gl_repository).await {
            Ok(object) => object,
            Err(error) => {
                tracing::warn!(%error, id, gl_repository, "an LFS object is not to be had");
                None
            }
        }
    }

    /// Says that the change is about to be made. GitLab forgets it by itself when it hears nothing more for some minutes.
    pub(crate) async fn announce(&self, change: &ChangeRequest<'_>) -> Result<(), RequestError> {
        let Self::Gitlab(gitlab) = self else { return Ok(()) };
        if gitlab.pre_receive(change).await? { Ok(()) } else { Err(RequestError::NotCounted) }
    }

    /// Says that the change has been made. Answers what the user is to see, also when that is not all.
    pub(crate) async fn report(&self, change: &ChangeRequest<'_>) -> (String, Result<(), RequestError>) {
        let Self::Gitlab(gitlab) = self else { return (String::new(), Ok(())) };
        if let Err(error) = change.require_names() {
            return (String::new(), Err(error));
        }
        let received = match gitlab.post_receive(change).await {
            Ok(received) => received,
            Err(error) => return (String::new(), Err(error)),
        };
        let (text, unknown) = messages::lay_out(&received.messages.unwrap_or_default());
        let end = match unknown {
            Some(unknown) => Err(unknown.into()),
            None if received.reference_counter_decreased => Ok(()),
            None => Err(RequestError::NotCounted),
        };
        (text, end)
    }

    /// Tells the log whether GitLab can be reached. A node serves without it, so that both can start in any order.
    pub(crate) async fn introduce(&self) {
        let Self::Gitlab(gitlab) = self else { return };
        match gitlab.check().await {
            Ok(about) if about.redis => tracing::info!(
                version = about.gitlab_version,
                revision = about.gitlab_revision,
                api_version = about.api_version,
                "GitLab can be asked"
            ),
            Ok(_) => tracing::warn!("GitLab can be asked, but says that its Redis cannot"),
            Err(problem) => {
                tracing::error!(problem, "GitLab cannot be asked; until it can nothing may be pushed");
            }
        }
    }
}

impl ChangeRequest<'_> {
    fn require_names(&self) -> Result<(), RequestError> {
        if self.changes.is_empty() {
            return Err(RequestError::NoChanges);
        }
        if self.requester.gl_repository.is_empty() {
            return Err(RequestError::NoRepository);
        }
        if self.requester.gl_id.is_empty() {
            return Err(RequestError::NoUser);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_objects_begins_at_the_repository() {
        let repository = Path::new("/s/@cluster/repositories/6b/86/1");
        let own = ObjectDirectories::relative_to(
            repository,
            &repository.join("objects/tmp_objdir-incoming-x"),
            &[repository.join("objects"), "/s/+gitaly/tmp/quarantine-1".into()],
        );
        assert_eq!(own.directory, "objects/tmp_objdir-incoming-x");
        assert_eq!(own.alternates, ["objects", "../../../../../+gitaly/tmp/quarantine-1"]);
        assert_eq!(relative(repository, repository), Path::new("."));
    }

    #[test]
    fn metadata_says_where_a_request_comes_from() {
        let mut metadata = MetadataMap::new();
        metadata.insert("remote_ip", "10.0.0.1".parse().unwrap());
        metadata.insert_bin("gitaly-client-context-bin", tonic::metadata::MetadataValue::from_bytes(b"{}"));
        let requester = Requester::default().sent_with(&metadata);
        assert_eq!(requester.caller.remote_ip.unwrap(), "10.0.0.1");
        assert_eq!(requester.client_context, "e30=");
        let requester = Requester::default().sent_with(&MetadataMap::new());
        assert!(requester.caller.remote_ip.is_none() && requester.client_context.is_empty());
    }
}
