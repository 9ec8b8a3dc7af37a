//! The local copy of another site's repository, read and written through this site's router like any other, with one
//! difference: every write says which home site it comes from.

use std::time::Duration;

use secrecy::SecretString;
use tabularium_common::{
    auth::SendToken,
    duties::SyncMessage,
    grpc::{Address, MAX_MESSAGE_BYTES, channel},
    telemetry::CorrelationId,
};
use tabularium_proto::gitaly::{
    CreateRepositoryRequest, FetchRemoteRequest, FindDefaultBranchNameRequest, ListRefsRequest, ObjectFormat,
    Remote, RemoveRepositoryRequest, Repository, WriteRefRequest, ref_service_client::RefServiceClient,
    repository_service_client::RepositoryServiceClient,
};
use tonic::{Code, Request, Status, metadata::MetadataValue, transport::Channel};

use crate::{
    calls::{LOOKUP_DEADLINE, Signed, attempt, request, within},
    failure::Failure,
    home::{Advertisement, Home},
    refs::RefsDigest,
};

/// Metadata key by which the router knows that a write comes from the home site.
pub(crate) const SYNC_FROM_SITE: &str = "tabularium-sync-from-site";
/// How long creating, removing and setting HEAD may take.
const WRITE_DEADLINE: Duration = Duration::from_secs(120);
/// What a new mirror's HEAD points at when the home site does not say.
const DEFAULT_BRANCH: &str = "main";

/// Clients of the local router.
pub(crate) struct LocalRouter {
    channel: Channel,
    token: SendToken,
}

impl LocalRouter {
    pub(crate) fn new(address: &Address, token: Option<SecretString>) -> Self {
        Self { channel: channel(address), token: SendToken(token) }
    }

    /// The mirror that an event is about.
    pub(crate) fn mirror<'a>(
        &'a self,
        event: &'a SyncMessage,
        correlation_id: &'a CorrelationId,
    ) -> Mirror<'a> {
        Mirror { router: self, event, correlation_id }
    }
}

/// One mirror.
pub(crate) struct Mirror<'a> {
    router: &'a LocalRouter,
    event: &'a SyncMessage,
    correlation_id: &'a CorrelationId,
}

impl Mirror<'_> {
    fn repositories(&self) -> RepositoryServiceClient<Signed> {
        RepositoryServiceClient::with_interceptor(self.router.channel.clone(), self.router.token.clone())
    }

    fn refs(&self) -> RefServiceClient<Signed> {
        RefServiceClient::with_interceptor(self.router.channel.clone(), self.router.token.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    #[expect(
        clippy::unnecessary_wraps,
        reason = "the field of every request that it is put into is optional"
    )]
    fn repository(&self) -> Option<Repository> {
        Some(Repository {
            storage_name: self.event.virtual_storage.to_string(),
            relative_path: self.event.relative_path.to_string(),
            gl_project_path: self.event.relative_path.as_str().trim_end_matches(".git").to_owned(),
            ..Repository::default()
        })
    }

    fn write<T>(&self, body: T, deadline: Duration) -> Request<T> {
        let mut request = request(body, self.correlation_id, deadline);
        if let Ok(site) = MetadataValue::try_from(self.event.home_site.as_str()) {
            request.metadata_mut().insert(SYNC_FROM_SITE, site);
        }
        request
    }

    /// Makes the repository, unless somebody else just did.
    pub(crate) async fn create(&self, home: &Advertisement) -> Result<(), Failure> {
        let branch =
            home.head.as_deref().and_then(|head| head.strip_prefix("refs/heads/")).unwrap_or(DEFAULT_BRANCH);
        let format = if home.sha256 { ObjectFormat::Sha256 } else { ObjectFormat::Sha1 };
        let body = CreateRepositoryRequest {
            repository: self.repository(),
            default_branch: branch.as_bytes().to_vec(),
            object_format: format.into(),
        };
        let mut client = self.repositories();
        match within(WRITE_DEADLINE, client.create_repository(self.write(body, WRITE_DEADLINE))).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(Failure::of_call("creating the mirror", &status)),
        }
    }

    /// Fetches every ref of the home site, forced and pruned.
    pub(crate) async fn fetch(&self, home: &Home, deadline: Duration) -> Result<(), Failure> {
        let body = FetchRemoteRequest {
            repository: self.repository(),
            force: true,
            timeout: i32::try_from(deadline.as_secs().max(1)).unwrap_or(i32::MAX),
            remote_params: Some(Remote {
                url: home.repository_url(&self.event.relative_path),
                http_authorization_header: home.authorization().unwrap_or_default(),
                mirror_refmaps: vec!["all_refs".to_owned()],
                ..Remote::default()
            }),
            ..FetchRemoteRequest::default()
        };
        let mut client = self.repositories();
        let call = client.fetch_remote(self.write(body, deadline));
        attempt("fetching from the home site", deadline, call).await.map(drop)
    }

    /// All refs, as a digest.
    pub(crate) async fn refs_digest(&self) -> Result<RefsDigest, Failure> {
        let body = ListRefsRequest {
            repository: self.repository(),
            patterns: vec![b"refs/".to_vec()],
            ..ListRefsRequest::default()
        };
        let mut client = self.refs();
        let listing = async {
            let mut stream =
                client.list_refs(request(body, self.correlation_id, LOOKUP_DEADLINE)).await?.into_inner();
            let mut digest = RefsDigest::default();
            while let Some(message) = stream.message().await? {
                for reference in &message.references {
                    digest.add(&reference.name, reference.target.as_bytes());
                }
            }
            Ok(digest)
        };
        let late = || Status::deadline_exceeded("not listed in time");
        let listed = tokio::time::timeout(LOOKUP_DEADLINE, listing).await.unwrap_or_else(|_| Err(late()));
        listed.map_err(|status| Failure::of_call("listing the mirror's refs", &status))
    }

    /// Points HEAD at `head`, unless it does already.
    pub(crate) async fn point_head(&self, head: &str) -> Result<(), Failure> {
        let body = FindDefaultBranchNameRequest { repository: self.repository(), head_only: true };
        let mut client = self.refs();
        let call = client.find_default_branch_name(request(body, self.correlation_id, LOOKUP_DEADLINE));
        let now = attempt("reading the mirror's HEAD", LOOKUP_DEADLINE, call).await?;
        if now.name == head.as_bytes() {
            return Ok(());
        }
        let body = WriteRefRequest {
            repository: self.repository(),
            r#ref: b"HEAD".to_vec(),
            revision: head.as_bytes().to_vec(),
            ..WriteRefRequest::default()
        };
        let mut client = self.repositories();
        let call = client.write_ref(self.write(body, WRITE_DEADLINE));
        attempt("pointing the mirror's HEAD", WRITE_DEADLINE, call).await.map(drop)
    }

    /// Removes the repository; one that is gone already is done.
    pub(crate) async fn remove(&self) -> Result<(), Failure> {
        let body = RemoveRepositoryRequest { repository: self.repository() };
        let mut client = self.repositories();
        match within(WRITE_DEADLINE, client.remove_repository(self.write(body, WRITE_DEADLINE))).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(Failure::of_call("removing the mirror", &status)),
        }
    }
}
