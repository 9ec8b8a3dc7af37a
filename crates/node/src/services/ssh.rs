//! `gitaly.SSHService`: Git over SSH for gitlab-shell, and for other nodes that fetch from this one.
//!
//! The client speaks first only after it has seen what is here, so git runs as it would at the other end of `ssh`: not in
//! rounds of requests and answers. Fetches come over a sidechannel today; the one that goes through messages is of the past.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use tabularium_proto::gitaly::{
    ExitStatus, SshReceivePackRequest, SshReceivePackResponse, SshUploadArchiveRequest,
    SshUploadArchiveResponse, SshUploadPackRequest, SshUploadPackResponse,
    SshUploadPackWithSidechannelRequest, SshUploadPackWithSidechannelResponse,
    ssh_service_server::SshService,
};
use tokio::time::{Instant, timeout_at};
use tonic::{Request, Response, Status, Streaming};

use super::{
    push::{Begun, First},
    sidechannel::{self, Voice},
    streams::{self, Ending, ResponseStream},
};
use crate::{
    access::Protocol,
    git::{Exit, GitCommand, negotiation::Negotiation, transport, transport::Choices},
    hooks::{self, Session},
    node::Node,
    votes::Voter,
};

/// How long a client may take to say what it wants to fetch. Whether it may was asked at the beginning; Gitaly's own.
const NEGOTIATION_PATIENCE: Duration = Duration::from_secs(600);
/// The same for an archive.
const ARCHIVE_PATIENCE: Duration = Duration::from_secs(60);
/// What git says when the other side has gone.
const HUNG_UP: &[u8] = b"fatal: the remote end hung up unexpectedly\n";

pub(crate) struct SshServer(Arc<Node>);

impl SshServer {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }

    /// Feeds the command with what the client says, and answers what it says.
    async fn converse<M, T>(
        &self,
        command: GitCommand,
        messages: M,
        wrap: fn(Bytes) -> Result<T, Status>,
        ended: impl FnOnce(Exit, Vec<u8>) -> Ending<Result<T, Status>> + Send + 'static,
    ) -> Result<Response<ResponseStream<T>>, Status>
    where
        M: Stream<Item = Result<Bytes, Status>> + Send + Unpin + 'static,
        T: Send + 'static,
    {
        let mut process = command.spawn(true).await?;
        let stdin = process.take_stdin().ok_or_else(|| Status::internal("no pipe to git"))?;
        let fed = streams::feed(messages, Bytes::new(), |data| data, stdin);
        let pump = self.0.tasks.spawn("ssh input", fed).into();
        let answer = streams::relay_to_end(Vec::new(), process, Some(pump), wrap, ended);
        // The last message may be an exit status, and a failure behind it.
        Ok(Response::new(Box::pin(answer.map(|item| item.and_then(|item| item)))))
    }
}

/// Passes on what the client says, and fails when it has not said what it wants in time.
fn decided_within(
    patience: Duration,
    messages: impl Stream<Item = Result<Bytes, Status>> + Send + Unpin + 'static,
    decided: fn(&Negotiation) -> bool,
) -> impl Stream<Item = Result<Bytes, Status>> + Send + Unpin + 'static {
    let until = Instant::now() + patience;
    let heard = (messages, Negotiation::default());
    Box::pin(stream::unfold(Some(heard), move |heard| async move {
        let (mut messages, mut negotiation) = heard?;
        let next = if decided(&negotiation) {
            messages.next().await
        } else {
            let Ok(next) = timeout_at(until, messages.next()).await else {
                let text = "waiting for negotiation: context canceled";
                return Some((Err(Status::deadline_exceeded(text)), None));
            };
            next
        };
        if let Some(Ok(data)) = &next {
            negotiation.hear(data);
        }
        next.map(|next| (next, Some((messages, negotiation))))
    }))
}

/// What a failed fetch or archive amounts to.
fn failed(what: &str, exit: Exit, stderr: &[u8]) -> Status {
    if stderr == HUNG_UP {
        return Status::cancelled(format!("{what}user canceled the request"));
    }
    let stderr = String::from_utf8_lossy(stderr);
    Status::internal(format!("{what}cmd wait: {exit}, stderr: {stderr:?}"))
}

fn exit_status(exit: Exit) -> ExitStatus {
    ExitStatus { value: exit.code.unwrap_or(-1) }
}

fn check_first_of_push(first: &SshReceivePackRequest) -> Result<(), Status> {
    if first.gl_id.is_empty() {
        return Err(Status::invalid_argument("empty GlId"));
    }
    if !first.stdin.is_empty() {
        return Err(Status::invalid_argument("non-empty data in first request"));
    }
    Ok(())
}

fn check_first(stdin: &[u8]) -> Result<(), Status> {
    if stdin.is_empty() { Ok(()) } else { Err(Status::invalid_argument("non-empty stdin in first request")) }
}

#[tonic::async_trait]
impl SshService for SshServer {
    async fn ssh_receive_pack(
        &self,
        request: Request<Streaming<SshReceivePackRequest>>,
    ) -> Result<Response<ResponseStream<SshReceivePackResponse>>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        let (metadata, _, mut messages) = request.into_parts();
        let first = messages.message().await?.unwrap_or_default();
        check_first_of_push(&first)?;
        let push = First {
            repository: first.repository.as_ref(),
            gl_id: &first.gl_id,
            gl_username: &first.gl_username,
            gl_repository: &first.gl_repository,
            git_config_options: &first.git_config_options,
            git_protocol: &first.git_protocol,
            protocol: Protocol::Ssh,
        };
        let wrap = |stdout| Ok(SshReceivePackResponse { stdout, ..Default::default() });
        let data = messages.map_ok(|message| message.stdin);
        let (command, session, front, data) = match push.begin(&self.0, voter, &metadata, data).await? {
            Begun::Followed(answer) => {
                let answer = stream::once(answer).map(move |answer| answer.and_then(wrap));
                return Ok(Response::new(Box::pin(answer)));
            }
            Begun::Git { command, session, front, data } => (command, session, front, data),
        };
        let data = stream::once(std::future::ready(Ok(front))).chain(data);
        let ended = |exit, stderr| -> Ending<_> { Box::pin(push_ended(session, exit, stderr)) };
        self.converse(command, data, wrap, ended).await
    }

    async fn ssh_upload_pack(
        &self,
        request: Request<Streaming<SshUploadPackRequest>>,
    ) -> Result<Response<ResponseStream<SshUploadPackResponse>>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.unwrap_or_default();
        let repository = self.0.storages.open(first.repository.as_ref())?;
        check_first(&first.stdin)?;
        let choices = conversation(&first.git_config_options, &first.git_protocol);
        let command = transport::upload_pack(&self.0.git, &repository, &choices)?;
        let data = messages.map_ok(|message| message.stdin);
        let data = decided_within(NEGOTIATION_PATIENCE, data, Negotiation::is_done);
        let wrap = |stdout| Ok(SshUploadPackResponse { stdout, ..Default::default() });
        let ended = |exit: Exit, stderr: Vec<u8>| -> Ending<_> {
            let failure = (!exit.success()).then(|| failed("running upload-pack: ", exit, &stderr));
            let mut last = Vec::new();
            if !stderr.is_empty() {
                last.push(Ok(SshUploadPackResponse { stderr: stderr.into(), ..Default::default() }));
            }
            if let Some(failure) = failure {
                last.push(Ok(SshUploadPackResponse {
                    exit_status: Some(exit_status(exit)),
                    ..Default::default()
                }));
                last.push(Err(failure));
            }
            Box::pin(std::future::ready(Ok(last)))
        };
        self.converse(command, data, wrap, ended).await
    }

    async fn ssh_upload_archive(
        &self,
        request: Request<Streaming<SshUploadArchiveRequest>>,
    ) -> Result<Response<ResponseStream<SshUploadArchiveResponse>>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.unwrap_or_default();
        let repository = self.0.storages.open(first.repository.as_ref())?;
        check_first(&first.stdin)?;
        let command = transport::upload_archive(&self.0.git, &repository);
        let data = messages.map_ok(|message| message.stdin);
        let data = decided_within(ARCHIVE_PATIENCE, data, Negotiation::has_flushed);
        let wrap = |stdout| Ok(SshUploadArchiveResponse { stdout, ..Default::default() });
        let ended = |exit: Exit, stderr: Vec<u8>| -> Ending<_> {
            let failure = (!exit.success()).then(|| failed("running upload-archive: ", exit, &stderr));
            let mut last = Vec::new();
            if !stderr.is_empty() {
                last.push(Ok(SshUploadArchiveResponse { stderr: stderr.into(), ..Default::default() }));
            }
            last.push(Ok(SshUploadArchiveResponse {
                exit_status: Some(exit_status(exit)),
                ..Default::default()
            }));
            last.extend(failure.map(Err));
            Box::pin(std::future::ready(Ok(last)))
        };
        self.converse(command, data, wrap, ended).await
    }

    async fn ssh_upload_pack_with_sidechannel(
        &self,
        request: Request<SshUploadPackWithSidechannelRequest>,
    ) -> Result<Response<SshUploadPackWithSidechannelResponse>, Status> {
        // Before anything is looked at, and so misspelt, as Gitaly has it.
        let side = sidechannel::open(&request).await;
        let side = side.map_err(|error| Status::internal(format!("opennig sidechannel: {error}")))?;
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        let choices = conversation(&request.git_config_options, &request.git_protocol);
        let command = transport::upload_pack(&self.0.git, &repository, &choices)?;
        let ended = sidechannel::run(command, &side, Voice::Banded, Some(NEGOTIATION_PATIENCE)).await?;
        // What git said of a failure is to arrive as well.
        side.finish();
        if !ended.exit.success() {
            return Err(failed("running upload-pack: ", ended.exit, &ended.stderr));
        }
        Ok(Response::new(SshUploadPackWithSidechannelResponse {
            packfile_negotiation_statistics: Some(ended.negotiation.into_statistics()),
        }))
    }
}

fn conversation<'a>(git_config_options: &'a [String], git_protocol: &'a str) -> Choices<'a> {
    Choices { git_config_options, git_protocol, stateless: false, advertise: false }
}

/// What a push amounts to, once git has ended and the last vote is in. A failure is told both ways.
async fn push_ended(
    session: Option<Arc<Session>>,
    exit: Exit,
    stderr: Vec<u8>,
) -> Result<Vec<Result<SshReceivePackResponse, Status>>, Status> {
    if exit.success() {
        if let Some(session) = &session {
            session.last_word().await?;
        }
        let said = (!stderr.is_empty())
            .then(|| Ok(SshReceivePackResponse { stderr: stderr.into(), ..Default::default() }));
        return Ok(said.into_iter().collect());
    }
    tracing::info!(%exit, stderr = %String::from_utf8_lossy(&stderr), "receive-pack failed");
    let otherwise = || {
        if stderr == HUNG_UP {
            Status::cancelled("user canceled the push")
        } else {
            Status::internal(format!("cmd wait: {exit}"))
        }
    };
    // Git ends that way when a vote forbids it to move references.
    let failure = hooks::failure(session.as_ref()).unwrap_or_else(otherwise);
    let mut last = Vec::new();
    if !stderr.is_empty() {
        last.push(Ok(SshReceivePackResponse { stderr: stderr.into(), ..Default::default() }));
    }
    last.push(Ok(SshReceivePackResponse { exit_status: Some(exit_status(exit)), ..Default::default() }));
    last.push(Err(failure));
    Ok(last)
}
