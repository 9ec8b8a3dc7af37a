//! `gitaly.SmartHTTPService`: Git over HTTP for Workhorse and the gateway. What is fetched goes over a sidechannel; whoever
//! has none uses [`super::upload_pack`].

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::{TryStreamExt as _, stream};
use tabularium_common::{multiplex::sidechannel::OpenError, pktline};
use tabularium_proto::gitaly::{
    InfoRefsRequest, InfoRefsResponse, PostReceivePackRequest, PostReceivePackResponse,
    PostUploadPackWithSidechannelRequest, PostUploadPackWithSidechannelResponse,
    smart_http_service_server::SmartHttpService,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    access::Protocol,
    git::{Exit, GitCommand, transport, transport::Choices},
    hooks::{self, Session},
    node::Node,
    services::{
        push::{Begun, First},
        sidechannel::{self, Voice},
        streams::{self, Ending, ResponseStream},
    },
    votes::Voter,
};

pub(crate) struct SmartHttpServer(Arc<Node>);

impl SmartHttpServer {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

fn info_refs(data: Bytes) -> InfoRefsResponse {
    InfoRefsResponse { data }
}

async fn advertise(
    service: &'static str,
    command: GitCommand,
) -> Result<Response<ResponseStream<InfoRefsResponse>>, Status> {
    let mut header = BytesMut::new();
    pktline::encode(format!("# service=git-{service}\n").as_bytes(), &mut header)
        .map_err(|error| Status::internal(error.to_string()))?;
    header.extend_from_slice(pktline::FLUSH);
    let mut process = command.spawn(false).await?;
    // The first piece decides whether this is an advertisement or an error: a client must not see half of each.
    let Some(first) = process.read_chunk().await? else {
        let (exit, stderr) = process.finish().await?;
        return Err(Status::internal(format!(
            "git {service}: {exit}, stderr: {:?}",
            String::from_utf8_lossy(&stderr)
        )));
    };
    let leading = vec![info_refs(header.freeze()), info_refs(first)];
    let ended = move |exit: Exit, _: Vec<u8>| {
        if exit.success() { Ok(Vec::new()) } else { Err(Status::internal(format!("git {service}: {exit}"))) }
    };
    Ok(Response::new(streams::relay(leading, process, None, info_refs, ended)))
}

/// Clients try again when the connection is at its end.
fn not_opened(error: &OpenError) -> Status {
    let text = format!("open sidechannel: {error}");
    match error {
        OpenError::Stream(_) => Status::unavailable(text),
        _ => Status::internal(text),
    }
}

fn check_first(first: &PostReceivePackRequest) -> Result<(), Status> {
    if first.gl_id.is_empty() {
        return Err(Status::invalid_argument("empty GlId"));
    }
    if !first.data.is_empty() {
        return Err(Status::invalid_argument("non-empty Data"));
    }
    Ok(())
}

#[tonic::async_trait]
impl SmartHttpService for SmartHttpServer {
    async fn info_refs_upload_pack(
        &self,
        request: Request<InfoRefsRequest>,
    ) -> Result<Response<ResponseStream<InfoRefsResponse>>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        let command = transport::upload_pack(&self.0.git, &repository, &advertisement(&request))?;
        advertise("upload-pack", command).await
    }

    async fn info_refs_receive_pack(
        &self,
        request: Request<InfoRefsRequest>,
    ) -> Result<Response<ResponseStream<InfoRefsResponse>>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        let command = transport::receive_pack(&self.0.git, &repository, &advertisement(&request))?.reads();
        advertise("receive-pack", command).await
    }

    async fn post_upload_pack_with_sidechannel(
        &self,
        request: Request<PostUploadPackWithSidechannelRequest>,
    ) -> Result<Response<PostUploadPackWithSidechannelResponse>, Status> {
        let message = request.get_ref();
        let repository = self.0.storages.open(message.repository.as_ref())?;
        let choices = Choices {
            git_config_options: &message.git_config_options,
            git_protocol: &message.git_protocol,
            stateless: true,
            advertise: false,
        };
        let command = transport::upload_pack(&self.0.git, &repository, &choices)?;
        let side = sidechannel::open(&request).await.map_err(|error| not_opened(&error))?;
        let ended = sidechannel::run(command, &side, Voice::Plain, None).await?;
        // What git said of a failure is to arrive as well.
        side.finish();
        if !ended.exit.success() && !ended.negotiation.is_shallow() {
            let stderr = String::from_utf8_lossy(&ended.stderr);
            return Err(Status::internal(format!("running upload-pack: {}, stderr: {stderr:?}", ended.exit)));
        }
        Ok(Response::new(PostUploadPackWithSidechannelResponse {
            packfile_negotiation_statistics: Some(ended.negotiation.into_statistics()),
        }))
    }

    async fn post_receive_pack(
        &self,
        request: Request<Streaming<PostReceivePackRequest>>,
    ) -> Result<Response<ResponseStream<PostReceivePackResponse>>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        let (metadata, _, mut messages) = request.into_parts();
        let first = messages.message().await?.unwrap_or_default();
        check_first(&first)?;
        let push = First {
            repository: first.repository.as_ref(),
            gl_id: &first.gl_id,
            gl_username: &first.gl_username,
            gl_repository: &first.gl_repository,
            git_config_options: &first.git_config_options,
            git_protocol: &first.git_protocol,
            protocol: Protocol::Http,
        };
        let wrap = |data| PostReceivePackResponse { data };
        let data = messages.map_ok(|message| message.data);
        let (command, session, front, data) = match push.begin(&self.0, voter, &metadata, data).await? {
            Begun::Followed(answer) => {
                return Ok(Response::new(Box::pin(stream::once(answer).map_ok(wrap))));
            }
            Begun::Git { command, session, front, data } => (command, session, front, data),
        };
        let mut process = command.spawn(true).await?;
        let stdin = process.take_stdin().ok_or_else(|| Status::internal("no pipe to git"))?;
        let fed = streams::feed(data, front, |data| data, stdin);
        let pump = self.0.tasks.spawn("receive-pack input", fed).into();
        let ended = |exit: Exit, stderr: Vec<u8>| -> Ending<PostReceivePackResponse> {
            Box::pin(push_ended(session, exit, stderr))
        };
        Ok(Response::new(streams::relay_to_end(Vec::new(), process, Some(pump), wrap, ended)))
    }
}

/// What a push amounts to, once git has ended and the last vote is in.
async fn push_ended<T>(session: Option<Arc<Session>>, exit: Exit, stderr: Vec<u8>) -> Result<Vec<T>, Status> {
    if exit.success() {
        if let Some(session) = &session {
            session.last_word().await?;
        }
        return Ok(Vec::new());
    }
    tracing::info!(%exit, stderr = %String::from_utf8_lossy(&stderr), "receive-pack failed");
    // Git ends that way when a vote forbids it to move references.
    let otherwise = || Status::failed_precondition(format!("waiting for receive-pack: {exit}"));
    Err(hooks::failure(session.as_ref()).unwrap_or_else(otherwise))
}

fn advertisement(request: &InfoRefsRequest) -> Choices<'_> {
    Choices {
        git_config_options: &request.git_config_options,
        git_protocol: &request.git_protocol,
        stateless: true,
        advertise: true,
    }
}
