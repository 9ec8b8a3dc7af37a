//! `tabularium.node.v1.UploadPackService`: `git upload-pack` as one stream, for the gateway (one request and answer) and
//! for other nodes (a whole conversation).

use std::sync::{Arc, Mutex, PoisonError};

use tabularium_proto::node::{
    UploadPackRequest, UploadPackResponse, upload_pack_response::Output,
    upload_pack_service_server::UploadPackService,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    git::{
        Exit,
        transport::{self, Choices, DeepenScan},
    },
    node::Node,
    services::streams::{self, ResponseStream},
};

pub(crate) struct UploadPackServer(Arc<Node>);

impl UploadPackServer {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

#[tonic::async_trait]
impl UploadPackService for UploadPackServer {
    async fn upload_pack(
        &self,
        request: Request<Streaming<UploadPackRequest>>,
    ) -> Result<Response<ResponseStream<UploadPackResponse>>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.unwrap_or_default();
        let repository = self.0.storages.open(first.repository.as_ref())?;
        let stateless = first.stateless_rpc;
        let choices = Choices {
            git_config_options: &first.git_config_options,
            git_protocol: &first.git_protocol,
            stateless,
            advertise: false,
        };
        let mut process = transport::upload_pack(&self.0.git, &repository, &choices)?.spawn(true).await?;
        let stdin = process.take_stdin().ok_or_else(|| Status::internal("no pipe to git"))?;

        let scan = Arc::new(Mutex::new(DeepenScan::default()));
        let scanned = Arc::clone(&scan);
        let look = move |data: &[u8]| {
            if stateless {
                scan.lock().unwrap_or_else(PoisonError::into_inner).feed(data);
            }
        };
        look(&first.data);
        let data = move |message: UploadPackRequest| {
            look(&message.data);
            message.data
        };
        let fed = streams::feed(messages, first.data, data, stdin);
        let pump = self.0.tasks.spawn("upload-pack input", fed).into();
        let ended = move |exit: Exit, stderr: Vec<u8>| {
            let shallow_round = scanned.lock().unwrap_or_else(PoisonError::into_inner).found();
            if !exit.success() && !shallow_round {
                let stderr = String::from_utf8_lossy(&stderr);
                return Err(Status::internal(format!("running upload-pack: {exit}, stderr: {stderr:?}")));
            }
            let said = (!stderr.is_empty())
                .then(|| UploadPackResponse { output: Some(Output::Stderr(stderr.into())) });
            Ok(said.into_iter().collect())
        };
        let wrap = |data| UploadPackResponse { output: Some(Output::Stdout(data)) };
        Ok(Response::new(streams::relay(Vec::new(), process, Some(pump), wrap, ended)))
    }
}
